"""The router's choice and the second runs of jobs, on hosts that are functions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from running_daemon import until

from xditd.client.cluster import runs
from xditd.client.cluster.errors import HostLost
from xditd.client.cluster.messages import HERE, Done, HostReport, Job, Placed, Placement, Unplaced, Versions
from xditd.client.cluster.router import Router, cost_s
from xditd.client.cluster.runs import FreeHosts, run_job
from xditd.ipc.errors import (
    BadRequest,
    ProtocolMismatch,
    UnknownComponent,
    WorkersLost,
    WorkersUnavailable,
    XditdError,
)

A, B = "blake2b:" + "a" * 64, "blake2b:" + "b" * 64
GB = 10**9


def job(job_id: str = "j", transformer: str = A) -> Job:
    return Job(
        versions=HERE, job_id=job_id, transformer=transformer, vae=None, height=1000, width=1000, steps=10, sigmas=None,
        guidance_scale=None, seed=1, step_cache=0.0, variant="class", options=None, compute_dtype=None, deadline_s=None,
    )  # fmt: skip


def report(name: str, **changes: Any) -> HostReport:
    found = HostReport(
        versions=HERE, host=name, agent=f"agent of {name}", is_serving=True, is_starting=False, detail="",
        files={A: 2 * GB, B: 2 * GB}, resident=(), running={}, other_jobs=0, pace={}, mean_job_s=1.0,
        lend_bytes_per_s=GB,
    )  # fmt: skip
    return msgspec.structs.replace(found, **changes)


class Host:
    """A host whose answers the test sets; ``runs`` are the ids of jobs that it was sent."""

    def __init__(self, name: str, **changes: Any) -> None:
        self.name = name
        self.found: HostReport | XditdError = report(name, **changes)
        self.runs: list[str] = []
        self.error: XditdError | None = None
        self.wait: Callable[[], object] = lambda: None

    def report(self) -> HostReport:
        if isinstance(self.found, XditdError):
            raise self.found
        return self.found

    def run(self, job: Job) -> Done:
        self.runs.append(job.job_id)
        self.wait()
        if self.error is not None:
            raise self.error
        return Done(host=self.name, seed=job.seed, timings_ms={}, reused_steps=0, was_resident=True, is_free=True)


class Cluster:
    """A program's way to the router and to the hosts."""

    def __init__(self, *hosts: Host) -> None:
        self.router = Router()
        self.set_hosts(*hosts)

    def set_hosts(self, *hosts: Host) -> None:
        self.hosts = {host.name: host for host in hosts}
        self.router.set_hosts(self.hosts)

    def place(self, job: Job, tried: Sequence[str]) -> Placement:
        return self.router.place(job, tried)

    def run(self, job: Job, placed: Placed) -> tuple[Done, str]:
        return self.hosts[placed.host].run(job), "tensors"

    def run_job(self, job: Job, wait_s: float = 0.0) -> Done:
        """Run a job as ``Submission`` does."""
        done, found = run_job(self, job, wait_s)
        self.router.end(job.job_id, done.host, True)
        assert found == "tensors"
        return done

    def choose(self, job: Job) -> str:
        """Return the host that the job would run on now."""
        answer = self.router.place(job)
        if isinstance(answer, Unplaced):
            raise answer.reason.error()
        self.router.end(job.job_id, answer.host, False)
        assert answer.agent == f"agent of {answer.host}"
        return answer.host


def test_of_hosts_that_wait_equally_the_one_with_the_weights_is_chosen() -> None:
    assert Cluster(Host("a"), Host("b", resident=(A,))).choose(job()) == "b"
    assert Cluster(Host("a", resident=(A,)), Host("b", resident=(B,))).choose(job(transformer=B)) == "b"


def test_a_host_that_ran_a_job_has_its_weights_before_it_reports_them() -> None:
    hosts = [Host("a", other_jobs=1), Host("b")]
    cluster = Cluster(*hosts)

    def report_in_mid_job() -> None:
        hosts[0].found, hosts[1].found = report("a"), report("b", running={"j": 10.0, "k": 10.0})
        cluster.router.reports()

    hosts[1].wait = report_in_mid_job
    cluster.run_job(job())
    assert hosts[1].runs == ["j"]
    # The last report says that it has to lend the weights, and wait for two jobs.
    assert cluster.choose(job("next")) == "b"
    cluster.router.reports()
    assert cluster.choose(job("next")) == "a"


