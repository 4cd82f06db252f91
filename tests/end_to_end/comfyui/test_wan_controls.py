"""First and last images and VACE through ComfyUI's own nodes: the latents of stock, in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wan_vaes
from comfyui_families import VARIANTS, drawn, of_vace
from safetensors.torch import save_file

from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

BAR = 1e-6
GUIDED_BAR = 3e-6
EFFECT = 1e-3
SIDES = {"width": 48, "height": 32, "length": 9, "batch_size": 1}
"""Three latent frames, of 4 x 6."""


@pytest.fixture(scope="module")
def vae(comfy, tmp_path_factory) -> Any:
    """ComfyUI's own VAE of Wan 2.1, so that both models get the same bits of conditioning."""
    path = tmp_path_factory.mktemp("vaes") / "wan.safetensors"
    save_file(wan_vaes.state_dict(), path)
    return comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(path)))


def image(seed: int, frames: int = 1) -> torch.Tensor:
    return torch.rand(frames, 40, 50, 3, generator=torch.Generator().manual_seed(seed))


def seen(seed: int) -> Any:
    """What CLIP Vision Encode gives."""
    return SimpleNamespace(penultimate_hidden_states=drawn(1, 257, 1280, seed=seed))


def texts(tokens: int = 16) -> tuple[list[Any], list[Any]]:
    """Positive and negative conditioning of a text alone."""
    positive, negative = ([[drawn(1, tokens, 4096, seed=seed), {"pooled_output": None}]] for seed in (1, 2))
    return positive, negative


def from_images(vae: Any, tokens: int = 16, **given: Any) -> tuple[Any, ...]:
    from comfy_extras.nodes_wan import WanFirstLastFrameToVideo

    sides = {**SIDES, **{name: given.pop(name) for name in list(given) if name in SIDES}}
    made: tuple[Any, ...] = WanFirstLastFrameToVideo.execute(*texts(tokens), vae, **sides, **given).result
    return made


@pytest.mark.parametrize("options", [{}, {"sampler_name": "uni_pc", "cfg": 5.0}], ids=["euler", "uni_pc"])
@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("wan22_image", ()), ("wan22_image", ("start", "end")), ("wan21_two_images", ("start", "end")),
        ("wan21_two_images", ("start",)), ("wan21_image", ("start", "end")),
    ],
    ids=str,
)  # fmt: skip
def test_a_first_and_a_last_image(name, clip, options, vae, weightless, stock, ksample, relative_error):
    """WanFirstLastFrameToVideo; CLIP's states are dropped by Wan 2.2, and positions are those of the images given."""
    states = {f"clip_vision_{each}_image": seen(number) for number, each in enumerate(clip, 3)}
    images = {"start_image": image(1), "end_image": image(2)}
    given = from_images(vae, VARIANTS[name].tokens, **images, **states)
    ours, theirs = (ksample(model(name), *given, **options) for model in (weightless, stock))
    assert ours.shape == (1, 16, 3, 4, 6)
    assert relative_error(ours, theirs) <= (GUIDED_BAR if options else BAR)


def test_every_image_matters(vae, weightless, ksample, relative_error):
    """Each of the images, and what CLIP's vision model saw of it; two videos at once have both."""
    name = "wan21_two_images"
    states = {"clip_vision_start_image": seen(3), "clip_vision_end_image": seen(4)}
    images = {"start_image": image(1), "end_image": image(2)}
    model = weightless(name)
    two = ksample(model, *from_images(vae, 512, **images, **states, batch_size=2))
    whole = ksample(model, *from_images(vae, 512, **images, **states))
    assert two.shape[0] == 2
    assert relative_error(two[:1], whole) <= 1e-5
    for other in (
        {"start_image": None}, {"end_image": None}, {"end_image": image(2, 5)},
        {"clip_vision_end_image": None}, {"clip_vision_end_image": seen(5)},
    ):  # fmt: skip
        changed = ksample(model, *from_images(vae, 512, **{**images, **states, **other}))
        assert relative_error(changed, whole) > EFFECT, list(other)


