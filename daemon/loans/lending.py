"""The life of a loan at the daemon: lend, map again after a rebuild, take back."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from xditd.daemon.loans.leases import Lease, LeaseRegistry, is_same_content
from xditd.daemon.operations.logbook import human_bytes
from xditd.daemon.queue.commands import Errand, Script, expect, slowest_ms
from xditd.daemon.queue.jobs import Job
from xditd.daemon.queue.scheduler import Desk
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import LeaseLost, XditdError
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.replies import Adopted, Lent
from xditd.ipc.requests import Lend
from xditd.ipc.status import LeaseState
from xditd.ipc.tensors import CopiedBytes, Tier
from xditd.ipc.worker_messages import Done, ForgetClient, Keep, Kept, Plug, Plugged, Prepare, Prepared, Unmap

logger = logging.getLogger(__name__)

MAX_DEATHS: Final = 2
"""Groups that may die while they map one loan again; after that the loan is held to be the cause, and ends."""

Callback = Callable[[], None]


class Loans:
    """Own the registry and what the workers have to map or unmap for it, which goes before any job."""

    def __init__(self, desk: Desk, is_group_alive: Callable[[], bool]) -> None:
        self.registry = LeaseRegistry()
        self._desk = desk
        self._is_group_alive = is_group_alive
        self._chores: deque[Errand[None]] = deque()
        self._replays: deque[Lease] = deque()

    @property
    def has_chores(self) -> bool:
        return bool(self._chores or self._replays)

    def next_errand(self) -> Errand[Any] | None:
        """Unmap what is owed first, then map again what a rebuilt group lacks."""
        if self._chores:
            return self._chores.popleft()
        while self._replays:
            lease = self._replays.popleft()
            if lease.state is LeaseState.LENDING:
                return self._replay(lease)
        return None

    # --- Lending -------------------------------------------------------------------------------------

    def reuse(self, session: Session, request: Lend) -> Lent | None:
        """Answer a lend of bytes that are on loan already; ``None`` where there is something to do.

        Raises:
            StaleSource: of an older generation than the loan.
        """
        lease = self.registry.same_place(session, request.manifest)
        if lease is None or lease.state is not LeaseState.LENT or not is_same_content(lease.manifest, request.manifest):
            return None
        lease.holds += 1
        # The newest descriptors: the earlier offer's may be closed by the time a rebuilt group needs them.
        lease.offer(request.manifest)
        return _lent(request, lease, is_reused=True)

    def lend(self, job: Job, request: Lend) -> Script[Lent]:
        """The script of a lend. When it does not come to its end, there is no loan."""
        started_s = time.monotonic()
        reused = self.reuse(job.session, request)
        if reused is not None:
            return reused
        rewritten = self.registry.same_place(job.session, request.manifest)
        lease = rewritten or self.registry.add(job.session, request.manifest)
        job.component_ids = (lease.component_id,)
        try:
            if rewritten is not None:
                # What the workers made of the old content goes before the new one is prepared.
                lease.move(LeaseState.LENDING)
                lease.holds += 1
                lease.offer(request.manifest)
                yield from _unmap(lease)
            yield from _map(lease, job)
            lease.client_copied += request.copied
            lease.lend_ms["lend"] = (time.monotonic() - started_s) * 1000
            lease.move(LeaseState.LENT)
        finally:
            if lease.state is LeaseState.LENDING:
                self.registry.end(lease)
        self._desk.accounts.lent(lease.bytes_by_tier, request.copied + lease.worker_copied)
        _log_lent(lease, request)
        return _lent(request, lease, is_reused=False)

    # --- Adopting ------------------------------------------------------------------------------------

    def adopt(self, job: Job, lease: Lease) -> Script[Adopted]:
        """The script that makes a loan the workers' own."""
        component_id = lease.component_id
        if lease.state is not LeaseState.LENT:
            raise LeaseLost(f"component {component_id}: {lease.state.value} when the turn to adopt it came")
        kept = expect((yield lambda number: Keep(op_number=number, component_id=component_id)), Kept)
        if lease.state is not LeaseState.LENT:
            raise lease.lost or LeaseLost(f"component {component_id}: taken back while it was being adopted")
        if job.ending is not None:
            yield from self._disown(lease)
            raise job.ending
        lease.move(LeaseState.ADOPTED)
        copied = sum((answer.copied for answer in kept), CopiedBytes())
        lease.worker_copied += copied
        logger.info("loan adopted component_id=%s copied=%s", component_id, describe_copied(copied))
        timings_ms = slowest_ms([answer.timings_ms for answer in kept])
        return Adopted(request_id=job.request.request_id, copied=copied, timings_ms=timings_ms)

    def _disown(self, lease: Lease) -> Script[None]:
        """Map the client's memory again: who asked for the copy does not want it any more."""
        lease.move(LeaseState.LENDING)
        try:
            yield from _map(lease, None)
        except XditdError as error:
            if lease.state is LeaseState.LENDING:
                lease.lost = LeaseLost(f"component {lease.component_id}: could not be mapped again: {error.detail}")
                self.registry.end(lease)
            raise
        lease.move(LeaseState.LENT)

    # --- Ending --------------------------------------------------------------------------------------

    def end(self, lease: Lease, why: LeaseLost, then: Callback, *, is_returned: bool = False) -> None:
        """End a loan: its jobs fail with ``why``; ``then`` is called once no worker maps it."""
        lease.on_ended.append(then)
        if not lease.is_live:
            return
        if not is_returned:
            lease.lost = why
        lease.move(LeaseState.RETURNING)
        self._desk.cancel_using(lease.component_id, why)
        self._chore(_unmap(lease), lambda: self.registry.end(lease))

    def end_all(self, leases: Sequence[Lease], why: LeaseLost, then: Callback) -> None:
        """End several loans; ``then`` is called once, after the last one."""
        waiting = set(leases)

        def ended(lease: Lease) -> None:
            waiting.discard(lease)
            if not waiting:
                then()

        if not waiting:
            then()
        for lease in leases:
            self.end(lease, why, partial(ended, lease))

    def forget(self, process: ProcessIdentity) -> None:
        """Let the workers close the I/O blocks of a client that is gone."""
        self._chore(_forget(process), lambda: None)

    def _chore(self, script: Script[None], done: Callback) -> None:
        """Queue what the workers owe. A group that ends has paid: its memory is gone with its processes."""
        if self._is_group_alive():
            self._chores.append(Errand(script, on_done=lambda _: done(), on_failed=lambda _: done()))
        else:
            script.close()
            done()

    # --- Rebuilt groups --------------------------------------------------------------------------------

    def group_ended(self) -> None:
        """Nothing is mapped any more: what was to be unmapped is, and what is lent has to be mapped again."""
        chores, self._chores = self._chores, deque()
        for chore in chores:
            chore.script.close()
            chore.on_done(None)
        for lease in self.registry:
            if lease.state is LeaseState.LENT:
                lease.move(LeaseState.LENDING)
            elif lease.state is LeaseState.ADOPTED:
                gone = LeaseLost(
                    f"component {lease.component_id}: adopted, so it ended with the workers; lend it again"
                )
                logger.warning("adopted component lost component_id=%s", lease.component_id)
                self.end(lease, gone, lambda: None)
        self._replays = deque(lease for lease in self.registry if lease.state is LeaseState.LENDING)

    def _replay(self, lease: Lease) -> Errand[None]:
        lease.deaths += 1  # undone when the group survives it

        def done(_: None) -> None:
            lease.deaths = 0
            lease.move(LeaseState.LENT)
            logger.info("loan mapped again component_id=%s label=%s", lease.component_id, lease.manifest.label)

        def refused(error: XditdError) -> None:
            if lease.state is not LeaseState.LENDING:
                return  # taken back meanwhile: the unmapping that follows ends it
            if not self._is_group_alive() and lease.deaths < MAX_DEATHS:
                return  # the group died of something else, or of this: the next life will tell
            logger.error("loan ended component_id=%s: could not be mapped again: %s", lease.component_id, error.detail)
            why = LeaseLost(f"component {lease.component_id}: the rebuilt workers could not map it: {error.detail}")
            lease.lost = why
            self._desk.cancel_using(lease.component_id, why)
            self.registry.end(lease)

        return Errand(_map(lease, None), on_done=done, on_failed=refused)


