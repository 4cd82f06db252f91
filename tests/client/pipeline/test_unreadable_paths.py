"""Folders that this user may not read or search are refused by name, with an error of this project."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xditd.client.pipeline.files import find_source
from xditd.ipc.errors import RequestError

NOBODY = 65_534


@pytest.fixture
def closed() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:  # those of pytest are closed to other users as a whole
        Path(made).chmod(0o755)
        folder = Path(made, "closed")
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "x.safetensors").write_text("x")
        folder.chmod(0)
        yield folder
        folder.chmod(0o700)


def said_to_another_user(function: Callable[[], object]) -> str:
    """Run a function in a fork that is not root, to whom every folder is open; return what it was refused with."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "no error of this project"
        try:
            if os.geteuid() == 0:
                os.setuid(NOBODY)
            function()
        except RequestError as error:
            said = error.detail
        finally:
            os.write(writable, said.encode())
            os._exit(0)
    os.close(writable)
    os.waitpid(pid, 0)
    with open(readable) as file:
        return file.read()


def test_paths_in_a_folder_that_may_not_be_read(closed: Path) -> None:
    none: dict[str, Any] = {
        "parts": {},
        "text_encoders": (),
        "tokenizers": None,
        "scheduler": None,
        "variant": None,
        "name": None,
    }
    for more, says in (
        ({"parts": {"transformer": closed}, "tokenizers": closed}, "tokenizers: .*: Permission denied"),
        ({"parts": {"transformer": closed}, "tokenizers": closed / "inner"}, "tokenizers: .*inner: no folder"),
        ({"parts": {"transformer": closed}, "scheduler": closed / "inner"}, "inner: Permission denied"),
        ({"source": closed / "inner" / "x.safetensors"}, "x.safetensors: Permission denied"),
    ):
        said = said_to_another_user(lambda more=more: find_source(**{"source": None, **none, **more}))
        assert re.search(says, said), said
