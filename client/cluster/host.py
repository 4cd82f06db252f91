"""A host's agent, without Ray: it runs the cluster's jobs on this host's daemon, and reports what that daemon holds."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from xditd.client.client import Client
from xditd.client.cluster.content_hashes import ContentHashes, check_content_id
from xditd.client.cluster.files import HostFiles
from xditd.client.cluster.messages import (
    HERE,
    NOISE,
    Done,
    HostReport,
    Job,
    StoredTensors,
    check_versions,
    load,
    store,
)
from xditd.client.cluster.paces import Paces
from xditd.client.cluster.residents import Residents, Wanted
from xditd.client.conditioning import conditioning_of
from xditd.client.metadata.record import encode
from xditd.client.results import GenerationResult
from xditd.client.waiting import why_not_serving
from xditd.ipc.errors import BadRequest, DaemonUnreachable, LeaseLost, UnknownComponent, XditdError
from xditd.ipc.status import GroupState
from xditd.ipc.tensors import ComponentKind, ComputeDType
from xditd.ipc.transports.tensor_views import dtype_name

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SCAN_EVERY_S: Final = 30.0
_ATTACH_EVERY_S: Final = 2.0
_STATUS_DEADLINE_S: Final = 2.0
_FREE_S: Final = 2.0
"""How long after its last look at the daemon's jobs the agent takes it that no other client has sent one."""

Result = tuple[Done, StoredTensors]


