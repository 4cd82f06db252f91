"""LoRAs beside modules that run as their class: against the same LoRA in the weights of the class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random
from lora_files import Lora
from running_daemon import RunningDaemon

from xditd.client import Client

BAR = 1e-6
CLASSES = (
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "SD3Transformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "ZImageTransformer2DModel",
)
ROWS: dict[str, list[str]] = {}
"""Classes without a token plan, none of these."""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[1, 2])
def connected(request: pytest.FixtureRequest) -> Iterator[Client]:
    name = "one_worker" if request.param == 1 else "two_workers"
    daemon: RunningDaemon = request.getfixturevalue(name)
    with daemon.connect() as found:
        yield found


def layers_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [each for item in value for each in tensors(item)] if isinstance(value, (list, tuple)) else []


def error(found: Any, expected: Any) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(tensors(found), tensors(expected), strict=True)
    )


def run(model: Any, entry: Any) -> Any:
    return model(**entry.arguments(Random(1)), return_dict=False)


@pytest.mark.parametrize("name", CLASSES)
def test_branches_are_as_baked(connected: Client, name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    model = entry.build()
    shapes = layers_of(model)
    loras = [lora_files.make(shapes, spelling, seed) for seed, spelling in enumerate(("diffusers", "peft", "rslora"))]
    plain = run(model, entry)
    with connected.lend(model, as_class=True) as loan:
        loans = [
            connected.lend_lora(each.save(tmp_path / f"{number}.safetensors"), as_class=True)
            for number, each in enumerate(loras)
        ]
        built = connected.status().counters
        strengths = (0.7, -0.4, 0.2)
        for used in ((0,), (0, 1, 2), ()):
            view = loan.with_loras([(loans[each], strengths[each]) for each in used])
            expected = run(baked(entry, [(loras[each], strengths[each]) for each in used]), entry)
            for _ in range(2):
                found = connected.call(view, {**entry.arguments(Random(1)), "return_dict": False})
                assert error(found, expected) <= BAR
            if used:
                assert error(found, plain) > 0.01
        assert error(connected.call(loan, {**entry.arguments(Random(1)), "return_dict": False}), plain) <= BAR
        after = connected.status().counters
        assert (after.models_built, after.plugs) == (built.models_built, built.plugs)
        for each in loans:
            each.return_()


def baked(entry: Any, loras: list[tuple[Lora, float]]) -> torch.nn.Module:
    model = entry.build()
    for lora, strength in loras:
        lora.bake_into(model, strength)
    return model
