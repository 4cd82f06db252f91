"""Fuzz the daemon through its real socket, while another client asks for the status; then fuzz each parser."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import zmq
from findings import Findings
from hostile_bytes import hostile_messages
from leaks import mib
from parsers import PARSERS, fuzz_parser, run_with_coverage
from process_tree import memory_bytes
from target import Target

from xditd.client import Client, XditdError
from xditd.ipc.addresses import endpoint
from xditd.ipc.codec import reply_decoder

SLOWEST_S = 1.0
GROWTH_BYTES = 160 * 2**20
"""The worst message within the limits takes 90 MiB while it is decoded; messages queued in ZeroMQ are added to that."""
ANSWER_S = 10.0
IDLE_WORKER = [sys.executable, "-c", "import signal; signal.pause()"]
"""A worker group that never becomes ready, so that it uses no processor time."""


class StatusPoller:
    """Asks for the status continuously; ``slowest_s`` is its slowest answer."""

    def __init__(self, client: Client) -> None:
        self.slowest_s = 0.0
        self.answers = 0
        self.failures: list[str] = []
        self._client = client
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._is_over.is_set():
            began = time.monotonic()
            try:
                self._client.status(deadline_s=ANSWER_S)
            except XditdError as error:
                self.failures.append(str(error))
                return
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.answers += 1
            self._is_over.wait(0.01)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def fuzz(socket_bytes: int, parser_bytes: int, coverage_s: int, seed: int) -> Findings:
    """Send hostile bytes to a live daemon, and then to each parser in this process."""
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    (folder / "xditd.toml").write_text(f"[workers]\ncommand = {json.dumps(IDLE_WORKER)}\n")
    target = Target(folder, flags=["--config", str(folder / "xditd.toml")])
    try:
        target.wait_answer()
        figures, failures = fuzz_socket(target, socket_bytes, seed)
    finally:
        target.stop()
        shutil.rmtree(folder)
    failures += target.problems
    for name in PARSERS:
        print(f"fuzz: the {name}", file=sys.stderr, flush=True)
        figures[f"{name} alone: bytes, inputs"] = list(fuzz_parser(name, parser_bytes, seed))
        if coverage_s:
            status, inputs = run_with_coverage(name, coverage_s)
            figures[f"{name} under atheris: status, inputs"] = [status, inputs]
            failures += [f"{name} under atheris: status {status}"] if status else []
    return Findings(figures, failures, [])


def fuzz_socket(target: Target, total_bytes: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Send hostile bytes to a live daemon and read every answer; returns figures and failures."""
    pid = target.process.pid
    before = memory_bytes(pid)
    answers: Counter[str] = Counter()
    sent_bytes = 0
    with Client(target.runtime.path, name="status poller") as client, zmq.Context() as context:
        poller = StatusPoller(client)
        try:
            with context.socket(zmq.DEALER) as peer:
                peer.setsockopt(zmq.LINGER, 0)
                peer.connect(endpoint(target.runtime.client_socket))
                for message in hostile_messages(total_bytes, random.Random(seed)):
                    peer.send(message)
                    sent_bytes += len(message)
                    if not peer.poll(int(ANSWER_S * 1000)):
                        answers["none"] += 1
                        break
                    reply = reply_decoder.decode(peer.recv())
                    answers[getattr(reply, "code", type(reply).__name__)] += 1
                    if sum(answers.values()) % 1000 == 0:
                        print(f"fuzz: {sent_bytes / 1e6:.1f} million bytes", file=sys.stderr, flush=True)
        finally:
            poller.stop()
    is_alive = target.process.poll() is None
    figures: dict[str, Any] = {
        "bytes through the socket": sent_bytes,
        "messages": sum(answers.values()),
        "answers": dict(answers.most_common()),
        "daemon alive": is_alive,
        "another client's answers": poller.answers,
        "its slowest answer (ms)": round(poller.slowest_s * 1000),
        "its failures": poller.failures,
    }
    failures = [
        *([] if is_alive else [f"the daemon ended with status {target.process.returncode}"]),
        *(["a message was not answered"] if answers["none"] else []),
        *(["another client was not served"] if poller.failures else []),
        *([f"another client waited {poller.slowest_s:.1f} s"] if poller.slowest_s > SLOWEST_S else []),
    ]
    if is_alive:
        peak = memory_bytes(pid, "VmHWM")
        figures["daemon RSS (MiB; before, peak, after)"] = [mib(before), mib(peak), mib(memory_bytes(pid))]
        if peak - before > GROWTH_BYTES:
            failures.append(f"the daemon's memory grew by {mib(peak - before)} MiB, at most {mib(GROWTH_BYTES)}")
    return figures, failures
