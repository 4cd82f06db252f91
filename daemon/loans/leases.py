"""Leases: which client lends which component, and the state of each lease. This module sends no messages."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from xditd.daemon.operations.states import move
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import Internal, LeaseLost, StaleSource, UnknownComponent
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.protocol import TimingsMs
from xditd.ipc.status import ComponentStatus, LeaseState
from xditd.ipc.tensors import Block, ComponentKind, CopiedBytes, CudaIpcBlock, FileBlock, FileDigest, Manifest

LEASE_NEXT: Final[Mapping[LeaseState, Set[LeaseState]]] = {
    LeaseState.LENDING: {LeaseState.LENT, LeaseState.RETURNING, LeaseState.ENDED},
    LeaseState.LENT: {LeaseState.LENDING, LeaseState.ADOPTED, LeaseState.RETURNING},
    LeaseState.ADOPTED: {LeaseState.RETURNING},
    LeaseState.RETURNING: {LeaseState.ENDED},
    LeaseState.ENDED: set(),
}
"""LENT goes back to LENDING when the client has rewritten the bytes, or when a rebuilt group has to map them again.
ADOPTED never does: the client's memory is not mapped any more."""

_MAX_LOST: Final = 256
"""How many of the leases that their owner did not end are remembered, each with the reason."""