def test_a_queue_that_is_longer_than_a_lend_moves_the_job() -> None:
    # A lend takes 2.2 s: two jobs of 1 s before it take less, three take more.
    assert Cluster(Host("a", resident=(A,), other_jobs=2), Host("b")).choose(job()) == "a"
    assert Cluster(Host("a", resident=(A,), other_jobs=3), Host("b")).choose(job()) == "b"


def test_a_job_waits_as_long_as_the_measured_paces_say() -> None:
    found = report("a", resident=(A,), pace={A: 0.5}, mean_job_s=3.0, other_jobs=1, running={"old": 10.0, "x": 10.0})
    assert cost_s(found, [job("x")], job()) == pytest.approx(10 * 0.5 + 3.0 + 3.0)
    assert cost_s(found, [], job(transformer=B)) == pytest.approx(3.0 + 2 * 3.0 + 2.2)
    assert cost_s(found, [job("x", B)], job(transformer=B)) == pytest.approx(3.0 + 3.0 + 3.0)  # it will have been lent


def test_jobs_that_are_sent_at_once_spread_over_the_hosts() -> None:
    hosts = [Host("a", resident=(A,)), Host("b", resident=(A,))]
    cluster = Cluster(*hosts)
    together = threading.Barrier(8)
    for host in hosts:
        host.wait = lambda: together.wait(10)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: cluster.run_job(job(str(number))), range(8)))
    assert [len(host.runs) for host in hosts] == [4, 4]


def test_a_job_that_went_to_a_free_host_without_a_question_counts_there_until_its_end() -> None:
    cluster = Cluster(Host("a", resident=(A,)), Host("b", resident=(A,)))
    assert cluster.choose(job()) == "a"
    cluster.router.take(job("one"), "a")
    assert cluster.choose(job("two")) == "b"
    cluster.router.end("one", "a", True)
    assert cluster.choose(job("three")) == "a"
    cluster.router.take(job("one"), "a")  # what was sent first may arrive last
    cluster.router.take(job("one"), "gone")
    assert cluster.choose(job("four")) == "a"


def test_a_free_host_gets_one_job_without_a_question_and_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    free, host = FreeHosts(), Placed(host="a", agent="agent of a")
    done = Done(host="a", seed=1, timings_ms={}, reused_steps=0, was_resident=True, is_free=True)
    free.note(job(), host, done)
    assert free.take(job(transformer=B)) is None
    assert free.take(job("next")) == host
    assert free.take(job("another")) is None
    free.note(job(), host, msgspec.structs.replace(done, is_free=False))
    assert free.take(job()) is None
    free.note(job(), host, done)
    free.forget()
    assert free.take(job()) is None
    monkeypatch.setattr(runs, "_FREE_S", 0.0)
    free.note(job(), host, done)
    assert free.take(job()) is None


def test_a_lost_hosts_job_runs_once_elsewhere_with_the_same_seed() -> None:
    lost, other = Host("a", resident=(A,)), Host("b")
    lost.error = HostLost("host a: the link was cut")
    assert Cluster(lost, other).run_job(job()) == Done(
        host="b", seed=1, timings_ms={}, reused_steps=0, was_resident=True, is_free=True, runs=2
    )
    assert (lost.runs, other.runs) == (["j"], ["j"])


def test_a_job_that_ends_two_hosts_is_not_run_a_third_time() -> None:
    hosts = [Host(name) for name in "abc"]
    for host in hosts:
        host.error = WorkersLost(f"host {host.name}: the workers ended")
    with pytest.raises(WorkersLost):
        Cluster(*hosts).run_job(job())
    assert sum(len(host.runs) for host in hosts) == 2


def test_a_wrong_request_is_answered_by_the_first_host() -> None:
    hosts = [Host("a"), Host("b")]
    for host in hosts:
        host.error = BadRequest("height: 100")
    with pytest.raises(BadRequest, match="height: 100"):
        Cluster(*hosts).run_job(job())
    assert sum(len(host.runs) for host in hosts) == 1


