"""A fake daemon with the real socket and codec, and replies that the test sets; without workers."""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sample_facts
import zmq

from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import encode, request_decoder
from xditd.ipc.processes import identify
from xditd.ipc.protocol import PROTOCOL_VERSION, Request
from xditd.ipc.replies import AnyReply, Farewell, Lent, MemoryChecked, Returned, Status, Welcome
from xditd.ipc.requests import CheckMemory, GetStatus, Goodbye, Hello, Lend, ReturnLoan
from xditd.ipc.status import ComponentStatus, Counters, DaemonStatus, GroupState, LeaseState
from xditd.ipc.tensors import CopiedBytes, HostShmBlock, IoTensor, Tier

if TYPE_CHECKING:
    from lent_values import State

    from xditd.client.lending import Offer

Answer = Callable[[Request], list[AnyReply]]


class ScriptedDaemon:
    """Answers each type of request by a function that the test sets, and records every request."""

    def __init__(self, folder: Path) -> None:
        self.runtime = RuntimeDir(folder)
        self.seen: list[Request] = []
        self.answers: dict[type[Request], Answer] = {
            Hello: self._welcome,
            Goodbye: lambda request: [Farewell(request_id=request.request_id)],
            CheckMemory: self._check_memory,
            Lend: self._lent,
            GetStatus: self._status,
            ReturnLoan: lambda request: [Returned(request_id=request.request_id)],
        }
        self.facts = {"c1": sample_facts.TRANSFORMER, "c2": sample_facts.VAE, "c3": sample_facts.TEXT_ENCODER}
        """Facts of the components in the status, by id."""
        self._lends = 0
        self._arrived = threading.Condition()
        self._unsolicited: queue.SimpleQueue[AnyReply | bytes] = queue.SimpleQueue()
        self._is_stopping = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(endpoint(self.runtime.client_socket))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def send(self, reply: AnyReply | bytes) -> None:
        """Send a reply, or plain bytes, to the client that sent the last request."""
        self._unsolicited.put(reply)

    def wait_for(self, kind: type[Request], count: int = 1, deadline_s: float = 30.0) -> Request:
        """Wait until ``count`` requests of a type have arrived; returns the last of them."""
        with self._arrived:
            found = self._arrived.wait_for(lambda: len(self.requests(kind)) >= count, deadline_s)
        assert found, f"{len(self.requests(kind))} {kind.__name__} requests, {count} expected; seen: {self.seen}"
        return self.requests(kind)[count - 1]

    def requests(self, kind: type[Request]) -> list[Request]:
        return [request for request in self.seen if isinstance(request, kind)]

    def open_io(self, io: HostShmBlock, spec: IoTensor):
        """Map a tensor of a client's block as a worker does; the caller drops the view, then closes the mapping."""
        from xditd.ipc.transports.host_shm import map_shm
        from xditd.ipc.transports.tensor_views import torch_dtype

        mapping = map_shm(io, identify(os.getpid()), is_writable=True)
        flat = mapping.bytes_tensor().narrow(0, spec.offset_bytes, spec.size_bytes)
        return flat.view(torch_dtype(spec.dtype)).view(spec.shape)

    def close(self) -> None:
        self._is_stopping = True
        self._thread.join(timeout=5)
        self._socket.close(linger=0)
        self._context.term()

    def _serve(self) -> None:
        routing_id = b""
        while not self._is_stopping:
            while not self._unsolicited.empty():
                item = self._unsolicited.get()
                self._socket.send_multipart((routing_id, item if isinstance(item, bytes) else encode(item)))
            if not self._socket.poll(10):
                continue
            routing_id, payload = self._socket.recv_multipart()
            request = request_decoder.decode(payload)
            replies = self.answers[type(request)](request) if type(request) in self.answers else []
            # Recorded after the answer, so that a test that waits for a request also sees the answer's effects.
            with self._arrived:
                self.seen.append(request)
                self._arrived.notify_all()
            for reply in replies:
                self._socket.send_multipart((routing_id, encode(reply)))

    def _welcome(self, request: Request) -> list[AnyReply]:
        return [
            Welcome(
                request_id=request.request_id,
                protocol_version=PROTOCOL_VERSION,
                package_version="0",
                daemon_pid=os.getpid(),
                world_size=2,
            )
        ]

    def _status(self, request: Request) -> list[AnyReply]:
        components = tuple(
            ComponentStatus(
                component_id=component_id,
                label=component_id,
                kind=facts.kind,
                facts=facts,
                state=LeaseState.LENT,
                tiers=(Tier.HOST_SHM,),
                lent_bytes=64,
                copied=CopiedBytes(),
                generation=0,
                owner_pid=os.getpid(),
                lend_ms={},
            )
            for component_id, facts in self.facts.items()
        )
        return [Status(request_id=request.request_id, daemon=status_of(components))]

    def _check_memory(self, request: Request) -> list[AnyReply]:
        from xditd.ipc.transports.fingerprints import digest_bytes

        assert isinstance(request, CheckMemory)
        spec = IoTensor(offset_bytes=request.offset_bytes, dtype="uint8", shape=(request.length_bytes,))
        digest = digest_bytes(self.open_io(request.io, spec).numpy().tobytes())
        return [MemoryChecked(request_id=request.request_id, digests=(digest, digest))]

    def _lent(self, request: Request) -> list[AnyReply]:
        assert isinstance(request, Lend)
        self._lends += 1
        component_id = f"c{self._lends}"
        self.facts[component_id] = sample_facts.of(request.manifest)
        return [self.lent(request, component_id=component_id)]

    def lent(self, request: Lend, component_id: str, is_reused: bool = False) -> Lent:
        return Lent(
            request_id=request.request_id,
            component_id=component_id,
            facts=sample_facts.of(request.manifest),
            tiers=request.manifest.tiers,
            lent_bytes=request.manifest.tensor_bytes,
            copied=request.copied,
            is_reused=is_reused,
            is_model_reused=False,
            timings_ms={"prepare": 1.0},
        )


