"""The parts of a pipeline on loan: lent when they are needed, lent again when their daemon has gone, and returned."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from xditd.client.client import Client
from xditd.client.loans import Loan
from xditd.client.model_folders import has_config
from xditd.client.part_checks import assigned, kind_fault, misfits
from xditd.client.pipeline.calls import Call
from xditd.client.pipeline.files import tokenizer_path
from xditd.client.pipeline.sources import IMAGE_ENCODER, TRANSFORMER, Part, Source
from xditd.ipc.addresses import check_is_there
from xditd.ipc.errors import BadCheckpoint, BadRequest, Closed, Unsupported, XditdError
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import Acceleration, ComputeDType

logger = logging.getLogger(__name__)


class Loans:
    """The loans of a pipeline's parts and LoRAs. Safe to use from several threads."""

    def __init__(
        self,
        client: Client,
        source: Source,
        *,
        compute_dtype: ComputeDType | None,
        acceleration: Acceleration | None,
        device: str | None,
    ) -> None:
        self._client = client
        self._source = source
        self._compute_dtype = compute_dtype
        self._acceleration = acceleration
        self._device = device
        self._lock = threading.Lock()
        self._is_closed = False
        self._parts: dict[str, Loan] = {}
        self._tokenizers: dict[str, Loan] = {}
        self._loras: dict[str, Loan] = {}

    @property
    def parts(self) -> Mapping[str, Loan]:
        """The loans by role, live or not."""
        return dict(self._parts)

    @property
    def are_live(self) -> bool:
        return set(self._parts) == set(self._source.parts) and all(each.is_live for each in self._parts.values())

    def lend(self) -> Mapping[str, Loan]:
        """Lend all parts that are not lent; return all loans by role, of which another thread may end some.

        Raises:
            Closed: the pipeline is closed.
            Unsupported: a transformer or VAE that no family runs.
            BadCheckpoint, OutOfMemory and others: as :meth:`Client.lend`.
        """
        with self._open():
            missing = {
                role: part
                for role, part in self._source.parts.items()
                if role not in self._parts or not self._parts[role].is_live
            }
            if self._device is not None:  # this process loads them one after the other
                for role, part in missing.items():
                    with contextlib.suppress(XditdError):  # what is wrong, the lend says
                        self._client.prepare(part.path, **self._as_given(role, part))
            for role, part in missing.items():
                self._parts[role] = self._lend(role, part)
            return dict(self._parts)

    def renew(self) -> None:
        """Lend all parts again, after a loan has ended that counted as live: another program has ended it.

        What is still lent stays so meanwhile, and is not copied again.

        Raises:
            XditdError: as :meth:`lend`.
        """
        with self._open():
            old = [*self._parts.values(), *self._tokenizers.values(), *self._loras.values()]
            self._tokenizers, self._loras = {}, {}
            for role, part in self._source.parts.items():
                self._parts[role] = self._lend(role, part)
        _return(old)

    def _lend(self, role: str, part: Part) -> Loan:
        loan = self._client.lend(
            part.path,
            device=self._device,
            acceleration=self._acceleration if role == IMAGE_ENCODER else None,
            **self._as_given(role, part),
        )
        if part.kind is not None and (fault := kind_fault(loan.facts, part.kind)):
            loan.return_()
            raise Unsupported(f"{role}: {part.path}: {fault}")
        return loan

    def _as_given(self, role: str, part: Part) -> dict[str, Any]:
        """Return how a part is prepared and lent."""
        # A folder is lent with its configuration, which a family has to agree with.
        is_folder = part.variant is not None or (part.prefix is None and has_config(part.path))
        return {
            "kind": None if is_folder else part.kind,
            "label": f"{self._source.name}/{role}",
            "variant": part.variant,
            "compute_dtype": self._compute_dtype,
            "prefix": part.prefix or "",
        }

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Hold the lock of a pipeline that is not closed."""
        with self._lock:
            if self._is_closed:
                raise Closed(f"pipeline {self._source.name} is closed; open it again")
            yield

    def encoders(self, parts: Mapping[str, Loan], needed: Mapping[str, Sequence[str]]) -> dict[str, Loan]:
        """Return the loans of text encoders by the roles of ``needed``, which has the families of each.

        Those of files that were given in another order are found by their families.

        Raises:
            Unsupported: one is missing; names its role and its families.
        """
        given = [parts[role] for role in self._source.encoders]
        places = assigned(needed, [*zip(self._source.encoders, (each.family for each in given), strict=True)])
        for role, families in needed.items():
            if role not in places:
                others = ", ".join(
                    f"{other} {self._source.parts[other].path} ({loan.family})"
                    for other, loan in zip(self._source.encoders, given, strict=True)
                )
                raise Unsupported(
                    f"prompt: {self._source.name} has no {role} ({listed(families)}){others and ', it has ' + others}: "
                    "give text_encoders= to Pipeline.open (--text-encoder in the shell), or conditioning= (--embeds) "
                    "in place of the prompt"
                )
        return {role: given[places[role]] for role in needed}

    def check(self, loans: Mapping[str, Loan]) -> None:
        """Check that every part that was lent has a use, and fits the others.

        Raises:
            BadRequest: one does not; names it, its path and the remedy.
        """
        parts = {role: loan.facts for role, loan in loans.items()}
        transformer = parts[TRANSFORMER].transformer
        encoders = [(role, parts[role]) for role in self._source.encoders]
        faults = list(misfits(parts, encoders, may_lack=True))
        takes = {each.name for each in transformer.conditioning} if transformer is not None else set()
        if IMAGE_ENCODER in parts and "image_embeds" not in takes:
            faults.append((IMAGE_ENCODER, f"this {parts[TRANSFORMER].family} shows no picture to one; remove it"))
        for name, fault in faults:
            at = self._source.parts.get(name)
            raise BadRequest(f"{name}: {'' if at is None else at.path + ': '}{fault}")

    def tokenizers(self, needed: Mapping[str, Sequence[str]]) -> dict[str, Loan]:
        """Return the loans of tokenizers by the roles of ``needed``, which has the classes of each; lend them first.

        Raises:
            Unsupported: one is missing; names its role and its classes.
            BadRequest: one is of another class; names both.
            BadCheckpoint: as :meth:`Client.lend_tokenizer`.
        """
        found: dict[str, Loan] = {}
        with self._open():
            for role, classes in needed.items():
                path = tokenizer_path(self._source.tokenizers, role, classes)
                if path is None:
                    raise Unsupported(
                        f"prompt: {self._source.name} has no {role} ({listed(classes)}): give tokenizers= to "
                        "Pipeline.open (--tokenizers in the shell), a folder with them, or conditioning= (--embeds) in "
                        "place of the prompt"
                    )
                known = self._tokenizers.get(path)
                if known is None or not known.is_live:
                    label = f"{self._source.name}/{role}"
                    known = self._tokenizers[path] = self._client.lend_tokenizer(path, label=label)
                if known.facts.class_name not in classes:
                    raise BadRequest(
                        f"tokenizers: {path}: a {known.facts.class_name}, and {role} is a {' or '.join(classes)}; give "
                        "that of each text encoder, by role or in a folder with both"
                    )
                found[role] = known
        return found

    def lora(self, given: Any) -> Loan:
        """Return the loan of a LoRA, lent once.

        Raises:
            BadCheckpoint and others: as :meth:`Client.lend_lora`.
        """
        if isinstance(given, Loan):
            given.check()
            return given
        if not isinstance(given, str | os.PathLike):
            raise BadRequest(f"loras: {given!r:.100} is no path, and no loan of lend_lora()")
        path = os.path.realpath(os.path.expanduser(os.fspath(given)))
        with self._open():
            known = self._loras.get(path)
            if known is None or not known.is_live:
                check_is_there(path, "loras")
                label = f"{self._source.name}/{os.path.basename(path)}"
                known = self._loras[path] = self._client.lend_lora(path, label=label, device=self._device)
            return known

    def return_all(self) -> None:
        """Return all loans that live; errors of a daemon that has gone are of no account."""
        with self._lock:
            every: Iterable[Loan] = (*self._loras.values(), *self._parts.values(), *self._tokenizers.values())
            self._loras, self._parts, self._tokenizers = {}, {}, {}
        _return(every)

    def close(self) -> None:
        """Return all loans, and lend no more: a call of another thread may be about to."""
        with self._lock:
            self._is_closed = True
        self.return_all()


def lends_all(call: Call) -> bool:
    """Return whether a pipeline lends all that a call needs: no LoRA and no ControlNet is a loan of the caller's."""
    pairs = [each for each in call.loras if isinstance(each, tuple | list)]
    return call.control is None and not any(isinstance(each, Loan) for pair in pairs for each in pair[:1])


