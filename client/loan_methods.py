"""The methods of ``Client`` that lend components and end their loans."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from xditd.client.argument_names import names_unknown
from xditd.client.connection import CONTROL_DEADLINE_S
from xditd.client.lend_errors import naming_path
from xditd.client.loans import Loan, any_component_id, kind_named
from xditd.client.session import Session
from xditd.ipc.errors import BadRequest, UnknownComponent, XditdError
from xditd.ipc.name_lists import listed
from xditd.ipc.renamed import Renamed
from xditd.ipc.replies import Status
from xditd.ipc.requests import GetStatus
from xditd.ipc.tensors import Acceleration, ComponentKind, ComputeDType, CopiedBytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from xditd.client.lending import Offer
    from xditd.client.loras.lending import ReadLora

logger = logging.getLogger(__name__)


class LoanMethods:
    """A base of ``Client``, which sets ``_current``: a function that returns its session."""

    _current: Callable[[], Session]

    @names_unknown("Client.lend")
    def lend(
        self,
        source: Mapping[str, torch.Tensor] | str | os.PathLike[str] | torch.nn.Module,
        *,
        kind: ComponentKind | str | None = None,
        label: str | None = None,
        device: str | None = None,
        generation: int = 0,
        changed: Collection[str] | None = None,
        as_class: bool = False,
        acceleration: Acceleration | None = None,
        variant: str | None = None,
        compute_dtype: ComputeDType | None = None,
        prefix: str = "",
        deadline_s: float | None = None,
    ) -> Loan:
        """Lend a component; returns when every worker has mapped, verified and plugged it.

        ``source`` is a state dict, a module, or a path: of a safetensors or GGUF file, of the index of a checkpoint in
        several files, or of a folder that ``save_pretrained`` of diffusers or transformers wrote, of which ``variant``
        (``fp16``) selects the weights if there are several. Without ``kind``, the tensor names determine it. ``device``
        (``cuda``, ``cuda:1``) first loads it into an arena there. Memory that can be shared is not copied;
        ``Loan.copied`` counts the bytes that were. Lending the same memory again returns at once; after writing to it,
        increase ``generation``. If you know which tensors were written since the generation before, name them in
        ``changed``: what the workers hold of all others is not copied again.

        A module of diffusers or transformers that no family runs, or that differs from what its class makes, runs as
        its own class does, with :meth:`call`; with ``as_class`` every module does. So does a path with a
        ``config.json``, as the class's ``from_pretrained`` makes it with ``torch_dtype`` the dtype of its weights.
        ``acceleration`` is how its forwards run on GPUs, instead of the daemon's setting of this name.

        Packed weights (fp8, int8, GGUF and others of docs/formats.md) are lent as they are, and dequantised into
        ``compute_dtype`` when they are multiplied: without it, into the half precision of most plain weights
        beside them, or bfloat16. ``prefix`` is what the names of its tensors begin with, in a file that has several
        components of one kind. A folder that runs as its class, with packed weights, is loaded in ``compute_dtype``.

        Raises:
            BadRequest: an argument is invalid, or a path where nothing is.
            BadCheckpoint: the file or the set of tensors is invalid; every fault is named.
            UnknownFamily, UnsupportedDtype, Unsupported: the workers cannot run it.
            StaleSource: the workers do not read what this process wrote.
            OutOfMemory: too little free memory in this process or in a worker.
        """
        named = None if kind is None else kind_named(kind)
        if named is ComponentKind.TOKENIZER:
            if not isinstance(source, (str, bytes, os.PathLike)):
                raise BadRequest(f"tokenizer: give the path of its folder, not a {type(source).__name__}")
            given = [generation, device, changed, as_class, acceleration, variant, compute_dtype]
            if any(each is not None and each is not False and each != 0 for each in given):
                raise BadRequest("tokenizer: it takes a label alone; leave the other arguments out")
            return self.lend_tokenizer(source, label=label, deadline_s=deadline_s)

        if device is not None and not generation:
            with contextlib.suppress(XditdError):  # what is wrong, the lend says
                self._announce(
                    source,
                    waits=False,  # the lend waits, at most its own deadline
                    kind=named,
                    label=label,
                    as_class=as_class,
                    variant=variant,
                    compute_dtype=compute_dtype,
                    prefix=prefix,
                )

        def make_offer() -> Offer:
            from xditd.client.lending import describe

            return describe(
                source,
                kind=named,
                label=label,
                device=device,
                generation=generation,
                changed=changed,
                as_class=as_class,
                acceleration=acceleration,
                variant=variant,
                compute_dtype=compute_dtype,
                prefix=prefix,
            )

        with naming_path(source, label):
            return self._current().lend(make_offer, deadline_s)

    @names_unknown("Client.prepare")
    def prepare(
        self,
        source: Mapping[str, Any] | str | os.PathLike[str] | torch.nn.Module,
        *,
        kind: ComponentKind | str | None = None,
        label: str | None = None,
        as_class: bool = False,
        variant: str | None = None,
        compute_dtype: ComputeDType | None = None,
        prefix: str = "",
    ) -> None:
        """Announce a component that will be lent: idle workers build its model, while this program makes its weights.

        Returns at once, also while workers start. Arguments are those of the :meth:`lend` that follows. Of tensors, on
        any device, ``meta`` included, only names, dtypes and shapes are read, and of files the headers. ``source`` may
        be a configuration, as the ``config.json`` of diffusers or transformers has it; its weights will have the
        ``compute_dtype``, bfloat16 unless given.

        Nothing depends on it: without a lend, workers keep the model without weights, at most 8 of such. What they
        cannot build is refused by the lend. A lend with a ``device`` announces its component by itself, and so do
        ``Pipeline.open`` with one and ComfyUI's nodes.

        Raises:
            BadCheckpoint, Unsupported, BadRequest: a file or a value that :meth:`lend` would refuse before it asks the
                workers.
        """
        self._announce(
            source,
            waits=True,
            kind=None if kind is None else kind_named(kind),
            label=label,
            as_class=as_class,
            variant=variant,
            compute_dtype=compute_dtype,
            prefix=prefix,
        )

    def _announce(
        self, source: Mapping[str, Any] | str | os.PathLike[str] | torch.nn.Module, *, waits: bool, **given: Any
    ) -> None:
        from xditd.client.outlines import outline_of

        self._current().announce(outline_of(source, **given), waits=waits)

    @names_unknown("Client.lend_tokenizer")
    def lend_tokenizer(
        self, source: str | os.PathLike[str], *, label: str | None = None, deadline_s: float | None = None
    ) -> Loan:
        """Lend the folder of a tokenizer, or of a processor, for :meth:`encode_prompt`.

        ``source`` is a folder that transformers saved, such as ``tokenizer`` of a diffusers pipeline. Its JSON and text
        files are lent, with those of SentencePiece if there is no ``tokenizer.json``; the workers build transformers'
        own class of them once, and keep no file. No code of the folder is run. ``facts.tokenizer`` says what it has.

        Raises:
            BadRequest: there is no such folder.
            BadCheckpoint: the folder has no tokenizer, or a file of it is invalid; names the file.
            Unsupported: its class is not known, or its configuration names code of its own.
        """

        def make_offer() -> Offer:
            from xditd.client.tokenizer_folders import describe_tokenizer

            return describe_tokenizer(source, label=label)

        with naming_path(source, label):
            return self._current().lend(make_offer, deadline_s)

    @names_unknown("Client.lend_lora")
    def lend_lora(
        self,
        source: Mapping[str, torch.Tensor] | str | os.PathLike[str] | ReadLora,
        *,
        label: str | None = None,
        device: str | None = None,
        generation: int = 0,
        metadata: Mapping[str, str] | None = None,
        as_class: bool = False,
        deadline_s: float | None = None,
    ) -> Loan:
        """Lend a LoRA, for use with any component that has its layers, by :meth:`Loan.with_loras`.

        ``source`` is a safetensors file, a folder that PEFT wrote, or a state dict, whose ``metadata`` is what a file
        has in its header. Names may be those of kohya, diffusers, PEFT, OneTrainer, LyCORIS, XLabs, ai-toolkit or
        ComfyUI. A program that has read one itself gives a ``client.loras.lending.ReadLora``. ``device`` and
        ``generation`` are those of :meth:`lend`. No weight of a component is read or changed: workers add the low-rank
        branch to the layers' results. Names that fit no layer are logged once, and are in the loan's ``facts.lora``.
        With ``as_class`` it is for modules that run as their class, of any class: its layers are submodules of theirs
        by name, as diffusers and PEFT spell them.

        Raises:
            Unsupported: LoHa, LoKr, DoRA and other adapters that are no product of two factors; factors in other dtypes
                than float32, bfloat16 and float16; a LoRA of a model that no family runs.
            BadRequest: there is no such file or folder.
            BadCheckpoint: the file is invalid, or the LoRA is not whole; every fault is named.
            StaleSource, OutOfMemory: as :meth:`lend`.
        """

        def make_offer() -> Offer:
            from xditd.client.loras.lending import describe_lora

            return describe_lora(
                source, label=label, device=device, metadata=metadata, generation=generation, as_class=as_class
            )

        with naming_path(source, label):
            loan = self._current().lend(make_offer, deadline_s)
        facts = loan.facts.lora
        if facts is not None and facts.unknown_count and not loan.is_reused:
            logger.warning(
                "layers of a LoRA are of no known family, and left out label=%s count=%d names=%s",
                loan.label, facts.unknown_count, listed(facts.unknown),
            )  # fmt: skip
        return loan

    def return_(self, loan: Loan, *, deadline_s: float | None = None) -> None:
        """Return a loan; when this returns, no worker maps the component."""
        if not isinstance(loan, Loan):
            raise BadRequest(f"loan: {loan!r:.100} is of type {type(loan).__name__}; give what lend() returned")
        loan.return_(deadline_s=deadline_s)

    def check_memory(self, *, deadline_s: float | None = None) -> None:
        """Check that every worker reads what this process writes into shared memory. The first lend does this too.

        Raises:
            StaleSource: a worker read something else.
        """
        self._current().check_memory(deadline_s)

    check_canary = Renamed("check_memory")

    def adopt(self, component_id: str, *, deadline_s: float | None = None) -> CopiedBytes:
        """Copy a component into the workers' own memory, whichever process of this user lent it; see ``Loan.adopt``."""
        found = any_component_id("component_id", component_id)
        return self._current().adopt(found, found, deadline_s)

    def revoke(self, component: Loan | str, *, deadline_s: float | None = None) -> None:
        """End a loan, or free an adopted component, whichever process of this user lent it.

        Returns when no worker maps or holds it. Running and later jobs that use it fail with ``LeaseLost``.
        """
        self._current().revoke(any_component_id("component", component), deadline_s)

    def unload(self, name: str, *, deadline_s: float | None = None) -> int:
        """End the loans of a pipeline by its name, whichever process of this user lent them; return how many ended.

        They are those labelled ``name`` or ``name/...``, as a ``Pipeline`` of this name labels its parts. Adopted
        components of this name are freed, too. A pipeline that is still open lends them again with its next call.

        Raises:
            UnknownComponent: there is none; names those that there are.
        """
        if not isinstance(name, str):
            raise BadRequest(f"name: {name!r:.100} is of type {type(name).__name__}; give the name of a pipeline")
        request = GetStatus(request_id=self._current().connection.next_request_id())
        components = self._current().connection.ask(request, Status, deadline_s=CONTROL_DEADLINE_S).daemon.components
        found = [each for each in components if each.label == name or each.label.startswith(f"{name}/")]
        if not found:
            known = sorted({each.label.partition("/")[0] for each in components})
            there = f"there are {listed(known)}" if known else "nothing is lent"
            raise UnknownComponent(f"{name}: no component is lent under this name; {there}")
        for each in found:
            with contextlib.suppress(UnknownComponent):  # its owner has returned it meanwhile
                self.revoke(each.component_id, deadline_s=deadline_s)
        return len(found)
