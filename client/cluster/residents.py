"""The components that an agent's daemon holds for the cluster: lent from this host's files, adopted, reused."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from xditd.client.client import Client
from xditd.client.cluster.content_hashes import PREFIX
from xditd.client.cluster.files import HostFiles
from xditd.client.cluster.paces import Paces
from xditd.client.loans import Loan
from xditd.ipc.errors import LeaseLost, OutOfMemory, StaleSource, UnknownComponent, XditdError
from xditd.ipc.status import LeaseState
from xditd.ipc.tensors import ComponentKind, ComputeDType

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A component by content: what a file's bytes are, as what they are lent, and in which dtype packed weights run."""

    digest: str
    kind: ComponentKind
    compute_dtype: ComputeDType | None

    @property
    def label(self) -> str:
        """The component's label in the daemon, by which a restarted agent finds it again."""
        return self.digest if self.compute_dtype is None else f"{self.digest} {self.compute_dtype}"


@dataclass(eq=False)
class _Resident:
    component_id: str = ""
    loan: Loan | None = None
    uses: int = 0
    used_s: float = 0.0
    lending: threading.Lock = field(default_factory=threading.Lock)


class Residents:
    """Lends each content once, copies it into the workers, and revokes the least recently used for lack of memory.

    A copy outlives the agent: the next one finds it by its label. For any thread.
    """

    def __init__(self, client: Client, files: HostFiles, paces: Paces) -> None:
        self._client = client
        self._files = files
        self._paces = paces
        self._lock = threading.Lock()
        self._held: dict[Wanted, _Resident] = {}

    def digests(self) -> tuple[str, ...]:
        """Return the contents that the workers hold."""
        with self._lock:
            return tuple(sorted({wanted.digest for wanted, each in self._held.items() if each.component_id}))

    def look(self) -> None:
        """Find what earlier agents left in the daemon, and forget what it lost by a restart of its own or its workers.

        Raises:
            DaemonUnreachable: no daemon runs.
        """
        with self._lock:
            known = {each.component_id for each in self._held.values()}
        status = self._client.status()
        gone = known - {each.component_id for each in status.components}  # not what was lent meanwhile
        with self._lock:
            for each in self._held.values():
                if each.lending.acquire(blocking=False):  # what is lent right now is not gone
                    if each.component_id in gone:
                        each.component_id, each.loan = "", None
                    each.lending.release()
            for found in status.components:
                if found.state is LeaseState.ADOPTED and found.label.startswith(PREFIX) and found.kind is not None:
                    digest, _, dtype = found.label.partition(" ")
                    compute_dtype: ComputeDType | None = dtype or None  # type: ignore[assignment]
                    held = self._held.setdefault(Wanted(digest, found.kind, compute_dtype), _Resident())
                    held.component_id = held.component_id or found.component_id

    @contextmanager
    def use(self, wanted: Wanted) -> Iterator[tuple[str, bool]]:
        """Yield the component's id, and whether the workers held it already. It is not revoked inside the block.

        If the block raises because the component is gone, it is forgotten, so that the next use lends it again.

        Raises:
            UnknownComponent: this host has no file of this content.
            XditdError: it cannot be lent.
        """
        with self._lock:
            held = self._held.setdefault(wanted, _Resident())
            held.uses += 1
        try:
            with held.lending:
                was_resident = bool(held.component_id)
                if held.loan is not None and not held.loan.is_adopted and not held.loan.is_live:
                    held.component_id, held.loan, was_resident = "", None, False
                if not held.component_id:
                    self._lend(wanted, held)
                component_id = held.component_id
            try:
                yield component_id, was_resident
            except (LeaseLost, UnknownComponent, StaleSource):
                with held.lending:
                    if held.component_id == component_id:
                        held.component_id, held.loan = "", None
                raise
        finally:
            with self._lock:
                held.uses -= 1
                held.used_s = time.monotonic()

    def revoke_all(self) -> None:
        """End everything that was lent for the cluster."""
        with self._lock:
            held, self._held = self._held, {}
        for each in held.values():
            if each.component_id:
                self._revoke(each)

    def _lend(self, wanted: Wanted, held: _Resident) -> None:
        path, key = self._files.find(wanted.digest)
        began_s = time.perf_counter()
        while True:
            try:
                loan = self._client.lend(path, kind=wanted.kind, label=wanted.label, compute_dtype=wanted.compute_dtype)
                break
            except OutOfMemory:
                if not self._revoke_idle():
                    raise
        while True:
            try:
                loan.adopt()
                break
            except OutOfMemory as error:
                if not self._revoke_idle():
                    logger.info("lent without a copy of the workers' own content=%s reason=%s", wanted.digest, error)
                    break
        try:
            self._files.check(path, key)  # what the workers hold is what was hashed
        except StaleSource:
            self._client.revoke(loan)
            raise
        held.component_id, held.loan = loan.component_id, loan
        took_s = time.perf_counter() - began_s
        self._paces.count_lend(loan.lent_bytes, took_s)
        logger.info("component lent content=%s component_id=%s took_s=%.2f", wanted.digest, loan.component_id, took_s)

    def _revoke_idle(self) -> bool:
        """Revoke the component that was unused for longest; returns whether there was one."""
        with self._lock:
            idle = [(each.used_s, wanted) for wanted, each in self._held.items() if each.component_id and not each.uses]
            if not idle:
                return False
            _, oldest = min(idle, key=lambda item: item[0])
            held = self._held.pop(oldest)
        self._revoke(held)
        return True

    def _revoke(self, held: _Resident) -> None:
        try:
            self._client.revoke(held.component_id)
        except XditdError as error:
            logger.info("component not revoked component_id=%s reason=%s", held.component_id, error)
