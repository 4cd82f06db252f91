"""Fixtures: a real daemon in a temporary folder, fake workers, and a raw client that sends any message."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import zmq

from xditd import __version__
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.arguments import Argument, InIo
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.job_parts import Part, Sampling
from xditd.ipc.protocol import PROTOCOL_VERSION, Reply, Request
from xditd.ipc.replies import AnyEvent, AnyReply, Failed, Farewell, Lent, Status, Welcome
from xditd.ipc.requests import Call, Generate, GetStatus, Goodbye, Hello, Lend
from xditd.ipc.status import DaemonStatus, GroupState
from xditd.ipc.tensors import (
    ComponentKind,
    Fingerprint,
    HostShmBlock,
    IoTensor,
    Manifest,
    TensorSpec,
)

HERE = Path(__file__).resolve().parent
FAKE_WORKERS = HERE.parent / "fake_workers.py"
LENDING_CLIENT = HERE / "lending_client.py"
DEADLINE_S = 60.0
"""Deadline of every wait, for a busy machine; a wait ends as soon as its condition holds."""
R = TypeVar("R", bound=Reply)


class Memory:
    """A memfd of this process, described as a block."""

    def __init__(self, content: bytes = b"weights!" * 512) -> None:
        self.fd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.write(self.fd, content)
        self.block = HostShmBlock(
            fd=self.fd,
            inode=os.fstat(self.fd).st_ino,
            size_bytes=len(content),
            fingerprint=Fingerprint(length_bytes=0, digest=hashlib.blake2b(b"", digest_size=16).digest()),
        )

    def manifest(self, label: str = "tiny", generation: int = 0, kind: str = "transformer") -> Manifest:
        return Manifest(
            kind=ComponentKind(kind),
            label=label,
            blocks=(self.block,),
            tensors=(TensorSpec("weight", "float32", (4, 4), 0, 0),),
            generation=generation,
        )

    def generate(self, transformer_id: str, steps: int = 3, seed: int = 0, width: int = 64) -> Generate:
        tensor = IoTensor(offset_bytes=0, dtype="float32", shape=(1, 4))
        return Generate(
            request_id="",
            components={"transformer": transformer_id},
            io=self.block,
            conditioning={"prompt_embeds": InIo(offset_bytes=0, dtype="float32", shape=(1, 4))},
            sampling=Sampling(height=64, width=width, steps=steps, seed=seed),
            out_latents=tensor,
        )

    def call(self, component_id: str, *results: Argument, **more: Any) -> Call:
        """A call whose arguments the fake workers return as results."""
        parts = tuple(Part(arguments={"result": result}) for result in results)
        room = {"out_offset_bytes": 0, "out_size_bytes": self.block.size_bytes}
        return Call(request_id="", component_id=component_id, io=self.block, parts=parts, **room | more)

    def close(self) -> None:
        os.close(self.fd)


class RawClient:
    """A client of only a DEALER socket and the codec."""

    numbers = itertools.count(1)

    def __init__(self, runtime: RuntimeDir, *, says_hello: bool = True, receive_limit: int = 1000) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, receive_limit)
        self.socket.connect(endpoint(runtime.client_socket))
        self.events: list[Reply] = []
        self.ended: list[str] = []
        """Request ids in the order in which their replies came."""
        self.others: dict[str, list[AnyReply]] = {}
        if says_hello:
            self.ask(self.hello(), Welcome)

    @staticmethod
    def hello(protocol_version: int = PROTOCOL_VERSION) -> Hello:
        return Hello(request_id="", protocol_version=protocol_version, package_version=__version__, client_name="test")

    def send(self, request: Request) -> str:
        """Send with a new request id, which is returned."""
        request_id = f"r{next(self.numbers)}"
        fields = {name: getattr(request, name) for name in request.__struct_fields__}
        self.socket.send(encode(type(request)(**{**fields, "request_id": request_id})))
        return request_id

    def receive(self, deadline_s: float = DEADLINE_S) -> AnyReply:
        assert self.socket.poll(int(deadline_s * 1000)), f"no reply within {deadline_s} s"
        return reply_decoder.decode(self.socket.recv())

    def wait(self, request_id: str, deadline_s: float = DEADLINE_S) -> AnyReply:
        """Wait for the reply to one request; its events are kept, and so are replies to others."""
        end = time.monotonic() + deadline_s
        while True:
            for reply in self.others.pop(request_id, []):
                return reply
            reply = self.receive(end - time.monotonic())
            if isinstance(reply, AnyEvent):
                self.events.append(reply)
            else:
                self.keep(reply)

    def keep(self, reply: AnyReply) -> None:
        self.ended.append(reply.request_id)
        self.others.setdefault(reply.request_id, []).append(reply)

    def wait_event(self, request_id: str, kind: type[Reply]) -> Reply:
        while True:
            for event in self.events:
                if event.request_id == request_id and isinstance(event, kind):
                    return event
            reply = self.receive()
            assert reply.request_id != request_id or isinstance(reply, AnyEvent), reply
            if isinstance(reply, AnyEvent):
                self.events.append(reply)
            else:
                self.keep(reply)

    def ask(self, request: Request, kind: type[R], deadline_s: float = DEADLINE_S) -> R:
        reply = self.wait(self.send(request), deadline_s)
        assert isinstance(reply, kind), reply
        return reply

    def fail(self, request: Request) -> Failed:
        return self.ask(request, Failed)

    def status(self) -> DaemonStatus:
        return self.ask(GetStatus(request_id=""), Status).daemon

    def lend(self, manifest: Manifest) -> Lent:
        return self.ask(Lend(request_id="", manifest=manifest), Lent)

    def wait_status(self, condition: Callable[[DaemonStatus], bool]) -> DaemonStatus:
        end = time.monotonic() + DEADLINE_S
        while True:
            status = self.status()
            if condition(status):
                return status
            assert time.monotonic() < end, status
            time.sleep(0.005)  # asked without a pause, daemon and test take both cores from the workers that start

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class DaemonProcess:
    """``python -m xditd.daemon`` with fake workers."""

    def __init__(
        self,
        folder: Path,
        *,
        settings: dict[str, Any],
        worker_flags: list[str],
        flags: list[str],
        before: Sequence[str] = (),
    ) -> None:
        self.runtime = RuntimeDir(folder / "run")
        command = [sys.executable, str(FAKE_WORKERS), *worker_flags]
        table = {"command": command, **settings}
        lines = ["[workers]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        (folder / "xditd.toml").write_text("\n".join(lines))
        self.log_path = folder / "daemon.log"
        environ = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*before, sys.executable, "-m", "xditd.daemon", "--config", str(folder / "xditd.toml")),
                    *("--runtime-dir", str(self.runtime.path), *flags),
                ],
                stdout=log,
                stderr=log,
                env=environ,
            )
        self.clients: list[RawClient] = []

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def client(self, **options: Any) -> RawClient:
        client = RawClient(self.runtime, **options)
        self.clients.append(client)
        return client

    def ready_client(self) -> RawClient:
        """Connect once the workers are ready; raises at once if the group is given up."""
        client = self.client()
        status = client.wait_status(lambda status: status.group_state in {GroupState.READY, GroupState.GIVEN_UP})
        assert status.group_state is GroupState.READY, f"{status.group_detail}\n{self.log[-4000:]}"
        return client

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        return self.process.wait(deadline_s)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise


StartDaemon = Callable[..., DaemonProcess]


def make_folder() -> Path:
    # Not tmp_path: with a long test name, socket paths would be too long.
    return Path(tempfile.mkdtemp(prefix="xditd-"))


@pytest.fixture
def folder() -> Iterator[Path]:
    path = make_folder()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_daemon(folder: Path) -> Iterator[StartDaemon]:
    """Start daemons in one folder, or one in its ``home``, and stop them after the test."""
    started: list[DaemonProcess] = []

    def start(
        *flags: str,
        worker_flags: list[str] | None = None,
        before: Sequence[str] = (),
        home: Path = folder,
        **settings: Any,
    ) -> DaemonProcess:
        daemon = DaemonProcess(
            home, settings=settings, worker_flags=worker_flags or [], flags=list(flags), before=before
        )
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.close()


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[DaemonProcess]:
    """One daemon for all tests that do not change it or its workers."""
    path = make_folder()
    daemon = DaemonProcess(path, settings={}, worker_flags=[], flags=["--queue-limit", "3"])
    try:
        # Checked here: without workers, each of these tests would wait until its deadline.
        daemon.ready_client().close()
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(path)


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[RawClient]:
    """A client of the shared daemon, whose workers are ready and have nothing mapped before and after."""
    client = shared_daemon.ready_client()
    yield client
    client.ask(Goodbye(request_id=""), Farewell)
    # The workers may still be unmapping the loan of a killed client.
    watching = shared_daemon.client()
    status = watching.wait_status(
        lambda status: not status.components and not status.jobs and status.group_state is GroupState.READY
    )
    for each in (client, watching):  # some tests count the daemon's descriptors, also those of earlier tests
        each.close()
        shared_daemon.clients.remove(each)
    assert status.counters.group_starts == 1


@pytest.fixture
def memory() -> Iterator[Memory]:
    block = Memory()
    yield block
    block.close()


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module of the fake workers, with the names of its faults."""
    spec = importlib.util.spec_from_file_location("fake_workers", FAKE_WORKERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start_lender() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start a client process that lends; returns it and its component id."""
    started: list[subprocess.Popen[str]] = []

    def start(daemon: DaemonProcess, *flags: str) -> tuple[subprocess.Popen[str], str]:
        word = [sys.executable, str(LENDING_CLIENT), str(daemon.runtime.path), *flags]
        lender = subprocess.Popen(word, stdout=subprocess.PIPE, text=True)
        started.append(lender)
        assert lender.stdout is not None
        return lender, lender.stdout.readline().strip()

    yield start
    for lender in started:
        lender.kill()
        lender.wait()
        assert lender.stdout is not None
        lender.stdout.close()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Wait for a condition with a deadline."""

    def wait(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, f"condition not met within {deadline_s} s"
            time.sleep(0.01)

    return wait
