"""Prompts of Qwen-Image as diffusers' pipelines encode them: Qwen2.5-VL's last states, without those of the template.

Texts alone are those of ``QwenImagePipeline``, texts with pictures those of ``QwenImageEditPlusPipeline`` (2509, 2511)
or, with the option :data:`EDIT`, of ``QwenImageEditPipeline`` (the first Edit). The mask is left out if it is all 1,
and is floating, as a generation takes it.

Source: diffusers, ``pipeline_qwenimage.py``, ``pipeline_qwenimage_edit.py`` and ``pipeline_qwenimage_edit_plus.py``;
tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from xditd.gpu_workers.families.qwen_image.config import QwenImageConfig
from xditd.gpu_workers.models.prompts import Conditioning, PromptEncoders, PromptInputs, Tokens
from xditd.gpu_workers.models.token_texts import MAX_LENGTH, length_option, tokenized
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import PromptFacts

ENCODER: Final = "text_encoder"
TOKENIZER: Final = "tokenizer"
PROCESSOR: Final = "processor"
EDIT: Final = "edit"
"""The option for the first Qwen-Image-Edit, which takes one picture, and larger than later ones do."""

FACTS: Final = PromptFacts(
    encoders={ENCODER: ("qwen2_5_vl",)},
    tokenizers={TOKENIZER: ("Qwen2Tokenizer",)},
    image_tokenizers={PROCESSOR: ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")},
    max_images=8,
    takes_negative=True,
    options=(MAX_LENGTH, EDIT),
)

_TEXT: Final = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_TEXT_DROPPED: Final = 34
_PICTURES: Final = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_PICTURES_DROPPED: Final = 64
_PLACE: Final = "<|vision_start|><|image_pad|><|vision_end|>"
_IMAGE_PAD: Final = "<|image_pad|>"

_MOST: Final = 1024
_LENGTH: Final = 512
_EDIT_AREA: Final = 1024 * 1024
_PLUS_AREA: Final = 384 * 384
_GRIDS: Final = "image_grid_thw"
_SIZES: Final = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
"""Of pictures, as the encoder reads them."""
_MOST_PIXELS: Final = 28 * 28 * 16_384
"""The most to which the released image processors resize a picture: 12,845,056."""


class QwenImagePrompt:
    """See :class:`~xditd.gpu_workers.models.prompts.PromptRecipe`."""

    def facts(self, config: QwenImageConfig) -> PromptFacts:
        return FACTS

    def tokenize(
        self, config: QwenImageConfig, inputs: PromptInputs, tokenizers: Mapping[str, BuiltTokenizer]
    ) -> Mapping[str, Tokens]:
        length = length_option(inputs.options, default=_LENGTH, most=_MOST)
        if inputs.images:
            return {ENCODER: _with_pictures(inputs, tokenizers[PROCESSOR])}
        if EDIT in inputs.options:
            raise BadRequest(f"options: {EDIT} is of prompts with a picture, and none is given; leave it out")
        # The pipeline encodes more tokens than it keeps, which changes no bit of those: they attend to earlier ones.
        texts = [_TEXT.format(each) for each in inputs.texts]
        found = tokenized(tokenizers[TOKENIZER], texts, _MOST + _TEXT_DROPPED, padding=True)
        return {ENCODER: replace(found, dropped=_TEXT_DROPPED, kept=length)}

    def encode(self, config: QwenImageConfig, tokens: Mapping[str, Tokens], encoders: PromptEncoders) -> Conditioning:
        given = tokens[ENCODER]
        assert given.mask is not None
        states, _ = encoders.states(ENCODER, given)
        mask = given.mask.bool().to(states.device)
        rows = [row[each][given.dropped :] for row, each in zip(states, mask, strict=True)]
        longest = max(len(row) for row in rows)
        embeds = torch.stack([torch.cat([row, row.new_zeros(longest - len(row), row.shape[1])]) for row in rows])
        ones = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        embeds, ones = embeds[:, : given.kept], ones[:, : given.kept]
        return {"prompt_embeds": embeds} | ({} if ones.all() else {"prompt_embeds_mask": ones.to(embeds.dtype)})


def _with_pictures(inputs: PromptInputs, processor: BuiltTokenizer) -> Tokens:
    if len(inputs.texts) > 1:
        raise BadRequest(f"prompts: {len(inputs.texts)} with pictures; encode one prompt with its pictures at a time")
    if MAX_LENGTH in inputs.options:
        raise BadRequest(f"options: {MAX_LENGTH} is of texts alone: with pictures, nothing is cut; leave it out")
    is_first = bool(inputs.options.get(EDIT, False))
    if is_first and len(inputs.images) > 1:
        raise BadRequest(f"images: {len(inputs.images)}, and with the option {EDIT} a prompt takes one")
    _check_sizes(processor)
    images = [_resized(each, _EDIT_AREA if is_first else _PLUS_AREA) for each in inputs.images]
    made = processor.image_processor(images=images, return_tensors="pt")
    places = _PLACE if is_first else "".join(f"Picture {number}: {_PLACE}" for number in range(1, len(images) + 1))
    text = _filled(_PICTURES.format(places + inputs.texts[0]), made[_GRIDS], len(images))
    found = processor.tokenizer([text], padding=True, return_tensors="pt")
    pictures = {"pixel_values": made["pixel_values"], _GRIDS: made[_GRIDS]}
    return Tokens(found.input_ids, found.attention_mask, pictures, dropped=_PICTURES_DROPPED)


def _filled(text: str, grids: torch.Tensor, images: int) -> str:
    """Repeat the token of each picture as often as the picture has tokens, as the processor's class does."""
    first, *parts = text.split(_IMAGE_PAD)
    if len(parts) != images:
        raise BadRequest(f"prompt: it holds {_IMAGE_PAD}, the token of pictures; write the text without it")
    counts = (grids.prod(-1) // _SIZES["merge_size"] ** 2).tolist()
    return first + "".join(_IMAGE_PAD * count + part for count, part in zip(counts, parts, strict=True))


def _resized(image: Any, area: int) -> Any:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    width, height = calculate_dimensions(area, image.width / image.height)
    if not width or not height:
        raise BadRequest(f"images: {image.width} x {image.height} pixels; a picture of such a shape cannot be resized")
    return VaeImageProcessor().resize(image, height, width)


def _check_sizes(processor: BuiltTokenizer) -> None:
    """Check what the encoder needs of the lent image processor, and that pictures are not made larger than they may be.

    Raises:
        BadRequest: it makes other patches.
    """
    for name, value in _SIZES.items():
        found = getattr(processor.image_processor, name, None)
        if found != value:
            raise BadRequest(f"tokenizers: {PROCESSOR} has the {name} {found!r:.50}, and the encoder reads {value}")
    size = dict(getattr(processor.image_processor, "size", None) or {})
    sides = [size.get(side) for side in ("shortest_edge", "longest_edge")]
    if not all(isinstance(each, int) and 0 < each <= _MOST_PIXELS for each in sides):
        raise BadRequest(f"tokenizers: {PROCESSOR} resizes to {sides} pixels; use from 1 to {_MOST_PIXELS}")
