"""Lending: have the workers map, map again after a restart, copy (adopt) and unmap lent components."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from xditd.daemon.groups.worker_group import WorkerGroup
from xditd.daemon.loans.leases import Lease, LeaseTable, is_next_generation, is_same_content
from xditd.daemon.operations.counters import EventCounters
from xditd.daemon.operations.log_buffer import human_bytes
from xditd.daemon.queue.commands import Script, Task, expect, slowest_ms
from xditd.daemon.queue.jobs import Job
from xditd.daemon.queue.scheduler import Scheduler
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import LeaseLost, XditdError
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.replies import Adopted, Lent
from xditd.ipc.requests import Lend
from xditd.ipc.status import LeaseState
from xditd.ipc.tensors import CopiedBytes, TensorNames, Tier
from xditd.ipc.worker_messages import (
    ComponentCopied,
    CopyComponent,
    Done,
    ForgetClient,
    Plug,
    Plugged,
    Prepare,
    Prepared,
    Unmap,
)

logger = logging.getLogger(__name__)

MAX_DEATHS: Final = 2
"""Groups that may end while they map one component again; then it is taken as the cause, and its lease ends."""

Callback = Callable[[], None]


class Lending:
    """Own the leases, and give ``scheduler`` the mapping and unmapping tasks for them, which go before any job."""

    def __init__(self, group: WorkerGroup, scheduler: Scheduler, counters: EventCounters) -> None:
        self.leases = LeaseTable()
        self._group = group
        self._scheduler = scheduler
        self._counters = counters

    # --- Lending -------------------------------------------------------------------------------------

    def reuse(self, session: Session, request: Lend) -> Lent | None:
        """Return the reply to a lend of bytes that are lent already; ``None`` if they have to be mapped.

        Raises:
            StaleSource: the manifest is of an older generation than the lease.
        """
        lease = self.leases.find_same_memory(session, request.manifest)
        if lease is None or lease.state is not LeaseState.LENT or not is_same_content(lease.manifest, request.manifest):
            return None
        lease.holds += 1
        # The newest descriptors: the client may have closed the earlier ones when a rebuilt group needs them.
        lease.replace_manifest(request.manifest)
        return _lent(request, lease, is_reused=True)

    def lend(self, job: Job, request: Lend) -> Script[Lent]:
        """The script of a lend. If it fails, the lease is ended."""
        started_s = time.monotonic()
        reused = self.reuse(job.session, request)
        if reused is not None:
            return reused
        rewritten = self.leases.find_same_memory(job.session, request.manifest)
        lease = rewritten or self.leases.add(job.session, request.manifest)
        job.component_ids = (lease.component_id,)
        changed: TensorNames | None = None
        try:
            if rewritten is not None:
                if lease.state is LeaseState.LENT and is_next_generation(lease.manifest, request.manifest):
                    changed = request.changed
                # The workers drop what they made from the old content first.
                lease.move(LeaseState.LENDING)
                lease.holds += 1
                lease.replace_manifest(request.manifest)
                yield from _unmap(lease, keeps_copies=changed is not None)
            yield from _map(lease, job, changed)
            lease.client_copied += request.copied
            lease.lend_ms["lend"] = (time.monotonic() - started_s) * 1000
            lease.move(LeaseState.LENT)
        finally:
            if lease.state is LeaseState.LENDING:
                self.leases.end(lease)
        self._counters.lent(lease.bytes_by_tier, request.copied + lease.worker_copied)
        _log_lent(lease, request)
        return _lent(request, lease, is_reused=False)

    # --- Adopting ------------------------------------------------------------------------------------

    def adopt(self, job: Job, lease: Lease) -> Script[Adopted]:
        """The script of an adopt: the workers copy a lent component and unmap the client's memory."""
        component_id = lease.component_id
        if lease.state is not LeaseState.LENT:
            raise LeaseLost(f"component {component_id}: {lease.state.value} when its adoption started; lend it again")
        kept = expect(
            (yield lambda number: CopyComponent(op_number=number, component_id=component_id)), ComponentCopied
        )
        if lease.state is not LeaseState.LENT:
            raise lease.lost or LeaseLost(f"component {component_id}: returned while it was being adopted")
        if job.cancel_error is not None:
            yield from self._undo_adoption(lease)
            raise job.cancel_error
        lease.move(LeaseState.ADOPTED)
        copied = sum((answer.copied for answer in kept), CopiedBytes())
        lease.worker_copied += copied
        logger.info("loan adopted component_id=%s copied=%s", component_id, describe_copied(copied))
        timings_ms = slowest_ms([answer.timings_ms for answer in kept])
        return Adopted(request_id=job.request.request_id, copied=copied, timings_ms=timings_ms)

    def _undo_adoption(self, lease: Lease) -> Script[None]:
        """Map the client's memory again, because the adoption was cancelled."""
        lease.move(LeaseState.LENDING)
        try:
            yield from _map(lease, None)
        except XditdError as error:
            if lease.state is LeaseState.LENDING:
                lease.lost = LeaseLost(f"component {lease.component_id}: could not be mapped again: {error.detail}")
                self.leases.end(lease)
            raise
        lease.move(LeaseState.LENT)

    # --- Ending --------------------------------------------------------------------------------------

    def end(self, lease: Lease, why: LeaseLost, then: Callback, *, is_returned: bool = False) -> None:
        """End a lease: its jobs fail with ``why``; ``then`` is called once no worker maps its component."""
        lease.on_ended.append(then)
        if not lease.is_live:
            return
        if not is_returned:
            lease.lost = why
        lease.move(LeaseState.RETURNING)
        self._cancel_users(lease, why)
        self._unmap_first(_unmap(lease), lambda: self.leases.end(lease))

    def end_all(self, leases: Sequence[Lease], why: LeaseLost, then: Callback) -> None:
        """End several leases; ``then`` is called once, after the last one."""
        waiting = set(leases)

        def ended(lease: Lease) -> None:
            waiting.discard(lease)
            if not waiting:
                then()

        if not waiting:
            then()
        for lease in leases:
            self.end(lease, why, partial(ended, lease))

    def forget(self, process: ProcessIdentity, then: Callback) -> None:
        """Have the workers close the I/O blocks of a client that has ended, and then call ``then``."""
        self._unmap_first(_forget(process), then)

    def _unmap_first(self, script: Script[None], done: Callback) -> None:
        """Have memory unmapped; ``done`` is called too if the group ends instead."""
        self._scheduler.unmap_first(
            Task(script, on_done=lambda _: done(), on_failed=lambda _: done(), frees_memory=True)
        )

    def _cancel_users(self, lease: Lease, why: LeaseLost) -> None:
        self._scheduler.cancel_all(why, lambda job: lease.component_id in job.component_ids)

    # --- Rebuilt groups --------------------------------------------------------------------------------

    def group_ended(self) -> None:
        """Queue the mapping of lent components, and end adopted ones, whose copies are lost.

        Called after ``Scheduler.group_ended``, which drops the tasks of the old group.
        """
        for lease in self.leases:
            if lease.state is LeaseState.LENT:
                lease.move(LeaseState.LENDING)
            elif lease.state is LeaseState.ADOPTED:
                gone = LeaseLost(
                    f"component {lease.component_id}: adopted, so it was lost with the workers; lend it again"
                )
                logger.warning("adopted component lost component_id=%s", lease.component_id)
                self.end(lease, gone, lambda: None)
        for lease in self.leases:
            if lease.state is LeaseState.LENDING:
                failed = partial(self._map_again_failed, lease)
                self._scheduler.map_first(Task(_map_again(lease), on_done=lambda _: None, on_failed=failed))

    def _map_again_failed(self, lease: Lease, error: XditdError) -> None:
        if lease.state is not LeaseState.LENDING:
            return  # returned meanwhile: the unmapping that follows ends it
        if not self._group.is_alive and lease.deaths < MAX_DEATHS:
            return  # the cause may be another one: the next group tries again
        logger.error("loan ended component_id=%s: could not be mapped again: %s", lease.component_id, error.detail)
        why = LeaseLost(f"component {lease.component_id}: the rebuilt workers could not map it: {error.detail}")
        lease.lost = why
        self._cancel_users(lease, why)
        self.leases.end(lease)


