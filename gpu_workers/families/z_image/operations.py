"""Build, check and run a Z-Image transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, cast

import torch

from xditd.gpu_workers.families.z_image.checks import check_image, check_list, check_split, check_texts
from xditd.gpu_workers.families.z_image.config import (
    AXES,
    AXES_LENGTHS,
    LATENT_CHANNELS,
    NORM_EPSILON,
    PATCH,
    ROPE_THETA,
    TIME_SCALE,
    ZImageConfig,
)
from xditd.gpu_workers.families.z_image.facts import transformer_facts
from xditd.gpu_workers.families.z_image.forward import SequenceParallelZImage
from xditd.gpu_workers.families.z_image.prompt import ZImagePrompt
from xditd.gpu_workers.families.z_image.recipe import ZImageRecipe
from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.job_checks import check_tensor
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults
from xditd.gpu_workers.models.planned_operations import check_has_plain_settings
from xditd.gpu_workers.parallel.attention import AUTO
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import Unsupported
from xditd.ipc.facts import TransformerFacts

PAD_TOKENS: Final = ("x_pad_token", "cap_pad_token")


class ZImageOperations:
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    recipe = ZImageRecipe()
    prompt = ZImagePrompt()

    def build(self, config: ZImageConfig) -> torch.nn.Module:
        arguments: dict[str, Any] = {
            "all_patch_size": (PATCH,),
            "all_f_patch_size": (1,),
            "in_channels": LATENT_CHANNELS,
            "dim": config.hidden,
            "n_layers": config.layers,
            "n_refiner_layers": config.refiners,
            "n_heads": config.heads,
            "n_kv_heads": config.heads,
            "norm_eps": NORM_EPSILON,
            "qk_norm": True,
            "cap_feat_dim": config.text_channels,
            "rope_theta": ROPE_THETA,
            "t_scale": TIME_SCALE,
            "axes_dims": list(AXES),
            "axes_lens": list(AXES_LENGTHS),
        }
        return SequenceParallelZImage(**arguments)

    def fuse(
        self,
        config: ZImageConfig,
        module: torch.nn.Module,
        layout: ParallelLayout,
        dtype: torch.dtype,
        exceptions: Mapping[str, torch.dtype],
    ) -> None:
        """Raise ``Unsupported`` if the settings ask for fused kernels or fp8, which Z-Image does not have."""
        check_has_plain_settings(layout, "z_image", "Z-Image")
        wide = [f"{name} is {exceptions[name]}" for name in PAD_TOKENS if name in exceptions]
        if wide:
            # The class mixes them with tokens in the main dtype, and its layers take one dtype.
            raise Unsupported(f"z_image: {wide[0]} and most weights are {dtype}: lend it as {dtype}", names=wide)

    def facts(self, config: ZImageConfig, layout: ParallelLayout) -> TransformerFacts:
        return transformer_facts(config, layout)

    def check(self, model: Model[ZImageConfig], inputs: Inputs) -> None:
        x, t, texts = (inputs.arguments[name] for name in ("x", "t", "cap_feats"))
        check_list("x", x)
        check_list("cap_feats", texts, len(x))
        check_texts("cap_feats", texts, model.config)
        check_tensor("t", t, (len(x),))
        for row, image in enumerate(x):
            check_image(f"x[{row}]", image, model.dtype)
            check_split(model.layout, math.prod(image.shape[2:]) // PATCH**2, [len(texts[row])])

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        return tuple(tuple(image.shape) for image in inputs.arguments["x"])

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        return Inputs(
            {name: argument[rows] for name, argument in inputs.arguments.items()},
            {name: values[rows] for name, values in inputs.known.items()},
        )

    def run(self, model: Model[ZImageConfig], inputs: Inputs, options: CallOptions) -> RowResults:
        module = cast(SequenceParallelZImage, model.module)
        module.set_variant(options.variant)
        x, t, texts = (inputs.arguments[name] for name in ("x", "t", "cap_feats"))
        if model.layout.degrees.sequence == 1 and model.layout.requested_attention.lower() == AUTO:
            return cast(list[torch.Tensor], module(list(x), t, list(texts), return_dict=False)[0])
        return module.forward_shared(x, t, texts)

    def tree(self, rows: RowResults) -> tuple[list[torch.Tensor]]:
        return (list(rows),)
