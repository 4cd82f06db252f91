"""One rank gives the bits of diffusers' own class, and every refusal is by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import wan_models
from interpreted_graphs import InterpretedGraphs

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]

TEXT, CLIP_IMAGE = wan_models.TEXT, wan_models.CLIP_IMAGE
CONFIGS = {
    **wan_models.CONFIGS,
    "text in diffusers' names": dataclasses.replace(TEXT, is_original=False),
    "image with CLIP in diffusers' names": dataclasses.replace(CLIP_IMAGE, is_original=False),
}


def plugged(cache: ModelCache, plug: Plugger, config: Any, **given: Any) -> tuple[CachedModel, Any]:
    state = wan_models.state_dict(0, config, **given)
    return plug(cache, state).model, wan_models.reference(state, config)


def run(model: CachedModel, given: Mapping[str, Any], **more: Any) -> torch.Tensor:
    import direct_jobs  # not before the group is started

    ((result,),) = direct_jobs.call(model, [Inputs(given)], **more)
    return result


def expected_of(reference: Any, given: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = reference(**given, return_dict=False)[0]
    return found


@pytest.mark.parametrize("config", list(CONFIGS.values()), ids=list(CONFIGS))
def test_a_call_gives_the_bits_of_the_class(shared_cache: ModelCache, plug: Plugger, config: Any) -> None:
    model, reference = plugged(shared_cache, plug, config)
    for case in ((1, 32, (2, 4, 6)), (2, 7, (3, 6, 10)), (1, 12, (1, 4, 4))):
        given = wan_models.inputs(*case, config)
        assert torch.equal(run(model, given), expected_of(reference, given)), case


def test_each_token_may_have_its_own_time(shared_cache: ModelCache, plug: Plugger) -> None:
    model, reference = plugged(shared_cache, plug, wan_models.TI2V)
    given = wan_models.inputs(2, 7, (3, 6, 10), wan_models.TI2V, is_per_token=True)
    found = run(model, given)
    assert torch.equal(found, expected_of(reference, given))
    assert not torch.equal(found, run(model, {**given, "timestep": given["timestep"].amax(dim=1)}))


def test_comfyuis_variant_has_its_frequencies_of_the_time(shared_cache: ModelCache, plug: Plugger) -> None:
    for config, more in ((TEXT, {}), (wan_models.TI2V, {"is_per_token": True})):
        model, reference = plugged(shared_cache, plug, config)
        given = wan_models.inputs(2, 7, (3, 6, 10), config, **more)
        plain = expected_of(reference, given)

        def embed(timesteps: torch.Tensor, half: int = config.time_channels // 2) -> torch.Tensor:
            frequencies = 10000 ** -(torch.arange(half, dtype=torch.float32) / half)
            angles = timesteps.flatten().float()[:, None] * frequencies
            return torch.cat([angles.cos(), angles.sin()], dim=1)

        reference.condition_embedder.timesteps_proj.forward = embed
        expected = expected_of(reference, given)
        assert torch.equal(run(model, given, variant="comfyui"), expected)
        assert 0 < wan_models.relative_error(plain, expected) < 1e-5
        assert torch.equal(run(model, given), plain)


def test_a_model_of_two_images_runs_with_the_first_alone(shared_cache: ModelCache, plug: Plugger) -> None:
    """As ComfyUI runs it: by the positions of the first."""
    model, reference = plugged(shared_cache, plug, wan_models.TWO_IMAGES)
    given = wan_models.inputs(2, 512, (2, 4, 6), wan_models.TWO_IMAGES)
    one = {**given, "encoder_hidden_states_image": given["encoder_hidden_states_image"][::2]}
    embedder = reference.condition_embedder.image_embedder
    whole = expected_of(reference, given)

    def embed(states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = embedder.norm2(embedder.ff(embedder.norm1(states + embedder.pos_embed[:, :257])))
        return found

    embedder.forward = embed
    assert torch.equal(run(model, one), expected_of(reference, one))
    assert torch.equal(run(model, given), whole)


def test_two_images_one_behind_the_other_are_those_of_the_class(shared_cache: ModelCache, plug: Plugger) -> None:
    model, reference = plugged(shared_cache, plug, CLIP_IMAGE)
    given = wan_models.inputs(2, 512, (2, 4, 6), CLIP_IMAGE)
    seen = given["encoder_hidden_states_image"]
    both = {**given, "encoder_hidden_states_image": torch.cat([seen, seen.flip(1)], dim=1)}
    assert torch.equal(run(model, both), expected_of(reference, both))
    assert not torch.equal(run(model, both), run(model, given))


def test_whole_numbers_of_a_scheduler_are_taken_as_they_are(shared_cache: ModelCache, plug: Plugger) -> None:
    model, reference = plugged(shared_cache, plug, TEXT)
    given = wan_models.inputs(2, 7, (2, 4, 6)) | {"timestep": torch.tensor([999, 5])}
    assert torch.equal(run(model, given), expected_of(reference, given))


def test_checkpoints_of_two_dtypes_compute_as_the_class_does(shared_cache: ModelCache, plug: Plugger) -> None:
    """Some files hold norms, modulations and biases in float32 beside weights in bfloat16."""
    state = wan_models.state_dict(0, TEXT, dtype=torch.bfloat16)
    kept = ("modulation", "norm3.weight", "norm3.bias")
    state |= {name: tensor.float() for name, tensor in state.items() if name.endswith(kept)}
    model, reference = plug(shared_cache, state).model, wan_models.reference(state)
    given = wan_models.inputs(2, 7, (2, 4, 6), dtype=torch.bfloat16)
    found = run(model, given)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected_of(reference, given))


@pytest.mark.parametrize("config", [TEXT, wan_models.TWO_CONTROLS], ids=["text", "VACE"])
def test_compiled_blocks_are_those_of_the_class(layout: ParallelLayout, plug: Plugger, config: Any) -> None:
    """A recorded block runs in place of the class's once it has been compared."""
    model, reference = plugged(ModelCache(dataclasses.replace(layout, acceleration="compiled")), plug, config)
    model.planned.resources = ProcessResources(lambda: InterpretedGraphs())  # type: ignore[arg-type,return-value]
    given = wan_models.inputs(2, 9, (2, 4, 6), config)
    expected = expected_of(reference, given)
    assert model.paths is not None
    paths = []
    for _ in range(6):
        assert wan_models.relative_error(run(model, given), expected) <= 1e-6
        model.paths.decide()
        paths += [(each.class_name, each.path, each.detail) for each in model.paths.take_reports()]
    assert paths[-1] == (type(reference).__name__, "compiled", "")


