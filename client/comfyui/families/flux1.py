"""FLUX.1 (dev, schnell, Kontext, Fill, Canny, Depth): ComfyUI's ``Flux`` as calls of ``FluxTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, ControlSource, Keep, Kept
from xditd.client.comfyui.families.base import (
    BaseAdapter,
    BaseCall,
    BaseModelAdapter,
    KeptPositions,
    text_of,
)
from xditd.client.comfyui.families.flux1_controlnets import KeptPictures, UsedControl, control_source, read_controls
from xditd.client.comfyui.families.reference_places import METHODS, reference_places
from xditd.client.comfyui.families.rows import join_rows, pad_to_patch
from xditd.client.families.flux1 import PATCH, Place, image_positions, pack, text_positions, unpack
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter
    from xditd.client.jobs.controls import CallControl

LATENT_CHANNELS: Final = 16
KNOWN_CHANNELS: Final = frozenset({LATENT_CHANNELS, 32, 96})
"""Of the inputs: Canny and Depth have the latents of an image beside their own, Fill also the pixels of a mask."""
"""Where the tokens of reference latents are; ComfyUI's other one modulates them apart."""

EMBEDS: Final = "encoder_hidden_states"
POOLED: Final = "pooled_projections"

_MASK: Final = "an attention mask in the conditioning (Apply Style Model)"
_REFUSED: Final = {"attention_mask_img_shape": _MASK}
"""Keys of conditioning that change the model's input in a way that the workers cannot."""


class Flux1Model(BaseModelAdapter):
    """One FLUX.1 transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`.

    ``pooled_channels`` is the width of the pooled text state; dev has guidance, schnell does not.
    """

    variant: Final = "float32_time"
    """In half precision ComfyUI rounds neither the timestep before it is embedded, nor latents between steps."""
    multiple: Final = PATCH
    text_weight: Final = "txt_in.weight"
    loop_keys: Final = frozenset({"cross_attn", "guidance", "pooled_output"})
    loop_conds: Final = frozenset({"c_crossattn", "guidance", "y"})

    takes_sigmas = True
    refused = _REFUSED

    def __init__(
        self,
        pooled_channels: int,
        has_guidance: bool,
        reference_method: str = "offset",
        *,
        hidden: int = 0,
        blocks: tuple[int, int] = (0, 0),
    ) -> None:
        """``hidden`` and ``blocks`` (double, single) are what residuals of ControlNets are for."""
        self._hidden = hidden
        self._blocks = blocks
        self.pictures = KeptPictures()
        self._pooled_channels = pooled_channels
        self.has_guidance = has_guidance
        self._reference_method = reference_method
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
    ) -> Flux1Call:
        """Read a call of ComfyUI's ``Flux``: latents ``x`` (rows, 16, height/8, width/8), one sigma a row.

        Fill, Canny and Depth have 96 and 32 channels. ``ref_latents`` are (rows, 16, any, any).

        Raises:
            BadRequest: no text embeddings.
        """
        context = text_of(context)
        faults: list[str] = []
        used = read_controls(control, self._blocks, faults)
        references = References(tuple(ref_latents or ()), more.get("ref_latents_method", self._reference_method))
        if references.latents:
            faults += self.method_faults(references.method)
        if more.get("attention_mask") is not None:
            faults.append(_MASK)
        numbers = self.numbers(timestep, x.shape[0], guidance)
        texts = {EMBEDS: context, POOLED: pooled_of(y, context, self._pooled_channels)}
        for each in used:
            numbers |= each.numbers(x.shape[0])
            texts |= each.texts(self._pooled_channels)
        return Flux1Call(
            model=self,
            x=x,
            numbers=numbers,
            texts=texts,
            references=references,
            used=used,
            options=transformer_options or {},
            faults=faults,
        )

    def control_source(self, control: Any) -> ControlSource | str:
        return control_source(control, self._hidden)

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        own = {name: texts[name].to(dtype) for name in (EMBEDS, POOLED)}
        kept = {name: keep(tensor) for name, tensor in own.items()}
        for name, tensor in texts.items():
            if name not in kept:  # of a ControlNet, in its own dtype; mostly the same text
                same = [each for each in own if own[each].dtype == tensor.dtype and torch.equal(own[each], tensor)]
                kept[name] = kept[same[0]] if same else keep(tensor)
        return kept

    def method_faults(self, method: str | None) -> Iterator[str]:
        if (method or self._reference_method) not in METHODS:
            yield f"reference latents by the method {method!r}"

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        embeds = conditions["c_crossattn"].cond
        pooled = pooled_of(conditions["y"].cond if "y" in conditions else None, embeds, self._pooled_channels)
        scale = conditions["guidance"].cond.item() if "guidance" in conditions else 1.0
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, scale

    def ids(self, keep: Keep, *places: Place) -> Any:
        """Return the positions of the tokens of images, kept; those of a text of so many tokens: :meth:`text_ids`."""
        return self._positions.get(places, keep, lambda: torch.cat([image_positions(*each) for each in places]))

    def text_ids(self, keep: Keep, tokens: int) -> Any:
        return self._positions.get(tokens, keep, lambda: text_positions(tokens))


