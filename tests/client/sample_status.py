"""A status for tests, with something in every table that it shows."""

import sample_facts

from xditd.ipc.layout_choice import choose_layout, report
from xditd.ipc.replies import Status
from xditd.ipc.requests import GetStatus
from xditd.ipc.status import (
    ComponentStatus,
    Counters,
    DaemonStatus,
    ErrorStatus,
    FusedCheck,
    GroupState,
    JobState,
    JobStatus,
    LeaseState,
    MemoryParts,
    WorkerStatus,
)
from xditd.ipc.tensors import ComponentKind, CopiedBytes, Tier

STATUS = DaemonStatus(
    package_version="0.1.0",
    protocol_version=2,
    pid=41,
    uptime_s=3_725.0,
    runtime_dir="/run/user/1/xditd",
    group_state=GroupState.BUSY,
    group_detail="",
    device_kind="cuda",
    world_size=2,
    parallel={"ulysses": 2},
    layout=report(choose_layout(2), {}),
    attention_backend="CUDNN",
    precision="bf16",
    fused_checks=(
        FusedCheck(
            kernels="fused FLUX.1 blocks", case="512 text + 4096 image", error=0.007, tolerance=0.02, is_used=True
        ),
        FusedCheck(kernels="fp8 FLUX.1 blocks", case="1 text + 2 image", error=None, tolerance=0.1, is_used=False),
    ),
    workers=(
        WorkerStatus(rank=0, pid=42, device="cuda:0", device_uuid="GPU-a", memory_bytes=3 * 2**30, loaded=1,
                     memory=MemoryParts(weights_bytes=2**30, graphs_bytes=2**29, reserve_bytes=2**28)),
        WorkerStatus(rank=1, pid=43, device="cuda:1", device_uuid="GPU-b", memory_bytes=0, loaded=1),
    ),
    components=(
        ComponentStatus(
            component_id="transformer-1",
            label="flux1-dev",
            kind=ComponentKind.TRANSFORMER,
            facts=sample_facts.TRANSFORMER,
            state=LeaseState.LENT,
            tiers=(Tier.CUDA_IPC,),
            lent_bytes=22 * 2**30,
            copied=CopiedBytes(peer=22 * 2**30),
            generation=0,
            owner_pid=99,
            lend_ms={"lend": 80.0},
        ),
    ),
    jobs=(
        JobStatus(
            request_id="r1", op="generate", state=JobState.RUNNING, owner_pid=99, step=3, total_steps=28,
            waited_s=0.0, ran_s=0.4,
        ),
    ),
    queue_limit=64,
    clients=2,
    counters=Counters(jobs_done=5, group_starts=1),
    last_job_ms={"steps": 1900.0},
    lent_bytes={"cuda_ipc": 22 * 2**30, "file": 2**20},
    last_errors=(ErrorStatus(age_s=75.0, where="workers", code="workers_lost", detail="rank 1\n" + "died " * 60),),
)  # fmt: skip


def answers_status(daemon):
    daemon.answers[GetStatus] = lambda request: [Status(request_id=request.request_id, daemon=STATUS)]
