"""Wan VACE's class of diffusers, also with several controls, each with its own weights, as ComfyUI runs it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanVACETransformer3DModel

from xditd.gpu_workers.families.wan.config import CONTROL_CHANNELS, WanVaceConfig
from xditd.gpu_workers.families.wan.module import add_time, positions, sizes


class WanVaceModule(WanVACETransformer3DModel):
    """The class, built for a configuration, with real tables of positions.

    With weights (controls, control blocks) in float32, ``control_hidden_states`` has the controls of each row one after
    another, (rows * controls, channels, frames, rows, columns), and each goes through the control blocks by itself.
    With one control in float32 this has the bits of the class.
    """

    def __init__(self, config: WanVaceConfig) -> None:
        layers = {"vace_layers": list(config.control_layers), "vace_in_channels": CONTROL_CHANNELS}
        super().__init__(**sizes(config), **layers)
        self.rope = positions()
        self._time = add_time(self.condition_embedder, config)

    def use(self, *, is_comfyuis: bool) -> None:
        """Choose the forward: with diffusers' or with ComfyUI's embedding of the time."""
        self._time.is_comfyuis = is_comfyuis

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        control_hidden_states: torch.Tensor | None = None,
        control_hidden_states_scale: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Predict as the class does, or with several controls; then a tuple of one tensor."""
        scales = control_hidden_states_scale
        if scales is None or scales.ndim == 1:
            return super().forward(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_hidden_states_image,
                control_hidden_states=control_hidden_states,
                control_hidden_states_scale=scales,
                return_dict=return_dict,
                attention_kwargs=attention_kwargs,
            )
        assert control_hidden_states is not None
        return (self._with_controls(hidden_states, timestep, encoder_hidden_states, control_hidden_states, scales),)

    def _with_controls(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        controls: torch.Tensor,
        scales: torch.Tensor,
    ) -> torch.Tensor:
        """Run the blocks; after every so many, one control block for each control.

        The class runs all control blocks first and holds all their results, which takes as much memory for each
        control as the video has in every one of them.

        Source: diffusers, ``WanVACETransformer3DModel.forward``.
        """
        rows, _, *video_sides = latents.shape
        rotary = self.rope(latents)
        video = self.patch_embedding(latents).flatten(2).transpose(1, 2)
        states = self.vace_patch_embedding(controls).flatten(2).transpose(1, 2)
        # A control may have fewer frames than the video: the rest is zero, as in the class.
        states = torch.nn.functional.pad(states, (0, 0, 0, video.shape[1] - states.shape[1]))
        of_controls = [each.contiguous() for each in states.unflatten(0, (rows, -1)).unbind(1)]
        time, modulation, text, _ = self.condition_embedder(timestep, text)
        modulation = modulation.unflatten(1, (6, -1))
        first = video
        numbers = {layer: number for number, layer in enumerate(self.config.vace_layers)}
        for layer, block in enumerate(self.blocks):
            video = block(video, text, modulation, rotary)
            number = numbers.get(layer)
            if number is None:
                continue
            for at, state in enumerate(of_controls):
                found, of_controls[at] = self.vace_blocks[number](first, text, state, modulation, rotary)
                # ComfyUI's weight is a number, which torch multiplies in float32 and does not round first.
                video = video + (found.float() * scales[at, number]).to(found.dtype)
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        video = (self.norm_out(video.float()) * (1 + scale) + shift).type_as(video)
        return self._unpatched(self.proj_out(video), rows, video_sides)

    def _unpatched(self, tokens: torch.Tensor, rows: int, sides: list[int]) -> torch.Tensor:
        """Return (rows, channels, frames, rows, columns) of tokens (rows, tokens, patch * channels)."""
        patch = self.config.patch_size
        counts = [side // each for side, each in zip(sides, patch, strict=True)]
        split = tokens.reshape(rows, *counts, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return split.flatten(6, 7).flatten(4, 5).flatten(2, 3)
