"""The library's front door."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from xditd.client.connection import CONTROL_DEADLINE_S
from xditd.client.io_blocks import IoPool
from xditd.client.jobs.arguments import KeptTensor
from xditd.client.jobs.generation import GenerationJob, draw_seed
from xditd.client.jobs.job_requests import (
    Component,
    decode_request,
    encode_request,
    encode_text_request,
    generate_request,
)
from xditd.client.jobs.runner import Runner
from xditd.client.lifetime import Lifetime
from xditd.client.loans import Loan, component_id_of, kind_named
from xditd.client.results import TextEncoding
from xditd.client.waiting import check_seconds, wait_for
from xditd.ipc.addresses import RuntimeDir, default_runtime_dir, user_path
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.renamed import Renamed
from xditd.ipc.replies import Decoded, Encoded, LogLines, Status, Stopping, TextEncoded
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

    def check_memory(self, *, deadline_s: float | None = None) -> None:
        """Show that every worker reads what this process writes into shared memory; the first lend does so anyway.

        Raises:
            StaleSource: a worker read something else.
        """
        self._current().check_memory(deadline_s)

    check_canary = Renamed("check_memory")

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

    def facts(self, component: Loan | str) -> ComponentFacts:
        """Say what the workers know of a component: its shapes and dtypes, the jobs it takes, and their defaults.

        Those of a loan are at hand; those of a component that is named by its id are asked for once.

        Raises:
            UnknownComponent: it is not on loan.
        """
        return component.facts if isinstance(component, Loan) else self._current().facts_of(component)

    def generate(
        self,
        transformer: Loan | str,
        conditioning: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
        *,
        vae: Loan | str | None = None,
        height: int = 1024,
        width: int = 1024,
        steps: int | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        noise: torch.Tensor | None = None,
        previews: bool = False,
        step_cache: float = 0.0,
        variant: str = "class",
        options: Mapping[str, bool | int | float] | None = None,
        deadline_s: float | None = None,
    ) -> GenerationJob:
        """Start a whole denoising loop in the workers, and hand back the job without waiting for it.

        ``conditioning`` is by the names that the transformer's facts list, on any device: for FLUX.1 ``prompt_embeds``
        (batch, tokens, 4096) and ``pooled_prompt_embeds`` (batch, 768), for Z-Image ``prompt_embeds``, a list of
        (tokens, 2560) for each image. ``noise``, shaped as the facts' latents, is used as it is; else ``seed`` makes
        it, and without a seed one is drawn and handed back. ``sigmas`` replaces the family's own schedule: ``steps``
        descending values in (0, 1]. Without ``steps`` or ``guidance_scale``, the family's default is used. A ``vae``
        adds the image to the result. ``previews`` lets ``job.denoised()`` say after each step what the latents are
        about to become. ``options`` are the family's own, as its facts name them. Components may be named by id, as
        ``xditd status`` shows them.

        ``step_cache``, up to 1, trades precision for time: a step whose first block does nearly the same as at the
        last one that was computed, by less than this share of it, is not computed to its end. 0.08 is a start, and
        ``reused_steps`` of the result says how many that were. The same job gives the same bits again.

        ``variant`` says whose rounding a transformer in half precision follows: ``"class"`` diffusers', or another one
        that the facts name. In float32 they are the same.

        Raises:
            BadRequest: a value that no job can use, by name and with the remedy.
            LeaseLost: a loan has ended.
        """
        if seed is not None and noise is not None:
            raise BadRequest("seed and noise: both are given, but each sets the noise; leave one out")
        if seed is None and noise is None:
            seed = draw_seed()
        job = generate_request(
            self._component(transformer, ComponentKind.TRANSFORMER),
            None if vae is None else self._component(vae, ComponentKind.VAE),
            conditioning,
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
            options=options,
        )
        return self._runner.generate(job, deadline_s, self)

    def keep(self, tensor: torch.Tensor) -> KeptTensor:
        """Make a tensor that crosses once, with the first ``call`` that uses it, and is kept in the workers.

        It is copied to the host. The workers let go of it with this process, or when others were used since and room
        is needed.
        """
        return KeptTensor(tensor)

    def call(
        self,
        component: Loan | str,
        arguments: Mapping[str, Any],
        *,
        foreseen: Mapping[str, Sequence[float] | torch.Tensor] | None = None,
        variant: str = "class",
        deadline_s: float | None = None,
    ) -> Any:
        """Run a transformer's ``forward`` once in the workers; returns what it returns without ``return_dict``.

        ``arguments`` are by the names of the class's ``forward``, and exactly as it takes them: dtypes, packing, sign
        and units are the caller's business. They are tensors, what :meth:`keep` returns, :class:`RowsOf`, numbers,
        texts, ``None``, and lists, tuples and maps of them. CPU tensors of at most 64 elements cross in the message:
        give timesteps and guidance so, and the workers wait for no GPU to read them. Tensors of the result are the
        caller's, on the device of the first one given.

        ``foreseen`` are values of an argument in calls to come, if a sampler knows them: workers then make for all of
        them at once what hangs on them alone, to the same bits. ``variant`` is that of :meth:`generate`.

        Raises:
            BadRequest: something that cannot cross, or that the class does not take.
            LeaseLost: the loan has ended.
        """
        return self.call_parts(component, [arguments], foreseen=foreseen, variant=variant, deadline_s=deadline_s)[0]

    def call_parts(
        self,
        component: Loan | str,
        parts: Sequence[Mapping[str, Any]],
        *,
        foreseen: Mapping[str, Sequence[float] | torch.Tensor] | None = None,
        variant: str = "class",
        deadline_s: float | None = None,
    ) -> list[Any]:
        """Run a forward for each of ``parts``, such as the conditional and the unconditional half of one step.

        Each part gives what :meth:`call` gives for it. Nothing of them is joined, but they may run side by side on
        different GPUs, and a tensor that several of them use crosses once.
        """
        named = self._component(component, ComponentKind.TRANSFORMER)
        return self._runner.call(named, parts, foreseen, variant, deadline_s)

    def encode_text(
        self,
        encoder: Loan | str,
        token_ids: torch.Tensor | Sequence[Sequence[int]],
        *,
        pooled: bool = False,
        deadline_s: float | None = None,
    ) -> TextEncoding:
        """Encode tokens (batch, tokens) with a text encoder, in float32, whatever the dtype of its weights.

        Every token counts, padding too; its facts say how many it takes. ``pooled`` asks for its pooled state.

        Raises:
            BadRequest: a token that the encoder does not know, too many tokens, or no pooled state.
        """
        job = encode_text_request(self._component(encoder, ComponentKind.TEXT_ENCODER), token_ids, pooled=pooled)
        found = self._runner.run(job, TextEncoded, deadline_s)
        return TextEncoding(found["hidden_states"], found.get("pooled"))

    def decode(
        self,
        vae: Loan | str,
        latents: torch.Tensor,
        *,
        transformer: Loan | str | None = None,
        clamp: bool = True,
        deadline_s: float | None = None,
    ) -> torch.Tensor:
        """Decode latents to images (batch, channels, height, width) in [-1, 1], on their device and dtype.

        ``transformer`` is the one whose latents they are: its facts say how they are scaled, which a VAE's tensors do
        not tell. Without it the VAE's facts do, by what its family assumes. Without ``clamp`` values outside stay as
        they are: tiles are joined before they are cut off.

        Raises:
            BadRequest: latents of another shape, or a transformer whose latents are not this VAE's in size.
        """
        job = decode_request(self._component(vae, ComponentKind.VAE), latents, self._transformer(transformer))
        image = self._runner.run(job, Decoded, deadline_s)["image"]
        return image.clamp_(-1.0, 1.0) if clamp else image

    def encode(
        self,
        vae: Loan | str,
        image: torch.Tensor,
        *,
        transformer: Loan | str | None = None,
        deadline_s: float | None = None,
    ) -> torch.Tensor:
        """Encode images (batch, channels, height, width) in [-1, 1] to latents, on their device and dtype.

        ``transformer`` is the one that shall read the latents, as in :meth:`decode`.
        """
        job = encode_request(self._component(vae, ComponentKind.VAE), image, self._transformer(transformer))
        return self._runner.run(job, Encoded, deadline_s)["latents"]

    def _transformer(self, component: Loan | str | None) -> Component | None:
        return None if component is None else self._component(component, ComponentKind.TRANSFORMER)

    def _component(self, component: Loan | str, kind: ComponentKind) -> Component:
        component_id = component_id_of(component, kind)
        return Component(component_id, self.facts(component))

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