def _map_again(lease: Lease) -> Script[None]:
    if lease.state is LeaseState.LENDING:  # else it was returned before its turn
        lease.deaths += 1  # reset below if the group survives
        yield from _map(lease, None)
        lease.deaths = 0
        lease.move(LeaseState.LENT)
        logger.info("loan mapped again component_id=%s label=%s", lease.component_id, lease.manifest.label)


def _map(lease: Lease, job: Job | None, changed: TensorNames | None = None) -> Script[None]:
    """Prepare on all ranks, then plug on all ranks. If one fails, all unmap.

    ``changed`` are the tensors whose bytes are others than those of the copies that the ranks have kept.
    """
    exporter = lease.session.process
    component_id, manifest, digests = lease.component_id, lease.manifest, lease.digests

    def prepare(number: int) -> Prepare:
        return Prepare(
            op_number=number,
            component_id=component_id,
            manifest=manifest,
            exporter=exporter,
            digests=digests,
            changed=changed,
        )

    try:
        prepared = expect((yield prepare), Prepared)
        _check_not_cancelled(lease, job)
        plugged = expect((yield lambda number: Plug(op_number=number, component_id=component_id)), Plugged)
        _check_not_cancelled(lease, job)
    except XditdError:
        yield from _unmap(lease)
        raise
    lease.facts = prepared[0].facts
    lease.worker_copied = sum((answer.copied for answer in prepared), CopiedBytes())
    lease.is_model_reused = all(answer.is_model_reused for answer in prepared)
    lease.lend_ms = slowest_ms(
        [*(answer.timings_ms for answer in prepared), *(answer.timings_ms for answer in plugged)]
    )


