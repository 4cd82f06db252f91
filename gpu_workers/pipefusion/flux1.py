"""The FLUX.1 transformer in stages: each rank runs some of its blocks, the first and the last what lies around."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from xditd.gpu_workers.pipefusion.key_values import KeyValues
from xditd.gpu_workers.pipefusion.shares import deal
from xditd.gpu_workers.sequence_parallel import CheckpointOrderNorm, TrimmingFluxAttnProcessor
from xditd.gpu_workers.timesteps import embed_time
from xditd.ipc.requests import Variant

Rotary = tuple[torch.Tensor, torch.Tensor]


class StagedFlux1(FluxTransformer2DModel):
    """FLUX.1 of which this rank runs one stage.

    It has the parameters of all blocks, since a lent checkpoint is on every GPU as a whole; those of other stages are
    never read. Blocks of both kinds work as long on a token, so that each stage gets as many.
    """

    def __init__(self, stage: int, stages: int, **config: Any) -> None:
        super().__init__(**config)
        self.norm_out = CheckpointOrderNorm(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
        for block in blocks:
            block.attn.processor = TrimmingFluxAttnProcessor()
        self.stage_blocks = blocks[deal(len(blocks), stages)[stage]]

    def condition(
        self, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor, variant: Variant
    ) -> torch.Tensor:
        """Embed what modulates every block of a step, (batch, hidden); ``timestep`` is a sigma for each sample."""
        return embed_time(self.time_text_embed, timestep, guidance, pooled, pooled.dtype, variant)

    def run_stage(
        self, image: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, rotary: Rotary, key_values: KeyValues
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run this stage's blocks on some image tokens and all text tokens, both (batch, tokens, hidden)."""
        for block in self.stage_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=modulation,
                image_rotary_emb=rotary,
                joint_attention_kwargs={"key_values": key_values},
            )
        return image, text

    def predict(self, image: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Turn what the last block made of image tokens into the prediction, (batch, tokens, packed channels)."""
        return cast(torch.Tensor, self.proj_out(self.norm_out(image, modulation)))
