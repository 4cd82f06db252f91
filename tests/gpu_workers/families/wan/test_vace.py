"""Wan VACE: ``Generate`` from a control video, a mask and references has the bits of ``WanVACEPipeline``'s latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import wan_models
import wan_vaes
from interpreted_graphs import InterpretedGraphs
from wan_samples import VideoSample, generate

from xditd.gpu_workers.families.wan.config import WanVaceConfig
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Inputs, Wanted
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.ipc.errors import BadRequest

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
CONFIG = wan_models.TWO_CONTROLS


@dataclasses.dataclass(frozen=True)
class Sample(VideoSample):
    """A generation; ``given`` names what controls it."""

    config: WanVaceConfig = CONFIG
    given: tuple[str, ...] = ("video", "mask")
    references: int = 0

    @property
    def conditioning(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.references)
        names = ["prompt_embeds", *(["negative_prompt_embeds"] if self.scale > 1 else [])]
        found: dict[str, Any] = {name: torch.randn(self.batch, 11, 48, generator=generator) for name in names}
        frames, *sides = self.sides.values()
        video = torch.rand(1, 3, frames, *sides, generator=generator) * 2 - 1
        mask = torch.rand(1, 1, frames, *sides, generator=generator)
        scales = torch.linspace(1.0, 0.4, self.config.control_blocks)
        known = {"video": video, "mask": mask, "conditioning_scales": scales}
        found |= {name: known[name] for name in self.given}
        if self.references:
            found["reference_images"] = [
                torch.rand(3, *sides, generator=generator) * 2 - 1 for _ in range(self.references)
            ]
        return found

    @property
    def noise_size(self) -> tuple[int, int, int]:
        frames, height, width = self.size
        return frames + self.references, height, width


SAMPLES = {
    "a video and a mask": Sample(),
    "a video alone, distilled": Sample(given=("video",), scale=1.0, size=(2, 4, 4)),
    "two references alone": Sample(given=(), references=2, size=(2, 4, 4)),
    "all, a weight": Sample(references=1, options={"conditioning_scale": 0.6, "shift": 5.0}),
    "all, Euler, weights": Sample(
        given=("video", "mask", "conditioning_scales"), references=2, size=(2, 4, 4), options={"euler": True}
    ),
    "one frame": Sample(references=1, size=(1, 4, 4)),
}


def models(
    layout: Any, plug: Plugger, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32
) -> tuple[CachedModel, Any, CachedModel, Any]:
    state = wan_models.state_dict(0, CONFIG, dtype=dtype)
    of_vae = {name: tensor.to(vae_dtype) for name, tensor in wan_vaes.state_dict().items()}
    plain = wan_vaes.reference(wan_vaes.state_dict()).to(vae_dtype)
    return (
        plug(ModelCache(layout), state).model, wan_models.reference(state, CONFIG),
        plug(ModelCache(layout), of_vae).model, plain,
    )  # fmt: skip


@pytest.mark.parametrize("case", list(SAMPLES))
def test_generating_gives_the_bits_of_the_pipeline(layout: Any, plug: Plugger, case: str) -> None:
    sample = SAMPLES[case]
    model, reference, vae, plain = models(layout, plug)
    expected = wan_models.control_pipeline_latents(reference, plain, sample)
    found = generate(model, vae, sample)
    assert found.shape[2] == sample.size[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("vae_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bfloat16_latents_are_the_pipeline_s(layout: Any, plug: Plugger, vae_dtype: torch.dtype) -> None:
    sample = SAMPLES["all, a weight"]
    model, reference, vae, plain = models(layout, plug, torch.bfloat16, vae_dtype)
    expected = wan_models.control_pipeline_latents(reference, plain, sample)
    assert torch.equal(generate(model, vae, sample), expected)


def test_every_input_matters(layout: Any, plug: Plugger) -> None:
    sample = SAMPLES["all, Euler, weights"]
    model, _, vae, _ = models(layout, plug)
    right = generate(model, vae, sample)
    given = sample.conditioning
    for name in ("video", "mask", "conditioning_scales", "reference_images"):
        turned = given[name][::-1] if isinstance(given[name], list) else given[name].flip(-1)
        assert wan_models.relative_error(generate(model, vae, sample, conditioning={name: turned}), right) > 1e-4, name


def test_a_batch_has_the_control_of_all_or_of_each_row(layout: Any, plug: Plugger) -> None:
    one = dataclasses.replace(SAMPLES["all, a weight"], size=(2, 4, 4))
    two = dataclasses.replace(one, batch=2)
    model, _, vae, _ = models(layout, plug)
    each = {name: torch.cat([one.conditioning[name], one.conditioning[name].flip(-1)]) for name in ("video", "mask")}
    given = two.conditioning
    for control in ({}, each):
        together = generate(model, vae, two, conditioning=control)
        for row in range(2):
            texts = {name: given[name][row : row + 1] for name in ("prompt_embeds", "negative_prompt_embeds")}
            own = {name: tensor[row : row + 1] for name, tensor in control.items()}
            noise = two.noise[row : row + 1]
            alone = generate(model, vae, one, conditioning=given | texts | own, noise=noise)
            assert wan_models.relative_error(together[row], alone[0]) <= 1e-5


@pytest.mark.parametrize(
    ("conditioning", "says"),
    [
        ({"video": None}, "mask without video would have no effect"),
        ({"video": torch.zeros(1, 3, 5, 32, 48)}, "video: 5 frames, but the video has 9"),
        ({"video": torch.zeros(1, 3, 9, 48, 48)}, "video: 48 x 48 pixels, but the video has 32 x 48"),
        ({"video": torch.zeros(2, 3, 9, 32, 48)}, "video: 2 for 1 videos"),
        ({"video": torch.full((1, 3, 9, 32, 48), 2.0)}, "video: values from 2 to 2, use -1 to 1"),
        ({"mask": torch.zeros(1, 1, 8, 32, 48)}, "mask: 8 frames, but the video has 9"),
        ({"mask": torch.zeros(1, 3, 9, 32, 48)}, r"mask: shape is \[1, 3, 9, 32, 48\], use \[any, 1, any, any, any\]"),
        ({"mask": torch.full((1, 1, 9, 32, 48), -1.0)}, "mask: values from -1 to -1, use 0 to 1"),
        (
            {"reference_images": [torch.zeros(3, 32, 32)]},
            r"reference_images\[0\]: 32 x 32 pixels, but the video has 32",
        ),
        ({"reference_images": [torch.zeros(1, 3, 32, 48)]}, r"reference_images\[0\]: shape is \[1, 3, 32, 48\]"),
        ({"reference_images": torch.zeros(3, 32, 48)}, "reference_images: Tensor where a list is needed"),
        ({"reference_images": []}, "reference_images: list where a list is needed"),
    ],
    ids=str,
)
def test_controls_that_cannot_be_used_are_refused(
    shared_cache: ModelCache, plug: Plugger, conditioning: dict[str, Any], says: str
) -> None:
    sample = SAMPLES["a video and a mask"]
    model = plug(shared_cache, wan_models.state_dict(0, CONFIG)).model
    wanted = Wanted(1, steps=3, guidance_scale=5.0, vae_dtype=torch.float32, **sample.sides)
    with pytest.raises(BadRequest, match=says):
        model.operations.recipe.pictures(model.config, wanted, sample.conditioning | conditioning)


def test_weights_that_cannot_be_used_are_refused(layout: Any, plug: Plugger) -> None:
    sample = SAMPLES["all, Euler, weights"]
    model, _, vae, _ = models(layout, plug)
    with pytest.raises(BadRequest, match=r"conditioning_scales: shape is \[3\], use \[2\]"):
        generate(model, vae, sample, conditioning={"conditioning_scales": torch.ones(3)})
    both = dataclasses.replace(sample, options={"conditioning_scale": 0.5})
    with pytest.raises(BadRequest, match="conditioning_scale beside conditioning_scales would have no effect"):
        generate(model, vae, both)
    wild = dataclasses.replace(SAMPLES["all, a weight"], options={"conditioning_scale": 10**9})
    with pytest.raises(BadRequest, match="conditioning_scale=1000000000 is not a number from -100 to 100"):
        generate(model, vae, wild)


def call(model: CachedModel, given: dict[str, Any], variant: str = "class") -> torch.Tensor:
    import direct_jobs

    ((result,),) = direct_jobs.call(model, [Inputs(given)], variant=variant)
    return result


def test_one_control_by_itself_has_the_bits_of_the_class(layout: Any, plug: Plugger) -> None:
    model, reference, _, _ = models(layout, plug)
    given = wan_models.inputs(2, 9, (2, 4, 6), CONFIG)
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    scales = given["control_hidden_states_scale"]
    found = call(model, {**given, "control_hidden_states_scale": scales[None]})
    assert torch.equal(found, expected)
    fewer = {**given, "control_hidden_states": given["control_hidden_states"][:, :, :1]}
    with torch.no_grad():
        expected = reference(**fewer, return_dict=False)[0]
    assert torch.equal(call(model, {**fewer, "control_hidden_states_scale": scales[None]}), expected)


@pytest.mark.parametrize("acceleration", ["eager", "compiled"])
def test_each_control_has_its_own_weights(layout: Any, plug: Plugger, acceleration: Any) -> None:
    state = wan_models.state_dict(0, CONFIG)
    model = plug(ModelCache(dataclasses.replace(layout, acceleration=acceleration)), state).model
    model.planned.resources = ProcessResources(lambda: InterpretedGraphs())  # type: ignore[arg-type,return-value]
    given = wan_models.controlled_inputs(2, 9, (3, 4, 6), 3, CONFIG)
    expected = wan_models.controlled_reference(state, CONFIG, given)
    paths: list[tuple[str, str]] = []
    for _ in range(6 if acceleration == "compiled" else 1):
        assert wan_models.relative_error(call(model, given), expected) <= 1e-6
        if model.paths is not None:
            model.paths.decide()
            paths += [(each.path, each.detail) for each in model.paths.take_reports()]
    if acceleration == "compiled":
        assert paths[-1] == ("compiled", "")
    for control in range(3):
        other = given["control_hidden_states_scale"].clone()
        other[control] = 0.0
        assert wan_models.relative_error(call(model, {**given, "control_hidden_states_scale": other}), expected) > 1e-3


def test_comfyuis_variant_has_its_frequencies_of_the_time(layout: Any, plug: Plugger) -> None:
    model, *_ = models(layout, plug)
    given = wan_models.inputs(1, 9, (2, 4, 6), CONFIG)
    plain, comfyuis = call(model, given), call(model, given, "comfyui")
    assert 0 < wan_models.relative_error(comfyuis, plain) < 1e-5
    assert torch.equal(call(model, given), plain)


def test_rows_are_taken_with_all_their_controls(layout: Any, plug: Plugger) -> None:
    model, *_ = models(layout, plug)
    given = wan_models.controlled_inputs(3, 9, (2, 4, 6), 2, CONFIG)
    whole = call(model, given)
    taken = model.operations.take_rows(Inputs(given), slice(1, 3))
    assert taken.arguments["control_hidden_states"].data_ptr() == given["control_hidden_states"][2:].data_ptr()
    assert wan_models.relative_error(call(model, dict(taken.arguments)), whole[1:]) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"control_hidden_states_scale": torch.ones(3, 2)}, r"control_hidden_states: shape is .*, use \[3, 96, any"),
        ({"control_hidden_states_scale": torch.ones(2, 3)}, r"control_hidden_states_scale: .* use \[any, 2\]"),
        ({"control_hidden_states_scale": torch.ones(0, 2)}, r"shape is \[0, 2\], use \[any, 2\]"),
        (
            {"control_hidden_states_scale": torch.ones(2, 2, dtype=torch.bfloat16)},
            "control_hidden_states_scale: dtype is bfloat16, use float32 for controls",
        ),
    ],
    ids=str,
)
def test_controls_of_another_number_are_refused(
    shared_cache: ModelCache, plug: Plugger, changes: dict[str, Any], says: str
) -> None:
    model = plug(shared_cache, wan_models.state_dict(0, CONFIG)).model
    given = wan_models.controlled_inputs(1, 9, (2, 4, 6), 2, CONFIG)
    with pytest.raises(BadRequest, match=says):
        model.operations.check(model, Inputs({**given, **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"control_hidden_states": None}, "control_hidden_states: NoneType where a tensor is needed"),
        (
            {"control_hidden_states": torch.ones(1, 96, 3, 4, 6)},
            "control_hidden_states: 3 frames of latents, but hid",
        ),
        ({"control_hidden_states": torch.ones(1, 96, 2, 6, 6)}, r"use \[1, 96, any, 4, 6\]"),
        ({"control_hidden_states_scale": torch.ones(8)}, r"control_hidden_states_scale: shape is \[8\], use \[2\]"),
        ({"timestep": torch.ones(1, 12)}, r"timestep: shape is \[1, 12\], use \[1\]"),
    ],
)
def test_arguments_that_cannot_run_are_refused(
    shared_cache: ModelCache, plug: Plugger, changes: dict[str, Any], says: str
) -> None:
    model = plug(shared_cache, wan_models.state_dict(0, CONFIG)).model
    with pytest.raises(BadRequest, match=says):
        model.operations.check(model, Inputs({**wan_models.inputs(1, 9, (2, 4, 6), CONFIG), **changes}))
