"""Calls of classes of images beside those of their entries: ControlNets, times of tokens, adapters."""

from __future__ import annotations

from typing import Any

import torch
from class_entries import ENTRIES
from class_entry import ClassEntry, Random
from further_calls import further
from model_arguments import padding_mask

_FLUX_IP_ADAPTER = ENTRIES["FluxTransformer2DModel-ip_adapter"]
_CHROMA = ENTRIES["ChromaTransformer2DModel"]
_FLUX = ENTRIES["FluxTransformer2DModel"]


def _chroma_ip_adapter(random: Random) -> dict[str, Any]:
    given = _FLUX_IP_ADAPTER.arguments(random)
    return _CHROMA.arguments(random) | {"joint_attention_kwargs": given["joint_attention_kwargs"]}


def _flux_controlnet(random: Random) -> dict[str, Any]:
    given = _FLUX.arguments(random)
    return given | {"controlnet_cond": random.normal(*given["hidden_states"].shape)}


def _two_residuals(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    """Of a ControlNet, for 16 tokens."""
    return {"controlnet_block_samples": [random.normal(2, 16, 32) for _ in range(2)]}


def _times(random: Random, given: dict[str, Any]) -> dict[str, Any]:
    """A time for each token."""
    return {"timestep": random.normal(*given["hidden_states"].shape[:2]).abs()}


def _fibo_short_text(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    return {"encoder_hidden_states": random.normal(2, 3, 7, 16), "encoder_attention_mask": padding_mask((7, 4), 7)}


IMAGE_CALLS = (
    ClassEntry(_CHROMA.name, _CHROMA.config, _chroma_ip_adapter, "ip_adapter", _FLUX_IP_ADAPTER.prepare),
    ClassEntry("FluxControlNetModel", _FLUX.config, _flux_controlnet),
    further("HunyuanDiT2DModel", "controlnet", _two_residuals),
    further("BriaTransformer2DModel", "controlnet", _two_residuals),
    further("BriaFibo2Transformer2DModel", "short_text", _fibo_short_text),
    further("GlmImageTransformer2DModel", "dropped_row", lambda *_: {"prior_token_drop": torch.tensor([True, False])}),
    further("Ideogram4Transformer2DModel", "times_of_tokens", _times),
)
"""Their variants say what differs."""
