"""Build Qwen2.5-VL, and encode texts with images to its hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from xditd.gpu_workers.families.qwen2_5_vl import config as constants
from xditd.gpu_workers.families.qwen2_5_vl.config import PATCH_VALUES, Qwen25VlConfig
from xditd.gpu_workers.families.qwen2_5_vl.images import GRIDS, PIXELS, TYPES, ImagesInTexts
from xditd.gpu_workers.models.decoders import DecoderOperations, place_features
from xditd.gpu_workers.models.full_precision import compute_in_float32, decode_in_float32, keep_frequencies
from xditd.gpu_workers.models.operations import Model
from xditd.ipc import limits
from xditd.ipc.facts import ArgumentFacts


class Qwen25VlOperations(DecoderOperations):
    """See :class:`~xditd.gpu_workers.models.operations.TextEncoderOperations`."""

    def build(self, config: Qwen25VlConfig) -> torch.nn.Module:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        model: Any = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=config.inner,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.key_heads,
                rms_norm_eps=constants.EPSILON,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": constants.ROPE_THETA,
                    "mrope_section": list(constants.ROPE_SECTIONS),
                },
                max_position_embeddings=limits.MAX_TEXT_TOKENS,
                use_cache=False,
            )
        )
        decode_in_float32(model)
        if config.vision is not None:
            model.visual = _vision_tower(config)
        return cast(torch.nn.Module, model)

    def image_facts(self, config: Qwen25VlConfig) -> tuple[ArgumentFacts, ...]:
        if config.vision is None:
            return ()
        return (
            ArgumentFacts(name=PIXELS, shape=("patches", PATCH_VALUES)),
            # Of each image frames, rows and columns of patches.
            ArgumentFacts(name=GRIDS, shape=("images", 3)),
            # 1 for tokens of images. With it, these have positions on three axes, without it those of a text.
            ArgumentFacts(name=TYPES, shape=("batch", "tokens"), is_needed=False),
        )

    def place_images(
        self,
        model: Model[Qwen25VlConfig],
        token_ids: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        images: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        given = ImagesInTexts.of(images, token_ids, mask)
        module = cast(Any, model.module)
        pixels, grids = (images[name].to(model.device) for name in (PIXELS, GRIDS))
        features = module.visual(pixels.float(), grid_thw=grids).pooler_output
        positions = given.positions(mask)
        more = {} if positions is None else {"position_ids": positions.to(model.device)}
        return place_features(states, given.is_image, features), more


def _vision_tower(config: Qwen25VlConfig) -> torch.nn.Module:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    assert config.vision is not None
    tower: Any = Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=config.vision.blocks,
            hidden_size=config.vision.width,
            intermediate_size=config.vision.inner,
            num_heads=config.vision.width // constants.VISION_HEAD_SIZE,
            in_channels=constants.CHANNELS,
            patch_size=constants.PATCH,
            spatial_merge_size=constants.MERGE,
            temporal_patch_size=constants.FRAMES,
            window_size=constants.WINDOW,
            out_hidden_size=config.width,
            fullatt_block_indexes=list(constants.FULL_ATTENTION),
        )
    )
    keep_frequencies(tower.rotary_pos_emb)
    compute_in_float32([tower.patch_embed, *tower.blocks, tower.merger], None)
    return cast(torch.nn.Module, tower)
