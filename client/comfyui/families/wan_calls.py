"""Wan 2.1 and 2.2: ComfyUI's ``WanModel`` as calls of diffusers' ``WanTransformer3DModel``.

Both take 1000 times sigma, and both predict the velocity. A first and a last image are in channels of ``x``, which
ComfyUI joins; of Wan 2.1, CLIP's vision model sees them, too. Wan 2.2 TI2V has a first image as the first frame of its
latents, at the time 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.base import BaseCall, BaseModelAdapter, text_of
from xditd.client.comfyui.families.rows import join_rows, join_several
from xditd.client.comfyui.unsupported import is_empty
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.jobs.arguments import KeptTensor, RowsOf

PATCH: Final = (1, 2, 2)
"""Frames, rows and columns of latents in a token."""

TEXT: Final = "encoder_hidden_states"
IMAGE: Final = "encoder_hidden_states_image"
TEXT_TOKENS: Final = 512
"""Of models with CLIP's vision model: the class finds the text by this number."""
IMAGE_TOKENS: Final = 257
"""Of an image, by CLIP's vision model."""

_REFUSED: Final = {
    "time_dim_concat": "latents behind those of the video (time_dim_concat)",
    "reference_latents": "reference latents",
    "context_latents": "reference latents (Bernini)",
}
"""Keys of conditioning that change the model's input in a way that the workers cannot."""


class WanModel(BaseModelAdapter):
    """One Wan transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`."""

    variant: Final = "comfyui"
    multiple: Final = PATCH[1]
    text_weight: Final = "text_embedding.0.weight"
    # The workers' loop has the schedulers of diffusers' pipeline alone: ComfyUI's own loop runs.
    loop_keys: Final[frozenset[str]] = frozenset()
    loop_conds: Final[frozenset[str]] = frozenset()
    refused = _REFUSED

    def __init__(self, *, has_image: bool = False, has_positions: bool = False, has_frame_times: bool = False) -> None:
        """``has_image``: it reads what CLIP's vision model sees, and with ``has_positions`` of two images.

        ``has_frame_times``: a frame may have its own time.
        """
        self._has_image = has_image
        self._has_positions = has_positions
        self._has_frame_times = has_frame_times

    def read(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None,
        clip_fea: torch.Tensor | None = None,
        time_dim_concat: torch.Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> WanCall:
        """Read a call of ComfyUI's ``WanModel``: ``x`` (rows, channels, frames, height/8, width/8), one time a row.

        TI2V has height/16 and width/16, and with a mask of latents (rows, frames) times.

        Raises:
            BadRequest: no text embeddings.
        """
        context, options, rows = text_of(context), transformer_options or {}, x.shape[0]
        if self._has_frame_times:
            more.pop("denoise_mask", None)  # ComfyUI made the frames' times of it
        faults = [] if is_empty(time_dim_concat) else [_REFUSED["time_dim_concat"]]
        faults += [f"{name} of the conditioning" for name, given in more.items() if not is_empty(given)]
        if options.get("rope_options"):
            faults.append("scaled or shifted positions (rope_options)")
        times = None
        if timestep.numel() not in (1, rows):
            if not self._has_frame_times or timestep.shape != (rows, x.shape[2]):
                faults.append("a time for each frame")
            # For the host, any of them: the workers get those of all frames.
            times, timestep = timestep, timestep[:, -1]
        texts = {TEXT: context}
        if self._has_image:  # ComfyUI's own models drop what a CLIP vision model saw where they cannot read it
            if clip_fea is None:
                faults.append("no output of a CLIP vision model, which this model reads")
            elif clip_fea.shape[1] not in (IMAGE_TOKENS, 2 * IMAGE_TOKENS):
                faults.append(
                    f"{clip_fea.shape[1]} tokens of a CLIP vision model, not the {IMAGE_TOKENS} of one image or the "
                    f"{2 * IMAGE_TOKENS} of two"
                )
            else:
                texts[IMAGE] = clip_fea
            if context.shape[1] != TEXT_TOKENS:
                faults.append(f"a text of {context.shape[1]} tokens, not {TEXT_TOKENS}, beside an image")
        texts = {name: each.expand(rows, *each.shape[1:]) for name, each in texts.items()}
        numbers = self.numbers(timestep, rows)
        return WanCall(x=x, numbers=numbers, texts=texts, options=options, faults=faults, times=times)

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        return super().keep_row({name: self._of_class(name, each) for name, each in texts.items()}, keep, dtype)

    def _of_class(self, name: str, row: torch.Tensor) -> torch.Tensor:
        """Return a row of conditioning as the class takes it: with positions, two images one after another."""
        if name == IMAGE and self._has_positions and row.shape[1] > IMAGE_TOKENS:
            return row.reshape(-1, IMAGE_TOKENS, row.shape[2])
        return row

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        raise Unsupported("XDiT: videos are sampled by ComfyUI's own loop; use a KSampler")


@dataclass(frozen=True, eq=False, kw_only=True)
class WanCall(BaseCall):
    """One call of ComfyUI's ``WanModel``; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`."""

    times: torch.Tensor | None
    """Of each frame, (rows, frames), if they are not all the same."""

    def arguments(
        self,
        rows: slice,
        numbers: Mapping[str, list[float]],
        kept: Sequence[Kept],
        keep: Keep,
        dtype: torch.dtype,
    ) -> list[Arguments]:
        """Return one forward for all rows: ComfyUI batches only texts of equal length."""
        video = _padded(self.x[rows]).to(dtype)
        if self.times is None:
            timestep = torch.tensor(numbers["timestep"], dtype=torch.float32)
        else:
            of_frame = video.shape[3] * video.shape[4] // (PATCH[1] * PATCH[2])
            timestep = self.times[rows].float().repeat_interleave(of_frame, dim=1)
        return [
            {
                "hidden_states": video,
                "timestep": timestep,
                **{name: self._join(name)([row[name] for row in kept]) for name in self.texts},
            }
        ]

    def _join(self, name: str) -> Callable[[Sequence[KeptTensor]], KeptTensor | RowsOf]:
        return join_rows if name == TEXT else join_several

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        ((predicted,),) = results
        height, width = self.x.shape[3:]
        found: torch.Tensor = predicted[..., :height, :width].to(self.x.dtype)
        return found


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Pad latents to whole tokens, as ComfyUI does."""
    if x.shape[3] % PATCH[1] == 0 == x.shape[4] % PATCH[2]:
        return x
    import comfy.ldm.common_dit

    result: torch.Tensor = comfy.ldm.common_dit.pad_to_patch_size(x, PATCH)
    return result
