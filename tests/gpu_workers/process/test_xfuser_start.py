"""Starting a rank: what is refused, what listens, and where xfuser's log goes."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import sys

import psutil
import pytest
import torch
from torch.distributed import distributed_c10d

from xditd.gpu_workers.parallel import attention, rank_sync
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.process import xfuser_start
from xditd.ipc.degrees import Degrees
from xditd.ipc.errors import Unsupported

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_a_single_rank_starts_and_agrees_with_itself(layout: ParallelLayout) -> None:
    assert (layout.rank, layout.world_size, layout.degrees) == (0, 1, Degrees())
    assert layout.attention_backend == "SDPA"
    assert rank_sync.agree(True) is True
    assert rank_sync.agree(False) is False
    assert rank_sync.broadcast_stop(True) is True
    assert rank_sync.broadcast_stop(False) is False


@pytest.mark.usefixtures("layout")
def test_a_group_listens_on_loopback_only() -> None:
    listening = [c for c in psutil.Process().net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    assert listening  # gloo's own; if it listens nowhere, this test no longer sees what it should
    assert all(ipaddress.ip_address(connection.laddr.ip).is_loopback for connection in listening)


@pytest.mark.usefixtures("layout")
def test_xfuser_does_not_log_to_standard_output() -> None:
    # Exactly this type: pytest puts its own capturing handlers beside it.
    (handler,) = (h for h in logging.getLogger("xfuser").handlers if type(h) is logging.StreamHandler)
    assert handler.stream is not sys.__stdout__
    assert handler.level >= logging.ERROR


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize(("asked", "expected"), [("auto", None), ("plain", None)])
def test_transformers_run_plain_on_a_cpu(asked: str, expected: None) -> None:
    assert xfuser_start._start_fused(0, Degrees(), CPU, "auto", "SDPA", asked, "bf16") is expected


def test_fused_kernels_by_name_are_refused_on_a_cpu() -> None:
    with pytest.raises(Unsupported, match="need NVIDIA GPUs; use auto or plain"):
        xfuser_start._start_fused(0, Degrees(), CPU, "auto", "SDPA", "fused", "bf16")


@pytest.mark.parametrize("kernels", ["auto", "fused", "plain"])
def test_eight_bits_are_refused_on_a_cpu(kernels: str) -> None:
    with pytest.raises(Unsupported, match="precision 'fp8' needs fused kernels on NVIDIA GPUs, not the CPU; use bf16"):
        xfuser_start._start_fused(0, Degrees(), CPU, "auto", "SDPA", kernels, "fp8")


def test_eight_bits_are_refused_with_plain_modules() -> None:
    with pytest.raises(Unsupported, match="needs fused kernels on NVIDIA GPUs, not kernels 'plain'"):
        xfuser_start._start_fused(0, Degrees(), GPU, "auto", "SDPA", "plain", "fp8")


def test_eight_bits_are_refused_in_layouts_that_run_plain() -> None:
    with pytest.raises(Unsupported, match=r"precision 'fp8' with layout .*ring.*; use ring=1 or bf16"):
        xfuser_start._start_fused(0, Degrees(ring=2), GPU, "auto", "SDPA", "auto", "fp8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_eight_bits_are_made_of_bfloat16_weights_alone(layout: ParallelLayout, dtype: torch.dtype) -> None:
    from xditd.gpu_workers.families.flux1.checkpoint import Flux1, Flux1Config

    config = Flux1Config(256, 1, 1, 4096, 768, True)
    gpu = dataclasses.replace(layout, device=GPU, fused_attention="CUDNN", precision="fp8")
    found = str(dtype).removeprefix("torch.")
    with pytest.raises(Unsupported, match=f"precision 'fp8' takes bfloat16 weights, and these are {found};"):
        Flux1().operations.fuse(config, torch.nn.Module(), gpu, dtype, {})
    with pytest.raises(Unsupported, match=f"takes bfloat16 weights, and these are bfloat16 and {found};"):
        Flux1().operations.fuse(config, torch.nn.Module(), gpu, torch.bfloat16, {"norm_out.linear.weight": dtype})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"requested_kernels": "fused"}, "kernels 'fused' with 3 .* with kernels auto, or with --workers 2$"),
        ({"precision": "fp8"}, "precision 'fp8' with 3 .* with precision bf16, or with --workers 2$"),
    ],
)
def test_fused_kernels_by_name_are_refused_where_heads_need_a_ring(
    layout: ParallelLayout, asked: dict[str, str], words: str
) -> None:
    from xditd.gpu_workers.families.flux1.checkpoint import Flux1, Flux1Config

    config = Flux1Config(384, 1, 1, 4096, 768, True)
    ring = dataclasses.replace(layout, degrees=Degrees(ring=2, cfg=2), fused_attention="CUDNN", **asked)
    with pytest.raises(Unsupported, match=words):
        Flux1().operations.fuse(config, torch.nn.Module(), ring, torch.bfloat16, {})


def test_plain_blocks_run_where_heads_need_a_ring(layout: ParallelLayout, caplog: pytest.LogCaptureFixture) -> None:
    from xditd.gpu_workers.families.flux1.checkpoint import Flux1, Flux1Config

    caplog.set_level("INFO")
    config = Flux1Config(384, 1, 1, 4096, 768, True)
    ring = dataclasses.replace(layout, degrees=Degrees(ring=2), fused_attention="CUDNN")
    assert Flux1().operations.fuse(config, torch.nn.Module(), ring, torch.bfloat16, {}) is None
    assert caplog.messages == ["plain blocks run: fused ones have no ring attention heads=3 layout=ring=2"]


def test_an_unknown_attention_backend_lists_those_that_run() -> None:
    with pytest.raises(Unsupported, match=r"'warp' is unknown; those that run here: .*SDPA"):
        attention.check("warp", CPU)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("backend", ["flash_4", "CUDNN", "AITER_FP8"])
def test_a_backend_that_does_not_run_here_is_found_at_start(backend: str) -> None:
    with pytest.raises(Unsupported, match=r"does not run here \(.+\); those that do: .*SDPA"):
        attention.check(backend, CPU)


@pytest.mark.usefixtures("layout")
def test_a_backend_that_runs_is_returned_as_xdit_spells_it() -> None:
    assert attention.check("sdpa_math", CPU) == "SDPA_MATH"
    assert attention.requested("sdpa", CPU) == "SDPA"


def test_float32_weights_avoid_kernels_for_half_precision() -> None:
    gpu = torch.device("cuda", 0)
    assert attention.for_dtype("CUDNN", torch.float32, gpu) == "SDPA"
    assert attention.for_dtype("CUDNN", torch.bfloat16, gpu) == "CUDNN"
    assert attention.for_dtype("SDPA_MATH", torch.float32, gpu) == "SDPA_MATH"


@pytest.mark.usefixtures("layout")
def test_no_group_of_a_rank_has_a_timeout_of_its_own() -> None:
    groups = list(distributed_c10d._world.pg_map)
    assert len(groups) > 1  # xfuser's, too
    timeouts = {group._get_backend(CPU).options._timeout for group in groups}
    assert timeouts == {xfuser_start.GROUP_TIMEOUT}
