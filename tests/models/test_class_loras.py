"""LoRAs beside modules that run as their class: against the same LoRA in the weights of the class."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random
from lora_files import Lora
from nested_values import cast, tensors_of
from rounding import BAR, assert_rounding, disturbed
from running_daemon import RunningDaemon

from xditd.client import BadRequest, Client, Unsupported

CLASSES = (
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "SD3Transformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "ZImageTransformer2DModel",
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_gradients(as_many_threads_as_the_worker: None) -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[1, 2])
def connected(request: pytest.FixtureRequest) -> Iterator[Client]:
    name = "one_worker" if request.param == 1 else "two_workers"
    daemon: RunningDaemon = request.getfixturevalue(name)
    with daemon.connect() as found:
        yield found


def layers_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}


def error(found: Any, expected: Any) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(tensors_of(found), tensors_of(expected), strict=True)
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
            parts = [(loras[each], strengths[each]) for each in used]
            expected = run(baked(entry, parts), entry)
            disturbed_error = partial(error_of_disturbed, entry, parts, expected)
            for _ in range(2):
                found = connected.call(view, {**entry.arguments(Random(1)), "return_dict": False})
                assert_rounding(error(found, expected), disturbed_error)
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


def error_of_disturbed(entry: Any, loras: list[tuple[Lora, float]], expected: Any, seed: int) -> float:
    model = baked(entry, loras)
    with disturbed([model], seed):
        return error(run(model, entry), expected)


def test_other_names_and_components_are_refused_by_name(connected: Client) -> None:
    entry = ENTRIES["FluxTransformer2DModel"]
    model = entry.build()
    given = entry.arguments(Random(1))
    some = {name: shape for name, shape in layers_of(model).items() if "attn" in name}
    with connected.lend(model, as_class=True) as loan:
        fused = lora_files.make({"double_blocks.0.img_attn.qkv": (96, 32)}, "kohya", 1)
        large = lora_files.make({name: (outputs + 1, inputs) for name, (outputs, inputs) in some.items()}, "peft", 2)
        text = lora_files.make({"text_model.encoder.layers.0.self_attn.q_proj": (32, 32)}, "diffusers", 3)
        text.tensors = {name.replace("transformer.", "text_encoder."): each for name, each in text.tensors.items()}
        for lora, said in (
            (fused, r"of another model: this FluxTransformer2DModel has 0 of its 1 layers.*double_blocks_0"),
            (large, r"outputs, the model's has"),
            (text, r"it has no layers of FluxTransformer2DModel"),
        ):
            with connected.lend_lora(lora.tensors, as_class=True) as bad:
                assert bad.facts.lora.families == {}
                with pytest.raises(BadRequest, match=said):
                    connected.call(loan.with_loras([(bad, 1.0)]), given)
        with connected.lend_lora(lora_files.make(some, "diffusers", 4).tensors) as known:  # a family knows it
            assert known.facts.lora.families
            connected.call(loan.with_loras([(known, 1.0)]), given)
        unknown = lora_files.make({"img_in": (32, 32)} | dict.fromkeys(("own.a", "own.b"), (4, 4)), "diffusers", 5)
        with pytest.raises(Unsupported, match="as_class=True"):
            connected.lend_lora(unknown.tensors)
        assert error(connected.call(loan, {**given, "return_dict": False}), run(model, entry)) <= BAR


@pytest.mark.parametrize("factors", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "WanTransformer3DModel"])
def test_factors_have_the_dtype_of_their_layers_as_diffusers_loads_them(
    one_worker: RunningDaemon, name: str, factors: torch.dtype, tmp_path: Path
) -> None:
    """The bits of ``load_lora_adapter`` in bfloat16, where files of LoRAs have another dtype."""
    entry = ENTRIES[name]
    model = entry.build().bfloat16()
    lora = lora_files.make(layers_of(model), "diffusers", 1, dtype=factors, size=0.2)
    path = lora.save(tmp_path / "x.safetensors")
    given = cast(entry.arguments(Random(1)), torch.bfloat16)
    with one_worker.connect() as client, client.lend(model, as_class=True) as loan:
        with client.lend_lora(path, as_class=True) as lent:
            found = client.call(loan.with_loras([(lent, 0.7)]), {**given, "return_dict": False})
        model.load_lora_adapter(path, prefix="transformer", adapter_name="x")
        model.set_adapters("x", 0.7)
        (expected,) = model(**given, return_dict=False)
    assert torch.equal(next(tensors_of(found)), expected)