def check_same_model(found: ComponentFacts, known: ComponentFacts | None, name: str) -> None:
    """Check that a transformer that was lent again takes the arguments of the one before; other weights may differ.

    Raises:
        BadCheckpoint: its file is that of another model now.
    """
    if known is not None and (found.family, found.transformer) != (known.family, known.transformer):
        raise BadCheckpoint(
            f"pipeline {name}: the file of its transformer is of another model since it was opened; open it again"
        )


def check_tokenizer_roles(given: Mapping[str, Any], facts: ComponentFacts, name: str) -> None:
    """Refuse tokenizers of roles that prompts of a transformer do not have.

    Raises:
        BadRequest: names the role, and those that there are.
    """
    prompt = None if facts.transformer is None else facts.transformer.prompt
    known = {} if prompt is None else {**prompt.tokenizers, **prompt.image_tokenizers}
    for role in given:
        if role not in known:
            roles = listed(f"{each} ({' or '.join(classes)})" for each, classes in known.items()) or "none"
            raise BadRequest(
                f"tokenizers: {role!r:.100} has no use in {name}; {facts.family} has {roles}; leave it out"
            )


def _return(loans: Iterable[Loan]) -> None:
    for loan in loans:
        try:
            if loan.is_live:
                loan.return_()
        except XditdError as error:
            logger.info("loan not returned label=%s reason=%s", loan.label, error.detail)
