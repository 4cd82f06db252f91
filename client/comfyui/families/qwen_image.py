"""Qwen-Image: ComfyUI's ``QwenImageTransformer2DModel`` as calls of diffusers' class of that name.

ComfyUI's latents have a dimension of frames, of which there is one. References are tokens after those of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.base import BaseAdapter, BaseCall, BaseModelAdapter, control_faults, text_of
from xditd.client.comfyui.families.rows import join_rows, pack_patches, pad_to_patch, unpack_patches
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter

PATCH: Final = 2
"""Width and height of a token in latents."""

EMBEDS: Final = "encoder_hidden_states"
MASK: Final = "encoder_hidden_states_mask"

_WEIGHTED_MASK: Final = "an attention mask of weights"
_LAYERED: Final = "conditioning of time (Qwen-Image-Layered)"


class QwenImageModel(BaseModelAdapter):
    """One Qwen-Image transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`.

    ``method`` is ComfyUI's name for how its references are placed and modulated; the workers have no other.
    """

    variant: Final = "comfyui"
    multiple: Final = PATCH
    has_frame_axis = True
    text_weight: Final = "txt_in.weight"
    loop_keys: Final = frozenset({
        "attention_mask", "cross_attn", "pooled_output", "reference_latents", "reference_latents_method"
    })  # fmt: skip
    loop_conds: Final = frozenset({"attention_mask", "c_crossattn", "ref_latents", "ref_latents_method"})

    takes_sigmas = True

    def __init__(self, method: str) -> None:
        self._method = method

    def read(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] | None = None,
        additional_t_cond: object | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        control: object | None = None,
        **more: Any,
    ) -> QwenImageCall:
        """Read a call of ComfyUI's module: latents ``x`` (rows, 16, 1, height/8, width/8), one sigma a row.

        Raises:
            BadRequest: no text embeddings.
        """
        texts = {EMBEDS: text_of(context)}
        references = tuple(ref_latents or ())
        faults = control_faults(control)
        faults += [_LAYERED] if additional_t_cond is not None else []
        faults += self.method_faults(more.get("ref_latents_method")) if references else ()
        if any(each.ndim != 5 or each.shape[2] != 1 for each in (x, *references)):
            faults.append("latents of several frames")
        if attention_mask is not None:
            if attention_mask.is_floating_point():
                faults.append(_WEIGHTED_MASK)
            texts[MASK] = (attention_mask != 0).expand(texts[EMBEDS].shape[0], -1)
        return QwenImageCall(
            x=x,
            numbers=self.numbers(timestep, x.shape[0]),
            texts=texts,
            references=references,
            options=transformer_options or {},
            faults=faults,
        )

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        found = {"prompt_embeds": conditions["c_crossattn"].cond}
        if "attention_mask" in conditions:
            found["prompt_embeds_mask"] = (conditions["attention_mask"].cond != 0).float()
        if "ref_latents" in conditions:
            references = conditions["ref_latents"].cond
            found["reference_latents"] = [pad_to_patch(each[:, :, 0], PATCH)[0] for each in references]
        return found, 1.0

    def loop_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        mask, references = part.get("attention_mask"), part.get("reference_latents") or ()
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            yield _WEIGHTED_MASK
        if any(each.shape[0] != 1 for each in references):
            yield "references that differ from image to image"
        if any(each.ndim != 5 or each.shape[2] != 1 for each in references):
            yield "references of several frames"

    def method_faults(self, method: str | None) -> Iterator[str]:
        if method not in (None, self._method):
            yield f"reference latents by the method {method!r} (this model's is {self._method!r})"


@dataclass(frozen=True, eq=False, kw_only=True)
class QwenImageCall(BaseCall):
    """One call of ComfyUI's module; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`.

    ``references`` are (rows, 16, 1, height/8, width/8) each.
    """

    references: Sequence[torch.Tensor]

    def arguments(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep, dtype: torch.dtype
    ) -> list[Arguments]:
        """Return one forward for all rows: ComfyUI batches only texts of equal length."""
        images = [pad_to_patch(each[rows, :, 0], PATCH) for each in (self.x, *self.references)]
        sizes = [(1, each.shape[2] // PATCH, each.shape[3] // PATCH) for each in images]
        found: Arguments = {
            "hidden_states": torch.cat([pack_patches(each.to(dtype), PATCH) for each in images], dim=1),
            EMBEDS: join_rows([row[EMBEDS] for row in kept]),
            "timestep": torch.tensor(numbers["timestep"], dtype=torch.float32),
            "img_shapes": [sizes] * len(images[0]),
        }
        if MASK in self.texts:
            found[MASK] = join_rows([row[MASK] for row in kept])
        return [found]

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        ((tokens,),) = results
        height, width = self.x.shape[3:]
        high, wide = (side + side % PATCH for side in (height, width))
        image = unpack_patches(tokens[:, : high * wide // PATCH**2], high, wide, PATCH)
        return image[:, :, None, :height, :width].to(self.x.dtype)


class QwenImage(BaseAdapter):
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "Qwen-Image (2512, Edit and their fine-tunes)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return (comfy.model_base.QwenImage,)

    def config_classes(self) -> tuple[type[Any], ...]:
        import comfy.supported_models as known

        return (known.QwenImage,)

    def check_config(self, config: Any, label: str) -> None:
        """Refuse a related model that ComfyUI runs with the same class.

        Raises:
            Unsupported: Qwen-Image-Layered.
        """
        if config.unet_config.get("use_additional_t_cond"):
            raise Unsupported(
                f"{label}: it is Qwen-Image-Layered; XDiT runs Qwen-Image, Edit and their fine-tunes, use the stock "
                "loader for it"
            )

    def adapt(self, model: Any) -> ModelAdapter:
        return QwenImageModel(model.diffusion_model.default_ref_method)


ADAPTER: Final[Adapter] = QwenImage()
