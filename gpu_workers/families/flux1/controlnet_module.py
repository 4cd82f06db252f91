"""diffusers' class of FLUX.1's ControlNets in two parts: the text with its mode, then all else on this rank's tokens.

Ranks split the tokens of the second part, of which the mode's token is one of the text. The bits are those of the
class, whose union ControlNets need a mode: ComfyUI runs them without one, too.
"""

from __future__ import annotations

import torch
from diffusers import FluxControlNetModel

from xditd.gpu_workers.families.flux1.config import PACKED_CHANNELS
from xditd.gpu_workers.families.flux1.controlnet_config import Flux1ControlNetConfig
from xditd.gpu_workers.families.flux1.timesteps import SCALE, norm_epsilon
from xditd.gpu_workers.models.query_key_norms import QueryKeyNorms

Samples = tuple[torch.Tensor, ...]


class Flux1ControlNetModule(FluxControlNetModel):
    """The class, built for a configuration. Its forward takes the text of :meth:`embed_text`."""

    def __init__(self, config: Flux1ControlNetConfig) -> None:
        super().__init__(
            in_channels=PACKED_CHANNELS,
            num_mode=config.modes or None,
            **config.class_arguments,
        )
        self._norms = QueryKeyNorms(self)

    def use(self, variant: str) -> None:
        """Choose the variant of the transformer, whose epsilon of query and key norms the ControlNet has, too."""
        self._norms.use(norm_epsilon(variant))

    def embed_text(
        self, encoder_hidden_states: torch.Tensor, txt_ids: torch.Tensor, mode: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embedded text (rows, tokens, hidden) and its ids; a token of the ``mode``, (rows, 1), is first."""
        text = self.context_embedder(encoder_hidden_states)
        if mode is None:
            return text, txt_ids
        return torch.cat([self.controlnet_mode_embedder(mode), text], dim=1), torch.cat([txt_ids[:1], txt_ids])

    def forward(
        self,
        hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[Samples, Samples]:
        """Return the residuals of both kinds of blocks, (rows, image tokens, hidden) each, not scaled."""
        image = self.x_embedder(hidden_states) + self.controlnet_x_embedder(controlnet_cond)
        times = [timestep.to(image.dtype) * SCALE]
        if guidance is not None:
            times.append(guidance.to(image.dtype) * SCALE)
        temb = self.time_text_embed(*times, pooled_projections)
        rotary = self.pos_embed(torch.cat((txt_ids, img_ids), dim=0))
        text = encoder_hidden_states
        double, single = [], []
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
            double.append(image)
        for block in self.single_transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
            single.append(image)
        return (
            tuple(block(sample) for block, sample in zip(self.controlnet_blocks, double, strict=True)),
            tuple(block(sample) for block, sample in zip(self.controlnet_single_blocks, single, strict=True)),
        )
