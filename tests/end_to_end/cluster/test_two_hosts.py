"""Two hosts with the real Ray, in network namespaces: what a user of a cluster is promised."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_jobs import direct_bits, write_models
from running_daemon import RunningDaemon, until
from two_hosts import (
    ClusterHost,
    Driver,
    Network,
    other_clocks,
    other_version,
    states,
    two_hosts,
    until_serving,
    why_impossible,
)

from xditd.client.cluster.content_hashes import ContentHashes
from xditd.client.cluster.messages import HERE

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ALL_JOBS_WITHIN_S = 240.0
IN_FLIGHT = 16
KILLS = 12
ERRORS_OF_TWO_LOSSES = ("host_lost", "lease_lost", "workers_lost", "session_lost", "process_gone")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each host's own copies, at other paths: the disks differ."""
    if why := why_impossible():
        pytest.skip(why)
    folders = [tmp_path_factory.mktemp("disk-a") / "models", tmp_path_factory.mktemp("disk-b") / "deep" / "weights"]
    for folder in folders:
        write_models(folder)
    return folders


@pytest.fixture(scope="module")
def cluster(
    models: list[Path], start_daemon: Callable[..., RunningDaemon], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Network, list[ClusterHost]]]:
    daemons = [start_daemon(1), start_daemon(1)]
    for daemon in daemons:
        daemon.wait_ready()
    with two_hosts(tmp_path_factory.mktemp("cluster"), daemons, models) as found:
        yield found


@pytest.fixture(scope="module")
def driver(cluster: tuple[Network, list[ClusterHost]]) -> Iterator[Driver]:
    started = Driver(cluster[0], 0)
    yield started
    started.close()