@dataclass(frozen=True, eq=False)
class References:
    """Images that the model sees as further tokens, each (rows, 16, height, width), and where these are."""

    latents: tuple[torch.Tensor, ...]
    method: str

    def places(self, image: Place) -> Iterator[Place]:
        """Yield where the tokens of each are, beside an ``image``."""
        sizes = [(each.shape[2], each.shape[3]) for each in self.latents]
        found = reference_places(self.method, (image.rows * PATCH, image.columns * PATCH), sizes, 1)
        for (height, width), (first, top, left) in zip(sizes, found, strict=True):
            yield Place(_tokens(height), _tokens(width), first, _tokens(top), _tokens(left))


@dataclass(frozen=True, eq=False, kw_only=True)
class Flux1Call(BaseCall):
    """One call of ComfyUI's ``Flux``; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`."""

    model: Flux1Model
    references: References
    used: Sequence[UsedControl] = ()

    def arguments(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep, dtype: torch.dtype
    ) -> list[Arguments]:
        """Return one forward for all rows: ComfyUI batches only texts of equal length."""
        image = self._image
        tokens = [pack(pad_to_patch(each[rows], PATCH).to(dtype)) for each in (self.x, *self.references.latents)]
        found = {
            "hidden_states": tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1),
            EMBEDS: join_rows([row[EMBEDS] for row in kept]),
            POOLED: join_rows([row[POOLED] for row in kept]),
            "timestep": torch.tensor(numbers["timestep"], dtype=torch.float32),
            "img_ids": self.model.ids(keep, image, *self.references.places(image)),
            "txt_ids": self.model.text_ids(keep, self.texts[EMBEDS].shape[1]),
        }
        if "guidance" in numbers:
            found["guidance"] = torch.tensor(numbers["guidance"], dtype=torch.float32)
        return [found]

    def controls(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep
    ) -> list[list[CallControl]]:
        """Return those of the one forward."""
        image, model = self._image, self.model

        def ids(tokens: int) -> tuple[Any, Any]:
            return model.ids(keep, image), model.text_ids(keep, tokens)

        found = [each.call_control(rows, numbers, kept, model.pictures, keep, ids) for each in self.used]
        return [found] if found else []

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        ((packed,),) = results
        (height, width), image = self.x.shape[2:], self._image
        even = unpack(packed[:, : image.rows * image.columns], image.rows * PATCH, image.columns * PATCH)
        return even[:, :, :height, :width].to(self.x.dtype)

    @property
    def _image(self) -> Place:
        height, width = self.x.shape[2:]
        return Place(_tokens(height), _tokens(width))


class Flux1(BaseAdapter):
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "FLUX.1 (dev, schnell, Kontext, Fill, Canny, Depth and their fine-tunes)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return (comfy.model_base.Flux,)

    def config_classes(self) -> tuple[type[Any], ...]:
        import comfy.supported_models as known

        return known.Flux, known.FluxInpaint, known.FluxSchnell

    def check_config(self, config: Any, label: str) -> None:
        """Refuse a FLUX.1 with another number of input channels than the released ones have.

        Raises:
            Unsupported: names the number.
        """
        channels = config.unet_config.get("in_channels", LATENT_CHANNELS)
        if channels not in KNOWN_CHANNELS:
            raise Unsupported(
                f"{label}: its transformer reads {channels} channels; XDiT runs FLUX.1 with {LATENT_CHANNELS} (dev, "
                "schnell, Kontext), 32 (Canny, Depth) and 96 (Fill), use the stock loader for it"
            )

    def adapt(self, model: Any) -> ModelAdapter:
        params = model.diffusion_model.params
        return Flux1Model(
            params.vec_in_dim,
            params.guidance_embed,
            params.default_ref_method,
            hidden=params.hidden_size,
            blocks=(params.depth, params.depth_single_blocks),
        )


ADAPTER: Final[Adapter] = Flux1()


def _tokens(latents: int) -> int:
    """Return how many tokens so many latents on a side are, of which the last may be padded."""
    return (latents + PATCH // 2) // PATCH


def pooled_of(y: torch.Tensor | None, like: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the pooled text state, cut to ``channels``, or zeros where there is none."""
    return like.new_zeros(like.shape[0], channels) if y is None else y[:, :channels]
