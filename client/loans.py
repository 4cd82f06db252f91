"""``Loan``: the client's side of a lent component; ``LoanWithLoras``: the same with LoRAs, as jobs use it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Protocol

from xditd.client.forks import OfOneProcess
from xditd.client.loras.strengths import Strength, strengths_by_step
from xditd.client.waiting import check_deadline
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, LeaseLost, XditdError
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.renamed import Renamed
from xditd.ipc.replies import Lent
from xditd.ipc.tensors import ComponentKind, CopiedBytes, Tier


class LoanSession(Protocol):
    """The methods of a session that its loans use."""

    @property
    def is_lost(self) -> bool:
        """Whether the session has ended, and its loans with it."""

    def check_loans(self, what: str) -> None:
        """Raise ``Closed``, ``DaemonUnreachable`` or ``LeaseLost`` if the session has ended."""

    def adopt(self, component_id: str, label: str, deadline_s: float | None) -> CopiedBytes:
        """Copy a component into the workers' own memory; returns the bytes copied."""

    def return_loan(self, component_id: str, label: str, deadline_s: float | None) -> None:
        """Return a loan; when this returns, no worker maps the component."""

    def return_soon(self, component_id: str, *, is_adopted: bool) -> None:
        """Return a loan, or free an adopted component, in a finalizer."""


class Loan(OfOneProcess):
    """A component that the workers map until ``return_()`` is called, the client is closed, or the daemon exits.

    Do not write to the lent memory during that time; the loan keeps its storages alive.
    Leaving a ``with`` block returns the loan.
    """

    is_skeleton_reused = Renamed("is_model_reused")

    def __init__(
        self,
        session: LoanSession,
        lent: Lent,
        *,
        label: str,
        copied_here: CopiedBytes,
        timings_ms: dict[str, float],
    ) -> None:
        self._session = session
        self._is_returned = False
        self.is_adopted = False
        """Whether the workers have copied it to their own memory: it then outlives this client."""
        self.kind: ComponentKind = lent.facts.kind
        self.label = label
        self.component_id = lent.component_id
        self.facts: ComponentFacts = lent.facts
        """Shapes, dtypes, and the jobs that it can run."""
        self.tiers: tuple[Tier, ...] = lent.tiers
        self.lent_bytes = lent.lent_bytes
        self.copied: CopiedBytes = copied_here + lent.copied
        """Bytes copied for this loan by kind of copy: by the client, and by all ranks together."""
        self.is_reused = lent.is_reused
        self.is_model_reused = lent.is_model_reused
        self.timings_ms = timings_ms
        self.lent_ns = time.time_ns()
        """When it was lent, by the clock of files: what was written later is not what workers hold."""

    @property
    def family(self) -> str:
        """The model family."""
        return self.facts.family

    @property
    def is_live(self) -> bool:
        """Whether jobs can still use it."""
        return not self._is_returned and not self._session.is_lost

    def check(self) -> None:
        """Refuse a loan that has ended.

        Raises:
            LeaseLost: it was returned, or its daemon has exited and another one runs.
            DaemonUnreachable: its daemon has exited, and none runs.
            Closed: its client is closed.
        """
        what = f"component {self.label} ({self.component_id})"
        if self._is_returned:
            raise LeaseLost(f"{what}: was returned; lend it again")
        self._session.check_loans(what)

    def adopt(self, *, deadline_s: float | None = None) -> CopiedBytes:
        """Copy the component into the workers' own memory, and release this process's; returns the bytes copied.

        Each rank that maps the lent memory makes one copy: on its GPU, or on the host where the ranks run on the CPU.
        The component then outlives this client, under its ``component_id``, until ``Client.revoke`` or the end of the
        worker group. Returning the loan or writing to the lent memory then has no effect.

        Raises:
            LeaseLost: the loan has ended.
            OutOfMemory: a worker has too little memory for the copy; the loan is unchanged.
        """
        self.check()
        copied = self._session.adopt(self.component_id, self.label, deadline_s)
        self.is_adopted = True
        return copied

    def with_loras(self, loras: Sequence[tuple[Loan | str, Strength]]) -> LoanWithLoras:
        """Return this component with LoRAs, for jobs: ``client.generate(loan.with_loras([(lora, 0.8)]), ...)``.

        ``loras`` are loans of :meth:`Client.lend_lora`, or their ids, each with its strength, which may be negative; 0
        is as without it. A generation also takes strengths by step: one for each step (the last one stays), or pairs
        ``(step, strength)``, each from that step on, counted from 0. Nothing is sent and no weight changes: jobs name
        the LoRAs. This loan stays as it is.

        Raises:
            BadRequest: a loan of no LoRA, or of one whose layers this family does not have, a component that takes
                none, such as a VAE, or a strength that is not from -1e6 to 1e6. A module that runs as its class is
                compared with the LoRA's names by the job.
            LeaseLost: a loan has ended.
        """
        return LoanWithLoras(self, loras)

    def return_(self, *, deadline_s: float | None = None) -> None:
        """End the loan; when this returns, no worker maps the component. May be called twice.

        Does nothing for an adopted component: the workers no longer map memory of this process.
        """
        check_deadline(deadline_s)
        if self._is_returned or self.is_adopted:
            return
        self._is_returned = True
        self._session.return_loan(self.component_id, self.label, deadline_s)

    def return_soon(self) -> None:
        """End the loan, or free the adopted component, in a finalizer: waits for nothing and takes no lock."""
        if not self._is_returned:
            self._is_returned = True
            self._session.return_soon(self.component_id, is_adopted=self.is_adopted)

    def __enter__(self) -> Loan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.return_()
        except XditdError:
            if error is None:
                raise  # the error inside the block is more important

    def __repr__(self) -> str:
        tiers = "+".join(tier.value for tier in self.tiers)
        state = "live" if self.is_live else "ended"
        return f"<Loan {self.label} {self.component_id} {self.family} {tiers} {self.lent_bytes} bytes, {state}>"


