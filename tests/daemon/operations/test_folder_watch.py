"""What the daemon does about a harmed folder: mend it at the next look, or give up after several."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from xditd.daemon.operations import folder_watch
from xditd.daemon.operations.event_loop import Loop
from xditd.daemon.operations.folder_watch import MOST_FAILURES, FolderWatch
from xditd.daemon.operations.runtime_folder import RuntimeFolder
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import XditdError


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setattr(folder_watch, "LOOK_EVERY_S", 0.001)
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RuntimeFolder]:
    with RuntimeFolder(RuntimeDir(tmp_path / "run")) as held:
        yield held


def test_a_folder_that_cannot_be_mended_is_given_up_once(loop: Loop, folder: RuntimeFolder) -> None:
    given_up: list[XditdError] = []
    watch = FolderWatch(loop, folder, given_up.append)
    path = folder.runtime.path
    shutil.rmtree(path)
    path.touch()
    for _ in range(MOST_FAILURES - 1):
        watch.look()
    assert not given_up
    path.unlink()
    watch.look()  # mended: the count begins anew
    assert folder.runtime.lock.exists()
    shutil.rmtree(path)
    path.touch()
    for _ in range(MOST_FAILURES):
        watch.look()
    assert [error.code for error in given_up] == ["bad_request"]


def test_it_looks_again_and_again_and_says_what_it_did(
    loop: Loop, folder: RuntimeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    FolderWatch(loop, folder, lambda error: pytest.fail(error.detail)).begin()
    for _ in range(2):
        folder.runtime.lock.unlink()
        loop.call_later(10.0, loop.stop)  # the deadline
        loop.run(lambda: loop.stop() if folder.runtime.lock.exists() else None)
        assert folder.runtime.lock.exists()
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["runtime folder was harmed by another program; made again: daemon.lock"] * 2
