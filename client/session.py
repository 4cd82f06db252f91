"""A client's session with one daemon process: its connection, the memory check, and its loans."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xditd.client.connection import CONTROL_DEADLINE_S, Connection
from xditd.client.discovery import close_quietly, find_daemon
from xditd.client.loans import Loan
from xditd.client.mailboxes import Ending, Timeouts
from xditd.client.memory_check import MemoryCheck, log_event
from xditd.client.waiting import check_deadline
from xditd.ipc import limits
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.codec import reply_decoder
from xditd.ipc.errors import (
    Closed,
    DaemonUnreachable,
    LeaseLost,
    SessionLost,
    UnknownComponent,
    XditdError,
)
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.replies import Adopted, Announced, Farewell, Lent, Returned, Revoked, Status
from xditd.ipc.requests import Adopt, Announce, Cancel, GetStatus, Goodbye, Lend, ReturnLoan, Revoke
from xditd.ipc.tensors import CopiedBytes, Tier

if TYPE_CHECKING:
    from xditd.client.io_blocks import IoPool
    from xditd.client.lending import Offer
    from xditd.ipc.outlines import Outline

logger = logging.getLogger(__name__)

_FAREWELL_DEADLINE_S: Final = 30.0


@dataclass
class _LentComponent:
    """The offers and the number of loans of one component. Lending the same bytes again gives the same component; all
    offers stay open until its last loan is returned, because new workers map the newest one's descriptors."""

    offers: list[Offer] = field(default_factory=list)
    loans: int = 0


