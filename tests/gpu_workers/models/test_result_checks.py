"""The first result that is not finite is named, in the dtype that it is converted to, and nothing else is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from xditd.gpu_workers.families.flux1.checkpoint import Flux1
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.result_checks import FiniteCheck, magnitude
from xditd.ipc.errors import NotFinite


@pytest.fixture
def component() -> Component:
    manifest = SimpleNamespace(label="dev.safetensors")
    match = SimpleNamespace(dtype=torch.float16, family=Flux1())
    return cast(
        Component,
        SimpleNamespace(component_id="c7", manifest=manifest, match=match),
    )


def checked(*results: torch.Tensor) -> FiniteCheck:
    finite = FiniteCheck()
    for number, result in enumerate(results, 1):
        finite.note(f"latents after step {number} of {len(results)}", result)
    return finite


def test_no_results_to_check_are_no_fault(component: Component) -> None:
    finite = FiniteCheck()
    finite.fetch()
    assert finite.fault(component) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_one_value_among_many_is_found(
    value: float, dtype: torch.dtype, order: torch.memory_format, component: Component
) -> None:
    sound = torch.randn(2, 16, 32, 32).to(dtype).contiguous(memory_format=order)
    assert magnitude(sound) == sound.float().abs().max()
    assert checked(sound, sound).fault(component) is None
    broken = sound.clone()
    broken[1, 5, 3, 31] = value
    fault = checked(sound, broken, sound, broken).fault(component)
    assert isinstance(fault, NotFinite)
    assert fault.detail.startswith("transformer c7 (dev.safetensors): latents after step 2 of 4: some values are NaN")
    assert "float16" in fault.detail


def test_what_does_not_fit_the_dtype_that_was_asked_for_is_found(component: Component) -> None:
    large = torch.full((4,), 65_519.0)  # which still rounds to the largest number of float16
    assert checked(large * 2, large).fault(component, torch.float16, torch.bfloat16) is None
    fault = checked(large, large + 1).fault(component, torch.bfloat16, torch.float16)
    assert fault is not None
    assert "latents after step 2 of 2: some values are NaN or infinite in float16" in fault.detail


@pytest.mark.gpu
def test_the_copy_to_the_host_is_not_waited_for_before_it_is_read(component: Component) -> None:
    result = torch.zeros(1 << 20, device="cuda")
    assert checked(result).fault(component) is None  # a first one waits: its kernel is loaded, and memory is pinned
    torch.cuda.synchronize()
    finite = FiniteCheck()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1_000_000_000)  # cycles: half a second of work that the result hangs on
        result.fill_(torch.nan)  # to set one value would wait
        finite.note("image", result)
        finite.fetch()
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
        assert finite.fault(component) is not None
        assert done.query()
