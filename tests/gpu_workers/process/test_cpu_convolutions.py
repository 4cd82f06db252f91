"""Convolutions in half precision on processors that have none."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from xditd.gpu_workers.process import cpu_convolutions

HALF = frozenset((torch.bfloat16, torch.float16))
LAYERS = [
    pytest.param(getattr(torch.nn, f"{kind}{sizes}d"), options, sizes, id=f"{kind}{sizes}d {options}")
    for kind, options in (
        ("Conv", {"padding": "same", "dilation": 2}),
        ("Conv", {"stride": 2, "groups": 2}),
        ("Conv", {"padding": 1, "padding_mode": "reflect", "bias": False}),
        ("ConvTranspose", {"stride": 2, "output_padding": 1}),
    )
    for sizes in (1, 2, 3)
]


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Convolve both dtypes in float32, whatever this processor has."""
    monkeypatch.setattr(cpu_convolutions, "slow_dtypes", lambda: HALF)
    request.getfixturevalue("convolutions_of_workers")


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "options", "sizes"), LAYERS)
def test_the_result_is_that_of_float32_rounded_once(
    kind: type[torch.nn.Module], options: dict[str, object], sizes: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = kind(4, 6, 3, **options).to(dtype)
    x = torch.randn(2, 4, *([9] * sizes)).to(dtype)
    assert torch.equal(layer(x), copy.deepcopy(layer).float()(x.float()).to(dtype))


@pytest.mark.usefixtures("widened")
def test_tensors_of_several_dtypes_are_refused_as_by_torch() -> None:
    layer = torch.nn.Conv2d(4, 4, 3).bfloat16()
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.randn(1, 4, 9, 9))
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.randn(1, 4, 9, 9).half())


@pytest.mark.usefixtures("widened")
def test_it_is_installed_once() -> None:
    before = functional.conv2d
    cpu_convolutions.install(HALF)
    assert functional.conv2d.__wrapped__ is before.__wrapped__


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("most", "slow"), [("AVX2", HALF), ("AVX512_CORE", {torch.float16})], ids=["AVX2", "AVX512"])
def test_the_processor_decides(most: str, slow: frozenset[torch.dtype]) -> None:
    """oneDNN may use no more than ``ONEDNN_MAX_CPU_ISA``, so that this machine is one with fewer instructions."""
    if most == "AVX512_CORE" and torch.bfloat16 in cpu_convolutions.slow_dtypes():
        pytest.skip("this processor has no AVX-512")
    program = "from xditd.gpu_workers.process import cpu_convolutions as c; print(*sorted(map(str, c.slow_dtypes())))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": most},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == sorted(map(str, slow))
