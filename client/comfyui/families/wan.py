"""Wan 2.1 and 2.2 (text and first image): ComfyUI's ``WanModel`` as calls of diffusers' ``WanTransformer3DModel``.

Both take 1000 times sigma, and both predict the velocity. A first image is in channels of ``x``, which ComfyUI joins;
of Wan 2.1, CLIP's vision model sees it, too. Wan 2.2 TI2V has it as the first frame of its latents, at the time 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.base import BaseAdapter, BaseCall, BaseModelAdapter, text_of
from xditd.client.comfyui.families.rows import join_rows
from xditd.client.comfyui.unsupported import is_empty
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter

PATCH: Final = (1, 2, 2)
"""Frames, rows and columns of latents in a token."""

TEXT: Final = "encoder_hidden_states"
IMAGE: Final = "encoder_hidden_states_image"
TEXT_TOKENS: Final = 512
"""Of models with CLIP's vision model: the class finds the text by this number."""

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
    # The workers' loop has the schedulers of diffusers' pipeline alone: ComfyUI's own loop runs.
    loop_keys: Final[frozenset[str]] = frozenset()
    loop_conds: Final[frozenset[str]] = frozenset()
    refused = _REFUSED

    def __init__(self, *, has_image: bool = False, has_frame_times: bool = False) -> None:
        """``has_image``: it reads what CLIP's vision model sees. ``has_frame_times``: a frame may have its own time."""
        self._has_image = has_image
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
        if self._has_image:
            if clip_fea is None:
                faults.append("no output of a CLIP vision model, which this model reads")
            elif clip_fea.shape[1] != 257:
                faults.append(f"{clip_fea.shape[1]} tokens of a CLIP vision model, not the 257 of one image")
            else:
                texts[IMAGE] = clip_fea
            if context.shape[1] != TEXT_TOKENS:
                faults.append(f"a text of {context.shape[1]} tokens, not {TEXT_TOKENS}, beside an image")
        elif clip_fea is not None:
            faults.append("the output of a CLIP vision model, which this model does not read")
        texts = {name: each.expand(rows, *each.shape[1:]) for name, each in texts.items()}
        numbers = self.numbers(timestep, rows)
        return WanCall(x=x, numbers=numbers, texts=texts, options=options, faults=faults, times=times)

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
                **{name: join_rows([row[name] for row in kept]) for name in self.texts},
            }
        ]

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


class Wan(BaseAdapter):
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "Wan 2.1 and 2.2 (text and first image)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return comfy.model_base.WAN21, comfy.model_base.WAN22

    def config_classes(self) -> tuple[type, ...]:
        import comfy.supported_models as known

        return known.WAN21_T2V, known.WAN21_I2V, known.WAN22_T2V

    def check_config(self, config: Any, label: str) -> None:
        """Refuse related models that ComfyUI runs with the same class.

        Raises:
            Unsupported: a model with a first and a last image, with a reference image, or with other channels.
        """
        read = config.unet_config
        found = None
        if read.get("flf_pos_embed_token_number") is not None:
            found = "it reads a first and a last image"
        elif read.get("in_dim_ref_conv") is not None:
            found = "it reads a reference image (Wan Fun)"
        elif (read.get("in_dim"), read.get("out_dim")) not in ((16, 16), (36, 16), (48, 48)):
            found = f"it has {read.get('in_dim')} channels, to {read.get('out_dim')}"
        if found is not None:
            raise Unsupported(
                f"{label}: {found}; XDiT runs Wan 2.1 and 2.2 for text and a first image, use the stock loader"
            )

    def adapt(self, model: Any) -> ModelAdapter:
        import comfy.model_base

        has_image = model.diffusion_model.img_emb is not None
        return WanModel(has_image=has_image, has_frame_times=isinstance(model, comfy.model_base.WAN22))


ADAPTER: Final[Adapter] = Wan()
