"""Build, check and run a Wan transformer."""

from __future__ import annotations

from typing import ClassVar, Final, cast

import torch

from xditd.gpu_workers.families.wan.checks import check_images, check_split, check_texts, check_timestep, check_video
from xditd.gpu_workers.families.wan.config import OUT_CHANNELS, WanConfig
from xditd.gpu_workers.families.wan.facts import COMFYUI, transformer_facts
from xditd.gpu_workers.families.wan.module import WanModule
from xditd.gpu_workers.families.wan.prompt import WanPrompt
from xditd.gpu_workers.families.wan.recipe import WanRecipe
from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.job_checks import check_batch
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults
from xditd.gpu_workers.models.planned_operations import PlannedOperations
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import TransformerFacts

_IMAGE: Final = "encoder_hidden_states_image"


class WanOperations(PlannedOperations):
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    name = "wan"
    title = "Wan"
    class_name = "WanTransformer3DModel"
    recipe = WanRecipe()
    prompt = WanPrompt()
    several_of_a_row: ClassVar[frozenset[str]] = frozenset({_IMAGE})
    """Arguments that may have several tensors of each row, one after another."""

    def build(self, config: WanConfig) -> torch.nn.Module:
        return WanModule(config)

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
        if config.image_channels:
            check_images(_IMAGE, given.get(_IMAGE), rows, config, model.dtype)
        check_split(model.layout, tokens)

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        rows, channels, *sides = inputs.arguments["hidden_states"].shape
        return ((OUT_CHANNELS[channels], *sides),) * rows

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        taken = super().take_rows(inputs, rows)
        whole, arguments = inputs.arguments["hidden_states"].shape[0], dict(taken.arguments)
        start, stop, _ = rows.indices(whole)
        for name in self.several_of_a_row:
            if (given := inputs.arguments.get(name)) is not None:
                each = given.shape[0] // whole
                arguments[name] = given[each * start : each * stop]
        return Inputs(arguments, taken.known)

    def run(
        self,
        model: Model[WanConfig],
        inputs: Inputs,
        options: CallOptions,
    ) -> RowResults:
        seen, rows = inputs.arguments.get(_IMAGE), inputs.arguments["hidden_states"].shape[0]
        images = 0 if seen is None else seen.shape[0] // rows
        cast(WanModule, model.module).use(is_comfyuis=options.variant == COMFYUI, images=images)
        given = {**inputs.arguments, "return_dict": False}
        found = model.planned.run(given, key=options.variant, loras=options.loras)
        return cast(torch.Tensor, found[0])
