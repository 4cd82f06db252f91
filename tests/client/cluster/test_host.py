"""A host's agent on a real daemon, without Ray: jobs by content; daemons, workers and agents that restart."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import wan_models
from cluster_jobs import bits, direct_bits, make_job, make_tensors, write_models
from running_daemon import RunningDaemon, until
from safetensors.torch import save_file

from xditd.client.cluster.content_hashes import PREFIX, ContentHashes
from xditd.client.cluster.host import HostAgent
from xditd.client.cluster.messages import Versions, load, store
from xditd.client.metadata.record import decode
from xditd.ipc.errors import BadRequest, ProtocolMismatch, UnknownComponent, XditdError
from xditd.ipc.status import LeaseState

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def hashes(tmp_path_factory: pytest.TempPathFactory) -> ContentHashes:
    return ContentHashes(tmp_path_factory.mktemp("cache") / "hashes.json")


@pytest.fixture
def daemon(one_worker: RunningDaemon) -> RunningDaemon:
    """The session's daemon: to start one for these tests takes longer than they do."""
    return one_worker


def lent_for_clusters(daemon: RunningDaemon) -> list[LeaseState]:
    return [each.state for each in daemon.status().components if each.label.startswith(PREFIX)]


@pytest.fixture
def agent(daemon: RunningDaemon, models: tuple[Path, Path], hashes: ContentHashes) -> Iterator[HostAgent]:
    made = HostAgent("a", [models[0].parent], daemon.runtime_dir, hashes)
    until(lambda: len(made.report().files) == 2, "the files to be hashed")
    yield made
    made.leave()


def test_a_job_by_content_has_the_bits_of_a_lone_client(agent, daemon, models, hashes):
    with daemon.connect() as client:
        (expected,) = direct_bits(client, *models, [5])
    done, tensors = agent.run(make_job(hashes, *models), make_tensors())
    assert (done.host, done.seed, done.was_resident, done.image_dtype) == ("a", 5, False, "float32")
    assert bits(tensors) == expected
    record = decode(done.record.encode(), "host a")
    assert (record.seed, record.steps, record.width, record.model.family) == (5, 2, 128, "flux1")
    assert agent.report().other_jobs == 0
    again, tensors = agent.run(make_job(hashes, *models), make_tensors())
    assert again.was_resident
    assert again.is_free
    assert bits(tensors) == expected
    report = agent.report()
    assert report.is_serving, report.detail
    assert set(report.resident) == {hashes.of(each) for each in models}
    assert report.pace[hashes.of(models[0])] > 0
    assert report.lend_bytes_per_s > 0
    assert not report.running
    assert report.other_jobs == 0


def test_a_video_of_two_transformers_has_the_bits_of_a_lone_client(daemon, hashes, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("high", "low")]
    for seed, path in enumerate(paths):
        save_file(wan_models.state_dict(seed), path)
    generator = torch.Generator().manual_seed(2)
    texts = {name: torch.randn(1, 20, 48, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}
    sampling = {"height": 48, "width": 80, "frames": 9, "steps": 4, "seed": 5}
    options = {"boundary_ratio": 0.7}
    with daemon.connect() as client:
        high, low = map(client.lend, paths)
        expected = client.generate(high, texts, transformer_2=low, options=options, **sampling).result().latents
        alone = client.generate(high, texts, **sampling).result().latents
    agent = HostAgent("a", [tmp_path], daemon.runtime_dir, hashes)
    until(lambda: len(agent.report().files) == 2, "the files to be hashed")
    job = make_job(hashes, paths[0], None, transformer_2=hashes.of(paths[1]), options=options, **sampling)
    assert set(job.digests) == {hashes.of(path) for path in paths}
    assert job.work == pytest.approx(make_job(hashes, paths[0], None, **{**sampling, "frames": 1}).work * 9)
    done, tensors = agent.run(job, store(texts))
    found = load(tensors)["latents"]
    assert torch.equal(found, expected)
    assert not torch.equal(found, alone)
    assert set(agent.report().resident) == set(job.digests)
    assert not done.was_resident
    assert agent.run(job, store(texts))[0].was_resident
    agent.leave()
    assert lent_for_clusters(daemon) == []


def test_the_next_agent_finds_what_the_last_one_adopted(agent, daemon, models, hashes):
    agent.run(make_job(hashes, *models), make_tensors())
    second = HostAgent("a", [models[0].parent], daemon.runtime_dir, hashes)
    until(lambda: len(second.report().resident) == 2, "the adopted components")
    done, _ = second.run(make_job(hashes, *models), make_tensors())
    assert done.was_resident
    assert lent_for_clusters(daemon) == [LeaseState.ADOPTED] * 2
    second.leave()
    assert lent_for_clusters(daemon) == []


def test_what_is_lent_while_an_agent_looks_is_kept_and_ends_with_it(daemon, models, hashes, monkeypatch):
    agent = HostAgent("a", [models[0].parent], daemon.runtime_dir, hashes)
    until(lambda: len(agent.report().files) == 2, "the files to be hashed")
    client, residents = agent._attached()
    status = client.status

    def late_status(*given):
        found = status(*given)
        monkeypatch.setattr(client, "status", status)
        agent.run(make_job(hashes, *models), make_tensors())
        return found

    monkeypatch.setattr(client, "status", late_status)
    residents.look()
    assert len(residents.digests()) == 2
    agent.leave()
    assert lent_for_clusters(daemon) == []


def test_errors_are_those_of_the_job(agent, models, hashes):
    with pytest.raises(BadRequest, match="height"):
        agent.run(make_job(hashes, *models, height=100), make_tensors())
    with pytest.raises(UnknownComponent, match="no file below"):
        agent.run(msgspec.structs.replace(make_job(hashes, *models), transformer="blake2b:" + "0" * 64), make_tensors())
    with pytest.raises(BadRequest, match="no content hash"):
        agent.run(msgspec.structs.replace(make_job(hashes, *models), transformer=str(models[0])), make_tensors())
    other = Versions(xditd="9.9", protocol=1, cluster=1)
    with pytest.raises(ProtocolMismatch, match=r"xditd version 9\.9, but"):
        agent.run(make_job(hashes, *models, versions=other), make_tensors())
    assert not agent.report().running


@pytest.mark.long
def test_workers_and_daemons_that_restart(start_daemon, models, hashes):
    daemon = start_daemon(1)
    daemon.wait_ready()
    agent = HostAgent("a", [models[0].parent], daemon.runtime_dir, hashes)
    _, tensors = agent.run(make_job(hashes, *models), make_tensors())
    expected = bits(tensors)

    # The workers take what they adopted along.
    starts = daemon.status().counters.group_starts
    os.kill(daemon.status().workers[0].pid, signal.SIGKILL)
    until(lambda: daemon.status().counters.group_starts > starts, "new workers")
    daemon.wait_ready()
    done, tensors = agent.run(make_job(hashes, *models), make_tensors())
    assert (bits(tensors), done.was_resident) == (expected, False)

    daemon.stop()
    until(lambda: not agent.report().is_serving, "the agent to see that the daemon is gone")
    assert "daemon" in agent.report().detail
    with pytest.raises(XditdError, match="daemon"):
        agent.run(make_job(hashes, *models), make_tensors())

    second = start_daemon(1, folder=daemon.runtime_dir.parent)
    second.wait_ready()
    until(lambda: agent.report().is_serving, "the agent to use the next daemon")
    done, tensors = agent.run(make_job(hashes, *models), make_tensors())
    assert (bits(tensors), done.was_resident) == (expected, False)
    agent.leave()
    assert second.status().components == ()
    second.stop()
