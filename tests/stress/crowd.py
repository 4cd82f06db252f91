"""The client processes of a soak: started, listened to, killed and started again."""

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


class Crowd:
    """Keeps :data:`CLIENTS` processes of ``clients.py`` at work until it is closed."""

    def __init__(self, folder: Path, runtime: Path, deeds: list[str], record: Record, rng: random.Random) -> None:
        self._words = ["--folder", str(folder), "--runtime", str(runtime)]
        self._deeds = deeds
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
        words = [*self._words, "--number", str(number), "--seed", seed, "--deeds", *self._deeds]
        child = subprocess.Popen([sys.executable, str(PROGRAM), *words], stdout=subprocess.PIPE, text=True)
        self._children[number] = child
        self._record.start_client(number)
        threading.Thread(target=self._listen, args=(number, child), daemon=True).start()

    def _listen(self, number: int, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # a killed client may leave half a line
                self._record.hear(number, json.loads(line))
        child.stdout.close()

    def kill(self, number: int) -> None:
        """Kill one client, and start another in its place."""
        self._children[number].kill()
        self._children[number].wait()
        self._start(number)

    def kill_one(self) -> None:
        self.kill(self._rng.randrange(CLIENTS))

    def check(self) -> None:
        """Start another client for each that ended by itself, or has said nothing for too long."""
        for number, child in list(self._children.items()):
            if child.poll() is not None and not self._is_closed:
                # Nobody killed it: an error that is not typed ended it, and went to standard error.
                self._record.break_promise(
                    "a client ended by itself", f"client {number}, with status {child.returncode}"
                )
                self._start(number)
        for number in self._record.hear_silence(time.monotonic()):
            self.kill(number)

    def close(self) -> None:
        self._is_closed = True
        for child in self._children.values():
            child.kill()
            child.wait()