def _unmap(lease: Lease, *, keeps_copies: bool = False) -> Script[None]:
    component_id = lease.component_id
    expect((yield lambda number: Unmap(op_number=number, component_id=component_id, keeps_copies=keeps_copies)), Done)


def _forget(process: ProcessIdentity) -> Script[None]:
    expect((yield lambda number: ForgetClient(op_number=number, exporter=process)), Done)


def _check_not_cancelled(lease: Lease, job: Job | None) -> None:
    """Raise if the owner has exited, cancelled the lend or returned the component."""
    if job is not None and job.cancel_error is not None:
        raise job.cancel_error
    if lease.state is not LeaseState.LENDING:
        raise LeaseLost(f"component {lease.component_id}: returned while it was being mapped")


def _lent(request: Lend, lease: Lease, *, is_reused: bool) -> Lent:
    return Lent(
        request_id=request.request_id,
        component_id=lease.component_id,
        facts=lease.known_facts,
        tiers=lease.manifest.tiers,
        lent_bytes=lease.lent_bytes,
        copied=CopiedBytes() if is_reused else lease.worker_copied,
        is_reused=is_reused,
        is_model_reused=is_reused or lease.is_model_reused,
        timings_ms={} if is_reused else lease.lend_ms,
    )


def _log_lent(lease: Lease, request: Lend) -> None:
    manifest = lease.manifest
    what = "checkpoint file" if Tier.FILE in manifest.tiers else "checkpoint"
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
    """Format what was copied, by kind; ``none`` when memory is shared."""
    kinds = {
        "host_to_host": copied.host_to_host,
        "host_to_device": copied.host_to_device,
        "device_to_device": copied.device_to_device,
        "peer": copied.peer,
    }
    return ",".join(f"{kind}:{human_bytes(count)}" for kind, count in kinds.items() if count) or "none"
