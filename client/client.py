"""The library's front door."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

from xditd.client.conditioning import Conditioning, conditionings_of
from xditd.client.connection import CONTROL_DEADLINE_S
from xditd.client.drafts import (
    draft_decode,
    draft_encode,
    draft_encode_text,
    draft_generate,
)
from xditd.client.io_blocks import IoPool
from xditd.client.jobs import GenerationJob, draw_seed
from xditd.client.lifetime import Lifetime
from xditd.client.loans import Loan, component_id_of, kind_named
from xditd.client.results import GenerationResult
from xditd.client.running import Runner
from xditd.client.text_encoding import TextEncoding
from xditd.client.waiting import check_seconds, wait_for
from xditd.ipc.addresses import RuntimeDir, default_runtime_dir, user_path
from xditd.ipc.errors import BadRequest
from xditd.ipc.replies import Decoded, Encoded, Generated, LogLines, Status, Stopping, TextEncoded
from xditd.ipc.requests import GetLogs, GetStatus, Stop, Variant
from xditd.ipc.status import DaemonStatus
from xditd.ipc.tensors import ComponentKind, CopiedBytes

if TYPE_CHECKING:
    import torch

SILENCE_DEADLINE_S: Final = 300.0
"""Default for lends and jobs: the longest silence between two signs of progress. Starting workers, loading 22 GiB
from a cold disk and compiling on the first step all stay well below it."""


class Client:
    """A session with the daemon: lend components to its workers, and run jobs on them.

    ``runtime_dir`` is the daemon's folder (default ``$XDITD_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/xditd``).
    ``deadline_s`` bounds the silence between two signs of progress of a lend or a job; a total can be given to each
    call. ``wait_s`` is for a daemon that is being started: how long to wait until its workers are ready.
    Safe to use from several threads, not across ``fork``. When the daemon is gone, waiting calls raise
    :class:`DaemonUnreachable` within a second; the next call greets the new daemon, where loans have
    to be made again. Leaving a ``with`` block, or ``close()``, ends all loans; using the client after that raises
    :class:`Closed`. A client that nobody holds any more is closed with a ``ResourceWarning``; a job under way holds it.

    Raises:
        DaemonUnreachable: no daemon answered within 2 s, or within ``wait_s``.
        BadRequest: ``deadline_s`` or ``wait_s`` is no time.
        WorkersUnavailable, DeadlineExceeded: with ``wait_s``, the workers are given up, or not ready in time.
        ProtocolMismatch: the daemon is of a version that speaks another protocol.
        NotPermitted: the daemon serves another user.
    """

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        name: str = "python",
        deadline_s: float = SILENCE_DEADLINE_S,
        wait_s: float = 0.0,
    ) -> None:
        check_seconds("deadline_s", deadline_s)
        runtime = default_runtime_dir() if runtime_dir is None else RuntimeDir(user_path(runtime_dir).absolute())
        self._pool = IoPool()
        self._lifetime = Lifetime(runtime, name, self._pool, deadline_s)
        self._current = self._lifetime.current
        self._runner = Runner(self._pool, self._current, deadline_s)
        try:
            if wait_s:
                self.wait_ready(wait_s)
            else:
                self._current()
        except BaseException:
            self._lifetime.close()
            raise
        self._finalizer = weakref.finalize(self, self._lifetime.abandon)
        self._finalizer.atexit = False  # the daemon sees a process end: no program has to wait for it

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
            kind=None if kind is None else kind_named(kind),
            label=label,
            device=device,
            generation=generation,
            deadline_s=deadline_s,
        )

    def return_(self, loan: Loan, *, deadline_s: float | None = None) -> None:
        """Take a component back; once this returns no worker maps it."""
        loan.return_(deadline_s=deadline_s)

    def check_canary(self, *, deadline_s: float | None = None) -> None:
        """Show that every worker reads what this process writes into shared memory; the first lend does so anyway.

        Raises:
            StaleSource: a worker read something else.
        """
        self._current().check_canary(deadline_s)

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
        previews: bool = False,
        step_cache: float = 0.0,
        variant: Variant = "class",
        deadline_s: float | None = None,
    ) -> GenerationJob:
        """Start a whole denoising loop in the workers, and hand back the job without waiting for it.

        ``prompt_embeds`` (batch, text tokens, context) and ``pooled_prompt_embeds`` (batch, pooled) may lie on
        any device. ``noise`` (batch, 16, height/8, width/8) is used as it is; else ``seed`` makes it, and
        without a seed one is drawn and handed back. ``sigmas`` replaces the family's own schedule:
        ``steps`` descending values in (0, 1]. A ``vae`` adds the image to the result. ``previews`` lets
        ``job.denoised()`` say after each step what the latents are about to become. Components may be
        named by id, as ``xditd status`` shows them.

        ``step_cache``, up to 1, trades precision for time: a step whose first block does nearly the same as at the
        last one that was computed, by less than this share of it, is not computed to its end. 0.08 is a start, and
        ``reused_steps`` of the result says how many that were. The same job gives the same bits again.

        ``variant`` says whose rounding a transformer in half precision follows: ``"class"`` diffusers', which rounds
        the timestep, and the latents between two steps, to the weights' dtype; ``"float32_time"`` ComfyUI's, which
        keeps both in float32. In float32 they are the same.

        Raises:
            BadRequest: a value that no job can use, by name and with the remedy.
            LeaseLost: a loan has ended.
        """
        if seed is not None and noise is not None:
            raise BadRequest("seed and noise: both are given, but each sets the noise; leave one out")
        if seed is None and noise is None:
            seed = draw_seed()
        draft = draft_generate(
            component_id_of(transformer, ComponentKind.TRANSFORMER),
            None if vae is None else component_id_of(vae, ComponentKind.VAE),
            prompt_embeds,
            pooled_prompt_embeds,
            height=height,
            width=width,
            steps=steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            seed=seed,
            noise=noise,
            previews=previews,
            step_cache=step_cache,
            variant=variant,
        )
        block = draft.fill(self._pool)

        def read_outputs(generated: Generated) -> GenerationResult:
            return GenerationResult(
                latents=block.read(draft.output, draft.device),
                image=None if draft.second is None else block.read(draft.second, draft.device),
                timings_ms=dict(generated.timings_ms),
                seed=seed,
                reused_steps=generated.reused_steps,
            )

        def read_denoised() -> torch.Tensor:
            if draft.denoised is None:
                raise BadRequest("denoised: the job was started without previews=True")
            return block.read(draft.denoised, draft.device)

        return GenerationJob(self._runner.start(draft, block, deadline_s), read_outputs, read_denoised, steps, self)

    def condition(
        self, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor, guidance: float | None = None
    ) -> Conditioning:
        """Make text conditioning that is sent once, with the first ``denoise`` that uses it, and kept in the workers.

        ``prompt_embeds`` (batch, text tokens, context) and ``pooled_prompt_embeds`` (batch, pooled) are copied to the
        host. The workers let go of it with this process, or when others were used since and room is needed.
        """
        return Conditioning(prompt_embeds, pooled_prompt_embeds, guidance)

    def denoise(
        self,
        transformer: Loan | str,
        latents: torch.Tensor,
        timestep: float | Sequence[float] | torch.Tensor,
        conditioning: Conditioning | Sequence[Conditioning] | torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        guidance: float | None = None,
        *,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        variant: Variant = "class",
        deadline_s: float | None = None,
    ) -> torch.Tensor:
        """Run the transformer once; returns the prediction on the device and dtype of ``latents``.

        ``latents`` are (batch, 16, height/8, width/8), ``timestep`` is the current sigma in [0, 1], one or one
        for each image. ``conditioning`` comes from :meth:`condition`; several share the batch out evenly, in order
        (unconditional and conditional images in one request). Or give ``prompt_embeds`` and ``pooled_prompt_embeds``
        as tensors, which then cross every time. ``guidance``, for guidance-distilled checkpoints, goes before theirs.
        ``sigmas`` are those of the whole run, if its sampler knows them: workers then make for all of them at once what
        hangs on the timestep alone, to the same bits. ``variant`` is that of :meth:`generate`.
        """
        component_id = component_id_of(transformer, ComponentKind.TRANSFORMER)
        given = conditionings_of(conditioning, pooled_prompt_embeds)
        return self._runner.forward(component_id, latents, timestep, given, guidance, sigmas, variant, deadline_s)

    def encode_text(
        self,
        encoder: Loan | str,
        token_ids: torch.Tensor | Sequence[Sequence[int]],
        *,
        pooled: bool = False,
        width: int | None = None,
        deadline_s: float | None = None,
    ) -> TextEncoding:
        """Encode tokens (batch, tokens) with a text encoder, in float32, whatever the dtype of its weights.

        Every token counts, padding too, as FLUX.1 was trained; CLIP takes up to 77. ``pooled`` asks for CLIP's pooled
        state. ``width`` is that of the states, and needed only for an encoder that is named by its id.

        Raises:
            BadRequest: a token that the encoder does not know, too many tokens, or no pooled state.
        """
        encoder_id = component_id_of(encoder, ComponentKind.TEXT_ENCODER)
        if width is None:
            width = encoder.text_width if isinstance(encoder, Loan) else None
        if width is None:
            raise BadRequest(f"width: that of the states of {encoder_id} is not known here; give it, such as 4096")
        draft = draft_encode_text(encoder_id, token_ids, width, pooled=pooled)
        hidden_states, pooled_states = self._runner.run(draft, TextEncoded, deadline_s)
        return TextEncoding(hidden_states, pooled_states)

    def decode(
        self, vae: Loan | str, latents: torch.Tensor, *, clamp: bool = True, deadline_s: float | None = None
    ) -> torch.Tensor:
        """Decode latents (batch, 16, h, w) to images (batch, 3, 8h, 8w) in [-1, 1], on their device and dtype.

        Without ``clamp`` values outside stay as they are: tiles are joined before they are cut off.
        """
        draft = draft_decode(component_id_of(vae, ComponentKind.VAE), latents)
        image = self._runner.run(draft, Decoded, deadline_s)[0]
        return image.clamp_(-1.0, 1.0) if clamp else image

    def encode(self, vae: Loan | str, image: torch.Tensor, *, deadline_s: float | None = None) -> torch.Tensor:
        """Encode images (batch, 3, 8h, 8w) in [-1, 1] to latents (batch, 16, h, w), on their device and dtype."""
        return self._runner.run(draft_encode(component_id_of(vae, ComponentKind.VAE), image), Encoded, deadline_s)[0]

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

    def wait_ready(
        self, wait_s: float, *, workers: bool = True, show: Callable[[str], None] = lambda _: None
    ) -> DaemonStatus:
        """Wait until a daemon answers and its workers are ready, or, without ``workers``, until it answers.

        ``show`` gets what is waited for, whenever it changes. A job may be sent before that, too: it then waits.

        Raises:
            DaemonUnreachable: no daemon answers within ``wait_s``.
            WorkersUnavailable: the workers are given up.
            DeadlineExceeded: the workers are not ready within ``wait_s``.
        """
        return wait_for(self.status, wait_s, workers=workers, show=show)

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
        """End all loans and the session. A second call does nothing; all other calls raise ``Closed`` from then on."""
        self._finalizer.detach()
        self._lifetime.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self._lifetime.runtime.path}, {self._lifetime.state}>"