@pytest.fixture(scope="module")
def contents(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    hashes = ContentHashes(tmp_path_factory.mktemp("hashes") / "hashes.json")
    return {"transformer": hashes.of(models[0] / "flux1.safetensors"), "vae": hashes.of(models[0] / "ae.safetensors")}


@pytest.fixture(scope="module")
def direct(models: list[Path], start_daemon: Callable[..., RunningDaemon]) -> tuple[dict[int, str], dict[int, str]]:
    """The bits of each seed, with and without images, from a daemon outside the cluster."""
    daemon = start_daemon(1)
    daemon.wait_ready()
    with daemon.connect() as client:
        transformer, seeds = models[0] / "flux1.safetensors", list(range(8))
        images = dict(enumerate(direct_bits(client, transformer, models[0] / "ae.safetensors", seeds)))
        latents = dict(enumerate(direct_bits(client, transformer, None, seeds)))
    daemon.stop()
    return images, latents


@pytest.fixture(scope="module")
def expected(direct: tuple[dict[int, str], dict[int, str]]) -> dict[int, str]:
    return direct[0]


def test_jobs_by_content_go_to_the_host_with_the_weights(cluster, driver, contents, expected):
    first = driver.ask(op="submit", seeds=[0], **contents)[0]
    assert first["bits"] == expected[0]
    for seed in (1, 2, 3):
        (found,) = driver.ask(op="submit", seeds=[seed], **contents)
        assert (found["bits"], found["host"], found["runs"]) == (expected[seed], first["host"], 1)
    found = driver.ask(op="submit", seeds=[4], transformer="blake2b:" + "0" * 64)
    assert found[0]["code"] == "unknown_component"


def test_strangers_are_refused(cluster):
    network, _ = cluster
    for changes, word in (
        ({"RAY_AUTH_MODE": None}, "RAY_AUTH_MODE"),
        ({"RAY_AUTH_TOKEN_PATH": f"{network.folder}/none"}, "No such file"),
        ({"RAY_USE_TLS": "0"}, "RAY_USE_TLS"),
    ):
        done = network.ask(1, "status", **changes)
        assert done.returncode == 1, (changes, done.stdout, done.stderr)
        assert "not_permitted" in done.stderr, (changes, done.stderr)
        assert word in done.stderr
    done = network.ask(1, "status", RAY_AUTH_TOKEN_PATH=f"{network.folder}/wrong_token")
    assert done.returncode == 1
    assert "the same token" in done.stderr, done.stderr


def test_a_router_that_is_killed_answers_each_job_once(cluster, driver, contents, expected):
    hosts = cluster[1]
    driver.send(op="submit", seeds=[0, 1, 2, 3], steps=2, **contents)
    os.kill(hosts[0].pid_of("ray::RouterActor"), signal.SIGKILL)
    answers = driver.receive()
    assert [each.get("bits") for each in answers] == [expected[seed] for seed in range(4)], answers


def test_a_link_that_is_cut_is_noticed_within_five_seconds(cluster, driver, contents, expected):
    network, hosts = cluster
    assert driver.ask(op="connect") == {"a": "", "b": ""}
    network.cut()
    cut_s = time.monotonic()

    def is_noticed() -> bool:
        return driver.ask(op="connect").get("b", "gone") != ""

    until(is_noticed, "the cut to be noticed")
    noticed_s = time.monotonic() - cut_s
    (found,) = driver.ask(op="submit", seeds=[5], **contents)
    network.mend()
    assert (found["bits"], found["host"]) == (expected[5], "a")
    assert noticed_s <= 5.0, noticed_s
    until_serving(network, hosts)


def test_each_of_200_jobs_is_answered_once_whatever_is_killed(cluster, driver, contents, direct):
    network, hosts = cluster
    until_serving(network, hosts)
    seeds = [number % 8 for number in range(200)]
    driver.send(op="submit", seeds=seeds, transformer=contents["transformer"], in_flight=IN_FLIGHT, pause_s=2.0)
    is_answered = threading.Event()
    killed: list[str] = []

    def kill_at_random() -> None:
        chance = random.Random(1)
        while len(killed) < KILLS and not is_answered.wait(chance.uniform(1.0, 4.0)):
            # The first three are of each kind.
            victim = ["router", "agent", "workers"][len(killed)] if len(killed) < 3 else chance.choice(killed[:3])
            host = hosts[0] if victim == "router" else chance.choice(hosts)
            pids = host.victims(victim)
            if victim == "workers" and not all(each.victims("workers") for each in hosts):
                continue  # with none left anywhere for most of the time, few jobs would run at all
            if pids:  # what is being started is left alone
                os.kill(pids[-1], signal.SIGKILL)
                killed.append(victim)

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        answers = driver.receive(within_s=ALL_JOBS_WITHIN_S)
    finally:
        is_answered.set()
        killer.join()
    assert [each["seed"] for each in answers] == seeds
    assert len({each["job_id"] for each in answers}) == 200
    assert set(killed) == {"router", "agent", "workers"}
    errors = [each for each in answers if "code" in each]
    assert [each for each in errors if each["code"] not in ERRORS_OF_TWO_LOSSES] == []
    wrong = [each for each in answers if "code" not in each and each["bits"] != direct[1][each["seed"]]]
    assert wrong == []
    # A kill loses at most the jobs in flight, and an error takes two losses of one job.
    assert len(errors) <= min(IN_FLIGHT * len(killed) // 2, len(seeds) - 1), (killed, errors)
    again = sum(each.get("runs", 1) - 1 for each in answers)
    print(f"{len(killed)} kills, {len(errors)} errors, {again} jobs ran again on the other host")
    until_serving(network, hosts)
    assert all(each["running"] == {} and each["other_jobs"] == 0 for each in states(network).values())


def test_a_host_that_is_killed_in_mid_job(cluster, driver, contents, expected, start_daemon):
    network, hosts = cluster
    until_serving(network, hosts)
    sent = [0, 1, 2, 3, 4, 5, 6, 7]
    driver.send(op="submit", seeds=sent, **contents)
    killer = threading.Timer(0.3, hosts[1].kill)
    killer.start()
    answers = driver.receive()
    killer.join()
    assert [each.get("bits") for each in answers] == [expected[seed] for seed in sent], answers
    # It comes back with another daemon.
    hosts[1].daemon = start_daemon(1, folder=hosts[1].daemon.runtime_dir.parent)
    hosts[1].daemon.wait_ready()
    hosts[1].join()
    until_serving(network, hosts)


def test_a_head_that_is_killed_does_not_disturb_local_clients_and_the_cluster_heals(
    cluster, contents, expected, models
):
    network, hosts = cluster
    with hosts[0].daemon.connect() as client:
        os.kill(hosts[0].pid_of("gcs_server"), signal.SIGKILL)
        bits = direct_bits(client, models[0] / "flux1.safetensors", models[0] / "ae.safetensors", [6])
        assert next(bits) == expected[6]
    until_serving(network, hosts)
    driver = Driver(network, 1)
    try:
        (found,) = driver.ask(op="submit", seeds=[7], **contents)
        assert found["bits"] == expected[7]
    finally:
        driver.close()


def test_a_join_that_is_killed_leaves_no_process_and_joins_again(cluster):
    network, hosts = cluster
    until_serving(network, hosts)
    before = hosts[1].pids().keys()
    assert len(before) > 3  # Ray, the member process and the agent
    hosts[1].process.kill()
    hosts[1].process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before), "all processes to end")
    hosts[1].join()
    until_serving(network, hosts)


