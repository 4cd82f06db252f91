"""Build, check and run a ControlNet for FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from diffusers import FluxPipeline

from xditd.gpu_workers.families.flux1.class_arguments import check_arguments, rows_of
from xditd.gpu_workers.families.flux1.config import LATENT_CHANNELS, PACKED_CHANNELS
from xditd.gpu_workers.families.flux1.controlnet_config import (
    DOUBLE_RESIDUALS,
    SINGLE_RESIDUALS,
    Flux1ControlNetConfig,
)
from xditd.gpu_workers.families.flux1.controlnet_module import Flux1ControlNetModule
from xditd.gpu_workers.families.flux1.facts import LATENTS
from xditd.gpu_workers.models.job_checks import check_shape
from xditd.gpu_workers.models.operations import Inputs, Model, Residuals
from xditd.gpu_workers.models.planned_path import PlannedPath
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.token_partition import partition_tokens
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ArgumentFacts, ControlNetFacts

PICTURE: Final = "controlnet_cond"
MODE: Final = "controlnet_mode"
_OF_TRANSFORMER: Final = (
    "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance",
)  # fmt: skip
"""Arguments that both classes take."""


class Flux1ControlNetOperations:
    """See :class:`~xditd.gpu_workers.models.operations.ControlNetOperations`."""

    def build(self, config: Flux1ControlNetConfig) -> torch.nn.Module:
        return cast(torch.nn.Module, Flux1ControlNetModule(config))

    def fuse(
        self,
        config: Flux1ControlNetConfig,
        module: torch.nn.Module,
        layout: ParallelLayout,
        dtype: torch.dtype,
        exceptions: Mapping[str, torch.dtype],
    ) -> PlannedPath:
        # The settings of the transformer's kernels and precision are not the ControlNet's, which computes as its class.
        return PlannedPath(module, "FluxControlNetModel", layout)

    def facts(self, config: Flux1ControlNetConfig, layout: ParallelLayout) -> ControlNetFacts:
        return ControlNetFacts(
            controls="flux1",
            heads=config.heads,
            ulysses=layout.degrees.ulysses,
            ring=layout.degrees.ring,
            arguments=(
                ArgumentFacts(name="hidden_states", shape=("rows", "image_tokens", PACKED_CHANNELS)),
                ArgumentFacts(name=PICTURE, shape=("rows", "image_tokens", PACKED_CHANNELS)),
                ArgumentFacts(name=MODE, shape=("rows", 1), is_needed=False),
                ArgumentFacts(name="encoder_hidden_states", shape=("rows", "text_tokens", config.context_channels)),
                ArgumentFacts(name="pooled_projections", shape=("rows", config.pooled_channels)),
                ArgumentFacts(name="timestep", shape=("rows",)),
                ArgumentFacts(name="img_ids", shape=("image_tokens", 3)),
                ArgumentFacts(name="txt_ids", shape=("text_tokens", 3)),
                ArgumentFacts(name="guidance", shape=("rows",), is_needed=config.has_guidance),
            ),
            modes=config.modes,
            residuals=config.residuals,
            latents=LATENTS,
        )

    def check(self, model: Model[Flux1ControlNetConfig], inputs: Inputs) -> None:
        given, config = inputs.arguments, model.config
        rows, text_tokens, tokens = check_arguments(model, inputs, PACKED_CHANNELS, alike=[PICTURE])
        mode = given.get(MODE)
        if mode is not None:
            check_shape(MODE, mode, (rows, 1))
            if mode.dtype != torch.int64:
                raise BadRequest(f"{MODE}: dtype is {str(mode.dtype).removeprefix('torch.')}, use int64")
            for value in inputs.known.get(MODE, tuple(mode.reshape(-1).tolist())):
                self.check_mode(config, int(value))
        partition_tokens(text_tokens + (mode is not None), tokens, model.layout.degrees.sequence)

    def check_mode(self, config: Flux1ControlNetConfig, mode: int | None) -> None:
        if not config.modes:
            if mode is not None:
                raise BadRequest(f"mode {mode}: this ControlNet is for one kind of pictures; leave the mode out")
        elif mode is None:
            raise BadRequest(f"mode: a union ControlNet needs the kind of its picture, from 0 to {config.modes - 1}")
        elif not 0 <= mode < config.modes:
            raise BadRequest(f"mode {mode}: this ControlNet has the modes 0 to {config.modes - 1}")

    def picture(
        self, model: Model[Flux1ControlNetConfig], latents: torch.Tensor, mode: int | None
    ) -> Mapping[str, Any]:
        batch, channels, height, width = latents.shape
        check_shape("latents", latents, (None, LATENT_CHANNELS, None, None))
        packed = FluxPipeline._pack_latents(latents.contiguous(), batch, channels, height, width).to(model.dtype)
        if mode is None:
            return {PICTURE: packed}
        return {PICTURE: packed, MODE: torch.full((batch, 1), mode, dtype=torch.int64, device=model.device)}

    def beside(self, config: Flux1ControlNetConfig, forward: Inputs, picture: Mapping[str, Any]) -> Inputs:
        shared = {name: forward.arguments.get(name) for name in _OF_TRANSFORMER}
        if config.has_guidance and shared["guidance"] is None:
            raise BadRequest(
                "guidance: this ControlNet has guidance, and the transformer has none; lend one for schnell"
            )
        return Inputs({**shared, **picture}, {k: v for k, v in forward.known.items() if k in _OF_TRANSFORMER})

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        return rows_of(inputs, rows)

    def residuals(self, model: Model[Flux1ControlNetConfig], inputs: Inputs, variant: str) -> Residuals:
        given = dict(inputs.arguments)
        module = cast(Flux1ControlNetModule, model.module)
        module.use(variant)
        text, ids = module.embed_text(given.pop("encoder_hidden_states"), given.pop("txt_ids"), given.pop(MODE, None))
        if not model.config.has_guidance:
            given.pop("guidance", None)  # the class does not read it
        double, single = model.planned.run({**given, "encoder_hidden_states": text, "txt_ids": ids}, key=variant)
        return {DOUBLE_RESIDUALS: list(double), SINGLE_RESIDUALS: list(single)}