@pytest.mark.parametrize("config", [TEXT, wan_models.TWO_CONTROLS], ids=["text", "VACE"])
def test_blocks_are_compiled_with_the_parts_that_the_class_keeps_in_float32(
    layout: ParallelLayout, plug: Plugger, config: Any
) -> None:
    """The class casts for them itself, so the blocks have no hooks."""
    config = dataclasses.replace(config, is_original=False)
    state = wan_models.state_dict(0, config, dtype=torch.bfloat16)
    kept = set(wan_models.empty_reference(config)._keep_in_fp32_modules)
    state = {name: each.float() if kept & set(name.split(".")) else each for name, each in state.items()}
    reference = wan_models.reference(state, config)
    model = plug(ModelCache(dataclasses.replace(layout, acceleration="compiled")), state).model
    model.planned.resources = ProcessResources(lambda: InterpretedGraphs())  # type: ignore[arg-type,return-value]
    given = wan_models.inputs(2, 9, (2, 4, 6), config, dtype=torch.bfloat16)
    expected = expected_of(reference, given)
    assert model.paths is not None
    paths = []
    for number in range(6):
        found = run(model, given)
        assert number or torch.equal(found, expected)
        assert wan_models.relative_error(found, expected) <= 1e-2
        model.paths.decide()
        paths += [(each.path, each.detail) for each in model.paths.take_reports()]
    assert paths[-1] == ("compiled", "")


def test_half_of_such_a_part_in_float32_is_computed_with_in_float32(shared_cache: ModelCache, plug: Plugger) -> None:
    """The class itself, which casts for the first layer of the part alone, cannot run these tensors."""
    config = dataclasses.replace(TEXT, is_original=False)
    state = wan_models.state_dict(0, config, dtype=torch.bfloat16)
    reference = wan_models.reference(state, config)
    given = wan_models.inputs(2, 7, (2, 4, 6), config, dtype=torch.bfloat16)
    state |= {name: each.float() for name, each in state.items() if "time_embedder.linear_2" in name}
    assert wan_models.relative_error(run(plug(shared_cache, state).model, given), expected_of(reference, given)) < 2e-2


