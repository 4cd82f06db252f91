"""Build, check and run a Qwen-Image transformer."""

from __future__ import annotations

from typing import Final, cast

import torch

from xditd.gpu_workers.families.qwen_image.checks import check_images, check_mask, check_positions
from xditd.gpu_workers.families.qwen_image.config import PACKED_CHANNELS, QwenImageConfig
from xditd.gpu_workers.families.qwen_image.facts import COMFYUI, ZERO_COND_T, transformer_facts
from xditd.gpu_workers.families.qwen_image.module import QwenImageModule
from xditd.gpu_workers.families.qwen_image.prompt import QwenImagePrompt
from xditd.gpu_workers.families.qwen_image.recipe import QwenImageRecipe
from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.job_checks import check_batch, check_known, check_split, check_tensor
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults
from xditd.gpu_workers.models.planned_operations import PlannedOperations
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import TransformerFacts

MASK: Final = "encoder_hidden_states_mask"


class QwenImageOperations(PlannedOperations):
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    name = "qwen_image"
    title = "Qwen-Image"
    class_name = "QwenImageTransformer2DModel"
    recipe = QwenImageRecipe()
    prompt = QwenImagePrompt()

    def build(self, config: QwenImageConfig) -> torch.nn.Module:
        return QwenImageModule(config)

    def facts(self, config: QwenImageConfig, layout: ParallelLayout) -> TransformerFacts:
        return transformer_facts(config, layout)

    def check(self, model: Model[QwenImageConfig], inputs: Inputs) -> None:
        given = inputs.arguments
        image, text = given["hidden_states"], given["encoder_hidden_states"]
        check_tensor("hidden_states", image, (None, None, PACKED_CHANNELS), model.dtype)
        rows, image_tokens = image.shape[:2]
        check_batch("hidden_states", rows)
        check_tensor("encoder_hidden_states", text, (rows, None, model.config.text_channels), model.dtype)
        if given.get(MASK) is not None:
            check_mask(MASK, given[MASK], rows, text.shape[1])
        check_tensor("timestep", given["timestep"], (rows,))
        check_known("timestep", inputs.known, 0.0, 1.0, "give sigmas, not the 0 to 1000 of a scheduler")
        images = check_images("img_shapes", given["img_shapes"], rows, image_tokens)
        check_positions("encoder_hidden_states", images, text.shape[1])
        check_split(model.layout, text.shape[1], image_tokens)

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        rows, *shape = inputs.arguments["hidden_states"].shape
        return (tuple(shape),) * rows

    def run(self, model: Model[QwenImageConfig], inputs: Inputs, options: CallOptions) -> RowResults:
        arguments = dict(inputs.arguments)
        # The class takes the images of a row as a list of tuples, whatever the client's message makes of them.
        arguments["img_shapes"] = [[tuple(size) for size in images] for images in arguments["img_shapes"]]
        module = cast(QwenImageModule, model.module)
        module.use(
            is_comfyuis=options.variant == COMFYUI,
            zero_cond_t=model.config.has_references_at_zero or options.variant == ZERO_COND_T,
        )
        found = model.planned.run({**arguments, "return_dict": False}, key=options.variant, loras=options.loras)
        return cast(torch.Tensor, found[0])