def controlled(vae: Any, conditioning: tuple[Any, Any], strength: float, seed: int, **given: Any) -> tuple[Any, ...]:
    """Run WanVaceToVideo with a control video, a mask and a reference."""
    from comfy_extras.nodes_wan import WanVaceToVideo

    mask = (torch.rand(9, 40, 50, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    known = {"control_video": image(seed, 9), "control_masks": mask, "reference_image": image(seed + 1)}
    made: tuple[Any, ...] = WanVaceToVideo.execute(
        *conditioning, vae, **SIDES, strength=strength, **{**known, **given}
    ).result
    return made


@pytest.mark.parametrize("options", [{}, {"sampler_name": "uni_pc", "cfg": 5.0}], ids=["euler", "uni_pc"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_control_with_a_strength(strength, options, vae, weightless, stock, ksample, relative_error):
    """WanVaceToVideo, and TrimVideoLatent, which drops the latents of the reference."""
    from comfy_extras.nodes_wan import TrimVideoLatent

    *given, trim = controlled(vae, texts(), strength, 1)
    assert trim == 1
    found = []
    for model in (weightless, stock):
        (cut,) = TrimVideoLatent.execute({"samples": ksample(model("wan_vace"), *given, **options)}, trim).result
        found.append(cut["samples"])
    assert found[0].shape == (1, 16, 3, 4, 6)
    assert relative_error(*found) <= (GUIDED_BAR if options else BAR)
    other = ksample(weightless("wan_vace"), *controlled(vae, texts(), strength + 0.5, 1)[:3], **options)
    assert relative_error(other[:, :, trim:], found[0]) > EFFECT


@pytest.mark.parametrize("strengths", [(0.5, 1.0), (1.0, 0.0), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_two_controls(batch, strengths, vae, weightless, stock, ksample, relative_error):
    positive, negative, *_ = controlled(vae, texts(), strengths[0], 1)
    positive, negative, latent, _ = controlled(vae, (positive, negative), strengths[1], 5)
    assert len(positive[0][1]["vace_frames"]) == 2
    latent["samples"] = latent["samples"].repeat(batch, 1, 1, 1, 1)
    ours, theirs = (ksample(model("wan_vace"), positive, negative, dict(latent)) for model in (weightless, stock))
    assert relative_error(ours, theirs) <= BAR
    ((embeds, more),) = positive
    swapped = [[embeds, {**more, "vace_strength": list(reversed(strengths))}]]
    other = ksample(weightless("wan_vace"), swapped, negative, dict(latent))
    assert relative_error(other, theirs) > EFFECT


@pytest.mark.parametrize("left_out", ["vace_frames", "vace_mask", "vace_strength"])
def test_what_a_control_lacks_is_that_of_stock(left_out, weightless, stock, ksample, relative_error):
    """Without a control VACE is given one of zeros, or a whole mask, or the strength 1."""
    variant = VARIANTS["wan_vace"]
    given = [variant.text(seed, **{left_out: None}) for seed in (1, 2)]
    if left_out == "vace_strength":
        for ((_, more),) in given:
            del more[left_out]
    ours, theirs = (ksample(model("wan_vace"), *given, variant.latent()) for model in (weightless, stock))
    assert relative_error(ours, theirs) <= BAR


@pytest.mark.parametrize("name", ["wan_vace", "wan21_two_images"])
def test_windows_over_frames(name, weightless, stock, ksample, relative_error):
    """WanContextWindowsManual: ComfyUI gives each window its frames of the conditioning."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    variant = VARIANTS[name]
    size = (5, 4, 6)
    given = variant.text(1, size=size), variant.text(2, size=size), variant.latent(1, size)
    found = []
    for model in (weightless, stock):
        (windowed,) = WanContextWindowsManualNode.execute(
            model(name), 13, 4, "standard_static", 1, False, "pyramid", False
        ).result
        found.append(ksample(windowed, *given, steps=2))
    assert relative_error(*found) <= BAR
    assert relative_error(found[1], ksample(stock(name), *given, steps=2)) > EFFECT


def test_a_control_of_another_size_is_refused(weightless, ksample):
    variant = VARIANTS["wan_vace"]
    given = [variant.text(seed, **of_vace((2, 6, 6))) for seed in (1, 2)]
    with pytest.raises(Unsupported, match="a control of 2 x 6 x 6 latents for a video of 2 x 4 x 6"):
        ksample(weightless("wan_vace"), *given, variant.latent())


def test_fewer_strengths_than_controls_are_refused(weightless, ksample):
    variant = VARIANTS["wan_vace"]
    given = [variant.text(seed, vace_strength=[]) for seed in (1, 2)]
    with pytest.raises(Unsupported, match="0 strengths for 1 controls"):
        ksample(weightless("wan_vace"), *given, variant.latent())
