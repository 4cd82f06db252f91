"""A program that uses a cluster; requests and answers are lines of JSON. Run by ``two_hosts.Driver``."""

from __future__ import annotations

import json
import os
import sys
import time

from cluster_jobs import SIDE, STEPS, bits, conditioning

from xditd.client.cluster.client import ClusterClient, ClusterJob
from xditd.client.cluster.messages import store
from xditd.ipc.errors import XditdError


def answer(job: ClusterJob, began_s: float) -> dict[str, object]:
    try:
        found = job.result()
    except XditdError as error:
        return {"seed": job.seed, "code": error.code, "detail": error.detail}
    tensors = {"latents": found.latents} | ({} if found.image is None else {"image": found.image})
    return {"seed": job.seed, "bits": bits(store(tensors)), "host": found.host, "runs": found.runs,
            "took_s": time.monotonic() - began_s}  # fmt: skip


def main() -> None:
    # Ray writes to stdout, too.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cluster: ClusterClient | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            cluster = cluster or ClusterClient(sys.argv[1])
            if request["op"] == "connect":
                found = cluster.hosts()
                print(json.dumps({name: getattr(each, "code", "") for name, each in found.items()}), file=answers)
                continue
            began_s = time.monotonic()
            jobs = [
                cluster.generate(
                    request["transformer"], conditioning(), vae=request.get("vae"), height=SIDE, width=SIDE,
                    steps=request.get("steps", STEPS), seed=seed,
                )
                for seed in request["seeds"]
            ]  # fmt: skip
            print(json.dumps([answer(job, began_s) for job in jobs]), file=answers)
        except XditdError as error:
            print(json.dumps({"code": error.code, "detail": error.detail}), file=answers)


main()
