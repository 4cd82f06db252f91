"""Programs beside tests, on the CPU, in processes forked from one that has imported xfuser."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest


class ProgramServer:
    """Runs ``program_server.py``, from the first program on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __call__(
        self, program: Path, *arguments: object, folders: Sequence[Path] = (), timeout_s: float = 240.0
    ) -> CompletedProcess[str]:
        """Run a program to its end, as :func:`subprocess.run` does; its ranks are killed if it takes too long."""
        command = [str(program), *map(str, arguments)]
        output = self._folder / "stdout", self._folder / "stderr"
        for path in output:
            path.write_bytes(b"")
        asked = {
            "command": command,
            "folders": [str(folder) for folder in folders],
            "stdout": str(output[0]),
            "stderr": str(output[1]),
        }
        status = self._ask(asked, timeout_s)
        return CompletedProcess(command, status, *(path.read_text() for path in output))

    def _ask(self, asked: dict[str, object], timeout_s: float) -> int:
        if self._process is None:
            server = Path(__file__).with_name("program_server.py")
            self._process = subprocess.Popen(
                [sys.executable, str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        pid = int(self._process.stdout.readline())
        too_late = threading.Timer(timeout_s, _kill, [pid])
        too_late.start()
        try:
            return int(self._process.stdout.readline())
        except BaseException:  # a timeout of the test
            _kill(pid)
            self._process.stdout.readline()
            raise
        finally:
            too_late.cancel()

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # it ends with its input


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def load_program(program: Path) -> ModuleType:
    """Import a program by its path: programs of several families have the same name."""
    spec = importlib.util.spec_from_file_location(f"{program.parent.name}_{program.stem}", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fork_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramServer]:
    """Run programs that import xfuser or run ranks on the CPU."""
    server = ProgramServer(tmp_path_factory.mktemp("programs"))
    yield server
    server.close()
