"""FLUX.2 (dev, klein, fine-tunes): ComfyUI's ``Flux`` as calls of diffusers' ``Flux2Transformer2DModel``.

ComfyUI pads texts of less than 512 tokens on the left, before the model is called, and the workers get them so.
References are tokens after those of the image; a reference's first coordinate tells it from the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.base import (
    BaseAdapter,
    BaseCall,
    BaseModelAdapter,
    KeptPositions,
    control_faults,
    text_of,
)
from xditd.client.comfyui.families.reference_places import METHODS, reference_places
from xditd.client.comfyui.families.rows import join_rows
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter

Size = tuple[int, int]
CHANNELS: Final = 128
ID_AXES: Final = 4
REFERENCE_STEP: Final = 10
"""Between the first coordinates of the image and its references."""
METHOD: Final = "index"
"""ComfyUI's name for how the model places references by itself."""

EMBEDS: Final = "encoder_hidden_states"

_MASK: Final = "an attention mask in the conditioning (Apply Style Model)"
_REFUSED: Final = {"attention_mask_img_shape": _MASK}
"""Keys of conditioning that change the model's input in a way that the workers cannot."""


class Flux2Model(BaseModelAdapter):
    """One FLUX.2 transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`.

    dev has guidance, klein does not.
    """

    variant: Final = "float32_time"
    """In half precision ComfyUI rounds neither the timestep before it is embedded, nor latents between steps."""
    multiple: Final = 1
    text_weight: Final = "txt_in.weight"
    loop_keys: Final = frozenset({
        "attention_mask", "cross_attn", "guidance", "pooled_output", "reference_latents"
    })  # fmt: skip
    loop_conds: Final = frozenset({"c_crossattn", "guidance", "ref_latents", "y"})
    """The loop places references as the model does by itself; with a method that is named, forwards are called."""

    takes_sigmas = True
    refused = _REFUSED

    def __init__(self, has_guidance: bool) -> None:
        self.has_guidance = has_guidance
        self._positions = KeptPositions()

    def read(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] | None = None,
        control: object | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Flux2Call:
        """Read a call of ComfyUI's ``Flux``: latents ``x`` (rows, 128, height/16, width/16), one sigma a row.

        Raises:
            BadRequest: no text embeddings.
        """
        texts = {EMBEDS: text_of(context)}
        faults = control_faults(control)
        references, method = tuple(ref_latents or ()), more.get("ref_latents_method") or METHOD
        if references:
            faults += self.method_faults(method)
        if more.get("attention_mask") is not None:
            faults.append(_MASK)
        return Flux2Call(
            model=self,
            x=x,
            numbers=self.numbers(timestep, x.shape[0], guidance),
            texts=texts,
            references=references,
            method=method,
            options=transformer_options or {},
            faults=faults,
        )

    def method_faults(self, method: str | None) -> Iterator[str]:
        if (method or METHOD) not in METHODS:
            yield f"reference latents by the method {method!r} (use one of {', '.join(METHODS)})"

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        scale = 1.0
        if self.has_guidance and "guidance" in conditions:
            scale = conditions["guidance"].cond.item()
        found: dict[str, Any] = {"prompt_embeds": conditions["c_crossattn"].cond}
        if "ref_latents" in conditions:
            found["reference_latents"] = [each[0] for each in conditions["ref_latents"].cond]
        return found, scale

    def text_ids(self, keep: Keep, tokens: int) -> Any:
        """Return the positions of a text of so many tokens, kept."""
        return self._positions.get(tokens, keep, lambda: _text_positions(tokens))

    def ids(self, keep: Keep, image: Size, references: Sequence[Size] = (), method: str = METHOD) -> Any:
        """Return the positions of an image and its references, kept; sizes are (rows, columns)."""
        return self._positions.get(
            (image, *references, method), keep, lambda: _all_positions(image, references, method)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Flux2Call(BaseCall):
    """One call of ComfyUI's ``Flux``; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`.

    ``references`` are (rows, 128, height/16, width/16) each, ``method`` is ComfyUI's name for where they are.
    """

    model: Flux2Model
    references: Sequence[torch.Tensor]
    method: str = METHOD

    def arguments(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep, dtype: torch.dtype
    ) -> list[Arguments]:
        """Return one forward for all rows: ComfyUI batches only texts of equal length."""
        images = [self.x[rows], *(each[rows] for each in self.references)]
        found = {
            "hidden_states": torch.cat([each.flatten(2).transpose(1, 2).to(dtype) for each in images], dim=1),
            EMBEDS: join_rows([row[EMBEDS] for row in kept]),
            "timestep": torch.tensor(numbers["timestep"], dtype=torch.float32),
            "img_ids": self.model.ids(keep, *self._sizes, self.method),
            "txt_ids": self.model.text_ids(keep, self.texts[EMBEDS].shape[1]),
        }
        if "guidance" in numbers:
            found["guidance"] = torch.tensor(numbers["guidance"], dtype=torch.float32)
        return [found]

    @property
    def _sizes(self) -> tuple[Size, list[Size]]:
        image, *references = ((each.shape[2], each.shape[3]) for each in (self.x, *self.references))
        return image, references

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        ((tokens,),) = results
        height, width = self.x.shape[2:]
        image: torch.Tensor = tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        return image.to(self.x.dtype)


class Flux2(BaseAdapter):
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "FLUX.2 (dev, klein and their fine-tunes)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return (comfy.model_base.Flux2,)

    def config_classes(self) -> tuple[type[Any], ...]:
        import comfy.supported_models as known

        return (known.Flux2,)

    def check_config(self, config: Any, label: str) -> None:
        """Refuse a relative that reads an image besides the latents.

        Raises:
            Unsupported: another number of channels.
        """
        channels = config.unet_config.get("in_channels", CHANNELS)
        if channels != CHANNELS:
            raise Unsupported(
                f"{label}: its transformer reads {channels} channels instead of {CHANNELS}; XDiT runs FLUX.2 dev, "
                "klein and their fine-tunes, use the stock loader for it"
            )

    def adapt(self, model: Any) -> ModelAdapter:
        return Flux2Model(model.diffusion_model.params.guidance_embed)


ADAPTER: Final[Adapter] = Flux2()


def _all_positions(image: Size, references: Sequence[Size], method: str) -> torch.Tensor:
    """Return the positions of an image and its references, (tokens, 4), float32."""
    places = [(0, 0, 0), *reference_places(method, image, references, REFERENCE_STEP)]
    return torch.cat([_positions(size, *place) for size, place in zip((image, *references), places, strict=True)])


def _positions(size: Size, first: int, top: int, left: int) -> torch.Tensor:
    rows, columns = size
    ids = torch.zeros(rows, columns, ID_AXES)
    ids[..., 0] = first
    ids[..., 1] += torch.arange(top, top + rows)[:, None]
    ids[..., 2] += torch.arange(left, left + columns)[None, :]
    return ids.reshape(-1, ID_AXES)


def _text_positions(tokens: int) -> torch.Tensor:
    ids = torch.zeros(tokens, ID_AXES)
    ids[:, 3] = torch.arange(tokens)
    return ids
