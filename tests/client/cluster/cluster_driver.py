"""A program that uses a cluster; requests and answers are lines of JSON. Run by ``two_hosts.Driver``."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster_jobs import SIDE, STEPS, bits, conditioning

from xditd.client.cluster.client import ClusterClient, ClusterJob
from xditd.client.cluster.messages import store
from xditd.ipc.errors import XditdError


def answer(job: ClusterJob, began_s: float) -> dict[str, object]:
    try:
        found = job.result()
    except XditdError as error:
        return {"job_id": job.job_id, "seed": job.seed, "code": error.code, "detail": error.detail}
    tensors = {"latents": found.latents} | ({} if found.image is None else {"image": found.image})
    return {"job_id": job.job_id, "seed": job.seed, "bits": bits(store(tensors)), "host": found.host,
            "runs": found.runs, "took_s": time.monotonic() - began_s}  # fmt: skip


def run_jobs(cluster: ClusterClient, request: dict[str, Any]) -> list[dict[str, object]]:
    """Run a job for each seed, ``in_flight`` at a time, else all at once; after each a thread waits ``pause_s``."""
    began_s = time.monotonic()

    def run_one(seed: int) -> dict[str, object]:
        job = cluster.generate(
            request["transformer"], conditioning(), vae=request.get("vae"), height=SIDE, width=SIDE,
            steps=request.get("steps", STEPS), seed=seed,
        )  # fmt: skip
        found = answer(job, began_s)
        time.sleep(request.get("pause_s", 0.0))  # spreads many jobs over what is done to the cluster
        return found

    with ThreadPoolExecutor(request.get("in_flight", len(request["seeds"]))) as pool:
        return list(pool.map(run_one, request["seeds"]))


def main() -> None:
    # Ray writes to stdout, too.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR1)
    cluster: ClusterClient | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            cluster = cluster or ClusterClient(sys.argv[1])
            if request["op"] == "connect":
                found = cluster.hosts()
                print(json.dumps({name: getattr(each, "code", "") for name, each in found.items()}), file=answers)
                continue
            print(json.dumps(run_jobs(cluster, request)), file=answers)
        except XditdError as error:
            print(json.dumps({"code": error.code, "detail": error.detail}), file=answers)


main()
