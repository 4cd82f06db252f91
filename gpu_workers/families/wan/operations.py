"""Build, check and run a Wan transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from xditd.gpu_workers.families.wan.checks import check_split, check_texts, check_timestep, check_video
from xditd.gpu_workers.families.wan.config import (
    EPSILON,
    HEAD_SIZE,
    IMAGE_TOKENS,
    MOST_POSITIONS,
    OUT_CHANNELS,
    PATCH,
    WanConfig,
)
from xditd.gpu_workers.families.wan.facts import transformer_facts
from xditd.gpu_workers.families.wan.recipe import WanRecipe
from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.job_checks import check_batch, check_tensor
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults
from xditd.gpu_workers.models.planned_operations import PlannedOperations
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import TransformerFacts


class _Positions(WanRotaryPosEmbed):
    """Tables of sines and cosines in float32, whatever the dtype of the weights, as diffusers keeps them."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        return self


class WanOperations(PlannedOperations):
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    name = "wan"
    title = "Wan"
    class_name = "WanTransformer3DModel"
    recipe = WanRecipe()

    def build(self, config: WanConfig) -> torch.nn.Module:
        arguments: dict[str, Any] = {
            "patch_size": PATCH,
            "num_attention_heads": config.heads,
            "attention_head_dim": HEAD_SIZE,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "text_dim": config.text_channels,
            "freq_dim": config.time_channels,
            "ffn_dim": config.ffn,
            "num_layers": config.blocks,
            "eps": EPSILON,
            "image_dim": config.image_channels or None,
            "added_kv_proj_dim": config.hidden if config.image_channels else None,
        }
        module = WanTransformer3DModel(**arguments)
        with torch.device("cpu"):  # tables of positions are no parameters
            module.rope = _Positions(HEAD_SIZE, PATCH, MOST_POSITIONS)
        return module

    def facts(self, config: WanConfig, layout: ParallelLayout) -> TransformerFacts:
        return transformer_facts(config, layout)

    def check(self, model: Model[WanConfig], inputs: Inputs) -> None:
        given, config = inputs.arguments, model.config
        video, text = given["hidden_states"], given["encoder_hidden_states"]
        tokens = check_video("hidden_states", video, config.in_channels, model.dtype)
        rows = video.shape[0]
        check_batch("hidden_states", rows)
        check_texts("encoder_hidden_states", text, rows, config, model.dtype)
        check_timestep(given["timestep"], inputs.known, rows, tokens)
        image = given.get("encoder_hidden_states_image")
        if config.image_channels:
            name = "encoder_hidden_states_image"
            check_tensor(name, image, (rows, IMAGE_TOKENS, config.image_channels), model.dtype)
        check_split(model.layout, tokens)

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        rows, channels, *sides = inputs.arguments["hidden_states"].shape
        return ((OUT_CHANNELS[channels], *sides),) * rows

    def run(
        self,
        model: Model[WanConfig],
        inputs: Inputs,
        options: CallOptions,
    ) -> RowResults:
        found = model.planned.run({**inputs.arguments, "return_dict": False}, loras=options.loras)
        return cast(torch.Tensor, found[0])
