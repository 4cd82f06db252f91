"""The class ``Client``: the public API for lending components and running jobs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from xditd.client.argument_names import names_unknown
from xditd.client.daemon_methods import DaemonMethods
from xditd.client.forks import OfOneProcess
from xditd.client.jobs.component import Component
from xditd.client.lifetime import Lifetime
from xditd.client.loan_methods import LoanMethods
from xditd.client.loans import Loan, LoanWithLoras, any_component_id, component_id_of
from xditd.client.prompt_methods import PromptMethods
from xditd.client.waiting import check_seconds
from xditd.ipc import limits
from xditd.ipc.addresses import default_runtime_dir, runtime_dir_at
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ComponentFacts, LatentScaling
from xditd.ipc.replies import Decoded, Encoded
from xditd.ipc.tensors import ComponentKind

# Modules of jobs are imported by the methods that run them: a program that asks for the status needs none.
if TYPE_CHECKING:
    import torch

    from xditd.client.jobs.arguments import KeptTensor
    from xditd.client.jobs.controls import CallControl, Control
    from xditd.client.jobs.generation import GenerationJob

SILENCE_DEADLINE_S: Final = 600.0
"""Default for lends and jobs: the longest time without progress. It is longer than the default of the daemon's
``hang_deadline_s``, after which the daemon ends a job itself and reports why."""


class Client(LoanMethods, PromptMethods, DaemonMethods, OfOneProcess):
    """A session with the daemon: lend components to its workers, and run jobs on them.

    ``runtime_dir`` is the daemon's folder (default ``$XDITD_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/xditd``).
    ``deadline_s`` is the longest time that a lend or a job may make no progress, to which a lend adds 1 s for each
    64 MiB; set it above the daemon's ``hang_deadline_s``. ``deadline_s`` of a method bounds the total time. ``wait_s``
    is how long to wait for a daemon that is being started, and for its workers, to be ready.
    Safe to use from several threads, not across ``fork``. When the daemon exits, waiting methods raise
    :class:`DaemonUnreachable` within a second; the next method connects to the new daemon, where components have
    to be lent again. Leaving a ``with`` block, or ``close()``, ends all loans; using the client after that raises
    :class:`Closed`. ``cluster`` (``IP:PORT`` of a head) generates on several hosts instead: docs/cluster.md has what
    such a client offers. A client without references is closed with a ``ResourceWarning``; a running job references it.

    Raises:
        DaemonUnreachable: no daemon answered within 2 s, or within ``wait_s``.
        BadRequest: ``deadline_s`` or ``wait_s`` is not a number of seconds, ``name`` or ``runtime_dir`` no text.
        WorkersUnavailable, DeadlineExceeded: with ``wait_s``, the workers are given up, or not ready in time.
        ProtocolMismatch: the daemon's version uses another protocol.
        NotPermitted: the daemon serves another user.
    """

    def __new__(cls, *_: object, cluster: str | None = None, **__: object) -> Any:
        """Make a client of one host, or with ``cluster`` a ``ClusterClient``, which needs ``xditd[cluster]``."""
        if cluster is None:
            return super().__new__(cls)
        from xditd.client.cluster.client import client_of

        return client_of(cluster)

    @names_unknown("Client")
    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        name: str = "python",
        deadline_s: float = SILENCE_DEADLINE_S,
        wait_s: float = 0.0,
        cluster: str | None = None,
    ) -> None:
        from xditd.client.io_blocks import IoPool
        from xditd.client.jobs.runner import Runner

        del cluster  # __new__ has looked at it
        check_seconds("deadline_s", deadline_s)
        check_seconds("wait_s", wait_s)
        if not isinstance(name, str) or not 1 <= len(name) <= limits.MAX_NAME_CHARS:
            raise BadRequest(f"name: {name!r:.100} is no text of 1 to {limits.MAX_NAME_CHARS} characters")
        runtime = default_runtime_dir() if runtime_dir is None else runtime_dir_at(runtime_dir)
        self.deadline_s = deadline_s
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
        self._finalizer.atexit = False  # the daemon notices when a process exits, so no program waits for this

    # --- Jobs ----------------------------------------------------------------------------------

    def facts(self, component: Loan | LoanWithLoras | str) -> ComponentFacts:
        """Return the facts of a component: its shapes and dtypes, the jobs that it can run, and their defaults.

        For a component id, the daemon is asked once.

        Raises:
            UnknownComponent: the component is not lent.
        """
        component_id = any_component_id("component", component)
        return self._current().facts_of(component_id) if isinstance(component, str) else component.facts

    @names_unknown("Client.generate")
    def generate(
        self,
        transformer: Loan | LoanWithLoras | str,
        conditioning: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
        *,
        vae: Loan | str | None = None,
        height: int = 1024,
        width: int = 1024,
        frames: int = 1,
        transformer_2: Loan | LoanWithLoras | str | None = None,
        steps: int | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        noise: torch.Tensor | None = None,
        previews: bool | Literal["image"] = False,
        step_cache: float = 0.0,
        variant: str = "class",
        options: Mapping[str, bool | int | float] | None = None,
        controls: Sequence[Control] = (),
        scheduler: Mapping[str, object] | None = None,
        start_image: torch.Tensor | None = None,
        start_mask: torch.Tensor | None = None,
        strength: float = 1.0,
        deadline_s: float | None = None,
    ) -> GenerationJob:
        """Start a whole denoising loop in the workers, and return the job without waiting for it.

        ``conditioning`` maps the names in the transformer's facts to tensors on any device: for FLUX.1
        ``prompt_embeds`` (batch, tokens, 4096) and ``pooled_prompt_embeds`` (batch, 768), for Z-Image
        ``prompt_embeds``, a list of (tokens, 2560) for each image, for FLUX.2 ``prompt_embeds`` (batch, tokens, 15360).
        ``noise`` has the shape of the facts' latents; without it the noise is drawn from ``seed``, which is random
        unless given and is part of the result. ``sigmas`` replaces the family's own schedule: ``steps`` descending
        values in (0, 1]. Without ``steps`` or ``guidance_scale``, the family's default is used. A ``vae`` adds the
        image to the result, and encodes pictures among the conditioning, such as Wan's first image. ``previews``
        enables ``job.denoised()``, the predicted clean latents after each step; ``previews="image"``, with a VAE,
        ``job.preview()``, an image of them, of a video its middle frame, which costs a decode of one image a step.
        A video has ``frames``, and may have a ``transformer_2`` for the steps at low noise, such as that of Wan 2.2.
        ``options`` are the family's own, as its facts name them. ``controls`` are ControlNets with their pictures,
        whose residuals are added up. Components may be named by id, as ``xditd status`` shows them.

        ``step_cache``, from 0 to 1, trades precision for time: if the first block's residual differs relatively by less
        than this from that of the last computed step, the remaining blocks are skipped. Start with 0.08;
        ``reused_steps`` of the result counts such steps. The same job gives the same bits again.

        ``scheduler`` is what a ``scheduler_config.json`` of diffusers has, for its steps in place of the family's own;
        it shifts ``sigmas``, which are used as they are without it.
        ``start_image`` (batch or 1, 3, height, width) in [-1, 1] is where steps start from, if the facts' ``starts``
        name it: the last ``strength`` of them run, from the image's latents and the noise. ``start_mask`` (batch or 1,
        1, height, width) is 1 where it is made anew; the rest of the image is kept.

        ``variant`` names the implementation whose arithmetic is followed: ``"class"`` for diffusers, or another one
        that the facts name. Their roundings differ in half precision; in float32 they differ by 1e-6 or so.

        Raises:
            BadRequest: an invalid value; the message names it and the remedy.
            LeaseLost: a loan has ended.
        """
        from xditd.client.jobs.controls import Control, checked_controls
        from xditd.client.jobs.generation import draw_seed
        from xditd.client.jobs.job_requests import generate_request
        from xditd.client.metadata.of_jobs import record_of

        if seed is not None and noise is not None:
            raise BadRequest("seed and noise: both are given, but each sets the noise; leave one out")
        if seed is None and noise is None:
            seed = draw_seed()
        lent = self._component(transformer, ComponentKind.TRANSFORMER)
        job = generate_request(
            lent,
            None if vae is None else self._component(vae, ComponentKind.VAE),
            conditioning,
            height=height,
            width=width,
            frames=frames,
            second=None
            if transformer_2 is None
            else self._component(transformer_2, ComponentKind.TRANSFORMER, "transformer_2"),
            steps=steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            seed=seed,
            noise=noise,
            previews=previews,
            step_cache=step_cache,
            variant=variant,
            options=options,
            controls=[
                (self._component(each.controlnet, ComponentKind.CONTROLNET, f"controls[{number}].controlnet"), each)
                for number, each in enumerate(checked_controls("controls", controls, Control))
            ],
            scheduler=scheduler,
            start_image=start_image,
            start_mask=start_mask,
            strength=strength,
        )
        components = {"transformer": transformer, "transformer_2": transformer_2, "vae": vae}
        record = record_of(job.sampling, lent.facts, components, controls=len(controls))
        return self._runner.generate(job, deadline_s, self, record)

    def keep(self, tensor: torch.Tensor) -> KeptTensor:
        """Copy a tensor to the host for use in calls: the first ``call`` sends it, and the workers keep it.

        The workers drop it when this process exits, or when they need room for tensors that were used more recently.
        """
        from xditd.client.jobs.arguments import KeptTensor

        return KeptTensor(tensor)

    def call(
        self,
        component: Loan | LoanWithLoras | str,
        arguments: Mapping[str, Any],
        *,
        method: str = "forward",
        foreseen: Mapping[str, Sequence[float] | torch.Tensor] | None = None,
        variant: str = "class",
        controls: Sequence[CallControl] = (),
        deadline_s: float | None = None,
    ) -> Any:
        """Run a transformer's ``forward`` once in the workers; returns what it returns with ``return_dict=False``.

        ``arguments`` have the names of the class's ``forward`` and are passed as they are: the caller sees to dtypes,
        packing, sign and units. They are tensors, what :meth:`keep` returns, :class:`RowsOf`, numbers, strings,
        ``None``, and lists, tuples and dicts of them. CPU tensors of at most 64 elements are sent in the message:
        give timesteps and guidance so, and the workers need not wait for a GPU to read them. The caller owns the
        tensors of the result; they are on the device of the first tensor given.

        ``foreseen`` are the values that an argument will have in later calls, if a sampler knows them: the workers
        compute at once for all of them what depends on them alone, with the same bits. ``variant``: as in
        :meth:`generate`.

        ``controls`` are ControlNets that run before the forward, which gets the sum of their residuals.

        A module that runs as its class takes any argument of its class, also objects of diffusers such as KV caches,
        and returns what its method returns, in the same classes. ``method`` is another one than ``forward``: a VAE's
        ``decode`` or ``encode``.

        Raises:
            BadRequest: an argument that cannot be sent, or that the class does not take.
            LeaseLost: the loan has ended.
        """
        from xditd.client.jobs.controls import checked_list

        return self.call_parts(
            component,
            [arguments],
            method=method,
            foreseen=foreseen,
            variant=variant,
            controls=[controls] if len(checked_list("controls", controls)) else (),
            deadline_s=deadline_s,
        )[0]

    def call_parts(
        self,
        component: Loan | LoanWithLoras | str,
        parts: Sequence[Mapping[str, Any]],
        *,
        method: str = "forward",
        foreseen: Mapping[str, Sequence[float] | torch.Tensor] | None = None,
        variant: str = "class",
        controls: Sequence[Sequence[CallControl]] = (),
        deadline_s: float | None = None,
    ) -> list[Any]:
        """Run one forward for each of ``parts``, such as the conditional and the unconditional half of one step.

        Each result is the one that :meth:`call` returns for that part. The parts are not batched, but may run in
        parallel on different GPUs; a tensor that several parts use is sent once. ``controls`` are those of each part.

        Raises:
            BadRequest, LeaseLost: as :meth:`call`.
        """
        from xditd.client.jobs.controls import CallControl, checked_controls, checked_list
        from xditd.client.jobs.job_requests import check_parts

        facts = component.facts if isinstance(component, LoanWithLoras) else self.facts(component)
        if facts.kind is not ComponentKind.MODULE:
            if method != "forward":
                raise BadRequest(
                    f"method {method!r:.100}: a component that family {facts.family} runs has forward alone; "
                    "lend it with as_class=True, or use decode(), encode() or encode_text()"
                )
            check_parts(parts)
            if len(checked_list("controls", controls)) not in (0, len(parts)):
                raise BadRequest(f"controls: {len(controls)} lists for {len(parts)} parts; give one for each part")
            named = self._component(component, ComponentKind.TRANSFORMER)
            with_ids = [
                [
                    (component_id_of(each.controlnet, ComponentKind.CONTROLNET), each)
                    for each in checked_controls(f"controls[{number}]", theirs, CallControl)
                ]
                for number, theirs in enumerate(controls)
            ]
            return self._runner.call(named, parts, foreseen, variant, deadline_s, with_ids)
        if foreseen is not None or variant != "class" or len(checked_list("controls", controls)):
            raise BadRequest("foreseen, variant and controls: a module that runs as its class has none; leave them out")
        named = self._component(component, ComponentKind.MODULE)
        return self._runner.call_class(named, parts, method=method, numerics=None, device=None, deadline_s=deadline_s)

    def decode(
        self,
        vae: Loan | str,
        latents: torch.Tensor,
        *,
        transformer: Loan | LoanWithLoras | str | None = None,
        scaling: LatentScaling | None = None,
        clamp: bool = True,
        deadline_s: float | None = None,
    ) -> torch.Tensor:
        """Decode latents to images (batch, channels, height, width) in [-1, 1], with their device and dtype.

        Latents of a video become one, (batch, channels, frames, height, width).

        ``transformer`` is the one that made the latents: its facts define their scaling. Without it, the scaling is
        the default of the VAE's family, or ``scaling``: factor 1 and shift 0 are of the VAE's own latents, which are
        not rounded then. ``clamp=False`` keeps values outside the range, for tiles that are blended before that.

        Raises:
            BadRequest: latents of another shape, or a transformer whose latents have another size than this VAE's.
        """
        from xditd.client.jobs.vae_requests import decode_request

        if not isinstance(clamp, bool):
            raise BadRequest(f"clamp: {clamp!r:.100} is of type {type(clamp).__name__}, use True or False")
        job = decode_request(self._component(vae, ComponentKind.VAE), latents, self._transformer(transformer), scaling)
        image = self._runner.run(job, Decoded, deadline_s)["image"]
        return image.clamp_(-1.0, 1.0) if clamp else image

    def encode(
        self,
        vae: Loan | str,
        image: torch.Tensor,
        *,
        transformer: Loan | LoanWithLoras | str | None = None,
        scaling: LatentScaling | None = None,
        deadline_s: float | None = None,
    ) -> torch.Tensor:
        """Encode images (batch, channels, height, width) in [-1, 1] to latents, with their device and dtype.

        A video has frames before its height. ``transformer`` is the one that will use the latents, and ``scaling``
        theirs, as in :meth:`decode`.

        Raises:
            BadRequest: an image of another shape, or a transformer whose latents have another size than this VAE's.
            Unsupported: the VAE was lent without its encoder.
        """
        from xditd.client.jobs.vae_requests import encode_request

        job = encode_request(self._component(vae, ComponentKind.VAE), image, self._transformer(transformer), scaling)
        return self._runner.run(job, Encoded, deadline_s)["latents"]

    def _transformer(self, component: Loan | LoanWithLoras | str | None) -> Component | None:
        return None if component is None else self._component(component, ComponentKind.TRANSFORMER)

    def _component(
        self, component: Loan | LoanWithLoras | str, kind: ComponentKind, name: str | None = None
    ) -> Component:
        if isinstance(component, LoanWithLoras):
            return Component(component_id_of(component.loan, kind, name), component.facts, component.uses())
        component_id = component_id_of(component, kind, name)
        return Component(component_id, self.facts(component))

    # --- The session ---------------------------------------------------------------------------

    def close(self) -> None:
        """End all loans and the session. May be called twice; all other methods then raise ``Closed``."""
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