def _map(lease: Lease, job: Job | None) -> Script[None]:
    """Two phases: no rank plugs in before every rank is prepared. Whoever refuses, all unmap."""
    exporter = lease.session.process
    component_id, manifest, digests = lease.component_id, lease.manifest, lease.digests

    def prepare(number: int) -> Prepare:
        return Prepare(
            op_number=number, component_id=component_id, manifest=manifest, exporter=exporter, digests=digests
        )

    try:
        prepared = expect((yield prepare), Prepared)
        _check_wanted(lease, job)
        plugged = expect((yield lambda number: Plug(op_number=number, component_id=component_id)), Plugged)
        _check_wanted(lease, job)
    except XditdError:
        yield from _unmap(lease)
        raise
    lease.facts = prepared[0].facts
    lease.worker_copied = sum((answer.copied for answer in prepared), CopiedBytes())
    lease.is_skeleton_reused = all(answer.is_skeleton_reused for answer in prepared)
    lease.lend_ms = slowest_ms(
        [*(answer.timings_ms for answer in prepared), *(answer.timings_ms for answer in plugged)]
    )


def _unmap(lease: Lease) -> Script[None]:
    component_id = lease.component_id
    expect((yield lambda number: Unmap(op_number=number, component_id=component_id)), Done)


def _forget(process: ProcessIdentity) -> Script[None]:
    expect((yield lambda number: ForgetClient(op_number=number, exporter=process)), Done)