class ClosedState:
    """Whether and why a client is closed. The client shares it with its sessions."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def check(self) -> None:
        """Raise ``Closed`` if the client is closed."""
        if self.reason is not None:
            raise Closed(f"{self.reason}; make a new Client")


class Session:
    """One session, from ``Hello`` until this side closes or the daemon exits. Safe to use from several threads."""

    def __init__(self, runtime: RuntimeDir, name: str, pool: IoPool, silence_s: float, closed: ClosedState) -> None:
        self._runtime = runtime
        self._closed = closed
        self._silence_s = silence_s
        self._components: dict[str, _LentComponent] = {}
        self._lock = threading.Lock()
        self._memory_check = MemoryCheck(pool)
        self._facts: dict[str, ComponentFacts] = {}
        self.connection = Connection(runtime, client_name=name)
        welcome = self.connection.welcome
        self.daemon_pid = welcome.daemon_pid
        logger.debug(
            "session open socket=%s daemon_pid=%d daemon_version=%s workers=%d",
            runtime.client_socket, welcome.daemon_pid, welcome.package_version, welcome.world_size,
        )  # fmt: skip

    @property
    def is_lost(self) -> bool:
        return self.connection.is_lost

    def check_loans(self, what: str) -> None:
        """Refuse a loan of a session that has ended.

        Raises:
            Closed: the client is closed.
            DaemonUnreachable: the daemon has exited, and no other one runs.
            LeaseLost: another daemon runs, which does not have the loan, or the daemon ended the session.
        """
        self._closed.check()
        if self.is_lost:
            close_quietly(find_daemon(self._runtime).pidfd)
            raise LeaseLost(f"{what}: its loan ended with daemon {self.daemon_pid}; lend it again")

    def lend(self, make_offer: Callable[[], Offer], deadline_s: float | None) -> Loan:
        """Lend the component that ``make_offer`` describes, after the memory check.

        Returns when every worker has mapped, verified and plugged it.
        """
        started = time.perf_counter()
        check_deadline(deadline_s)
        self.check_memory(deadline_s)
        memory_check_ms = (time.perf_counter() - started) * 1e3
        offer = make_offer()
        manifest = offer.manifest
        logger.info(
            "%s label=%s tensors=%d bytes=%d; loading is deferred to the workers, "
            "nothing will be downloaded",
            _format_of(offer), manifest.label, len(manifest.tensors), manifest.tensor_bytes,
        )  # fmt: skip
        for note in offer.tier_notes:
            logger.info("lending label=%s %s", manifest.label, note)
        silence_s = self._silence_s + manifest.tensor_bytes / limits.SLOWEST_BYTES_PER_S  # as the daemon allows
        rest_s = None if deadline_s is None else max(0.0, deadline_s - (time.perf_counter() - started))
        lent = self._send_lend(offer, Timeouts(silence_s, rest_s))
        timings = {**lent.timings_ms, **offer.timings_ms}
        if memory_check_ms > 1.0:
            timings["memory_check"] = memory_check_ms
        timings["total"] = (time.perf_counter() - started) * 1e3
        loan = Loan(self, lent, label=manifest.label, copied_here=offer.copied, timings_ms=timings)
        logger.info(
            "component lent label=%s component_id=%s family=%s tiers=%s lent_bytes=%d copied_bytes=%d "
            "reused=%s total_ms=%.1f",
            loan.label, loan.component_id, loan.family, "+".join(tier.value for tier in loan.tiers), loan.lent_bytes,
            loan.copied.total, loan.is_reused, timings["total"],
        )  # fmt: skip
        return loan

    def announce(self, outline: Outline, *, waits: bool) -> None:
        """Announce a component that will be lent. The daemon answers at once; ``waits`` for that, and for its error."""
        request = Announce(request_id=self.connection.next_request_id(), outline=outline)
        if waits:
            self.connection.ask(request, Announced)
        else:
            self.connection.submit(request)
        reply_decoder.warm_up(Lent)

    def check_memory(self, deadline_s: float | None) -> None:
        """Check, unless that was done before, that every worker reads this process's shared memory.

        Raises:
            StaleSource: a worker read something else.
        """
        check_deadline(deadline_s)
        self._memory_check.run(self.connection, Timeouts(self._silence_s, deadline_s))

    def return_loan(self, component_id: str, label: str, deadline_s: float | None) -> None:
        """Return one loan of a component; the daemon counts the loans, and the last one unmaps the component."""
        self.connection.maker.check()
        with self._lock:
            freed = self._drop_loan(component_id)
        if freed is None:
            return
        request = ReturnLoan(request_id=self.connection.next_request_id(), component_id=component_id)
        try:
            mailbox = self.connection.submit(request, f"return of {label}")
        except (Closed, DaemonUnreachable, SessionLost):
            _close_offers(freed)  # the daemon has exited or ended the loan: no worker maps the memory
            return
        # The memory stays alive until the workers have unmapped it, even if this thread stops waiting before.
        mailbox.when_ended(lambda _: _close_offers(freed))
        try:
            mailbox.wait(Returned, Timeouts(self._silence_s, deadline_s))
        except (Closed, DaemonUnreachable, LeaseLost, SessionLost) as error:
            logger.info("loan had already ended component_id=%s reason=%s", component_id, error.detail)

    def return_soon(self, component_id: str, *, is_adopted: bool) -> None:
        """Return a loan, or free an adopted component, in a finalizer: waits for no reply and takes no lock."""
        if not self.is_lost:
            self.connection.run_soon(lambda: self._return_unwaited(component_id, is_adopted=is_adopted))
        elif is_adopted:
            logger.warning("component not freed, since its session has ended: use xditd revoke %s", component_id)

    def _return_unwaited(self, component_id: str, *, is_adopted: bool) -> None:
        request_id = self.connection.next_request_id()
        if is_adopted:
            self._try_submit(Revoke(request_id=request_id, component_id=component_id), [])
            return
        with self._lock:
            freed = self._drop_loan(component_id)
        if freed is not None:  # else it was returned before
            back = ReturnLoan(request_id=request_id, component_id=component_id)
            if not self._try_submit(back, freed):
                _close_offers(freed)

    def _drop_loan(self, component_id: str) -> list[Offer] | None:
        """Count one loan less; returns the offers that are free then, or ``None`` if there is no loan."""
        component = self._components.get(component_id)
        if component is None:
            return None
        component.loans -= 1
        return [] if component.loans else self._components.pop(component_id).offers

    def adopt(self, component_id: str, label: str, deadline_s: float | None) -> CopiedBytes:
        """Copy a component into the workers' own memory, then release this process's memory of it."""
        check_deadline(deadline_s)
        request = Adopt(request_id=self.connection.next_request_id(), component_id=component_id)
        mailbox = self.connection.submit(request, f"adoption of {label}")
        try:
            adopted = mailbox.wait(Adopted, Timeouts(self._silence_s, deadline_s))
        except BaseException:
            mailbox.when_ended(lambda ending: self._release(component_id) if isinstance(ending, Adopted) else None)
            raise
        self._release(component_id)
        return adopted.copied

    def revoke(self, component_id: str, deadline_s: float | None) -> None:
        """End a loan of any process of this user, or free an adopted component."""
        check_deadline(deadline_s)
        request = Revoke(request_id=self.connection.next_request_id(), component_id=component_id)
        mailbox = self.connection.submit(request, f"revocation of {component_id}")
        mailbox.wait(Revoked, Timeouts(self._silence_s, deadline_s))

    def facts_of(self, component_id: str) -> ComponentFacts:
        """Return the facts of a component, whichever process lent it.

        They are cached: the names, dtypes and shapes of a component id's tensors do not change.

        Raises:
            UnknownComponent: the component is not lent, or its lend is not complete.
        """
        found = self._facts.get(component_id)
        if found is None:
            request = GetStatus(request_id=self.connection.next_request_id())
            status = self.connection.ask(request, Status, deadline_s=CONTROL_DEADLINE_S).daemon
            known = {each.component_id: each.facts for each in status.components if each.facts is not None}
            if component_id not in known:
                raise UnknownComponent(
                    f"component {component_id}: not on loan (returned, lend not complete, or its owner has exited); "
                    "lend it, or use an id that `xditd status` shows"
                )
            self._facts = known
            found = known[component_id]
        return found

    def _release(self, component_id: str) -> None:
        with self._lock:
            component = self._components.pop(component_id, None)
        if component is not None:
            _close_offers(component.offers)

    def close(self) -> None:
        """End the session and all its loans. Does not raise if the daemon has exited."""
        if not self.is_lost:
            self.connection.leave()
            try:
                farewell = Goodbye(request_id=self.connection.next_request_id())
                self.connection.ask(farewell, Farewell, deadline_s=_FAREWELL_DEADLINE_S)
            except XditdError as error:
                logger.warning("session closed without an answer to Goodbye reason=%s", error)
            except BaseException:  # an interrupt: nobody can close it again
                self._end()
                raise
        self._end()

    def abandon(self) -> None:
        """End the session in the client's finalizer: waits for no reply and takes no lock."""
        if self.is_lost:
            self._release_all()
        else:
            self.connection.run_soon(self._send_goodbye)

    def _send_goodbye(self) -> None:
        """Send ``Goodbye``, and end the session when it is answered. Runs on the connection's thread."""
        logger.warning("client was not closed, its loans end now daemon_pid=%d", self.daemon_pid)
        try:
            mailbox = self.connection.submit(Goodbye(request_id=self.connection.next_request_id()))
        except XditdError:
            self._end()
            return
        self.connection.end_within(_FAREWELL_DEADLINE_S)
        # The callback keeps this session and the lent memory alive until the workers have unmapped it.
        mailbox.when_ended(lambda _: self._end())

    def _end(self) -> None:
        self.connection.close()
        self._release_all()

    def _release_all(self) -> None:
        """Release all lent memory. Needs no lock: a session that has ended lends nothing."""
        with contextlib.suppress(KeyError):
            while True:
                _close_offers(self._components.popitem()[1].offers)

    def _send_lend(self, offer: Offer, timeouts: Timeouts) -> Lent:
        label = offer.manifest.label
        request = Lend(
            request_id=self.connection.next_request_id(),
            manifest=offer.manifest,
            copied=offer.copied,
            changed=offer.changed,
        )
        try:
            mailbox = self.connection.submit(request, f"lending {label}")
        except BaseException:
            offer.close()
            raise
        try:
            lent = mailbox.wait(Lent, timeouts, on_event=lambda event: log_event(label, event))
        except BaseException:
            cancel = Cancel(request_id=self.connection.next_request_id(), target_request_id=request.request_id)
            self._try_submit(cancel, then_free=[])
            mailbox.when_ended(lambda ending: self._undo_lend(offer, ending))
            raise
        with self._lock:
            component = self._components.setdefault(lent.component_id, _LentComponent())
            component.offers.append(offer)
            component.loans += 1
            self._facts[lent.component_id] = lent.facts
        return lent

    def _undo_lend(self, offer: Offer, ending: Ending) -> None:
        """Return a component whose lend succeeded after its caller stopped waiting."""
        freed = [offer]
        if isinstance(ending, Lent):
            with self._lock:
                component = self._components.get(ending.component_id)
                if component is not None:
                    # The daemon maps the component by its newest descriptors, which this offer holds open.
                    component.offers.append(offer)
                    freed = []
            back = ReturnLoan(request_id=self.connection.next_request_id(), component_id=ending.component_id)
            if self._try_submit(back, then_free=freed):
                return
        _close_offers(freed)

    def _try_submit(self, request: Cancel | ReturnLoan | Revoke, then_free: list[Offer]) -> bool:
        """Send a request without waiting; close offers when it is answered. Returns whether it was sent."""
        try:
            mailbox = self.connection.submit(request)
        except XditdError:
            return False
        mailbox.when_ended(lambda _: _close_offers(then_free))
        return True


def _format_of(offer: Offer) -> str:
    return "checkpoint file" if offer.manifest.tiers == (Tier.FILE,) else "state dict"


def _close_offers(offers: list[Offer]) -> None:
    for offer in offers:
        try:
            offer.close()
        except XditdError as error:
            # The caller still holds a view; the memory is freed with that.
            logger.warning("lent memory not freed label=%s reason=%s", offer.manifest.label, error)
