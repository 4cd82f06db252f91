"""Metrics of a real daemon, and the same facts in its status."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

from xditd.ipc import limits
from xditd.ipc.replies import Generated

OPERATIONS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


def scrape(path: Path) -> dict[str, float]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        found = b""
        while part := client.recv(65536):
            found += part
    return parse(found.partition(b"\r\n\r\n")[2].decode())


def parse(text: str) -> dict[str, float]:
    samples = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    assert len({name for name, _, _ in samples}) == len(samples)
    named = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    for name, _, _ in samples:
        base = re.sub(r"\{.*", "", name)
        assert {base, re.sub(r"_(bucket|sum|count)$", "", base)} & named, name
    return {name: float(value) for name, _, value in samples}


def test_metrics_tell_what_happened(start_daemon: Any, memory: Any) -> None:
    daemon = start_daemon("--metrics", "unix")
    client = daemon.ready_client()
    path = daemon.runtime.metrics_socket
    before = scrape(path)
    assert before['xditd_group_state{state="ready"}'] == 1
    assert before["xditd_queue_limit"] == 512
    assert not [name for name in before if name.startswith("xditd_jobs_total")]
    lent = client.lend(memory.manifest())
    client.ask(memory.generate(lent.component_id, steps=4), Generated)
    client.fail(memory.generate(lent.component_id, seed=903))
    of_first_group = scrape(path)  # checks of fused kernels are dropped with the group
    os.kill(client.status().workers[1].pid, signal.SIGKILL)
    status = client.wait_status(lambda found: found.counters.group_starts == 2 and found.group_state.value == "ready")
    found = scrape(path)
    assert found['xditd_jobs_total{op="lend",outcome="done"}'] == 1
    assert found['xditd_jobs_total{op="generate",outcome="done"}'] == 1
    assert found['xditd_jobs_total{op="generate",outcome="failed"}'] == 1
    assert found['xditd_job_duration_seconds_count{op="generate"}'] == 1
    assert found["xditd_step_seconds_count"] == 4
    assert found['xditd_lent_bytes{tier="host_shm"}'] == 64
    assert found['xditd_copied_bytes_total{kind="host_to_host"}'] == 200
    assert found['xditd_leases{state="lent"}'] + found['xditd_leases{state="lending"}'] == 1
    assert found["xditd_group_restarts_total"] == 1
    assert found["xditd_clients"] == 1
    assert found["xditd_outside_connections_total"] == 0
    assert of_first_group['xditd_packed_products_total{format="int8",way="reference"}'] == 1
    assert of_first_group['xditd_forward_paths{class="Fake",path="eager"}'] == 1
    assert of_first_group["xditd_lora_jobs_total"] == 1
    assert {error.where for error in status.last_errors} == {"generate", "workers"}
    assert status.last_errors[0].where == "workers"
    assert status.lent_bytes == {"host_shm": 64}
    text = OPERATIONS.read_text()
    table = text[text.index("| metric | labels |") : text.index("The daemon's event loop answers")]
    documented = set(re.findall(r"`(xditd_[a-z_]+)`", table))
    assert documented == {re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", name) for name in {**of_first_group, **found}}
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not path.exists()


def test_metrics_are_off_unless_asked_for(shared_daemon: Any, client: Any) -> None:
    assert not shared_daemon.runtime.metrics_socket.exists()
    assert "metrics" not in shared_daemon.log


def test_metrics_on_loopback(start_daemon: Any) -> None:
    daemon = start_daemon("--metrics", "127.0.0.1:0")
    daemon.ready_client()
    (address,) = re.findall(r"metrics served at=(\S+)", daemon.log)
    with urllib.request.urlopen(address, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert parse(answer.read().decode())["xditd_clients"] == 1


def test_one_log_line_a_job_with_its_timings(start_daemon: Any, memory: Any, wait_until: Any) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    request_id = client.send(memory.generate(lent.component_id, steps=2))
    client.wait(request_id)
    wait_until(lambda: f"request_id={request_id} " in daemon.log)  # the reply goes first
    client.status()  # and what else there is to log about it has been logged once this is answered
    lines = [line for line in daemon.log.splitlines() if f"request_id={request_id} " in line]
    assert len(lines) == 1
    assert re.search(r"INFO .* op=generate .* waited_ms=\d+\.\d ran_ms=\d+\.\d", lines[0])


def test_verdicts_on_fused_kernels_are_in_status_and_metrics_and_bounded(
    start_daemon: Any, memory: Any, fake: Any
) -> None:
    daemon = start_daemon("--metrics", "unix")
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    assert client.status().fused_checks == ()
    client.ask(memory.generate(lent.component_id, steps=1, seed=fake.Fault.INEXACT, width=16), Generated)
    for number in range(limits.MAX_FUSED_CHECKS + 8):
        job = memory.generate(lent.component_id, steps=1, width=32 + 16 * number)
        client.ask(job, Generated)
    checks = client.status().fused_checks
    assert len(checks) == limits.MAX_FUSED_CHECKS
    assert (checks[0].case, checks[0].is_used, checks[0].error) == ("1 text + 16 image", False, None)  # kept longest
    assert (checks[-1].case, checks[-1].is_used) == (f"1 text + {job.sampling.width} image", True)
    found = scrape(daemon.runtime.metrics_socket)
    assert found['xditd_fused_in_use{kernels="fake blocks",tokens="1 text + 16 image"}'] == 0
    assert math.isnan(found['xditd_fused_error_ratio{kernels="fake blocks",tokens="1 text + 16 image"}'])
    last = f'{{kernels="fake blocks",tokens="1 text + {job.sampling.width} image"}}'
    assert found[f"xditd_fused_in_use{last}"] == 1
    assert found[f"xditd_fused_error_ratio{last}"] == 0.001
    assert found[f"xditd_fused_tolerance_ratio{last}"] == 0.02
