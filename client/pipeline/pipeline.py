"""The class ``Pipeline``: words and pictures in, pictures and videos out, with the models in the workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from xditd.client.argument_names import check_names, names_unknown
from xditd.client.client import SILENCE_DEADLINE_S, Client
from xditd.client.forks import OfOneProcess
from xditd.client.loans import Loan
from xditd.client.pipeline.adapter import Adapter
from xditd.client.pipeline.calls import (
    ARGUMENTS,
    OF_CALLERS,
    OF_JOBS,
    Texts,
    call_of,
    check_function,
    check_refused,
)
from xditd.client.pipeline.files import PathLike, Paths, tokenizer_path
from xditd.client.pipeline.futures import RunFuture, Threads
from xditd.client.pipeline.job import LOST, OnPreview, OnProgress, PipelineJob
from xditd.client.pipeline.keep_alive import KeepAlive
from xditd.client.pipeline.loading import Loans, check_same_model, check_tokenizer_roles, lends_all
from xditd.client.pipeline.opening import opening_of, rules_of
from xditd.client.pipeline.results import PipelineResult
from xditd.client.pipeline.running import Runner
from xditd.client.pipeline.sources import IMAGE_ENCODER, SECOND, TRANSFORMER, VAE, Source
from xditd.client.waiting import check_seconds
from xditd.ipc.errors import BadRequest, Closed
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.tensors import Acceleration, ComputeDType

if TYPE_CHECKING:
    from xditd.client.jobs.controls import Control


class Pipeline(OfOneProcess):
    """Models on loan that make pictures and videos from words: ``pipe("a cat").images[0]``.

    Open one with :meth:`open`, which lends its models; leaving a ``with`` block, or ``close()``, returns them. Safe to
    use from several threads. After the daemon was restarted, the next call lends the models again.
    """

    def __init__(
        self,
        client: Client,
        source: Source,
        loans: Loans,
        *,
        owns_client: bool,
        defaults: Mapping[str, Any] | None = None,
        keep_alive: float | None = None,
    ) -> None:
        """For :meth:`open`. ``owns_client``: it is closed with the pipeline."""
        self.client = client
        self.name = source.name
        self._source = source
        self._loans = loans
        self._owns_client = owns_client
        self._keep_alive = KeepAlive(keep_alive, self.unload)
        self._given_defaults = defaults
        self._threads = Threads()
        self._is_closed = False
        self._has_lost = False
        """Whether a job has ended because a loan had, of which this client did not know."""
        self._adapter: Adapter | None = None
        self._facts: ComponentFacts | None = None
        self._defaults: dict[str, Any] = {}

    @classmethod
    @names_unknown("Pipeline.open")
    def open(
        cls,
        source: PathLike | None = None,
        *,
        transformer: PathLike | None = None,
        transformer_2: PathLike | None = None,
        vae: PathLike | None = None,
        text_encoders: Paths = (),
        tokenizers: PathLike | Mapping[str, PathLike] | None = None,
        image_encoder: PathLike | None = None,
        scheduler: PathLike | Mapping[str, Any] | None = None,
        variant: str | None = None,
        compute_dtype: ComputeDType | None = None,
        acceleration: Acceleration | None = None,
        device: str | None = None,
        name: str | None = None,
        keep_alive: float | None = None,
        defaults: Mapping[str, Any] | None = None,
        client: Client | None = None,
        runtime_dir: str | os.PathLike[str] | None = None,
        wait_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> Pipeline:
        """Find the parts of a pipeline and lend them to the workers.

        ``source`` is a folder that diffusers has saved (with ``model_index.json``), an all-in-one checkpoint, or a name
        in ``models.toml``. Parts are also given by their own files, in place of those of ``source``: ``text_encoders``
        in any order, or by role (``text_encoder``, ``text_encoder_2``); ``tokenizers`` is a folder with
        those of each encoder, one tokenizer's own, or a checkout of ComfyUI; ``image_encoder`` the CLIP vision model of
        Wan 2.1 I2V. A folder's scheduler is obeyed with all of its settings; ``scheduler`` replaces it, by its file or
        its values. ``variant`` (``fp16``) selects weights in a folder. ``compute_dtype`` and ``device`` are
        those of :meth:`Client.lend`, and so is ``acceleration`` for an image encoder, the one part that runs as its
        class.

        ``name`` is in the labels of loans (``NAME/transformer``), for ``Client.unload``; it is the folder's or file's
        unless given. With ``keep_alive``, the models are returned after so many seconds without a call, and the next
        call lends them again. ``defaults`` replace those of :attr:`defaults`. Without a ``client``, the pipeline has
        one of its own, made with ``runtime_dir``, ``wait_s`` and ``deadline_s``.

        Raises:
            BadRequest: an argument that is not known, names no part or has no effect, a path where nothing is, or a
                part that does not fit the others.
            BadCheckpoint: a file is none of its kind, or one of a folder is missing; every fault is named.
            Unsupported: a pipeline, a scheduler or a model that no family runs; names it and the value.
            DaemonUnreachable, OutOfMemory and others: as :class:`Client` and :meth:`Client.lend`.
        """
        if keep_alive is not None:
            check_seconds("keep_alive", keep_alive)
        if client is not None and not isinstance(client, Client):
            raise BadRequest(f"client: {client!r:.100} of type {type(client).__name__} is no Client")
        if client is not None and (runtime_dir is not None or wait_s or deadline_s is not None):
            raise BadRequest("client beside runtime_dir, wait_s or deadline_s: the client has its own; leave them out")
        opening = opening_of(
            source,
            parts={TRANSFORMER: transformer, SECOND: transformer_2, VAE: vae, IMAGE_ENCODER: image_encoder},
            text_encoders=text_encoders,
            tokenizers=tokenizers,
            scheduler=scheduler,
            variant=variant,
            compute_dtype=compute_dtype,
            acceleration=acceleration,
            name=name,
            defaults=defaults,
        )
        found = opening.source
        silence_s = SILENCE_DEADLINE_S if deadline_s is None else deadline_s
        own = client or Client(runtime_dir, name=f"pipeline {found.name}"[:64], wait_s=wait_s, deadline_s=silence_s)
        loans = Loans(own, found, compute_dtype=opening.compute_dtype, acceleration=opening.acceleration, device=device)
        pipe = cls(own, found, loans, owns_client=client is None, defaults=opening.defaults, keep_alive=keep_alive)
        try:
            pipe.load()
            if isinstance(tokenizers, Mapping):
                check_tokenizer_roles(tokenizers, pipe.facts, pipe.name)
        except BaseException:
            pipe.close()
            raise
        return pipe

    # --- What it is ----------------------------------------------------------------------------------

    @property
    def facts(self) -> ComponentFacts:
        """The facts of the transformer."""
        return self._known()[0]

    @property
    def family(self) -> str:
        """The family of the transformer: ``flux1``, ``wan``."""
        return self.facts.family

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What a call uses for arguments that it does not have, by their names; ``fps`` is of ``save``."""
        self._known()
        return dict(self._defaults)

    @property
    def arguments(self) -> Mapping[str, str]:
        """The arguments of a call: empty for those that this model honours, else why it refuses them."""
        refused = self._known()[1].refused()
        return {name: refused.get(name, "") for name in ARGUMENTS}

    @property
    def files(self) -> Mapping[str, tuple[str, ...]]:
        """The paths of the parts, by role."""
        return {role: (part.path,) for role, part in self._source.parts.items()}

    @property
    def loans(self) -> Mapping[str, Loan]:
        """The loans of the parts, by role."""
        return self._loans.parts

    @property
    def is_loaded(self) -> bool:
        """Whether all parts are lent."""
        return self._loans.are_live

    def _known(self) -> tuple[ComponentFacts, Adapter]:
        if self._facts is None or self._adapter is None:
            raise Closed(f"pipeline {self.name}: it was never loaded; open it again")
        return self._facts, self._adapter

    # --- Loading -------------------------------------------------------------------------------------

    def load(self) -> None:
        """Lend what is not lent: after :meth:`unload`, or in a new daemon. Calls do it by themselves.

        Raises:
            Closed: the pipeline is closed.
            XditdError: as :meth:`Client.lend`.
        """
        self._check_open()
        parts = self._lend()
        facts = parts[TRANSFORMER].facts
        assert facts.transformer is not None  # lent as a transformer
        self._loans.check(parts)
        if facts.transformer.prompt is not None and self._source.encoders:
            given, needed = self._source.tokenizers, facts.transformer.prompt.tokenizers
            there = {role: classes for role, classes in needed.items() if tokenizer_path(given, role, classes)}
            self._loans.tokenizers(there)  # a call says what is missing
        if self._facts is not None:
            return
        adapter, self._defaults = rules_of(self._source, facts, self._given_defaults)
        self._adapter, self._facts = adapter, facts

    def _lend(self) -> Mapping[str, Loan]:
        has_lost, self._has_lost = self._has_lost, False
        if has_lost:
            self._loans.renew()
        parts = self._loans.lend()
        check_same_model(parts[TRANSFORMER].facts, self._facts, self.name)
        return parts

    def unload(self) -> None:
        """Return the models and free their memory in the workers; the next call lends them again."""
        self._threads.maker.check()
        self._keep_alive.stop()
        self._loans.return_all()

    def close(self) -> None:
        """Cancel calls in threads, return the models, and close the pipeline's own client. May be called twice."""
        if not self._threads.maker.is_here:
            return  # a fork's loans are those of the other process
        self._is_closed = True
        self._keep_alive.close()
        self._threads.close()
        if self._owns_client:
            self.client.close()  # which ends all loans
        else:
            self._loans.close()

    def _check_open(self) -> None:
        self._threads.maker.check()
        if self._is_closed:
            raise Closed(f"pipeline {self.name} is closed; open it again")

    def _end(self, error: BaseException | None = None, *, lends_all: bool = True) -> None:
        """A call has ended, well or by an error. ``lends_all``: the next one lends all that it needs again."""
        if isinstance(error, LOST):
            self._has_lost = True
            error.retryable = lends_all and not self._is_closed
        self._keep_alive.end()

    # --- Calls ---------------------------------------------------------------------------------------

    @names_unknown("Pipeline")
    def __call__(
        self,
        prompt: Texts | None = None,
        *,
        prompt_2: Texts | None = None,
        negative_prompt: Texts | None = None,
        max_sequence_length: int | None = None,
        weights: bool = False,
        image: Any = None,
        mask: Any = None,
        last_image: Any = None,
        references: Any = (),
        control: Any | Control | Sequence[Control] = None,
        loras: Sequence[tuple[Any, ...]] = (),
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int | None = None,
        num_images: int | None = None,
        strength: float | None = None,
        options: Mapping[str, bool | int | float] | None = None,
        step_cache: float = 0.0,
        conditioning: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        deadline_s: float | None = None,
    ) -> PipelineResult:
        """Make pictures or videos from words.

        ``prompt`` is one text or several, with ``num_images`` pictures of each; ``negative_prompt`` one, or one for
        each. ``prompt_2`` is what FLUX.1's T5 reads in place of the prompt, one text or one for each.
        ``max_sequence_length`` is to how many tokens prompts are padded or cut. ``weights`` asks that ``(cat:1.2)`` in
        a prompt counts, which is text otherwise. Pictures are paths, PIL images, arrays (height,
        width, 3) of uint8 or floats in [0, 1], or tensors (3, height, width) in [0, 1]. ``image`` is where steps start
        from, by ``strength``, or what the model makes a picture or video from; ``mask`` is white where it is made anew;
        ``references`` are pictures that the prompt refers to; ``control`` is a control picture, a list of pictures for
        a video, or ``Control`` objects with ControlNets. ``loras`` are pairs of a path and a strength, of two
        transformers with the role as a third.

        ``seed`` is drawn unless given, and makes the same pictures again. ``guidance`` is the scale that the model's
        pipeline has; ``sigmas`` are shifted by the folder's scheduler; ``options`` the family's own; ``conditioning``
        the tensors of :meth:`Client.generate` in place of a prompt. ``on_progress`` gets each event, and
        ``on_preview(image, step, total)`` the first picture as each step predicts it; if one raises, the job is
        cancelled.
        What is not given has the value of :attr:`defaults`.

        Raises:
            BadRequest: an argument that this model cannot honour, by name, or a value that is none.
            XditdError: the error that ended the job; if ``retryable``, the same call may work later.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        for name in OF_CALLERS:
            check_function(name, arguments.pop(name))
        job: PipelineJob | None = None
        is_last = False
        while True:
            try:
                with self.start(previews=on_preview is not None, **arguments) as job:
                    return job.watch(on_progress, on_preview)
            except LOST:  # another program or thread has ended a loan; the next start lends it again
                self._check_open()
                if is_last or (job is not None and job.has_begun):
                    raise
            is_last = True

    def start(
        self, prompt: Texts | None = None, *, previews: bool = False, deadline_s: float | None = None, **arguments: Any
    ) -> PipelineJob:
        """Start a call, and return its job without waiting for it. Arguments are those of a call.

        With ``previews``, ``job.preview()`` is the first picture as the last step predicts it.

        Raises:
            BadRequest: as a call; or an argument that calls do not have.
        """
        check_names(arguments, OF_JOBS, "Pipeline.start")
        self._check_open()
        _, adapter = self._known()
        if arguments.get("num_images") is None:
            arguments["num_images"] = self._defaults["num_images"]
        given = {"prompt": prompt, **arguments}
        check_refused(given, adapter.refused(), adapter.title)
        call = call_of(given, self._defaults)
        self._keep_alive.begin()
        ended = partial(self._end, lends_all=lends_all(call))
        try:
            runner = Runner(self.client, self._source, self._loans, self._lend(), adapter)
            return runner.start(call, previews=previews, deadline_s=deadline_s, ended=ended)
        except BaseException as error:
            ended(error)
            raise

    def submit(self, prompt: Texts | None = None, **arguments: Any) -> RunFuture[PipelineResult]:
        """Run a call in a thread, and return its future; ``cancel()`` of a running one cancels its job.

        Callbacks run in that thread. Up to 16 calls run at the same time, others wait.
        """
        check_names(arguments, ARGUMENTS, "Pipeline.submit")
        self._check_open()
        call: Callable[[], PipelineResult] = partial(self, prompt, **arguments)
        return self._threads.submit(call)

    async def run_async(self, prompt: Texts | None = None, **arguments: Any) -> PipelineResult:
        """Run a call for an event loop: in a thread, as :meth:`submit`. Cancelling the task cancels the job.

        If the loop is closed before the call has ended, the job is cancelled, and a warning is logged.
        """
        future = self.submit(prompt, **arguments)
        return await self._threads.awaited(future, f"a call of pipeline {self.name}")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "loaded" if self.is_loaded else "not loaded"
        family = "?" if self._facts is None else self._facts.family
        return f"<Pipeline {self.name} of {family}, {state}>"
