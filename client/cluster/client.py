"""``ClusterClient``: what ``Client(cluster=...)`` offers, generations on the hosts of a cluster."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.cluster.content_hashes import PREFIX, ContentHashes, check_content_id
from xditd.client.cluster.messages import HERE, NOISE, HostReport, Job, Refused, encode, load, store
from xditd.client.jobs.generation import draw_seed
from xditd.client.metadata.record import decode
from xditd.client.results import GenerationResult
from xditd.ipc.addresses import user_path
from xditd.ipc.errors import BadRequest, Closed, Unsupported
from xditd.ipc.tensors import ComputeDType
from xditd.ipc.transports.tensor_views import torch_dtype

if TYPE_CHECKING:
    import torch


_ONE_HOST_ONLY: Final = frozenset(
    [
        "prepare",
        "lend",
        "lend_lora",
        "lend_tokenizer",
        "unload",
        "return_",
        "check_memory",
        "adopt",
        "revoke",
        "keep",
        "call",
        "call_parts",
        "encode_text",
        "encode_prompt",
        "tokenize",
        "decode",
        "encode",
        "facts",
        "daemon_pid",
        "status",
        "wait_ready",
        "logs",
        "stop",
    ]
)
"""What a ``Client`` of one host offers, and a cluster's does not."""


@dataclass(frozen=True, eq=False, repr=False)
class ClusterResult(GenerationResult):
    """A result with the name of the host that made it, and how many hosts ran the job: 2 if one was lost."""

    host: str = ""
    runs: int = 1


class ClusterJob:
    """A generation on some host of the cluster. It runs whether or not its result is waited for."""

    def __init__(self, job: Job, future: Future[ClusterResult]) -> None:
        self.job_id = job.job_id
        self.seed = job.seed
        self._future = future

    def result(self) -> ClusterResult:
        """Wait for the end and return the result; further calls return the same object.

        Raises:
            HostLost: the host was lost, and so was the second one, or no other has the files.
            XditdError: the error that ended the job.
        """
        return self._future.result()

    @property
    def is_done(self) -> bool:
        """Whether ``result()`` returns, or raises, at once."""
        return self._future.done()

    def __repr__(self) -> str:
        return f"<ClusterJob {self.job_id}, seed {self.seed}, {'ended' if self.is_done else 'under way'}>"


class ClusterClient:
    """Generates on the hosts of the cluster whose head is at ``address`` (``IP:PORT``); this host has to have joined.

    Components are named by content: a ``blake2b:...`` hash, or a path here, whose content is hashed once. Each host
    lends its own file of that content. Without a ``seed`` one is drawn here, so that a job which runs again, on
    another host, gives the same bits. For any thread; one cluster for each process.

    Raises:
        ClusterUnreachable: no cluster answers, or this host has not joined it.
        NotPermitted: the token is missing or wrong, or TLS is off.
        ProtocolMismatch: the cluster runs another version.
    """

    def __init__(self, address: str) -> None:
        try:
            from xditd.client.cluster import connection
        except ImportError as error:
            raise Unsupported(f"{error.name}: not installed here; pip install 'xditd[cluster]'") from None
        connection.connect(address)
        connection.router()
        self._connection = connection
        self.address = address
        self._hashes = ContentHashes()
        self._is_closed = False

    def generate(
        self,
        transformer: str | os.PathLike[str],
        conditioning: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
        *,
        vae: str | os.PathLike[str] | None = None,
        height: int = 1024,
        width: int = 1024,
        frames: int = 1,
        transformer_2: str | os.PathLike[str] | None = None,
        steps: int | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        noise: torch.Tensor | None = None,
        step_cache: float = 0.0,
        variant: str = "class",
        options: Mapping[str, bool | int | float] | None = None,
        compute_dtype: ComputeDType | None = None,
        has_file_names: bool = False,
        deadline_s: float | None = None,
        **unsupported: object,
    ) -> ClusterJob:
        """Start a generation on the host that will have it first, and return without waiting.

        Arguments are those of :meth:`Client.generate`, which checks them on the host; ``transformer_2`` is named by
        content, too. ``compute_dtype`` is that of
        :meth:`Client.lend`. With ``has_file_names``, ``conditioning`` has the tensors of a file, of which the host
        selects those that the model takes. Tensors of the result are on the CPU.

        Raises:
            BadRequest: no content hash and no file; or ``seed`` and ``noise``.
            Unsupported: previews.
        """
        if self._is_closed:
            raise Closed("this client of a cluster is closed")
        if unsupported:
            names = ", ".join(sorted(unsupported))
            raise Unsupported(f"{names}: not offered on a cluster; use a Client of one host")
        if seed is not None and noise is not None:
            raise BadRequest("seed and noise: both are given, but each sets the noise; leave one out")
        if seed is None and noise is None:
            seed = draw_seed()
        tensors: dict[str, Any] = {
            name: list(value) if isinstance(value, list | tuple) else value for name, value in conditioning.items()
        }
        if NOISE in tensors:
            raise BadRequest(f"conditioning: {NOISE!r} is no argument of a model")
        if noise is not None:
            tensors[NOISE] = noise
        stored = store(tensors)
        job = Job(
            versions=HERE,
            job_id=uuid.uuid4().hex,
            transformer=self.content_of(transformer),
            vae=None if vae is None else self.content_of(vae),
            height=height,
            width=width,
            frames=frames,
            transformer_2=None if transformer_2 is None else self.content_of(transformer_2),
            steps=steps,
            sigmas=None if sigmas is None else tuple(float(each) for each in sigmas),
            guidance_scale=guidance_scale,
            seed=seed,
            step_cache=step_cache,
            variant=variant,
            options=None if options is None else dict(options),
            compute_dtype=compute_dtype,
            deadline_s=deadline_s,
            has_file_names=has_file_names,
        )
        submission = self._connection.Submission(job)
        encoded = encode(stored)
        future: Future[ClusterResult] = Future()

        def work() -> None:
            try:
                done, found = submission.result(encoded)
                loaded: dict[str, Any] = load(found)
                record = None if done.record is None else decode(done.record.encode(), f"host {done.host}")
                result = ClusterResult(
                    loaded["latents"], loaded.get("image"), done.timings_ms, done.seed, done.reused_steps, done.host,
                    done.runs, record=record,
                    image_dtype=None if done.image_dtype is None else torch_dtype(done.image_dtype),
                )  # fmt: skip
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                future.set_exception(error)
            else:
                future.set_result(result)
            submission.end()

        threading.Thread(target=work, name=f"cluster job {job.job_id}", daemon=True).start()
        return ClusterJob(job, future)

    def content_of(self, component: str | os.PathLike[str]) -> str:
        """Return a content hash: as given, or that of the file at a path of this host.

        Raises:
            BadRequest: neither.
        """
        text = os.fspath(component)
        return check_content_id(text) if text.startswith(PREFIX) else self._hashes.of(Path(user_path(text)))

    def hosts(self) -> dict[str, HostReport | Refused]:
        """Return each host's report, or why it gave none."""
        return self._connection.status()

    def close(self) -> None:
        """End the use of the cluster; jobs under way end on their hosts. May be called twice."""
        self._is_closed = True

    def __enter__(self) -> ClusterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> object:
        if name in _ONE_HOST_ONLY:
            raise Unsupported(f"{name}: a cluster runs whole generations; use a Client of one host, without cluster=")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<ClusterClient of {self.address}>"


def client_of(address: str) -> ClusterClient:
    """Return a client of a cluster."""
    return ClusterClient(address)
