"""Two hosts with the real Ray, in network namespaces: what a user of a cluster is promised."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_jobs import direct_bits, write_models
from running_daemon import RunningDaemon, until
from two_hosts import ClusterHost, Driver, Network, states, two_hosts, until_serving, why_impossible

from xditd.client.cluster.content_hashes import ContentHashes

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


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
def expected(models: list[Path], start_daemon: Callable[..., RunningDaemon]) -> dict[int, str]:
    """The bits of each seed, from a daemon outside the cluster."""
    daemon = start_daemon(1)
    daemon.wait_ready()
    with daemon.connect() as client:
        found = direct_bits(client, models[0] / "flux1.safetensors", models[0] / "ae.safetensors", list(range(8)))
        bits = dict(enumerate(found))
    daemon.stop()
    return bits


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


def test_a_host_leaves(cluster):
    network, hosts = cluster
    done = network.ask(0, "leave", "--name", "b")
    assert done.returncode == 0, done.stderr
    assert hosts[1].process.wait(timeout=60) == 0
    assert set(states(network)) == {"a"}
    assert hosts[1].daemon.status().components == ()
