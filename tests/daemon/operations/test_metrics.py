from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from xditd.daemon.front.handlers.status import describe_daemon
from xditd.daemon.front.service import Service
from xditd.daemon.operations.metrics import write_metrics
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.status import ForwardPath, FusedCheck, MemoryParts, PackedProducts, WorkerStatus
from xditd.ipc.tensors import CopiedBytes


def read(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labelled(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_counters_and_state_are_written_with_their_labels(service: Service) -> None:
    service.counters.job_ended("generate", None, 0.02, 3.0)
    service.counters.job_ended("lend", BadCheckpoint("a.weight is missing"), 0.02, 0.1)
    service.counters.lent({"file": 10}, CopiedBytes(host_to_device=7))
    found = read(write_metrics(describe_daemon(service), service.counters, 3))
    assert found[labelled("xditd_jobs_total", op="generate", outcome="done")] == 1
    assert found[labelled("xditd_jobs_total", op="lend", outcome="failed")] == 1
    assert found[labelled("xditd_errors_total", code="bad_checkpoint")] == 1
    assert found[labelled("xditd_job_duration_seconds_bucket", op="generate", le="2.5")] == 0
    assert found[labelled("xditd_job_duration_seconds_bucket", op="generate", le="5")] == 1
    assert found[labelled("xditd_job_duration_seconds_sum", op="generate")] == 3.0
    assert found[labelled("xditd_job_wait_seconds_count", op="lend")] == 1
    assert found[labelled("xditd_step_seconds_count")] == 0
    assert found[labelled("xditd_lent_bytes_total", tier="file")] == 10
    assert found[labelled("xditd_copied_bytes_total", kind="host_to_device")] == 7
    assert found[labelled("xditd_group_state", state="dead")] == 1
    assert found[labelled("xditd_group_failures_in_a_row")] == 3


def test_workers_and_fused_checks_have_samples_of_their_own(service: Service) -> None:
    worker = WorkerStatus(
        rank=1,
        pid=2,
        device="cuda:1",
        device_uuid="GPU-1",
        memory_bytes=5,
        loaded=1,
        memory=MemoryParts(graphs_bytes=3),
    )
    check = FusedCheck(kernels='a"b', case="8", error=None, tolerance=0.02, is_used=False)
    status = describe_daemon(service)
    fields = {name: getattr(status, name) for name in status.__struct_fields__}
    changed = type(status)(**fields | {"workers": (worker,), "fused_checks": (check,)})
    found = read(write_metrics(changed, service.counters, 0))
    assert found[labelled("xditd_gpu_memory_used_bytes", rank="1", device="cuda:1", uuid="GPU-1")] == 5
    assert found[labelled("xditd_worker_memory_bytes", rank="1", part="graphs")] == 3
    assert labelled("xditd_worker_memory_bytes", rank="1", part="context") not in found  # the driver did not say
    assert math.isnan(found[labelled("xditd_fused_error_ratio", kernels='a"b', tokens="8")])
    assert found[labelled("xditd_fused_in_use", kernels='a"b', tokens="8")] == 0


def test_forward_paths_count_the_last_decision_on_each_case(service: Service) -> None:
    def path(shapes: str, chosen: Any) -> ForwardPath:
        return ForwardPath(class_name="A", split="whole", shapes=shapes, path=chosen, took_s=0.1, memory_bytes=0)

    paths = (path("[1]", "captured"), path("[2]", "eager"), path("[1]", "compiled, captured"))
    products = (PackedProducts(format="int8", reference=3, native=4),)
    status = describe_daemon(service)
    fields = {name: getattr(status, name) for name in status.__struct_fields__}
    changed = type(status)(**fields | {"forward_paths": paths, "packed_products": products})
    found = read(write_metrics(changed, service.counters, 0))
    assert found[labelled("xditd_forward_paths", **{"class": "A", "path": "compiled, captured"})] == 1
    assert found[labelled("xditd_forward_paths", **{"class": "A", "path": "eager"})] == 1
    assert labelled("xditd_forward_paths", **{"class": "A", "path": "captured"}) not in found
    assert found[labelled("xditd_packed_products_total", format="int8", way="native")] == 4


def test_a_daemon_without_metrics_does_not_import_their_library() -> None:
    code = "import sys, xditd.daemon.main; print('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
