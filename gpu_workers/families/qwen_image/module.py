"""Qwen-Image's class of diffusers, with the positions and the time of ComfyUI's module as a variant."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

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

MAX_KEPT: Final = 16
"""Sizes of images and references for which the numbers of their tokens stay on the device; 16 KiB for one megapixel."""


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
            zero_cond_t=config.has_references_at_zero,
        )
        with torch.device("cpu"):  # its tables are no parameters: they have values
            self.pos_embed = _Rope(ROPE_THETA, list(AXES), scale_rope=True)
        self._has_exact_time = False
        self._references: OrderedDict[tuple[int, tuple[Size, ...]], torch.Tensor] = OrderedDict()

    def use(self, *, is_comfyuis: bool, zero_cond_t: bool) -> None:
        """Choose the forward: with ComfyUI's positions and its time, which is not rounded; with references, which are
        all images but the first, modulated at timestep zero."""
        self.pos_embed.is_comfyuis = self._has_exact_time = is_comfyuis
        if zero_cond_t != self.zero_cond_t:
            for each in (self, *self.transformer_blocks):
                cast(Any, each).zero_cond_t = zero_cond_t

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: Sequence[Sequence[Size]],
        encoder_hidden_states_mask: torch.Tensor | None = None,
        controlnet_block_samples: None = None,
        *,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        """Return what the class returns for these arguments with ``return_dict=False``, with the same bits.

        The class makes tensors of numbers of the host in every forward: which tokens are references (``zero_cond_t``),
        and the length of a text with a mask. Each is a copy to the GPU, for which the host waits.
        """
        assert not return_dict
        assert controlnet_block_samples is None  # the class's plan names it, and this family takes none
        image = self.img_in(hidden_states)
        time = timestep.float() if self._has_exact_time else timestep.to(image.dtype)
        is_reference = None
        if self.zero_cond_t:
            time = torch.cat([time, time * 0])
            is_reference = self._is_reference(len(image), img_shapes[0], image.device)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.to(torch.bool)
        modulation = self.time_text_embed(time, image)
        rotations = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        for block in self.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                temb=modulation,
                image_rotary_emb=rotations,
                joint_attention_kwargs=None,
                modulate_index=is_reference,
            )
        if self.zero_cond_t:
            modulation = modulation.chunk(2, dim=0)[0]
        return (self.proj_out(self.norm_out(image, modulation)),)

    def _is_reference(self, rows: int, images: Sequence[Size], device: torch.device) -> torch.Tensor:
        """Return 0 for tokens of the first image and 1 for those of all others, (rows, tokens), int32.

        It is kept for the sizes that were used last: forwards of equal sizes copy nothing from the host.
        """
        sizes = (rows, tuple(images))
        found = self._references.pop(sizes, None)
        if found is None or found.device != device:
            counts = [math.prod(size) for size in images]
            numbers = (torch.arange(sum(counts)) >= counts[0]).expand(rows, -1)
            found = numbers.to(device, torch.int32).contiguous()
        self._references[sizes] = found
        while len(self._references) > MAX_KEPT:
            self._references.popitem(last=False)
        return found
