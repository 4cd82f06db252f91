"""The library's front door."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from xditd.client.connection import CONTROL_DEADLINE_S
from xditd.client.drafts import Draft, draft_decode, draft_denoise, draft_encode, draft_generate
from xditd.client.io_blocks import IoBlock, IoPool
from xditd.client.jobs import GenerationJob, PendingJob, draw_seed
from xditd.client.loans import Loan
from xditd.client.mailboxes import Patience
from xditd.client.results import GenerationResult
from xditd.client.session import Session
from xditd.ipc.addresses import RuntimeDir, default_runtime_dir
from xditd.ipc.errors import BadRequest, DaemonUnreachable
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Decoded, Denoised, Encoded, Generated, LogLines, Status, Stopping
from xditd.ipc.requests import GetLogs, GetStatus, Stop
from xditd.ipc.status import DaemonStatus
from xditd.ipc.tensors import ComponentKind, CopiedBytes

if TYPE_CHECKING:
    import torch

SILENCE_DEADLINE_S: Final = 300.0
"""Default for lends and jobs: the longest silence between two signs of progress. Starting workers, loading 22 GiB
from a cold disk and compiling on the first step all stay well below it."""


class Client:
    """A session with the daemon: lend components to its workers, and run jobs on them.

    ``runtime_dir`` is the daemon's folder (default ``$XDG_RUNTIME_DIR/xditd``). ``deadline_s`` bounds
    the silence between two signs of progress of a lend or a job; a total can be given to each call.
    Safe to use from several threads, not across ``fork``. When the daemon is gone, waiting calls raise
    :class:`DaemonUnreachable` within a second; the next call greets the new daemon, where loans have
    to be made again. Leaving a ``with`` block, or ``close()``, ends all loans.

    Raises:
        DaemonUnreachable: no daemon answered within 2 s.
        ProtocolMismatch: the daemon is of a version that speaks another protocol.
        NotPermitted: the daemon serves another user.
    """

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        name: str = "python",
        deadline_s: float = SILENCE_DEADLINE_S,
    ) -> None:
        self._runtime = default_runtime_dir() if runtime_dir is None else RuntimeDir(Path(runtime_dir).absolute())
        self._name = name
        self._silence_s = deadline_s
        self._pool = IoPool()
        self._lock = threading.Lock()
        self._is_closed = False
        self._session: Session | None = self._open()

    # --- Loans ---------------------------------------------------------------------------------

    def lend(
        self,
        source: Mapping[str, torch.Tensor] | str | os.PathLike[str] | torch.nn.Module,
        *,
        kind: ComponentKind | str | None = None,
        label: str | None = None,
        device: str | None = None,
        generation: int = 0,
        deadline_s: float | None = None,
    ) -> Loan:
        """Lend a component; returns once every worker has mapped, verified and plugged it.

        ``source`` is a state dict, a path to a safetensors file, or a module. ``kind`` is guessed from the
        tensor names where it is not given. ``device`` (``cuda``, ``cuda:1``) loads it into an arena there
        first. Nothing is copied where memory can be shared as it is; ``Loan.copied`` says what was. Lending the
        same memory again is a no-op that returns at once; after writing to it, raise ``generation``.

        Raises:
            BadCheckpoint: the file, or the set of tensors, is not sound; every fault is named.
            UnknownFamily, UnsupportedDtype, Unsupported: the workers cannot run it.
            StaleSource: the workers do not read what this process wrote.
            OutOfMemory: no room here or in a worker.
        """
        return self._current().lend(
            source,
            kind=None if kind is None else _read_kind(kind),
            label=label,
            device=device,
            generation=generation,
            deadline_s=deadline_s,
        )

    def return_(self, loan: Loan, *, deadline_s: float | None = None) -> None:
        """Take a component back; once this returns no worker maps it."""
        loan.return_(deadline_s=deadline_s)

    def adopt(self, component_id: str, *, deadline_s: float | None = None) -> CopiedBytes:
        """Make a component the workers' own, whichever process of yours has lent it; see ``Loan.adopt``."""
        return self._current().adopt(component_id, component_id, deadline_s)

    def revoke(self, component: Loan | str, *, deadline_s: float | None = None) -> None:
        """End a loan, or free an adopted component, whichever process of yours has lent it.

        Returns once no worker maps or holds it. Jobs that use it fail with ``LeaseLost``, and so does its owner's next.
        """
        component_id = component if isinstance(component, str) else component.component_id
        self._current().revoke(component_id, deadline_s)

    # --- Jobs ----------------------------------------------------------------------------------

    def generate(
        self,
        transformer: Loan | str,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        *,
        vae: Loan | str | None = None,
        height: int = 1024,
        width: int = 1024,
        steps: int = 28,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        guidance_scale: float = 3.5,
        seed: int | None = None,
        noise: torch.Tensor | None = None,
        deadline_s: float | None = None,
    ) -> GenerationJob:
        """Start a whole denoising loop in the workers, and hand back the job without waiting for it.

        ``prompt_embeds`` (batch, text tokens, context) and ``pooled_prompt_embeds`` (batch, pooled) may lie on
        any device. ``noise`` (batch, 16, height/8, width/8) is used as it is; else ``seed`` makes it, and
        without a seed one is drawn and handed back. ``sigmas`` replaces the family's own schedule:
        ``steps`` descending values in (0, 1]. A ``vae`` adds the image to the result. Components may be
        named by id, as ``xditd status`` shows them.

        Raises:
            BadRequest: a value that no job can use, by name and with the remedy.
            LeaseLost: a loan has ended.
        """
        if seed is not None and noise is not None:
            raise BadRequest("seed and noise: both are given, but each sets the noise; leave one out")
        if seed is None and noise is None:
            seed = draw_seed()
        draft = draft_generate(
            _component_id(transformer, ComponentKind.TRANSFORMER),
            None if vae is None else _component_id(vae, ComponentKind.VAE),
            prompt_embeds,
            pooled_prompt_embeds,
            height=height,
            width=width,
            steps=steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            seed=seed,
            noise=noise,
        )
        block = draft.fill(self._pool)

        def read_outputs(generated: Generated) -> GenerationResult:
            return GenerationResult(
                latents=block.read(draft.output, draft.device),
                image=None if draft.image is None else block.read(draft.image, draft.device),
                timings_ms=dict(generated.timings_ms),
                seed=seed,
            )

        return GenerationJob(self._start(draft, block, deadline_s), read_outputs, steps)

    def denoise(
        self,
        transformer: Loan | str,
        latents: torch.Tensor,
        timestep: float | Sequence[float] | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        guidance: float | None = None,
        *,
        deadline_s: float | None = None,
    ) -> torch.Tensor:
        """Run one forward of the transformer; returns the prediction on the device and dtype of ``latents``.

        ``latents`` are (batch, 16, height/8, width/8), ``timestep`` is the current sigma in [0, 1], one or one
        for each image. ``guidance`` is for guidance-distilled checkpoints.
        """
        component_id = _component_id(transformer, ComponentKind.TRANSFORMER)
        draft = draft_denoise(component_id, latents, timestep, prompt_embeds, pooled_prompt_embeds, guidance)
        return self._run(draft, Denoised, deadline_s)

    def decode(self, vae: Loan | str, latents: torch.Tensor, *, deadline_s: float | None = None) -> torch.Tensor:
        """Decode latents (batch, 16, h, w) to images (batch, 3, 8h, 8w) in [-1, 1], on their device and dtype."""
        return self._run(draft_decode(_component_id(vae, ComponentKind.VAE), latents), Decoded, deadline_s)

    def encode(self, vae: Loan | str, image: torch.Tensor, *, deadline_s: float | None = None) -> torch.Tensor:
        """Encode images (batch, 3, 8h, 8w) in [-1, 1] to latents (batch, 16, h, w), on their device and dtype."""
        return self._run(draft_encode(_component_id(vae, ComponentKind.VAE), image), Encoded, deadline_s)

    # --- The daemon ----------------------------------------------------------------------------

    @property
    def daemon_pid(self) -> int:
        """The process at the other end."""
        return self._current().daemon_pid

    def status(self, *, deadline_s: float = CONTROL_DEADLINE_S) -> DaemonStatus:
        """Ask for the daemon's state."""
        connection = self._current().connection
        request = GetStatus(request_id=connection.next_request_id())
        return connection.ask(request, Status, deadline_s=deadline_s).daemon

    def logs(self, after: int = 0, *, deadline_s: float = CONTROL_DEADLINE_S) -> tuple[list[str], int]:
        """Ask for recent log lines from number ``after`` on; returns them and the number to go on from."""
        connection = self._current().connection
        request = GetLogs(request_id=connection.next_request_id(), after_line=after)
        reply = connection.ask(request, LogLines, deadline_s=deadline_s)
        return list(reply.lines), reply.next_line

    def stop(self, *, deadline_s: float = CONTROL_DEADLINE_S) -> bool:
        """Shut the daemon down, and wait for it; returns whether it has exited within ``deadline_s``."""
        connection = self._current().connection
        connection.ask(Stop(request_id=connection.next_request_id()), Stopping, deadline_s=deadline_s)
        return connection.wait_lost(deadline_s)

    def close(self) -> None:
        """End all loans and the session. A second call does nothing."""
        with self._lock:
            session, self._session = self._session, None
            self._is_closed = True
        if session is not None:
            session.close()
        self._pool.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Session:
        return Session(self._runtime, self._name, self._pool, self._silence_s)

    def _current(self) -> Session:
        """The session, or a new one where the daemon of the last one is gone."""
        with self._lock:
            if self._is_closed:
                raise DaemonUnreachable("this client is closed; make a new Client")
            if self._session is not None and self._session.is_lost:
                self._session.close()
                self._session = None
            if self._session is None:
                self._session = self._open()
            return self._session

    def _start(self, draft: Draft, block: IoBlock, deadline_s: float | None) -> PendingJob:
        try:
            connection = self._current().connection
            request = draft.write(connection.next_request_id(), block.describe())
        except BaseException:
            self._pool.give_back(block)
            raise
        patience = Patience(self._silence_s, deadline_s)
        purpose = f"{type(request).__name__.lower()} {request.request_id}"
        return PendingJob(connection, self._pool, request, block, patience, purpose)

    def _run(self, draft: Draft, reply_type: type[Reply], deadline_s: float | None) -> torch.Tensor:
        """Run a job that has one output, and wait for it."""
        block = draft.fill(self._pool)
        with self._start(draft, block, deadline_s) as pending:
            pending.wait(reply_type)
            return block.read(draft.output, draft.device)


def _read_kind(kind: ComponentKind | str) -> ComponentKind:
    try:
        return ComponentKind(kind)
    except ValueError:
        known = ", ".join(each.value for each in ComponentKind)
        raise BadRequest(f"kind {kind!r}: unknown; choose one of {known}") from None


def _component_id(component: Loan | str, kind: ComponentKind) -> str:
    if isinstance(component, str):
        return component
    if not isinstance(component, Loan):
        raise BadRequest(f"{kind.value}: a loan or a component id is needed, not {type(component).__name__}")
    component.check()
    if component.kind is not kind:
        raise BadRequest(f"{kind.value}: {component.label} is a {component.kind.value}; name a {kind.value}")
    return component.component_id
