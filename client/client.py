"""The library's front door."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from xditd.client import job_inputs
from xditd.client.connection import CONTROL_DEADLINE_S
from xditd.client.io_blocks import IoBlock, IoLayout, IoPool
from xditd.client.jobs import GenerationJob, PendingJob, draw_seed
from xditd.client.loans import Loan
from xditd.client.mailboxes import Patience
from xditd.client.results import GenerationResult
from xditd.client.session import Session
from xditd.ipc.addresses import RuntimeDir, default_runtime_dir
from xditd.ipc.errors import BadRequest, DaemonUnreachable
from xditd.ipc.replies import Decoded, Denoised, Encoded, Generated, LogLines, Status, Stopping
from xditd.ipc.requests import Decode, Denoise, Encode, Generate, GetLogs, GetStatus, Job, Stop
from xditd.ipc.status import DaemonStatus
from xditd.ipc.tensors import ComponentKind, IoTensor

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
        batch = job_inputs.check_embeds(prompt_embeds, pooled_prompt_embeds)
        job_inputs.check_size(height, width)
        job_inputs.check_steps(steps)
        guidance_scale = job_inputs.check_guidance("guidance_scale", guidance_scale)
        schedule = None if sigmas is None else job_inputs.check_sigmas(sigmas, steps)
        if noise is not None:
            if seed is not None:
                raise BadRequest("seed and noise: both are given, but each sets the noise; leave one out")
            job_inputs.check_noise(noise, batch, height, width)
        elif seed is None:
            seed = draw_seed()
        else:
            job_inputs.check_whole("seed", seed, 0, 2**63 - 1)

        import torch

        like = prompt_embeds if noise is None else noise
        layout = IoLayout()
        embeds_at, pooled_at = layout.add_input(prompt_embeds), layout.add_input(pooled_prompt_embeds)
        inputs = [(embeds_at, prompt_embeds), (pooled_at, pooled_prompt_embeds)]
        noise_at = None
        if noise is not None:
            noise_at = layout.add_input(noise)
            inputs.append((noise_at, noise))
        side = job_inputs.PIXELS_PER_LATENT
        latents_at = layout.add_output(like.dtype, (batch, job_inputs.LATENT_CHANNELS, height // side, width // side))
        image_at = None if vae is None else layout.add_output(torch.float32, (batch, 3, height, width))
        transformer_id = _component_id(transformer, ComponentKind.TRANSFORMER)
        vae_id = None if vae is None else _component_id(vae, ComponentKind.VAE)
        session = self._current()
        block = self._fill(layout, inputs)
        request = Generate(
            request_id=session.connection.next_request_id(),
            transformer_id=transformer_id,
            vae_id=vae_id,
            io=block.describe(),
            prompt_embeds=embeds_at,
            pooled_prompt_embeds=pooled_at,
            noise=noise_at,
            seed=seed,
            height=height,
            width=width,
            steps=steps,
            sigmas=schedule,
            guidance_scale=guidance_scale,
            out_latents=latents_at,
            out_image=image_at,
        )
        device = like.device

        def read_outputs(generated: Generated) -> GenerationResult:
            return GenerationResult(
                latents=block.read(latents_at, device),
                image=None if image_at is None else block.read(image_at, device),
                timings_ms=dict(generated.timings_ms),
                seed=seed,
            )

        return GenerationJob(self._start(session, request, block, deadline_s), read_outputs, steps)

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
        batch = job_inputs.check_embeds(prompt_embeds, pooled_prompt_embeds)
        job_inputs.check_latents("latents", latents, batch=batch)
        job_inputs.check_even_latents("latents", latents)
        sigmas = job_inputs.check_timestep(timestep, batch)
        if guidance is not None:
            guidance = job_inputs.check_guidance("guidance", guidance)
        layout = IoLayout()
        latents_at = layout.add_input(latents)
        embeds_at, pooled_at = layout.add_input(prompt_embeds), layout.add_input(pooled_prompt_embeds)
        out_at = layout.add_output(latents.dtype, tuple(latents.shape))
        component_id = _component_id(transformer, ComponentKind.TRANSFORMER)

        session = self._current()
        inputs = [(latents_at, latents), (embeds_at, prompt_embeds), (pooled_at, pooled_prompt_embeds)]
        block = self._fill(layout, inputs)
        request = Denoise(
            request_id=session.connection.next_request_id(),
            transformer_id=component_id,
            io=block.describe(),
            latents=latents_at,
            prompt_embeds=embeds_at,
            pooled_prompt_embeds=pooled_at,
            timestep=sigmas,
            guidance=guidance,
            out=out_at,
        )
        with self._start(session, request, block, deadline_s) as pending:
            pending.wait(Denoised)
            return block.read(out_at, latents.device)

    def decode(self, vae: Loan | str, latents: torch.Tensor, *, deadline_s: float | None = None) -> torch.Tensor:
        """Decode latents (batch, 16, h, w) to images (batch, 3, 8h, 8w) in [-1, 1], on their device and dtype."""
        job_inputs.check_latents("latents", latents)
        batch, _, height, width = latents.shape
        side = job_inputs.PIXELS_PER_LATENT
        layout = IoLayout()
        latents_at = layout.add_input(latents)
        out_at = layout.add_output(latents.dtype, (batch, 3, height * side, width * side))
        vae_id = _component_id(vae, ComponentKind.VAE)
        session = self._current()
        block = self._fill(layout, [(latents_at, latents)])
        request = Decode(
            request_id=session.connection.next_request_id(),
            vae_id=vae_id,
            io=block.describe(),
            latents=latents_at,
            out=out_at,
        )
        with self._start(session, request, block, deadline_s) as pending:
            pending.wait(Decoded)
            return block.read(out_at, latents.device)

    def encode(self, vae: Loan | str, image: torch.Tensor, *, deadline_s: float | None = None) -> torch.Tensor:
        """Encode images (batch, 3, 8h, 8w) in [-1, 1] to latents (batch, 16, h, w), on their device and dtype."""
        job_inputs.check_image(image)
        batch, _, height, width = image.shape
        side = job_inputs.PIXELS_PER_LATENT
        layout = IoLayout()
        image_at = layout.add_input(image)
        out_at = layout.add_output(image.dtype, (batch, job_inputs.LATENT_CHANNELS, height // side, width // side))
        vae_id = _component_id(vae, ComponentKind.VAE)
        session = self._current()
        block = self._fill(layout, [(image_at, image)])
        request = Encode(
            request_id=session.connection.next_request_id(),
            vae_id=vae_id,
            io=block.describe(),
            image=image_at,
            out=out_at,
        )
        with self._start(session, request, block, deadline_s) as pending:
            pending.wait(Encoded)
            return block.read(out_at, image.device)

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

    def _fill(self, layout: IoLayout, inputs: list[tuple[IoTensor, torch.Tensor]]) -> IoBlock:
        block = self._pool.borrow(layout.size_bytes)
        try:
            for spec, tensor in inputs:
                block.write(spec, tensor)
        except BaseException:
            self._pool.give_back(block)
            raise
        return block

    def _start(self, session: Session, request: Job, block: IoBlock, deadline_s: float | None) -> PendingJob:
        patience = Patience(self._silence_s, deadline_s)
        purpose = f"{type(request).__name__.lower()} {request.request_id}"
        return PendingJob(session.connection, self._pool, request, block, patience, purpose)


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