def _check_wanted(lease: Lease, job: Job | None) -> None:
    """Stop between two commands when the owner went away, or changed its mind."""
    if job is not None and job.ending is not None:
        raise job.ending
    if lease.state is not LeaseState.LENDING:
        raise LeaseLost(f"component {lease.component_id}: taken back while it was being mapped")


def _lent(request: Lend, lease: Lease, *, is_reused: bool) -> Lent:
    return Lent(
        request_id=request.request_id,
        component_id=lease.component_id,
        facts=lease.known_facts,
        tiers=lease.manifest.tiers,
        lent_bytes=lease.lent_bytes,
        copied=CopiedBytes() if is_reused else lease.worker_copied,
        is_reused=is_reused,
        is_skeleton_reused=is_reused or lease.is_skeleton_reused,
        timings_ms={} if is_reused else lease.lend_ms,
    )


def _log_lent(lease: Lease, request: Lend) -> None:
    manifest = lease.manifest
    what = "safetensors checkpoint" if Tier.FILE in manifest.tiers else "checkpoint"
    logger.info(
        "%s recognised family=%s kind=%s tensors=%d label=%s component_id=%s request_id=%s; loading is deferred to the "
        "workers, nothing will be downloaded; mapped, verified and plugged tier=%s shared=%s copied=%s lend_ms=%.1f",
        what,
        lease.known_facts.family,
        lease.known_facts.kind.value,
        len(manifest.tensors),
        manifest.label,
        lease.component_id,
        request.request_id,
        "+".join(tier.value for tier in manifest.tiers),
        human_bytes(lease.lent_bytes),
        describe_copied(lease.client_copied + lease.worker_copied),
        lease.lend_ms["lend"],
    )


def describe_copied(copied: CopiedBytes) -> str:
    """Spell what was copied, by kind; ``none`` when memory is shared."""
    kinds = {
        "host_to_host": copied.host_to_host,
        "host_to_device": copied.host_to_device,
        "device_to_device": copied.device_to_device,
        "peer": copied.peer,
    }
    return ",".join(f"{kind}:{human_bytes(count)}" for kind, count in kinds.items() if count) or "none"
