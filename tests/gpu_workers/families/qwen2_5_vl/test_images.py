"""Images in texts: the states of transformers' class, its positions, the pipelines' embeddings, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import qwen2_5_vl_models as models
import torch

from xditd.gpu_workers.families.qwen2_5_vl.images import ImagesInTexts
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.ipc.errors import BadRequest

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
NAMES = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
BAR = 1e-6


@pytest.fixture(scope="module")
def processor() -> models.Processor:
    return models.Processor()


@pytest.fixture
def model(shared_cache: ModelCache, plug: Plugger) -> CachedModel:
    return plug(shared_cache, models.state_dict()).model


def encoded(model: CachedModel, inputs: Any, *, has_types: bool = False, mask: bool = True, **more: Any) -> Any:
    operations: Any = model.operations
    images = {name: inputs[name].long() if name != "pixel_values" else inputs[name] for name in NAMES}
    if not has_types:
        del images["mm_token_type_ids"]
    given = inputs["attention_mask"] if mask else None
    return operations.encode(model, inputs["input_ids"], pooled=False, mask=given, images=images, **more)[0]


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


BATCHES: dict[str, Any] = {
    "one": ([f"ab{IMAGE}cdef"], [(70, 100)]),
    "two": ([f"Picture 1: {IMAGE}Picture 2: {IMAGE}a cat"], [(120, 60), (200, 170)]),
    "rows": ([f"{IMAGE}short", f"{IMAGE}{IMAGE}a longer text, with two"], [(90, 60), (56, 56), (300, 60)]),
}


@pytest.mark.parametrize("has_types", [False, True], ids=["", "types"])
@pytest.mark.parametrize("batch", BATCHES)
def test_states_are_those_of_the_class(
    model: CachedModel, processor: models.Processor, batch: str, has_types: bool
) -> None:
    texts, sizes = BATCHES[batch]
    inputs = processor(texts, [models.picture(*size, seed=number) for number, size in enumerate(sizes)])
    given = {name: each for name, each in inputs.items() if has_types or name != "mm_token_type_ids"}
    with torch.no_grad():
        right = models.reference()(**given, output_hidden_states=True).hidden_states
    assert error_of(encoded(model, inputs, has_types=has_types), right[-1]) <= BAR
    assert error_of(encoded(model, inputs, has_types=has_types, layers=(1,)), right[1]) <= BAR


def test_every_tensor_of_the_tower_shows(cache: ModelCache, plug: Plugger, processor: models.Processor) -> None:
    inputs = processor([f"ab{IMAGE}cdef"], [models.picture(140, 84)])
    state = models.state_dict()
    right = encoded(plug(cache, state).model, inputs)
    for name in (each for each in state if each.startswith("visual.")):
        changed = encoded(plug(cache, {**state, name: torch.zeros_like(state[name])}).model, inputs)
        assert error_of(changed, right) > 10 * BAR, name


def test_weights_in_bfloat16_are_computed_in_float32(
    cache: ModelCache, plug: Plugger, processor: models.Processor
) -> None:
    inputs = processor([f"ab{IMAGE}cdef"], [models.picture(140, 84)])
    halves = {name: each.bfloat16() for name, each in models.state_dict().items()}
    expected = encoded(plug(cache, {name: each.float() for name, each in halves.items()}).model, inputs)
    found = encoded(plug(cache, halves).model, inputs)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_are_those_of_the_class(processor: models.Processor, padding: str) -> None:
    texts, sizes = BATCHES["rows"]
    processor.tokenizer.padding_side = padding
    try:
        inputs = processor(texts, [models.picture(*size) for size in sizes])
    finally:
        processor.tokenizer.padding_side = "right"
    images = {name: inputs[name] for name in NAMES}
    right, _ = models.reference().get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    found = ImagesInTexts.of(images, inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(found.positions(inputs["attention_mask"]), right)


@pytest.mark.parametrize("is_plus", [False, True], ids=["edit", "edit_plus"])
def test_embeddings_are_those_of_the_pipelines(model: CachedModel, processor: models.Processor, is_plus: bool) -> None:
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

    from xditd.client.families.qwen_image import (
        EDIT_TEMPLATE_TOKENS,
        condition_size,
        edit_templated,
        without_template,
    )

    parts = {"scheduler": None, "vae": None, "tokenizer": None, "transformer": None, "processor": None}
    kind = QwenImageEditPlusPipeline if is_plus else QwenImageEditPipeline
    pipe = kind(text_encoder=None, **parts)
    pipe.text_encoder, pipe.processor = models.reference(), processor
    pictures = [models.picture(300, 200), models.picture(120, 260, seed=1)][: 2 if is_plus else 1]
    # Far smaller than the pipelines', so that the test is fast.
    pictures = [each.resize(condition_size(*each.size, pixels=96 * 96)) for each in pictures]
    prompt = "Give the cat a hat"
    with warnings.catch_warnings(action="ignore"):
        right, mask = pipe.encode_prompt(prompt, pictures if is_plus else pictures[0], device="cpu")
    inputs = processor([edit_templated(prompt, len(pictures), is_numbered=is_plus)], pictures)
    found = without_template(encoded(model, inputs), EDIT_TEMPLATE_TOKENS)
    assert mask is None
    assert found.shape == right.shape
    assert error_of(found, right) <= BAR


def test_bad_images_are_named(model: CachedModel, processor: models.Processor) -> None:
    inputs = processor([f"ab{IMAGE}cd", f"abc{IMAGE}"], [models.picture(70, 100), models.picture(56, 56)])
    grids, types = inputs["image_grid_thw"], inputs["mm_token_type_ids"]
    tokens = inputs["input_ids"].clone()
    tokens[0, 3 + 5] = 7
    shifted = inputs["attention_mask"].clone()
    shifted[0, 5] = 0
    operations: Any = model.operations
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_grid_thw": grids.float()}, "image_grid_thw: dtype is float32, use int64"),
        ({"image_grid_thw": grids * torch.tensor([2, 1, 1])}, r"image_grid_thw\[0\]: \[2, .*images are no videos"),
        ({"image_grid_thw": grids + torch.tensor([0, 1, 0])}, r"image_grid_thw\[0\]: .* multiples of 2"),
        ({"image_grid_thw": grids[:1]}, r"pixel_values: 48 patches, but image_grid_thw are 32 patches"),
        ({"pixel_values": inputs["pixel_values"].long()}, "pixel_values: dtype is int64"),
        ({"input_ids": tokens}, r"they are 12 tokens, but token_ids have 11 of images \(id 151655\)"),
        ({"attention_mask": shifted}, "mask: it leaves out tokens of images"),
        ({"mm_token_type_ids": types * 0}, "mm_token_type_ids: use .* 1 where token_ids are 151655"),
        ({"mm_token_type_ids": types[:1]}, r"mm_token_type_ids: use \[2, "),
    ]
    for change, says in cases:
        given = {**inputs, **change}
        with pytest.raises(BadRequest, match=says):
            operations.encode(
                model,
                given["input_ids"],
                pooled=False,
                mask=given["attention_mask"],
                images={name: given[name] for name in NAMES},
            )
    together = processor([f"a{IMAGE}"], [models.picture(84, 56)])
    with pytest.raises(BadRequest, match=r"images of \[2, 4\] tokens, but they follow each other .* in runs of \[6\]"):
        ImagesInTexts.of(
            {
                "pixel_values": together["pixel_values"],
                "image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 4]]),
                "mm_token_type_ids": together["mm_token_type_ids"],
            },
            together["input_ids"],
            None,
        )
