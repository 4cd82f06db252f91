"""``Generate`` with references gives the bits of ``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import qwen_image_models
import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Wanted
from xditd.ipc.errors import BadRequest

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
BASE, EDIT_2511 = qwen_image_models.BASE, qwen_image_models.EDIT_2511
STEPS = 3


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

    of_area = module.calculate_dimensions
    # Pipelines scale pictures to a million pixels; these to four thousand.
    monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio: of_area(64 * 64, ratio))
    return module


@pytest.fixture
def edit_plus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    of_area = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio: of_area(64 * 64, ratio))
    return module


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    return AutoencoderKLQwenImage(base_dim=8).eval().requires_grad_(False)


def picture(width: int, height: int, seed: int) -> Any:
    from PIL import Image

    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def texts(batch: int, *, is_guided: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    given = {"prompt_embeds": torch.randn(batch, 21, 96, generator=generator)}
    if is_guided:
        given["negative_prompt_embeds"] = torch.randn(batch, 8, 96, generator=generator)
    return given


@torch.no_grad()
def expected_of(
    pipeline_class: Any, module: Any, vae: Any, noise: torch.Tensor, conditioning: Any, pictures: Any, scale: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sample with a pipeline; return the latents, and those of the references."""
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "processor": None, "transformer": module}
    pipeline = pipeline_class(scheduler=qwen_image_models.scheduler(), vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    references: list[torch.Tensor] = []
    encode = pipeline._encode_vae_image

    def keep(image: torch.Tensor, generator: Any) -> torch.Tensor:
        latents: torch.Tensor = encode(image=image, generator=generator)
        references.append(latents[0, :, 0])
        return latents

    pipeline._encode_vae_image = keep
    height, width = (side * 8 for side in noise.shape[2:])
    found = pipeline(
        image=pictures,
        latents=pipeline._pack_latents(noise, *noise.shape),
        height=height,
        width=width,
        num_inference_steps=STEPS,
        true_cfg_scale=scale,
        output_type="latent",
        return_dict=False,
        **conditioning,
    )[0]
    return pipeline._unpack_latents(found, height, width, 8).squeeze(2), references


def generate(
    model: CachedModel,
    noise: torch.Tensor,
    conditioning: Any,
    references: Sequence[torch.Tensor],
    scale: float,
    **more: Any,
) -> torch.Tensor:
    import direct_jobs  # not before the group is started

    return direct_jobs.generate_from(
        model,
        {**conditioning, "reference_latents": list(references)},
        noise,
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        steps=STEPS,
        guidance_scale=scale,
        **more,
    )


def noise_of(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_edit(shared_cache: ModelCache, plug: Plugger, edit: ModuleType, vae: Any, batch: int, scale: float) -> None:
    state = qwen_image_models.state_dict(0)
    conditioning, noise = texts(batch, is_guided=scale > 1), noise_of(batch, 6, 10)
    right, references = expected_of(
        edit.QwenImageEditPipeline,
        qwen_image_models.reference(state),
        vae,
        noise,
        conditioning,
        picture(96, 64, 0),
        scale,
    )
    model = plug(shared_cache, state).model
    found = generate(model, noise, conditioning, references, scale)
    assert torch.equal(found, right)
    others = [each + 1 for each in references]
    assert not torch.equal(generate(model, noise, conditioning, others, scale), right)


@pytest.mark.parametrize("config", [BASE, EDIT_2511], ids=["2509", "2511"])
@pytest.mark.parametrize("sizes", [((96, 64),), ((96, 64), (40, 120)), ((64, 64), (96, 64), (64, 96))])
def test_edit_plus(
    shared_cache: ModelCache,
    plug: Plugger,
    edit_plus: ModuleType,
    vae: Any,
    config: Any,
    sizes: Sequence[tuple[int, int]],
) -> None:
    state = qwen_image_models.state_dict(0, config)
    conditioning, noise = texts(1, is_guided=True), noise_of(1, 6, 10)
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    right, references = expected_of(
        edit_plus.QwenImageEditPlusPipeline,
        qwen_image_models.reference(state, config),
        vae,
        noise,
        conditioning,
        pictures,
        3.0,
    )
    assert len(references) == len(sizes)
    model = plug(shared_cache, state).model
    assert torch.equal(generate(model, noise, conditioning, references, 3.0), right)


def test_a_file_of_2511_without_its_marker_needs_the_variant(shared_cache: ModelCache, plug: Plugger) -> None:
    state = qwen_image_models.state_dict(0)
    marked = qwen_image_models.state_dict(0, EDIT_2511)
    conditioning, noise = texts(1, is_guided=False), noise_of(1, 6, 10)
    references = [noise_of(1, 4, 6)[0]]
    right = generate(plug(shared_cache, marked).model, noise, conditioning, references, 1.0)
    model = plug(shared_cache, state).model
    assert torch.equal(generate(model, noise, conditioning, references, 1.0, variant="zero_cond_t"), right)
    assert not torch.equal(generate(model, noise, conditioning, references, 1.0), right)


def test_wrong_references_are_named(shared_cache: ModelCache, plug: Plugger) -> None:
    model = plug(shared_cache, qwen_image_models.state_dict(0)).model
    noise, wanted = noise_of(1, 6, 10), Wanted(1, 48, 80, STEPS, 1.0)
    good = torch.zeros(16, 4, 6)
    for references, says in (
        (good, "reference_latents: Tensor where a list is needed"),
        ([], "reference_latents: list where a list is needed, with a tensor for each"),
        ([good, good[None]], r"reference_latents\[1\]: shape is \[1, 16, 4, 6\], use \[16, any, any\]"),
        ([good[:, :3]], r"reference_latents\[0\]: shape is \[16, 3, 6\], use multiples of 2 up to"),
        ([good * float("nan")], r"reference_latents\[0\]"),
    ):
        given = {**texts(1, is_guided=False), "reference_latents": references}
        with pytest.raises(BadRequest, match=says):
            model.operations.recipe.start(model, wanted, given, noise)


def test_a_text_after_a_large_reference_needs_positions(shared_cache: ModelCache, plug: Plugger) -> None:
    model = plug(shared_cache, qwen_image_models.state_dict(0)).model
    given = {"prompt_embeds": torch.ones(1, 4085, 96), "reference_latents": [torch.zeros(16, 4, 60)]}
    wanted = Wanted(1, 48, 80, STEPS, 1.0)
    with pytest.raises(BadRequest, match=r"prompt_embeds: 4085 tokens .* the model has positions for 4081 tokens"):
        model.operations.recipe.start(model, wanted, given, noise_of(1, 6, 10))