@dataclass(eq=False)
class Lease:
    """The daemon's record of a lent component: its owner, its state, and the memory that ``manifest`` describes.

    ``holds`` counts the lends of the same bytes; each needs its own return.
    """

    component_id: str
    session: Session
    manifest: Manifest
    state: LeaseState = LeaseState.LENDING
    holds: int = 1
    facts: ComponentFacts | None = None
    """From the workers, once they have prepared it."""
    client_copied: CopiedBytes = field(default_factory=CopiedBytes)
    """Bytes that the client copied to make its tensors lendable."""
    worker_copied: CopiedBytes = field(default_factory=CopiedBytes)
    is_model_reused: bool = False
    lend_ms: TimingsMs = field(default_factory=dict)
    digests: tuple[FileDigest, ...] = ()
    """Of its files, from the workers; those of a rebuilt group compare with them."""
    deaths: int = 0
    """How many groups have ended while they mapped it again."""
    on_ended: list[Callable[[], None]] = field(default_factory=list)
    lost: LeaseLost | None = None
    """Why it ended, if its owner did not end it: the error of later requests that name it."""
    lent_bytes: int = field(init=False)
    """Bytes of all its tensors, summed once: there may be thousands. Each manifest of the same memory has as many."""
    _bytes_by_tier: tuple[Manifest, dict[str, int]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.lent_bytes = self.manifest.tensor_bytes

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Lent bytes by the tier's name. Cached: a checkpoint has a thousand tensors, and status is asked often."""
        if self._bytes_by_tier is None or self._bytes_by_tier[0] is not self.manifest:
            self._bytes_by_tier = self.manifest, self.manifest.bytes_by_tier
        return self._bytes_by_tier[1]

    @property
    def is_live(self) -> bool:
        return self.state in (LeaseState.LENDING, LeaseState.LENT, LeaseState.ADOPTED)

    @property
    def is_usable(self) -> bool:
        """Whether every worker has the component mapped."""
        return self.state in (LeaseState.LENT, LeaseState.ADOPTED)

    @property
    def known_facts(self) -> ComponentFacts:
        """The facts of a component that the workers have prepared."""
        if self.facts is None:
            raise Internal(f"component {self.component_id}: lent, but no worker has reported its facts")
        return self.facts

    def replace_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest by another one of the same memory; drop digests of files that have changed."""
        self.manifest = manifest
        self.note_digests(self.digests)

    def note_digests(self, digests: tuple[FileDigest, ...]) -> None:
        """Keep the digests of files that are lent now, in their present state."""
        blocks = self.manifest.blocks
        self.digests = tuple(
            found
            for found in digests
            if found.block < len(blocks)
            and isinstance(block := blocks[found.block], FileBlock)
            and block.ctime_ns == found.ctime_ns
        )

    def move(self, to: LeaseState) -> None:
        self.state = move(LEASE_NEXT, self.state, to)

    @property
    def kind(self) -> ComponentKind | None:
        """From the workers' facts, else from the client's manifest; ``None`` if neither names it."""
        return self.manifest.kind if self.facts is None else self.facts.kind

    def status(self) -> ComponentStatus:
        return ComponentStatus(
            component_id=self.component_id,
            label=self.manifest.label,
            kind=self.kind,
            facts=self.facts,
            state=self.state,
            tiers=self.manifest.tiers,
            lent_bytes=self.lent_bytes,
            copied=self.client_copied + self.worker_copied,
            generation=self.manifest.generation,
            owner_pid=0 if self.state is LeaseState.ADOPTED else self.session.process.pid,
            lend_ms=self.lend_ms,
        )


class LeaseTable:
    """Every lease that has not ended, in the order of lending."""

    def __init__(self) -> None:
        self._by_id: dict[str, Lease] = {}
        self._numbers = itertools.count(1)
        self._lost: OrderedDict[str, str] = OrderedDict()

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._by_id.values()))

    def add(self, session: Session, manifest: Manifest) -> Lease:
        # The random part: an id of an earlier daemon must not name another component of this one.
        what = "component" if manifest.kind is None else manifest.kind.value
        component_id = f"{what}-{next(self._numbers)}-{os.urandom(3).hex()}"
        lease = self._by_id[component_id] = Lease(component_id, session, manifest)
        return lease

    def live(self, component_id: str) -> Lease:
        """Find a lease whose component jobs may use.

        Raises:
            LeaseLost: it ended, but its owner did not end it.
            UnknownComponent: never lent, returned, or its owner is gone.
        """
        lease = self.find(component_id)
        if not lease.is_live:
            raise lease.lost or UnknownComponent(f"component {component_id}: its owner returned it; lend it again")
        return lease

    def find(self, component_id: str) -> Lease:
        """Find a lease, also one whose component the workers still have to unmap.

        Raises:
            LeaseLost: it ended, but its owner did not end it.
            UnknownComponent: never lent, or returned.
        """
        lease = self._by_id.get(component_id)
        if lease is not None:
            return lease
        if component_id in self._lost:
            raise LeaseLost(self._lost[component_id])
        raise UnknownComponent(
            f"component {component_id}: not on loan (returned, or its owner is gone); lend it, or name one that "
            "`xditd status` shows"
        )

    def of_session(self, session: Session) -> list[Lease]:
        """Return the leases that end with a session: all but the adopted ones."""
        return [lease for lease in self if lease.session is session and lease.state is not LeaseState.ADOPTED]

    def of_process(self, process: ProcessIdentity) -> list[Lease]:
        """Return the leases of a client over all its sessions, without the adopted ones."""
        return [lease for lease in self if lease.session.process == process and lease.state is not LeaseState.ADOPTED]

    def end(self, lease: Lease) -> None:
        """Remove a lease whose component no worker maps any more, and call its ``on_ended`` callbacks."""
        lease.move(LeaseState.ENDED)
        del self._by_id[lease.component_id]
        if lease.lost is not None:
            self._lost[lease.component_id] = lease.lost.detail
            while len(self._lost) > _MAX_LOST:
                self._lost.popitem(last=False)
        for callback in lease.on_ended:
            callback()

    def note_digests(self, component_id: str, digests: tuple[FileDigest, ...]) -> None:
        """Keep the digests of a component's files, if it is still lent."""
        lease = self._by_id.get(component_id)
        if lease is not None:
            lease.note_digests(digests)

    def find_same_memory(self, session: Session, manifest: Manifest) -> Lease | None:
        """Find this session's live lease of the same memory, even if its bytes have changed since.

        Raises:
            StaleSource: ``manifest`` is of an older generation than the lease.
        """
        memory = _memory(manifest)
        for lease in self.of_session(session):
            if not lease.is_live or lease.manifest.kind is not manifest.kind or _memory(lease.manifest) != memory:
                continue
            if manifest.generation < lease.manifest.generation:
                raise StaleSource(
                    f"{manifest.label}: generation {manifest.generation} was offered, "
                    f"but {lease.component_id} has generation {lease.manifest.generation}; lend the newest"
                )
            return lease
        return None


def is_same_content(old: Manifest, new: Manifest) -> bool:
    """Return whether two manifests of the same memory describe the same bytes."""
    return old.generation == new.generation and [*map(_content, old.blocks)] == [*map(_content, new.blocks)]


def is_next_generation(old: Manifest, new: Manifest) -> bool:
    """Return whether a manifest of the same memory follows another one, and no file among its blocks changed."""
    return new.generation == old.generation + 1 and all(
        _content(before) == _content(after)
        for before, after in zip(old.blocks, new.blocks, strict=True)
        if isinstance(before, FileBlock)
    )


def _memory(manifest: Manifest) -> Hashable:
    """Identify the memory of a component, what its bytes mean, and how they are run.

    A module in another state is another component: two models that are of one file may differ in it.
    """
    meaning = manifest.packed, manifest.compute_dtype, manifest.lora, manifest.module
    return tuple(_block_memory(block) for block in manifest.blocks), manifest.tensors, meaning


def _block_memory(block: Block) -> Hashable:
    """Identify a block's memory, whatever its content."""
    if isinstance(block, CudaIpcBlock):
        return block.device_uuid, block.handle, block.size_bytes
    if isinstance(block, FileBlock):
        return block.device, block.inode, block.size_bytes
    return block.inode, block.size_bytes


def _content(block: Block) -> Hashable:
    """Identify a block's content. Descriptor numbers are left out: they differ if a file was opened twice."""
    return block.fingerprint, (block.mtime_ns, block.ctime_ns) if isinstance(block, FileBlock) else None