def test_two_joins_of_one_name_on_one_host(cluster):
    network, hosts = cluster
    until_serving(network, hosts)
    second = ClusterHost(network, 1, hosts[1].daemon, hosts[1].models)
    began = second.log.stat().st_size
    second.join()
    assert second.process is not None
    assert second.process.wait(timeout=60) == 2
    assert "name 'b': another `xditd cluster join` on this host has it" in second.log.read_text()[began:]
    until_serving(network, hosts)


def test_a_host_leaves(cluster):
    network, hosts = cluster
    done = network.ask(0, "leave", "--name", "b")
    assert done.returncode == 0, done.stderr
    assert hosts[1].process.wait(timeout=60) == 0
    assert set(states(network)) == {"a"}
    assert hosts[1].daemon.status().components == ()


@pytest.mark.parametrize(
    ("file", "before", "after", "text"),
    [
        ("__init__.py", '"{0}"', '"9.9.9"', "the cluster's router: xditd version {0}, but 9.9.9 here"),
        ("ipc/protocol.py", " = {1}", " = 99", "the cluster's router: protocol version {1}, but 99 here"),
    ],
    ids=["xditd", "protocol"],
)
def test_a_host_of_another_version_is_refused_by_name(cluster, tmp_path, file, before, after, text):
    network, hosts = cluster
    hosts[1].end()
    here = (HERE.xditd, HERE.protocol)
    began = hosts[1].log.stat().st_size
    hosts[1].join(**other_version(tmp_path, file, before.format(*here), after))
    assert hosts[1].process.wait(timeout=120) == 1
    said = hosts[1].log.read_text()[began:]
    assert text.format(*here) in said, said
    assert "install the same xditd on every host" in said
    assert not states(network).get("b", {}).get("is_serving")


def test_a_host_whose_clocks_differ(cluster, contents, expected, tmp_path):
    network, hosts = cluster
    hosts[1].end()
    hosts[1].join(**other_clocks(tmp_path))
    until_serving(network, hosts)
    driver = Driver(network, 0)
    try:
        answers = driver.ask(op="submit", seeds=list(range(8)), **contents)
    finally:
        driver.close()
    assert [each.get("bits") for each in answers] == [expected[seed] for seed in range(8)], answers
    assert {each["host"] for each in answers} == {"a", "b"}
    assert 0.0 < states(network)["b"]["mean_job_s"] < 60.0
