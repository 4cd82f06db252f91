"""Run jobs: take a block, send the request, wait for the reply, read the outputs."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from xditd.client.io_blocks import IoBlock, IoPool
from xditd.client.jobs.arguments import KeptTensor, read_results
from xditd.client.jobs.component import Component
from xditd.client.jobs.controls import CallControl
from xditd.client.jobs.device_use import DeviceUse, Key, Room
from xditd.client.jobs.generation import GenerationJob
from xditd.client.jobs.job_requests import CallRequest, GenerationRequest, JobRequest, call_request
from xditd.client.jobs.pending import PendingJob
from xditd.client.jobs.start_images import steps_to_run
from xditd.client.mailboxes import Timeouts
from xditd.client.results import GenerationResult
from xditd.client.session import Session
from xditd.client.waiting import check_deadline
from xditd.ipc.arguments import InIo
from xditd.ipc.errors import (
    BadRequest,
    ForeignGpu,
    Internal,
    LeaseLost,
    StaleSource,
    UnknownKept,
    WorkersLost,
    XditdError,
)
from xditd.ipc.job_parts import Numerics
from xditd.ipc.processes import is_alive
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Called, Generated, PromptEncoded, TensorsRead
from xditd.ipc.requests import Call, InferenceRequest
from xditd.ipc.tensors import HostShmBlock

if TYPE_CHECKING:
    import torch

    from xditd.client.jobs.held_tensors import HeldStore
    from xditd.client.metadata.record import Record
    from xditd.ipc.processes import ProcessIdentity

logger = logging.getLogger(__name__)

Read = Callable[["InIo", "torch.device"], "torch.Tensor"]


def _log_cut(encoded: PromptEncoded) -> None:
    for each in encoded.cut:
        kind = "negative prompt" if each.is_negative else "prompt"
        logger.warning(
            "%s %d: %s reads the first %d of %d tokens", kind, each.number, each.role, each.read, each.tokens
        )


def _read_trees(called: Called, job: CallRequest, read: Read) -> list[Any]:
    return [read_results(tree, device, read) for tree, device in zip(called.results, job.devices, strict=True)]


class Runner:
    """Runs jobs in the session that ``current`` returns; ``silence_s`` is the longest wait for an event or reply."""

    def __init__(self, pool: IoPool, current: Callable[[], Session], silence_s: float) -> None:
        self._pool = pool
        self._current = current
        self._silence_s = silence_s
        self._device_use = DeviceUse()
        self._lock = threading.Lock()
        self._stores: weakref.WeakKeyDictionary[Session, HeldStore] = weakref.WeakKeyDictionary()

    def start(self, job: JobRequest, block: IoBlock, deadline_s: float | None) -> PendingJob:
        """Send a job whose inputs are in ``block``, without waiting. The job gives the block back to the pool."""
        try:
            check_deadline(deadline_s)
            connection = self._current().connection
            request = _with_device_io(job.write(connection.next_request_id(), block.describe()), block)
        except BaseException:
            self._pool.give_back(block)
            raise
        timeouts = Timeouts(self._silence_s, deadline_s)
        purpose = f"{type(request).__name__.lower()} {request.request_id}"
        return PendingJob(connection, self._pool, request, block, timeouts, purpose)

    def run(self, job: JobRequest, reply_type: type[Reply], deadline_s: float | None) -> dict[str, torch.Tensor]:
        """Run a job, wait for it, and read its outputs by name."""
        block = job.fill(self._pool)
        with self.start(job, block, deadline_s) as pending:
            pending.wait(reply_type)
            return {name: block.read(place, job.device) for name, place in job.outputs.items()}

    def encode_prompt(self, make_request: Callable[..., JobRequest], deadline_s: float | None) -> Any:
        """Encode prompts, and read the results as tensors by name. ``make_request`` takes ``room_bytes``."""
        job = make_request()
        block = job.fill(self._pool)
        with self.start(job, block, deadline_s) as pending:
            encoded = pending.wait(PromptEncoded)
            _log_cut(encoded)
            read = partial(read_results, encoded.results, job.device)
            if encoded.block is None:
                return read(block.read_result)
            if encoded.provider is None:
                raise Internal("the results of a prompt are in a block of a worker, but no worker is named")
            try:
                return _read_from(encoded.block, encoded.provider, block, read)
            except StaleSource:
                room_bytes = encoded.block.size_bytes
        # As in calls: those of other threads have replaced the workers' block.
        return self.encode_prompt(partial(make_request, room_bytes=room_bytes), deadline_s)

    def generate(
        self, job: GenerationRequest, deadline_s: float | None, owner: object, record: Record | None = None
    ) -> GenerationJob:
        """Start a generation, without waiting. ``owner`` is kept alive until it ended. The result has ``record``."""
        block = job.fill(self._pool)

        def read(name: str) -> torch.Tensor | None:
            return block.read(job.outputs[name], job.device) if name in job.outputs else None

        def read_outputs(generated: Generated) -> GenerationResult:
            return GenerationResult(
                latents=block.read(job.outputs["latents"], job.device),
                image=read("image"),
                timings_ms=dict(generated.timings_ms),
                seed=job.sampling.seed,
                reused_steps=generated.reused_steps,
                record=record,
                image_dtype=job.image_dtype,
            )

        def read_denoised() -> torch.Tensor:
            denoised = read("denoised")
            if denoised is None:
                raise BadRequest("denoised: the job was started without previews=True")
            return denoised

        def read_preview() -> torch.Tensor:
            preview = read("preview")
            if preview is None:
                raise BadRequest("preview: the job was started without previews='image'")
            return preview

        pending = self.start(job, block, deadline_s)
        total_steps = steps_to_run(job.sampling.steps, job.sampling.strength)
        return GenerationJob(pending, read_outputs, read_denoised, read_preview, total_steps, owner)

    def call(
        self,
        component: Component,
        parts: Sequence[Mapping[str, Any]],
        foreseen: Mapping[str, Sequence[float] | torch.Tensor] | None,
        variant: str,
        deadline_s: float | None,
        controls: Sequence[Sequence[tuple[str, CallControl]]] = (),
    ) -> list[Any]:
        """Run a call of a family's transformer. ``controls`` are the ControlNets of each part, with their ids."""
        request = partial(call_request, component, parts, foreseen, variant, controls)
        return self._call(self._current(), (component.component_id, "forward"), request, deadline_s)

    def call_class(
        self,
        component: Component,
        parts: Sequence[Mapping[str, Any]],
        *,
        method: str,
        numerics: Numerics | None,
        device: torch.device | None,
        deadline_s: float | None,
        while_running: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Run a method of a module that runs as its class. Objects among the arguments have their new state at the end.

        ``while_running`` is called when the request is sent. If it raises, the job is cancelled, and no object changes.
        """
        from xditd.client.jobs.class_calls import class_call_request

        session = self._current()
        request = partial(class_call_request, component, parts, method, numerics, device)
        read = partial(self._read_class_results, self._held_store(session), parts)
        key = component.component_id, method
        return self._call(session, key, request, deadline_s, read=read, while_running=while_running)

    def read_tensor(self, component_id: str, name: str, like: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of a component from the workers, with the dtype, shape and device of ``like``."""
        from xditd.client.jobs.class_calls import read_tensor_request

        return self.run(read_tensor_request(name, like, component_id), TensorsRead, None)["value"]

    def _read_class_results(
        self, store: HeldStore, parts: Sequence[Mapping[str, Any]], called: Called, job: CallRequest, read: Read
    ) -> list[Any]:
        from xditd.client.jobs.class_results import ClassResultReader

        readers = [ClassResultReader(read, device, store, parts) for device in job.devices]
        results = [reader.value(tree) for reader, tree in zip(readers, called.results, strict=True)]
        for reader, part, changed in zip(readers, parts, called.changed, strict=False):
            for name, node in changed.items():
                reader.update(node, part[name])
        return results

    def _held_store(self, session: Session) -> HeldStore:
        """Return the store of the tensors that the workers hold for a session."""
        from xditd.client.jobs.held_tensors import HeldStore, HeldTensor

        def read(tensor: HeldTensor) -> torch.Tensor:
            from xditd.client.jobs.class_calls import read_tensor_request

            if session.is_lost:
                raise LeaseLost(
                    f"{tensor!r}: its workers have ended; start the pipeline's call again, with a new cache"
                )
            return self.run(read_tensor_request(tensor.held.held_id, tensor), TensorsRead, None)["value"]

        def release(held_ids: tuple[str, ...]) -> None:
            from xditd.client.jobs.class_calls import release_request

            with contextlib.suppress(XditdError):  # if the session has ended, the daemon has freed them
                if not session.is_lost:
                    self.run(release_request(held_ids), TensorsRead, None)

        with self._lock:
            store = self._stores.get(session)
            if store is None:
                store = self._stores[session] = HeldStore(read, release)
                weakref.finalize(session, store.close).atexit = False
            return store

    def _call(
        self,
        session: Session,
        key: Key,
        request: Callable[[Callable[[KeptTensor], bool], Room], CallRequest],
        deadline_s: float | None,
        *,
        read: Callable[[Called, CallRequest, Read], list[Any]] = _read_trees,
        while_running: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Run a call. Kept tensors are sent by id, and sent again if the workers no longer have them."""
        run = partial(self._run_call, session, key, read=read, while_running=while_running)
        try:
            sent, results = run(partial(request, lambda kept: kept.is_kept_by(session)), deadline_s)
        except UnknownKept:
            # Dropped for newer kept tensors, or lost with workers that were killed.
            sent, results = run(partial(request, lambda _: False), deadline_s)
        for kept in sent:
            kept.note_kept_by(session)
        return results

    def _run_call(
        self,
        session: Session,
        key: Key,
        make_request: Callable[[Room], CallRequest],
        deadline_s: float | None,
        *,
        read: Callable[[Called, CallRequest, Read], list[Any]],
        while_running: Callable[[], None] | None,
    ) -> tuple[Sequence[KeptTensor], list[Any]]:
        """Run a call; returns the tensors that were kept, and the results.

        If the workers cannot map this process's device memory, it is run again through host memory.
        """
        room = self._device_use.room(session, key)
        job = make_request(room)
        block = job.fill_all(self._pool)
        if block is None:
            room = Room()
            job = make_request(room)
            block = job.fill(self._pool)
        uses_device = block.device is not None
        try:
            return self._run_filled(key, make_request, room, job, block, deadline_s, read, while_running)
        except (ForeignGpu, StaleSource) as error:
            if not uses_device:
                raise
            found = self._run_on_host(key, make_request, Room(), deadline_s, read)
            # Only now: a stale source can also be that of the weights, and then this call fails, too.
            self._device_use.refuse(session)
            logger.info("calls go through host memory daemon_pid=%d reason=%s", session.daemon_pid, error.detail)
            return found

    def _run_on_host(
        self,
        key: Key,
        make_request: Callable[[Room], CallRequest],
        room: Room,
        deadline_s: float | None,
        read: Callable[[Called, CallRequest, Read], list[Any]],
    ) -> tuple[Sequence[KeptTensor], list[Any]]:
        job = make_request(room)
        return self._run_filled(key, make_request, room, job, job.fill(self._pool), deadline_s, read, None)

    def _run_filled(
        self,
        key: Key,
        make_request: Callable[[Room], CallRequest],
        room: Room,
        job: CallRequest,
        block: IoBlock,
        deadline_s: float | None,
        read: Callable[[Called, CallRequest, Read], list[Any]],
        while_running: Callable[[], None] | None,
    ) -> tuple[Sequence[KeptTensor], list[Any]]:
        """Run a call whose inputs are in ``block``, and read its results."""
        with self.start(job, block, deadline_s) as pending:
            if while_running is not None:
                pending.wait_sent()
                while_running()
            called = pending.wait(Called)
            while block.dropped:  # the workers have unmapped them
                block.dropped.pop().close()
            if len(called.results) != len(job.devices):
                raise Internal(f"a call of {len(job.devices)} parts was answered with {len(called.results)} results")
            if room.is_on_device:
                self._device_use.note_results(key, called, job.device_room_bytes)
            try:
                return job.kept, self._read(called, job, block, read)
            except StaleSource:
                if room.host_bytes or called.block is None:
                    raise
        # The workers keep only a few blocks for this process's results, and calls of other threads have replaced this
        # one. Run again with enough room in the client's own block.
        return self._run_on_host(key, make_request, Room(called.block.size_bytes), deadline_s, read)

    def _read(
        self, called: Called, job: CallRequest, block: IoBlock, read: Callable[[Called, CallRequest, Read], list[Any]]
    ) -> list[Any]:
        """Read the results out of the client's blocks, and out of a worker's if the reply names one."""
        try:
            if called.block is None:
                return read(called, job, block.read_result)
            if called.provider is None:
                raise Internal("the results of a call are in a block of a worker, but no worker is named")
            found: list[Any] = _read_from(called.block, called.provider, block, partial(read, called, job))
            return found
        finally:
            if block.device is not None:
                block.device.wait()  # the next call may write to it


def _with_device_io(request: InferenceRequest, block: IoBlock) -> InferenceRequest:
    """Describe the block of device memory in a call, and those that its workers are to unmap."""
    if not isinstance(request, Call) or (block.device is None and not block.dropped):
        return request
    return replace(
        request,
        device_io=None if block.device is None else block.device.description,
        dropped_device_io=tuple(each.description.fingerprint.digest for each in block.dropped),
    )


def _read_from(block: HostShmBlock, provider: ProcessIdentity, own: IoBlock, read_all: Callable[[Read], Any]) -> Any:
    """Copy results out of a worker's block, and those in device memory out of ``own``.

    The worker keeps its block until a few later calls of this process have replaced it.

    Raises:
        StaleSource: the block was replaced.
        WorkersLost: the worker has exited since it answered.
    """
    from xditd.ipc.transports.host_shm import map_shm
    from xditd.ipc.transports.tensor_views import torch_dtype

    try:
        mapping = map_shm(block, provider)
    except XditdError as error:
        if is_alive(provider):
            raise
        raise WorkersLost(
            f"call: the worker (pid {provider.pid}) that held the results exited before they were read; "
            "the worker group is being rebuilt, and the same request may be sent again"
        ) from error
    try:

        def read(leaf: InIo, device: torch.device) -> torch.Tensor:
            if leaf.in_device_io:
                return own.read_result(leaf, device)
            place = leaf.place
            stored = mapping.bytes_tensor()[place.offset_bytes : place.offset_bytes + place.size_bytes]
            return stored.to(device, copy=True).view(torch_dtype(place.dtype)).view(place.shape)

        return read_all(read)
    finally:
        mapping.close()