class HostAgent:
    """Attaches to the daemon of ``runtime_dir``, and never starts or stops one.

    ``name`` is the host's in the cluster; ``search_path`` are the folders whose checkpoint files it lends. Without a
    daemon it reports why, and uses the next one that answers. For any thread; the daemon's queue orders the jobs.
    """

    def __init__(
        self,
        name: str,
        search_path: Sequence[Path],
        runtime_dir: Path | None = None,
        hashes: ContentHashes | None = None,
    ) -> None:
        self.name = name
        self._agent_id = uuid.uuid4().hex
        self._runtime_dir = runtime_dir
        self._files = HostFiles(search_path, ContentHashes() if hashes is None else hashes)
        self._paces = Paces()
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._residents: Residents | None = None
        self._jobs: dict[str, float] = {}
        self._found_free_s = float("-inf")
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(self._files.scan, _SCAN_EVERY_S), daemon=True),
            threading.Thread(target=self._repeat, args=(self._look, _ATTACH_EVERY_S), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def report(self) -> HostReport:
        """Describe the host, its daemon's state included."""
        detail, other_jobs, is_starting = "", 0, False
        try:
            client, residents = self._attached()
            status = client.status(deadline_s=_STATUS_DEADLINE_S)
            detail = why_not_serving(status)
            is_starting = status.group_state in (GroupState.STARTING, GroupState.DEAD)
            # A job of the agent that still waits for its lend is not in the daemon's queue.
            other_jobs = max(0, len(status.jobs) - len(self._running()))
            self._found_free_s = float("-inf") if detail or other_jobs else time.monotonic()
            resident = residents.digests()
        except XditdError as error:
            detail, resident = error.detail, ()
        pace, mean_job_s, lend_bytes_per_s = self._paces.snapshot()
        return HostReport(
            versions=HERE,
            host=self.name,
            agent=self._agent_id,
            is_serving=not detail,
            is_starting=is_starting,
            detail=detail,
            files=self._files.digests(),
            resident=resident,
            running=self._running(),
            other_jobs=other_jobs,
            pace=pace,
            mean_job_s=mean_job_s,
            lend_bytes_per_s=lend_bytes_per_s,
        )

    def run(self, job: Job, tensors: StoredTensors) -> Result:
        """Run a job and wait for its end; returns the outcome, and ``latents`` and ``image`` as messages.

        Raises:
            ProtocolMismatch: the job is of another version.
            BadRequest: no content hash, or arguments that no job takes.
            UnknownComponent: this host has no file of a content.
            XditdError: the error that ended the job.
        """
        check_versions(job.versions, f"job {job.job_id}, sent to host {self.name}")
        for digest in job.digests:
            check_content_id(digest)
        with self._lock:
            self._jobs[job.job_id] = job.work
        try:
            return self._run_again_if_gone(job, tensors)
        finally:
            with self._lock:
                del self._jobs[job.job_id]

    def leave(self) -> None:
        """Revoke what was lent for the cluster, and detach from the daemon."""
        self._closing.set()
        with self._lock:
            client, residents = self._client, self._residents
            self._client = self._residents = None
        if client is not None and residents is not None:
            try:
                residents.revoke_all()
            finally:
                client.close()

    def _run_again_if_gone(self, job: Job, tensors: StoredTensors) -> Result:
        """Run a job; once more if a component went with a restart of the daemon or of its workers before the job."""
        try:
            return self._run(job, tensors)
        except (LeaseLost, UnknownComponent) as error:
            for digest in job.digests:
                self._files.find(digest)  # raises if the host has no such file, and running again would not help
            logger.info("component is lent again job_id=%s reason=%s", job.job_id, error)
            self._look()
            return self._run(job, tensors)

    def _run(self, job: Job, tensors: StoredTensors) -> Result:
        client, residents = self._attached()
        conditioning = load(tensors)
        noise = conditioning.pop(NOISE, None)
        if isinstance(noise, list):
            raise BadRequest("noise: one tensor is needed, not a list")
        with ExitStack() as stack:
            transformer, was_resident = stack.enter_context(
                residents.use(Wanted(job.transformer, ComponentKind.TRANSFORMER, job.compute_dtype))
            )
            second = None
            if job.transformer_2 is not None:
                wanted = Wanted(job.transformer_2, ComponentKind.TRANSFORMER, job.compute_dtype)
                second, has_second = stack.enter_context(residents.use(wanted))
                was_resident = was_resident and has_second
            if job.has_file_names:
                conditioning = conditioning_of(_plain(conditioning), client.facts(transformer), "the embeddings")
            vae = None
            if job.vae is not None:
                vae, has_vae = stack.enter_context(residents.use(Wanted(job.vae, ComponentKind.VAE, None)))
                was_resident = was_resident and has_vae
            result = client.generate(
                transformer,
                conditioning,
                vae=vae,
                height=job.height,
                width=job.width,
                frames=job.frames,
                transformer_2=second,
                steps=job.steps,
                sigmas=job.sigmas,
                guidance_scale=job.guidance_scale,
                seed=job.seed,
                noise=noise,
                step_cache=job.step_cache,
                variant=job.variant,
                options=job.options,
                deadline_s=job.deadline_s,
            ).result()
        queued_ms = result.timings_ms.get("queued", 0.0)
        ran_s = max(0.0, result.timings_ms["round_trip"] - queued_ms) / 1e3
        self._paces.count_job(job.transformer, job.work, ran_s)
        return self._done(result, was_resident), _tensors_of(result)

    def _done(self, result: GenerationResult, was_resident: bool) -> Done:
        return Done(
            host=self.name,
            seed=result.seed,
            timings_ms=result.timings_ms,
            reused_steps=result.reused_steps,
            record=None if result.record is None else encode(result.record),
            image_dtype=None if result.image_dtype is None else cast(ComputeDType, dtype_name(result.image_dtype)),
            was_resident=was_resident,
            is_free=len(self._running()) == 1 and time.monotonic() - self._found_free_s <= _FREE_S,
        )

    def _attached(self) -> tuple[Client, Residents]:
        """Return the client of the daemon; the first call connects.

        Raises:
            DaemonUnreachable: no daemon answers, or the agent has left.
        """
        with self._lock:
            if self._closing.is_set():
                raise DaemonUnreachable(f"host {self.name}: its agent has left the cluster")
            if self._client is None or self._residents is None:
                self._client = Client(self._runtime_dir, name=f"xditd cluster {self.name}")
                self._residents = Residents(self._client, self._files, self._paces)
            return self._client, self._residents

    def _look(self) -> None:
        self._attached()[1].look()

    def _running(self) -> dict[str, float]:
        with self._lock:
            return dict(self._jobs)

    def _repeat(self, action: Callable[[], None], every_s: float) -> None:
        shown = ""
        while not self._closing.is_set():
            try:
                action()
                shown = ""
            except XditdError as error:
                if error.detail != shown:
                    logger.warning("host agent waits: %s", error.detail)
                shown = error.detail
            self._closing.wait(every_s)


def _plain(tensors: dict[str, torch.Tensor | list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in tensors.items() if not isinstance(each, list)}


def _tensors_of(result: GenerationResult) -> StoredTensors:
    found: dict[str, torch.Tensor | list[torch.Tensor]] = {"latents": result.latents}
    if result.image is not None:
        found["image"] = result.image
    return store(found)
