"""Z-Image (Turbo, Base, fine-tunes): ComfyUI's ``NextDiT`` as calls of diffusers' ``ZImageTransformer2DModel``.

ComfyUI negates the transformer's prediction; diffusers' class takes ``t = 1 - sigma``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.base import BaseAdapter, BaseCall, BaseModelAdapter, control_faults, text_of
from xditd.client.comfyui.families.rows import pad_to_patch
from xditd.client.comfyui.unsupported import is_empty
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter

PATCH: Final = 2
"""Width and height of a token in latents."""

TEXT: Final = "cap_feats"

_REFUSED: Final = {
    "reference_latents": "reference latents (Z-Image Omni and Edit)",
    "reference_latents_text_embeds": "texts of reference latents (Z-Image Omni and Edit)",
}
"""Keys of conditioning that change the model's input in a way that the workers cannot."""


class ZImageModel(BaseModelAdapter):
    """One Z-Image transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`."""

    variant: Final = "comfyui"
    multiple: Final = PATCH
    text_weight: Final = "cap_embedder.1.weight"
    # ComfyUI's module ignores the mask and the number of tokens; only related models read a pooled state.
    loop_keys: Final = frozenset({"cross_attn", "attention_mask", "pooled_output"})
    loop_conds: Final = frozenset({"c_crossattn", "attention_mask", "num_tokens", "clip_text_pooled"})

    refused = _REFUSED

    def read(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None,
        num_tokens: int | None = None,
        attention_mask: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] = (),
        ref_contexts: Sequence[torch.Tensor] = (),
        control: object | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> ZImageCall:
        """Read a call of ComfyUI's ``NextDiT``: latents ``x`` (rows, 16, height/8, width/8), one sigma a row.

        Raises:
            BadRequest: no text embeddings.
        """
        texts = {TEXT: text_of(context)}
        faults = control_faults(control)
        faults += [
            _REFUSED[key]
            for key, given in (("reference_latents", ref_latents), ("reference_latents_text_embeds", ref_contexts))
            if not is_empty(given)
        ]
        numbers = {"sigma": timesteps.reshape(-1).expand(x.shape[0])}
        return ZImageCall(x=x, numbers=numbers, texts=texts, options=transformer_options or {}, faults=faults)

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        return {TEXT: keep(texts[TEXT][0].to(dtype))}

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        embeds = conditions["c_crossattn"].cond
        return {"prompt_embeds": [embeds[row % len(embeds)] for row in range(rows)]}, 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class ZImageCall(BaseCall):
    """One call of ComfyUI's ``NextDiT``; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`."""

    def arguments(
        self,
        rows: slice,
        numbers: Mapping[str, list[float]],
        kept: Sequence[Kept],
        keep: Keep,
        dtype: torch.dtype,
    ) -> list[Arguments]:
        """Return one forward for all rows: ComfyUI batches only texts of equal length."""
        latents = pad_to_patch(self.x[rows], PATCH).to(dtype)
        return [
            {
                "x": list(latents.unsqueeze(2).unbind()),
                "t": 1.0 - torch.tensor(numbers["sigma"], dtype=torch.float32),
                TEXT: [row[TEXT] for row in kept],
            }
        ]

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        ((predicted,),) = results
        height, width = self.x.shape[2:]
        return -torch.stack(predicted).squeeze(2)[:, :, :height, :width].to(self.x.dtype)


class ZImage(BaseAdapter):
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "Z-Image (Turbo, Base and their fine-tunes)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return (comfy.model_base.Lumina2,)

    def config_classes(self) -> tuple[type, ...]:
        import comfy.supported_models

        return (comfy.supported_models.ZImage,)

    def check_config(self, config: Any, label: str) -> None:
        """Refuse related models that ComfyUI runs with the same class.

        Raises:
            Unsupported: Lumina 2, Z-Image Omni or Edit, or a model without padding tokens.
        """
        read = config.unet_config
        found = None
        if not read.get("z_image_modulation"):
            found = "it is Lumina 2 or a related model"
        elif read.get("siglip_feat_dim") is not None:
            found = "it reads images besides the text (Z-Image Omni or Edit)"
        elif read.get("pad_tokens_multiple") is None:
            found = "it has no padding tokens"
        if found is not None:
            raise Unsupported(
                f"{label}: {found}; XDiT runs Z-Image Turbo, Base and their fine-tunes, use the stock loader for it"
            )

    def adapt(self, model: Any) -> ModelAdapter:
        return ZImageModel()


ADAPTER: Final[Adapter] = ZImage()
