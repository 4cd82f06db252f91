"""FLUX.1 (dev, schnell and their fine-tunes): ComfyUI's ``Flux`` as calls of diffusers' ``FluxTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.rows import join_rows, pad_to_patch
from xditd.client.comfyui.unsupported import is_empty
from xditd.client.families.flux1 import PATCH, image_positions, pack, text_positions, unpack
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.limits import MAX_STEPS

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter, StockEncoder, TextModel
    from xditd.client.comfyui.weights import RemoteWeights

LATENT_CHANNELS: Final = 16

KNOWN_SIZES: Final = 8
"""For how many image sizes and text lengths the workers keep the token positions."""

EMBEDS: Final = "encoder_hidden_states"
POOLED: Final = "pooled_projections"

_REFUSED: Final = {
    "reference_latents": "reference latents (FLUX.1 Kontext)",
    "attention_mask_img_shape": "an attention mask in the conditioning (Apply Style Model)",
}
"""Keys of conditioning that change the model's input in a way that the workers cannot."""


class Flux1Model:
    """One FLUX.1 transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`.

    ``pooled_channels`` is the width of the pooled text state; dev has guidance, schnell does not.
    """

    wrapper: Final = "diffusion_model"
    variant: Final = "float32_time"
    """In half precision ComfyUI rounds neither the timestep before it is embedded, nor latents between steps."""
    multiple: Final = PATCH
    loop_keys: Final = frozenset({"cross_attn", "guidance", "pooled_output"})
    loop_conds: Final = frozenset({"c_crossattn", "guidance", "y"})

    def __init__(self, pooled_channels: int, has_guidance: bool) -> None:
        self._pooled_channels = pooled_channels
        self._has_guidance = has_guidance
        self._ids: dict[tuple[int, ...], Any] = {}

    def read(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: object | None = None,
        control: object | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Flux1Call:
        """Read a call of ComfyUI's ``Flux``: latents ``x`` (rows, 16, height/8, width/8), one sigma a row.

        Raises:
            BadRequest: no text embeddings.
        """
        if context is None:
            raise BadRequest("XDiT: the conditioning has no text embeddings; connect CLIP Text Encode")
        faults = ["ControlNet"] if control else []
        if ref_latents is not None:
            faults.append(_REFUSED["reference_latents"])
        if more.get("attention_mask") is not None:
            faults.append(_REFUSED["attention_mask_img_shape"])
        rows = x.shape[0]
        numbers = {"timestep": timestep.reshape(-1).expand(rows)}
        if guidance is not None and self._has_guidance:
            numbers["guidance"] = guidance.expand(rows)
        texts = {EMBEDS: context, POOLED: pooled_of(y, context, self._pooled_channels)}
        return Flux1Call(self, x, numbers, texts, transformer_options or {}, faults)

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        return {name: keep(tensor.to(dtype)) for name, tensor in texts.items()}

    def schedule_values(self, sigmas: Sequence[float]) -> Mapping[str, list[float]]:
        return {"timestep": [sigma for sigma in sigmas if 0.0 <= sigma <= 1.0][:MAX_STEPS]}

    def condition_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        for key, what in _REFUSED.items():
            if not is_empty(part.get(key)):
                yield what
        if self._has_guidance and part.get("guidance", 0.0) is None:
            yield "conditioning without guidance (FluxDisableGuidance)"

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        embeds = conditions["c_crossattn"].cond
        pooled = pooled_of(conditions["y"].cond if "y" in conditions else None, embeds, self._pooled_channels)
        scale = conditions["guidance"].cond.item() if "guidance" in conditions else 1.0
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, scale

    def ids(self, keep: Keep, *sides: int) -> Any:
        """Return token positions, kept: of an image for ``sides`` (rows, columns), of a text for (tokens,)."""
        found = self._ids.get(sides)
        if found is None:
            while len(self._ids) >= KNOWN_SIZES:
                del self._ids[next(iter(self._ids))]
            found = self._ids[sides] = keep(image_positions(*sides) if len(sides) > 1 else text_positions(*sides))
        return found


@dataclass(frozen=True, eq=False)
class Flux1Call:
    """One call of ComfyUI's ``Flux``; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`."""

    model: Flux1Model
    x: torch.Tensor
    numbers: Mapping[str, torch.Tensor]
    texts: Mapping[str, torch.Tensor]
    options: Mapping[str, Any]
    faults: Sequence[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return int(self.x.shape[0])

    def arguments(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep, dtype: torch.dtype
    ) -> list[Arguments]:
        """Return one forward for all rows: ComfyUI batches only texts of equal length."""
        latents = pad_to_patch(self.x[rows], PATCH).to(dtype)
        height, width = latents.shape[2:]
        found = {
            "hidden_states": pack(latents),
            EMBEDS: join_rows([row[EMBEDS] for row in kept]),
            POOLED: join_rows([row[POOLED] for row in kept]),
            "timestep": torch.tensor(numbers["timestep"], dtype=torch.float32),
            "img_ids": self.model.ids(keep, height // PATCH, width // PATCH),
            "txt_ids": self.model.ids(keep, self.texts[EMBEDS].shape[1]),
        }
        if "guidance" in numbers:
            found["guidance"] = torch.tensor(numbers["guidance"], dtype=torch.float32)
        return [found]

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        ((packed,),) = results
        height, width = self.x.shape[2:]
        even = unpack(packed, height + height % PATCH, width + width % PATCH)
        return even[:, :, :height, :width].to(self.x.dtype)


class Flux1:
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "FLUX.1 (dev, schnell and their fine-tunes)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return (comfy.model_base.Flux,)

    def config_classes(self) -> tuple[type[Any], ...]:
        import comfy.supported_models as known

        return known.Flux, known.FluxInpaint, known.FluxSchnell

    def check_config(self, config: Any, label: str) -> None:
        """Refuse a FLUX.1 that reads an image besides the latents.

        Raises:
            Unsupported: Fill, Canny or Depth.
        """
        channels = config.unet_config.get("in_channels", LATENT_CHANNELS)
        if channels != LATENT_CHANNELS:
            raise Unsupported(
                f"{label}: its transformer reads {channels} channels instead of {LATENT_CHANNELS} (FLUX.1 Fill, Canny "
                "or Depth); XDiT runs FLUX.1 dev, schnell and their fine-tunes, use the stock loader for it"
            )

    def adapt(self, model: Any) -> ModelAdapter:
        params = model.diffusion_model.params
        return Flux1Model(params.vec_in_dim, params.guidance_embed)

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        from xditd.client.comfyui.families.flux1_text import stock_encoder

        return stock_encoder(tensors)

    def text_model(self, files: Mapping[str, RemoteWeights]) -> TextModel | None:
        from xditd.client.comfyui.families.flux1_text import text_model

        return text_model(files)


ADAPTER: Final[Adapter] = Flux1()


def pooled_of(y: torch.Tensor | None, like: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the pooled text state, cut to ``channels``, or zeros where there is none."""
    return like.new_zeros(like.shape[0], channels) if y is None else y[:, :channels]
