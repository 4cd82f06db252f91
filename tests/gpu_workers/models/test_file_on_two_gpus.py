"""Two NCCL ranks share the upload of a file: both hold all of it, and what fails on one of them fails on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.multigpu

MIB = 2**20
NCCL_BYTES = 1024 * MIB
"""What NCCL keeps for good from its first collective on, at most."""
KEPT_BYTES = 128 * MIB
"""What ranks keep of a first upload at most: 68 to 72 MiB were seen. A context on a GPU takes more than 500."""

PROGRAM = Path(__file__).with_name("file_on_two_gpus.py")
WAYS = ("chosen", "broadcast")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("file_on_two_gpus")
    devices = os.environ.get("XDITD_TEST_DEVICES", "cuda:0,cuda:1").split(",")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), *devices], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(
        facts=[json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)],
        lent=(folder / "lent.txt").read_text(),
    )


@pytest.mark.parametrize("attempt", ["whole", "again"])
@pytest.mark.parametrize("way", WAYS)
def test_both_ranks_hold_the_files_bytes(made, way, attempt):
    for facts in made.facts:
        assert facts[f"{way}, {attempt}: digest"] == made.lent


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_uploads_a_share_and_gets_the_other(made, way):
    size = made.facts[0][f"{way}, whole: bytes"]
    uploaded = [facts[f"{way}, whole: uploaded"] for facts in made.facts]
    assert sum(uploaded) == size
    assert all(abs(share - size / 2) <= 2 * MIB for share in uploaded)
    assert [facts[f"{way}, whole: peer"] for facts in made.facts] == uploaded[::-1]


def test_the_other_ranks_memory_is_opened_where_it_can_be_and_else_not(made):
    for facts in made.facts:
        assert {"copy", "peer_copy"} <= set(facts["broadcast, whole: phases"])
        assert "peer_close" not in facts["broadcast, whole: phases"]
        if facts["is direct"]:
            assert {"copy", "peer_copy", "peer_close"} <= set(facts["chosen, whole: phases"])


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_short_is_stale_on_both_ranks(made, way):
    assert [facts[f"{way}, cut short: error"] for facts in made.facts] == ["stale_source"] * 2


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_overwritten_with_its_old_mtime_is_stale_on_both_ranks(made, way):
    assert [facts[f"{way}, overwritten: error"] for facts in made.facts] == ["stale_source"] * 2


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_without_room_fails_both_ranks(made, way):
    errors = [facts[f"{way}, no room: error"] for facts in made.facts]
    assert errors == ["other_rank_failed", "out_of_memory"]


@pytest.mark.parametrize("attempt", ["whole", "cut short", "overwritten", "no room", "again"])
@pytest.mark.parametrize("way", WAYS)
def test_memory_and_files_come_back(made, way, attempt):
    for facts in made.facts:
        first_broadcast = "broadcast" if facts["is direct"] else "chosen"
        is_connecting = (way, attempt) == (first_broadcast, "whole")
        assert facts[f"{way}, {attempt}: blocks"] == 0
        assert facts[f"{way}, {attempt}: left"] < (NCCL_BYTES if is_connecting else KEPT_BYTES)


def test_no_context_is_opened_on_the_other_ranks_gpu(made):
    """A context takes some 500 MiB there, where memory is short."""
    if not made.facts[0]["is direct"]:
        pytest.skip("the GPUs have no peer access to each other")
    for facts in made.facts:
        assert facts["chosen, whole: taken"] < facts["chosen, whole: bytes"] + KEPT_BYTES
