"""Components that are lent, as the client sees them."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from xditd.ipc.errors import BadRequest, LeaseLost, XditdError
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.renamed import Renamed
from xditd.ipc.replies import Lent
from xditd.ipc.tensors import ComponentKind, CopiedBytes, Tier


class Lender(Protocol):
    """What a loan asks of the session that made it."""

    @property
    def is_lost(self) -> bool:
        """Whether the daemon that holds the session's loans is gone."""

    def check_loans(self, what: str) -> None:
        """Raise ``Closed``, ``DaemonUnreachable`` or ``LeaseLost`` if the session's loans have ended."""

    def adopt(self, component_id: str, label: str, deadline_s: float | None) -> CopiedBytes:
        """Have the workers copy a component; returns what was copied."""

    def return_loan(self, component_id: str, label: str, deadline_s: float | None) -> None:
        """Take a component back; once this returns no worker maps it."""


class Loan:
    """A component that the workers hold mapped, until ``return_()``, the client's end, or the daemon's.

    The lent memory must stay alive and unwritten meanwhile; the loan keeps the storages that it lent.
    Leaving a ``with`` block returns the loan.
    """

    is_skeleton_reused = Renamed("is_model_reused")

    def __init__(
        self,
        session: Lender,
        lent: Lent,
        *,
        label: str,
        copied_here: CopiedBytes,
        timings_ms: dict[str, float],
    ) -> None:
        self._session = session
        self._is_returned = False
        self.is_adopted = False
        """Whether the workers hold it in memory of their own: it then outlives this client."""
        self.kind: ComponentKind = lent.facts.kind
        self.label = label
        self.component_id = lent.component_id
        self.facts: ComponentFacts = lent.facts
        """What the workers know of it: shapes, dtypes, and what jobs it takes."""
        self.tiers: tuple[Tier, ...] = lent.tiers
        self.lent_bytes = lent.lent_bytes
        self.copied: CopiedBytes = copied_here + lent.copied
        """Bytes copied for this loan by kind: by the client, and by the workers over all ranks."""
        self.is_reused = lent.is_reused
        self.is_model_reused = lent.is_model_reused
        self.timings_ms = timings_ms

    @property
    def family(self) -> str:
        """The model family that runs it."""
        return self.facts.family

    @property
    def is_live(self) -> bool:
        """Whether jobs can still name it."""
        return not self._is_returned and not self._session.is_lost

    def check(self) -> None:
        """Refuse a loan that has ended.

        Raises:
            LeaseLost: it was returned, or the daemon that held it is gone and another one runs.
            DaemonUnreachable: the daemon that held it is gone, and none runs.
            Closed: its client is closed.
        """
        what = f"component {self.label} ({self.component_id})"
        if self._is_returned:
            raise LeaseLost(f"{what}: was returned; lend it again")
        self._session.check_loans(what)

    def adopt(self, *, deadline_s: float | None = None) -> CopiedBytes:
        """Have the workers copy the component, and let go of this process's memory; returns what was copied.

        One copy for each rank that maps the lent memory: on its GPU, or on the host where the ranks run on the CPU.
        The component then outlives this client, by its ``component_id``, until ``Client.revoke`` or the end of the
        worker group. Returning the loan frees nothing any more, and what is written to the lent memory is not seen.

        Raises:
            LeaseLost: the loan has ended.
            OutOfMemory: a worker has no room for the copy; the loan stays as it was.
        """
        self.check()
        copied = self._session.adopt(self.component_id, self.label, deadline_s)
        self.is_adopted = True
        return copied

    def return_(self, *, deadline_s: float | None = None) -> None:
        """Take the component back; once this returns no worker maps it. A loan that has ended is no error.

        Of an adopted component the workers map nothing of this process: there is nothing to take back.
        """
        if self._is_returned or self.is_adopted:
            return
        self._is_returned = True
        self._session.return_loan(self.component_id, self.label, deadline_s)

    def __enter__(self) -> Loan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.return_()
        except XditdError:
            if error is None:
                raise  # else the first error says more

    def __repr__(self) -> str:
        tiers = "+".join(tier.value for tier in self.tiers)
        state = "live" if self.is_live else "ended"
        return f"<Loan {self.label} {self.component_id} {self.family} {tiers} {self.lent_bytes} bytes, {state}>"


def kind_named(kind: ComponentKind | str) -> ComponentKind:
    """Read a kind, by its name or as it is.

    Raises:
        BadRequest: there is none of this name.
    """
    try:
        return ComponentKind(kind)
    except ValueError:
        known = ", ".join(each.value for each in ComponentKind)
        raise BadRequest(f"kind {kind!r}: unknown; choose one of {known}") from None


def component_id_of(component: Loan | str, kind: ComponentKind) -> str:
    """The id of a loan that is live and of this kind; an id is taken as it is.

    Raises:
        BadRequest: it is neither, or of another kind.
        LeaseLost: the loan has ended.
    """
    if isinstance(component, str):
        return component
    if not isinstance(component, Loan):
        raise BadRequest(f"{kind.value}: a loan or a component id is needed, not {type(component).__name__}")
    component.check()
    if component.kind is not kind:
        raise BadRequest(f"{kind.value}: {component.label} is a {component.kind.value}; name a {kind.value}")
    return component.component_id