@pytest.mark.parametrize("config", [CLIP_IMAGE, wan_models.TWO_IMAGES, wan_models.VACE], ids=["CLIP", "two", "VACE"])
def test_rows_are_taken_as_views(shared_cache: ModelCache, plug: Plugger, config: Any) -> None:
    model, _ = plugged(shared_cache, plug, config)
    given = wan_models.inputs(3, 9, (2, 4, 6), config)
    whole = run(model, given)
    assert model.operations.rows(Inputs(given)) == (tuple(whole.shape[1:]),) * 3
    taken = model.operations.take_rows(Inputs(given, {"timestep": (0.7, 0.45, 0.2)}), slice(1, 3))
    assert taken.known == {"timestep": (0.45, 0.2)}
    assert taken.arguments["timestep"].data_ptr() == given["timestep"][1:].data_ptr()
    rows = model.operations.run(model, taken, CallOptions())
    assert wan_models.relative_error(rows, whole[1:]) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_states": torch.ones(1, 36, 4, 6)}, r"hidden_states: shape is \[1, 36, 4, 6\], use \[any, 36, any, "),
        ({"hidden_states": torch.ones(1, 16, 2, 4, 6)}, r"use \[any, 36, any, any, any\]"),
        ({"hidden_states": torch.ones(1, 36, 2, 5, 6)}, "2 x 5 x 6 frames, rows and columns of latents: rows and col"),
        ({"hidden_states": torch.ones(1, 36, 1025, 2, 2)}, "no axis has more than 1024 tokens"),
        ({"hidden_states": torch.ones(1, 36, 2, 4, 6, dtype=torch.bfloat16)}, "dtype is bfloat16, use float32"),
        (
            {"encoder_hidden_states": torch.ones(1, 77, 48)},
            r"encoder_hidden_states: shape is \[1, 77, 48\], use \[1, 512",
        ),
        ({"encoder_hidden_states": torch.ones(1, 512, 47)}, r"use \[1, 512, 48\]"),
        ({"encoder_hidden_states_image": None}, "encoder_hidden_states_image: NoneType where a tensor is needed"),
        ({"encoder_hidden_states_image": torch.ones(1, 256, 64)}, r"use \[1, 257, 64\]"),
        ({"timestep": torch.ones(2)}, r"timestep: shape is \[2\], use \[1\]"),
        ({"timestep": torch.ones(1, 7)}, r"timestep: shape is \[1, 7\], use \[1, 12\]"),
        ({"timestep": torch.ones(1, dtype=torch.bool)}, "timestep: dtype is bool"),
    ],
)
def test_arguments_that_cannot_run_are_refused(
    shared_cache: ModelCache, plug: Plugger, changes: dict[str, Any], says: str
) -> None:
    model, _ = plugged(shared_cache, plug, CLIP_IMAGE)
    with pytest.raises(BadRequest, match=says):
        model.operations.check(model, Inputs({**wan_models.inputs(1, 9, (2, 4, 6), CLIP_IMAGE), **changes}))


@pytest.mark.parametrize("shape", [(1, 514, 64), (3, 257, 64), (2, 256, 64)], ids=str)
def test_states_of_another_number_of_images_are_refused(
    shared_cache: ModelCache, plug: Plugger, shape: tuple[int, ...]
) -> None:
    model, _ = plugged(shared_cache, plug, wan_models.TWO_IMAGES)
    given = wan_models.inputs(1, 512, (2, 4, 6), wan_models.TWO_IMAGES)
    with pytest.raises(BadRequest, match=r"encoder_hidden_states_image: shape is .*, use \[[12], 257, 64\]"):
        model.operations.check(model, Inputs({**given, "encoder_hidden_states_image": torch.ones(shape)}))


def test_times_that_no_scheduler_has_are_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug, TEXT)
    with pytest.raises(BadRequest, match=r"timestep: 1500 is not a number from 0 to 1000"):
        model.operations.check(model, Inputs(wan_models.inputs(1, 9, (2, 4, 6)), {"timestep": (1500.0,)}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp8"}, "precision 'fp8': Wan has no products in eight bits"),
        ({"requested_kernels": "fused"}, "kernels 'fused': Wan has none; start the daemon with kernels auto"),
    ],
)
def test_kernels_that_are_not_there_are_refused(layout: ParallelLayout, changes: dict[str, str], says: str) -> None:
    cache = ModelCache(dataclasses.replace(layout, **changes))
    with pytest.raises(Unsupported, match=says):
        cache.match({name: TensorInfo.of(tensor) for name, tensor in wan_models.state_dict(0).items()})
