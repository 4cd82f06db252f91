"""Arguments of the most used classes with a given number of text tokens and of image or video tokens.

They fit the configuration of each class's first entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from class_entries import ENTRIES
from class_entry import Random
from model_arguments import grid_ids, padding_mask, timestep

Build = Callable[[Random, int, int, int], dict[str, Any]]
"""From a source of numbers, the rows of a batch, the tokens of a text, and those of an image or video."""


def _entry(name: str) -> dict[str, Any]:
    return ENTRIES[name].arguments(Random(1))


def _columns(image: int) -> int:
    """Return the columns of an image of as few rows as possible: at most eight, as classes have no more positions."""
    return max(each for each in range(1, 9) if image % each == 0)


def _flux(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    ids = torch.zeros(image, 3)
    ids[:, 2] = torch.arange(image)
    return {
        "hidden_states": random.normal(rows, image, 16),
        "timestep": timestep(0.5, rows),
        "guidance": torch.full([rows], 3.5),
        "pooled_projections": random.normal(rows, 8),
        "encoder_hidden_states": random.normal(rows, text, 16),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": ids,
        "controlnet_block_samples": [random.normal(rows, image, 32)],
        "controlnet_single_block_samples": [random.normal(rows, image, 32)],
    }


def _flux_2(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(rows, image, 16),
        "timestep": timestep(0.5, rows),
        "guidance": torch.full([rows], 4.0),
        "encoder_hidden_states": random.normal(rows, text, 16),
        "txt_ids": grid_ids(0, 1, 1, text).repeat(rows, 1, 1),
        "img_ids": grid_ids(0, 1, image).repeat(rows, 1, 1),
    }


def _qwen_image(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    """Prompts of different lengths, so that there is a mask."""
    return {
        "hidden_states": random.normal(rows, image, 16),
        "timestep": torch.full((rows,), 0.7),
        "encoder_hidden_states_mask": padding_mask((text, text - 3)[-rows:], text, torch.int64),
        "encoder_hidden_states": random.normal(rows, text, 24),
        "img_shapes": [[(1, 1, image)]] * rows,
        "controlnet_block_samples": [random.normal(rows, image, 32)],
    }


def _wan(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    """A frame of one row of tokens. Beside tokens of an image, this class has 512 of a text in its code."""
    return {
        "hidden_states": random.normal(rows, 12, 1, 2, 2 * image),
        "timestep": timestep(700, rows, torch.int64),
        "encoder_hidden_states": random.normal(rows, 512, 24),
        "encoder_hidden_states_image": random.normal(rows, text, 40),
    }


def _z_image(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    """The class pads both to multiples of 32; the rows have texts of different lengths."""
    columns = _columns(image)
    return {
        "x": [random.normal(4, 1, 2 * (image // columns), 2 * columns) for _ in range(rows)],
        "t": torch.full((rows,), 0.4),
        "cap_feats": [random.normal(text + 32 * row, 24) for row in range(rows)],
    }


def _sd_3(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    """The class has positions for eight rows and eight columns."""
    columns = _columns(image)
    return {
        "hidden_states": random.normal(rows, 4, 2 * (image // columns), 2 * columns),
        "timestep": timestep(750.0, rows),
        "encoder_hidden_states": random.normal(rows, text, 24),
        "pooled_projections": random.normal(rows, 24),
        "block_controlnet_hidden_states": [random.normal(rows, image, 32)],
    }


def _ltx_2(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    """As many tokens of audio as of the video and the text together; a text with padding."""
    audio = image + text
    found = _entry("LTX2VideoTransformer3DModel")
    mask = padding_mask((text, text - 3)[-rows:], text, torch.int64)
    starts = torch.arange(image, dtype=torch.float32)
    video = torch.zeros(rows, 3, image, 2)
    video[:, 2] = torch.stack([starts, starts + 1], dim=-1)
    heard = torch.arange(audio, dtype=torch.float32) / 25
    step = timestep(875.0, rows)
    return found | {
        "hidden_states": random.normal(rows, image, 8),
        "audio_hidden_states": random.normal(rows, audio, 6),
        "encoder_hidden_states": random.normal(rows, text, 32),
        "audio_encoder_hidden_states": random.normal(rows, text, 16),
        "timestep": step,
        "sigma": step,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 1,
        "height": 1,
        "width": image,
        "audio_num_frames": audio,
        "video_coords": video,
        "audio_coords": torch.stack([heard, heard + 0.04], dim=-1).expand(rows, 1, audio, 2),
    }


def _chroma(random: Random, rows: int, text: int, image: int) -> dict[str, Any]:
    ids = torch.zeros(image, 3)
    ids[:, 2] = torch.arange(image)
    mask = padding_mask((text, text - 3)[-rows:], text, torch.float32)
    return {
        "hidden_states": random.normal(rows, image, 16),
        "timestep": timestep(0.5, rows),
        "encoder_hidden_states": random.normal(rows, text, 16),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": ids,
        "attention_mask": torch.cat([mask, torch.ones(rows, image, dtype=torch.bool)], dim=1),
        "controlnet_block_samples": [random.normal(rows, image, 32)],
        "controlnet_single_block_samples": [random.normal(rows, image, 32)],
    }


BUILDERS: dict[str, Build] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux_2,
    "QwenImageTransformer2DModel": _qwen_image,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
    "SD3Transformer2DModel": _sd_3,
    "LTX2VideoTransformer3DModel": _ltx_2,
    "ChromaTransformer2DModel": _chroma,
}

COUNTS = ((8, 16), (9, 25), (5, 14))
"""Tokens of a text and of an image: those that divide by 2 and 4 ranks, and those that do not."""