def test_the_error_says_why_no_other_host_ran_it() -> None:
    lost, other = Host("a"), Host("b", files={})
    lost.error = HostLost("host a: the link was cut")
    with pytest.raises(HostLost, match=r"link was cut; and no other host has the files of job j: host b: no file of"):
        Cluster(lost, other).run_job(job())


@pytest.mark.parametrize(
    ("host", "error", "text"),
    [
        (Host("a", files={}), UnknownComponent, "no host has the files of job j: host a: no file of content blake2b:a"),
        (Host("a", is_serving=False, detail="workers given up"), WorkersUnavailable, "host a: workers given up"),
        (Host("a", versions=Versions(xditd="9", protocol=1, cluster=1)), ProtocolMismatch, "host a: xditd version 9"),
    ],
)
def test_no_host_can_run_it(host: Host, error: type[XditdError], text: str) -> None:
    with pytest.raises(error, match=text):
        Cluster(host).run_job(job())
    assert host.runs == []


def test_a_job_goes_to_a_host_whose_workers_start_if_no_other_is_sooner() -> None:
    starting = Host("a", resident=(A,), is_serving=False, is_starting=True)
    assert Cluster(starting).choose(job()) == "a"
    assert Cluster(starting, Host("b", other_jobs=7)).choose(job()) == "b"
    assert Cluster(starting, Host("b", other_jobs=8)).choose(job()) == "a"


def test_a_job_waits_for_a_host_that_is_lost_and_comes_back() -> None:
    back = Host("a")
    back.found = HostLost("host a: its agent restarts")
    cluster = Cluster(back)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.run_job, job(), 30.0)
        until(lambda: cluster.router.reports() != {}, "the router to ask")
        back.found = report("a")
        cluster.router.reports()
        answer.result(timeout=10)
    assert back.runs == ["j"]


def test_a_wait_for_a_lost_host_ends_by_the_deadline_of_the_job_and_is_for_lost_hosts_alone() -> None:
    cluster = Cluster()
    began_s = time.monotonic()
    with pytest.raises(HostLost, match="xditd cluster join"):
        cluster.run_job(msgspec.structs.replace(job(), deadline_s=0.3), 30.0)
    cluster.set_hosts(Host("a", files={}))
    with pytest.raises(UnknownComponent):
        cluster.run_job(job(), 30.0)
    assert time.monotonic() - began_s < 10.0


def test_a_cluster_without_hosts_says_so() -> None:
    with pytest.raises(HostLost, match="xditd cluster join"):
        Cluster().run_job(job())


def test_a_job_that_is_placed_again_counts_once() -> None:
    cluster = Cluster(Host("a", resident=(A,)), Host("b"))
    for _ in range(9):  # the answers were lost
        cluster.place(job(), [])
    assert cluster.choose(job("next")) == "a"


def test_a_job_whose_program_is_gone_counts_until_the_host_no_longer_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("a", resident=(A,), running={"j": 10.0})
    cluster = Cluster(host, Host("b"))
    for number in range(9):
        cluster.place(job(f"j{number}" if number else "j"), [])
    cluster.router.reports()
    assert cluster.choose(job("next")) == "b"  # jobs may be on their way
    monkeypatch.setattr("xditd.client.cluster.router._ARRIVAL_S", 0.0)
    cluster.router.reports()
    assert cluster.choose(job("next")) == "a"  # it still runs one, which takes less than a lend
    assert [*cluster.router._known["a"].sent] == ["j"]


def test_a_host_that_failed_a_job_gets_others_once_it_answers() -> None:
    failed = Host("a", resident=(A,))
    cluster = Cluster(failed)
    failed.found = HostLost("host a: gone")
    answer = cluster.place(job(), ["a"])
    assert isinstance(answer, Unplaced)
    assert (answer.reason.detail, answer.may_change) == ("the cluster has no other host", False)
    with pytest.raises(HostLost, match="host a: gone"):
        cluster.choose(job("next"))


def test_a_host_that_comes_back_is_used_again() -> None:
    back = Host("a")
    back.found = HostLost("host a: gone")
    cluster = Cluster(back)
    with pytest.raises(HostLost, match="host a: gone"):
        cluster.choose(job())
    back.found = report("a")
    cluster.router.reports()
    assert cluster.choose(job()) == "a"