_TAKE_LORAS: Final = (ComponentKind.TRANSFORMER, ComponentKind.TEXT_ENCODER, ComponentKind.MODULE)


class LoanWithLoras(OfOneProcess):
    """A lent component with LoRAs and their strengths: a light view, which holds no memory and needs no return.

    Give it to jobs in place of the loan. It can be used as long as all its loans live.
    """

    def __init__(self, loan: Loan, loras: Sequence[tuple[Loan | str, Strength]]) -> None:
        self.loan = loan
        if not isinstance(loras, Sequence | Iterator) or isinstance(loras, str | bytes):
            raise BadRequest(
                f"loras: {loras!r:.100} is of type {type(loras).__name__}: a list of pairs is needed, of a loan of "
                "lend_lora() and a strength, such as [(lora, 0.8)]; an empty list for none"
            )
        self.loras = tuple(_checked(loan, each) for each in loras)
        if self.loras and loan.kind not in _TAKE_LORAS:
            raise BadRequest(f"loras: {loan.label} is a {loan.kind.value}, which takes none; leave them out")
        if len(self.loras) > limits.MAX_LORAS:
            raise BadRequest(f"loras: {len(self.loras)}, at most {limits.MAX_LORAS} of one component")

    @property
    def component_id(self) -> str:
        """The id of the component without LoRAs."""
        return self.loan.component_id

    @property
    def facts(self) -> ComponentFacts:
        """The facts of the component, which LoRAs do not change."""
        return self.loan.facts

    def with_loras(self, loras: Sequence[tuple[Loan | str, Strength]]) -> LoanWithLoras:
        """Return the component with these LoRAs, too."""
        return LoanWithLoras(self.loan, [*self.loras, *LoanWithLoras(self.loan, loras).loras])

    def uses(self) -> tuple[LoraUse, ...]:
        """Return the LoRAs as a request names them.

        Raises:
            LeaseLost: a loan has ended.
        """
        return tuple(
            LoraUse(component_id=component_id_of(lora, ComponentKind.LORA), strength=strength, later=later)
            for lora, strength, later in ((lora, *strengths_by_step(given)) for lora, given in self.loras)
        )

    def __repr__(self) -> str:
        names = ", ".join(f"{lora.label if isinstance(lora, Loan) else lora} {given}" for lora, given in self.loras)
        return f"<{self.loan!r} with LoRAs: {names or 'none'}>"


def any_component_id(name: str, component: object) -> str:
    """Return the id of a loan of any kind, which may have ended; a component id is returned unchanged.

    Raises:
        BadRequest: neither a loan nor an id; ``name`` is that of the argument.
    """
    if isinstance(component, str):
        return component
    if not isinstance(component, Loan | LoanWithLoras):
        raise BadRequest(
            f"{name}: {component!r:.100} is of type {type(component).__name__}; give what lend() returned, or an id "
            "that `xditd status` shows"
        )
    return component.component_id


def kind_named(kind: ComponentKind | str) -> ComponentKind:
    """Convert the name of a component kind.

    Raises:
        BadRequest: unknown name.
    """
    try:
        return ComponentKind(kind)
    except ValueError:
        known = ", ".join(each.value for each in ComponentKind)
        raise BadRequest(f"kind {kind!r}: unknown; choose one of {known}") from None


def component_id_of(component: Loan | str, kind: ComponentKind, name: str | None = None) -> str:
    """Return the id of a live loan of this kind; a component id is returned unchanged.

    ``name`` is that of the argument in messages, without it that of the kind.

    Raises:
        BadRequest: neither a loan nor an id, or a loan of another kind.
        LeaseLost: the loan has ended.
    """
    name = name or kind.value
    if isinstance(component, str):
        return component
    if not isinstance(component, Loan):
        raise BadRequest(f"{name}: a loan or a component id is needed, not {type(component).__name__}")
    component.check()
    if component.kind is kind:
        return component.component_id
    if component.kind is ComponentKind.MODULE and kind is not ComponentKind.LORA:
        reason = component.facts.family_reason
        why, rest = (f"no family runs it: {reason}", "") if reason else ("as_class was given", ", without as_class")
        raise BadRequest(
            f"{name}: {component.label} runs as its class {component.family}, by client.call(), since {why}; for this "
            f"job lend a {kind.value} of a family (docs/models.md lists them){rest}"
        )
    raise BadRequest(f"{name}: {component.label} is a {component.kind.value}; name a {kind.value}")


def _checked(loan: Loan, given: object) -> tuple[Loan | str, Strength]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise BadRequest(f"loras: {given!r:.100}: pairs of a loan of lend_lora() and a strength are needed")
    lora, strength = given
    component_id_of(lora, ComponentKind.LORA)
    strengths_by_step(strength)
    if isinstance(lora, Loan) and loan.kind is not ComponentKind.MODULE:  # its class's layers are known at the job
        families = {} if lora.facts.lora is None else lora.facts.lora.families
        if loan.family not in families:
            of = lora.family if families else "a module that runs as its class (as_class=True)"
            raise BadRequest(
                f"LoRA {lora.label} is of {of}, and {loan.label} of {loan.family}: use it with the model that it was "
                "made for"
            )
    return lora, strength