def status_of(components: tuple[ComponentStatus, ...]) -> DaemonStatus:
    """The status of a daemon whose workers are ready."""
    return DaemonStatus(
        package_version="0",
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        uptime_s=1.0,
        runtime_dir="",
        group_state=GroupState.READY,
        group_detail="",
        device_kind="cpu",
        world_size=2,
        parallel={},
        layout=None,
        attention_backend="",
        precision="bf16",
        fused_checks=(),
        workers=(),
        components=components,
        jobs=(),
        queue_limit=64,
        clients=1,
        counters=Counters(),
        last_job_ms={},
        lent_bytes={},
        last_errors=(),
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="xd") as path:
        yield Path(path)


@pytest.fixture
def daemon(folder: Path) -> Iterator[ScriptedDaemon]:
    scripted = ScriptedDaemon(folder)
    yield scripted
    scripted.close()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for a condition, at most half a minute."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30.0
        while not condition():
            assert time.monotonic() < end, "the condition did not come true within 30 s"
            time.sleep(0.005)

    return wait


@pytest.fixture
def state() -> State:
    """A state dict to lend: tensors of several dtypes, of which two have whole pages of their own."""
    from lent_values import decoder_state

    return decoder_state()


@pytest.fixture
def path(state: State, tmp_path: Path) -> Path:
    """A safetensors file of ``state``."""
    from safetensors.torch import save_file

    file = tmp_path / "vae.safetensors"
    save_file(state, file)
    return file


@pytest.fixture
def offers() -> Iterator[list[Offer]]:
    """Offers that are closed when the test ends."""
    made: list[Offer] = []
    yield made
    for offer in made:
        offer.close()


@pytest.fixture
def open_memfds() -> Callable[[], int]:
    """Count the shared memory segments of this library that this process holds open and did not before the test."""

    def inodes() -> set[int]:
        found = set()  # mmap duplicates the descriptor of a segment
        for name in os.listdir("/proc/self/fd"):
            path = f"/proc/self/fd/{name}"
            with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
                if os.readlink(path).startswith("/memfd:xditd"):
                    found.add(os.stat(path).st_ino)
        return found

    earlier = inodes()  # of other tests, whose threads or garbage may end while this one runs
    return lambda: len(inodes() - earlier)
