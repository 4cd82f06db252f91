"""Client processes of a soak test: start them, read their events, kill them, start them again."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from record import Record

CLIENTS = 4
PROGRAM = Path(__file__).with_name("clients.py")


class ClientProcesses:
    """Runs :data:`CLIENTS` processes of ``clients.py`` until it is closed."""

    def __init__(self, folder: Path, runtime: Path, actions: list[str], record: Record, rng: random.Random) -> None:
        self._arguments = ["--folder", str(folder), "--runtime", str(runtime)]
        self._actions = actions
        self._record = record
        self._rng = rng
        self._children: dict[int, subprocess.Popen[str]] = {}
        self._is_closed = False

    def start(self) -> None:
        for number in range(CLIENTS):
            self._start(number)

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children.values()]

    def _start(self, number: int) -> None:
        seed = str(self._rng.randrange(2**32))
        arguments = [*self._arguments, "--number", str(number), "--seed", seed, "--actions", *self._actions]
        child = subprocess.Popen([sys.executable, str(PROGRAM), *arguments], stdout=subprocess.PIPE, text=True)
        self._children[number] = child
        self._record.start_client(number)
        threading.Thread(target=self._listen, args=(number, child), daemon=True).start()

    def _listen(self, number: int, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # a killed client may write half a line
                self._record.add_event(number, json.loads(line))
        child.stdout.close()

    def kill(self, number: int) -> None:
        """Kill one client, and start another in its place."""
        self._children[number].kill()
        self._children[number].wait()
        self._start(number)

    def kill_one(self) -> None:
        self.kill(self._rng.randrange(CLIENTS))

    def check(self) -> None:
        """Replace each client that ended by itself, or that has reported nothing for too long."""
        for number, child in list(self._children.items()):
            if child.poll() is not None and not self._is_closed:
                # An unexpected exception ended it; its traceback is on standard error.
                self._record.add_broken("a client ended by itself", f"client {number}, with status {child.returncode}")
                self._start(number)
        for number in self._record.find_silent_clients(time.monotonic()):
            self.kill(number)

    def close(self) -> None:
        self._is_closed = True
        for child in self._children.values():
            child.kill()
            child.wait()
