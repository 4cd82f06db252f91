"""Qwen-Image's class of diffusers, with the positions and the time of ComfyUI's module as a variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenTimestepProjEmbeddings

from xditd.gpu_workers.families.qwen_image.config import (
    AXES,
    HEAD_SIZE,
    LATENT_CHANNELS,
    PACKED_CHANNELS,
    PATCH,
    ROPE_THETA,
    QwenImageConfig,
)

Size = tuple[int, int, int]
"""Frames, rows and columns of an image, in tokens."""


class _Rope(QwenEmbedRope):
    is_comfyuis: bool = False
    """Whether positions are those of ComfyUI's module: of an odd number of rows the middle one is 0 (in diffusers the
    one after it), and a text begins behind the first image, however large the references."""

    def forward(
        self,
        video_fhw: Sequence[Sequence[Size]],
        device: torch.device | None = None,
        max_txt_seq_len: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_comfyuis:
            return cast(tuple[torch.Tensor, torch.Tensor], super().forward(video_fhw, device, max_txt_seq_len))
        assert max_txt_seq_len is not None
        images = video_fhw[0]
        of_images = torch.cat([self._of_image(number, size, device) for number, size in enumerate(images)])
        start = max(side // 2 for side in images[0][1:])
        return of_images, self._get_device_freqs(device)[0][start : start + int(max_txt_seq_len)]

    def _of_image(self, number: int, size: Size, device: torch.device | None) -> torch.Tensor:
        """Return the rotations of an image's tokens, (tokens, head size / 2), complex."""
        positive, negative = (
            table.split([channels // 2 for channels in self.axes_dim], dim=1)
            for table in self._get_device_freqs(device)
        )
        frames, *sides = size
        parts = [positive[0][number : number + frames]]
        for axis, side in enumerate(sides, 1):
            before = side // 2
            parts.append(torch.cat([negative[axis][len(negative[axis]) - before :], positive[axis][: side - before]]))
        along, rows, columns = parts
        wide = [
            along[:, None, None].expand(*size, -1),
            rows[None, :, None].expand(*size, -1),
            columns[None, None].expand(*size, -1),
        ]
        return torch.cat(wide, dim=-1).flatten(0, 2)


class _TimeEmbeddings(QwenTimestepProjEmbeddings):
    exact: torch.Tensor | None = None
    """The timesteps in float32, in place of the rounded ones, while a forward of that variant runs."""

    def forward(self, timestep: torch.Tensor, hidden_states: torch.Tensor, addition_t_cond: Any = None) -> torch.Tensor:
        given = timestep if self.exact is None else self.exact
        return cast(torch.Tensor, super().forward(given, hidden_states, addition_t_cond))


class QwenImageModule(QwenImageTransformer2DModel):
    """The class, built for a configuration, with real tables of positions. Its forward is that of :meth:`use`."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__(
            patch_size=PATCH,
            in_channels=PACKED_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=config.blocks,
            attention_head_dim=HEAD_SIZE,
            num_attention_heads=config.heads,
            joint_attention_dim=config.text_channels,
            axes_dims_rope=AXES,
            zero_cond_t=config.has_marker,
        )
        with torch.device("cpu"):  # its tables are no parameters: they have values
            self.pos_embed = _Rope(ROPE_THETA, list(AXES), scale_rope=True)
        self.time_text_embed = _TimeEmbeddings(embedding_dim=config.hidden)
        self._has_exact_time = False

    def use(self, *, is_comfyuis: bool, zero_cond_t: bool) -> None:
        """Choose the forward: with ComfyUI's positions and its time, which is not rounded; with references, which are
        all images but the first, modulated at timestep zero."""
        self.pos_embed.is_comfyuis = self._has_exact_time = is_comfyuis
        if zero_cond_t != self.zero_cond_t:
            for each in (self, *self.transformer_blocks):
                cast(Any, each).zero_cond_t = zero_cond_t

    def forward(self, *args: Any, timestep: torch.Tensor, **kwargs: Any) -> Any:
        if not self._has_exact_time:
            return super().forward(*args, timestep=timestep, **kwargs)
        exact = timestep.float()
        self.time_text_embed.exact = torch.cat([exact, exact * 0]) if self.zero_cond_t else exact
        try:
            return super().forward(*args, timestep=timestep, **kwargs)
        finally:
            del self.time_text_embed.exact
