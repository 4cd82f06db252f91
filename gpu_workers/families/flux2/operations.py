"""Build, check and run a FLUX.2 transformer."""

from __future__ import annotations

from typing import Final, cast

import torch

from xditd.gpu_workers.families.flux2.checks import check_images
from xditd.gpu_workers.families.flux2.config import AXES, Flux2Config
from xditd.gpu_workers.families.flux2.facts import FLOAT32_TIME, transformer_facts
from xditd.gpu_workers.families.flux2.module import CACHE, Flux2Module, ReferenceCache
from xditd.gpu_workers.families.flux2.prompt import Flux2Prompt
from xditd.gpu_workers.families.flux2.recipe import Flux2Recipe
from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.job_checks import check_batch, check_known, check_split, check_tensor
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults
from xditd.gpu_workers.models.planned_operations import PlannedOperations
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import TransformerFacts

_OF_CACHE: Final = "keys and values of references, which are other tensors in each generation, are read by its steps"


class Flux2Operations(PlannedOperations):
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    name = "flux2"
    title = "FLUX.2"
    class_name = "Flux2Transformer2DModel"
    of_all_rows = frozenset({"img_ids", "txt_ids", CACHE})
    recipe = Flux2Recipe()
    prompt = Flux2Prompt()

    def build(self, config: Flux2Config) -> torch.nn.Module:
        return Flux2Module(config)

    def facts(self, config: Flux2Config, layout: ParallelLayout) -> TransformerFacts:
        return transformer_facts(config, layout)

    def check(self, model: Model[Flux2Config], inputs: Inputs) -> None:
        given, config = inputs.arguments, model.config
        image, text = given["hidden_states"], given["encoder_hidden_states"]
        check_images("hidden_states", image, model.dtype)
        rows, image_tokens = image.shape[:2]
        check_batch("hidden_states", rows)
        check_tensor("encoder_hidden_states", text, (rows, None, config.context_channels), model.dtype)
        check_tensor("img_ids", given["img_ids"], (image_tokens, len(AXES)))
        check_tensor("txt_ids", given["txt_ids"], (text.shape[1], len(AXES)))
        check_tensor("timestep", given["timestep"], (rows,))
        check_known("timestep", inputs.known, 0.0, 1.0, "give sigmas, not the 0 to 1000 of a scheduler")
        if config.has_guidance or given.get("guidance") is not None:
            check_tensor("guidance", given.get("guidance"), (rows,))
        check_split(model.layout, text.shape[1], image_tokens)

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        rows, tokens, channels = inputs.arguments["hidden_states"].shape
        cache: ReferenceCache | None = inputs.arguments.get(CACHE)
        if cache is not None and not cache.is_filled:
            tokens -= cache.tokens
        return ((tokens, channels),) * rows

    def run(self, model: Model[Flux2Config], inputs: Inputs, options: CallOptions) -> RowResults:
        arguments = dict(inputs.arguments)
        if not model.config.has_guidance:
            arguments.pop("guidance", None)  # the class does not read it
        cache: ReferenceCache | None = arguments.pop(CACHE, None)
        cast(Flux2Module, model.module).use(is_comfyuis=options.variant == FLOAT32_TIME)
        if cache is not None:
            arguments |= cache.arguments()
        found = model.planned.run(
            {**arguments, "return_dict": False},
            key=options.variant,
            loras=options.loras,
            why_eager="" if cache is None else _OF_CACHE,
        )
        if cache is not None and not cache.is_filled:
            cache.kept = found[1]
        return cast(torch.Tensor, found[0])
