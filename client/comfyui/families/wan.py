"""Wan 2.1 and 2.2 A14B (text and first image): ComfyUI's ``WanModel`` as calls of diffusers' ``WanTransformer3DModel``.

Both take 1000 times sigma, and both predict the velocity. A first image is in channels of ``x``, which ComfyUI joins;
of Wan 2.1, CLIP's vision model sees it, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from xditd.client.comfyui.families.adapter import Arguments, Keep, Kept
from xditd.client.comfyui.families.rows import join_rows
from xditd.client.comfyui.unsupported import is_empty
from xditd.ipc.errors import BadRequest, Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter, StockEncoder, TextModel
    from xditd.client.comfyui.weights import RemoteWeights

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


@dataclass(frozen=True)
class WanModel:
    """One Wan transformer; see :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`."""

    has_image: bool = False
    """Whether it reads what CLIP's vision model sees."""
    wrapper: str = "diffusion_model"
    variant: str = "comfyui"
    multiple: int = PATCH[1]
    # The workers' loop has the schedulers of diffusers' pipeline alone: ComfyUI's own loop runs.
    loop_keys: frozenset[str] = frozenset()
    loop_conds: frozenset[str] = frozenset()

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

        Raises:
            BadRequest: no text embeddings.
        """
        if context is None:
            raise BadRequest("XDiT: the conditioning has no text embeddings; connect CLIP Text Encode")
        options = transformer_options or {}
        faults = [] if is_empty(time_dim_concat) else [_REFUSED["time_dim_concat"]]
        faults += [f"{name} of the conditioning" for name, given in more.items() if not is_empty(given)]
        if options.get("rope_options"):
            faults.append("scaled or shifted positions (rope_options)")
        if timestep.numel() not in (1, x.shape[0]):
            faults.append("a time for each frame")
        texts = {TEXT: context}
        if self.has_image:
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
        rows = x.shape[0]
        texts = {name: each.expand(rows, *each.shape[1:]) for name, each in texts.items()}
        return WanCall(x, {"timestep": timestep.reshape(-1).expand(rows)}, texts, options, faults)

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        return {name: keep(each.to(dtype)) for name, each in texts.items()}

    def schedule_values(self, sigmas: Sequence[float]) -> Mapping[str, list[float]]:
        return {}

    def condition_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        yield from (what for key, what in _REFUSED.items() if not is_empty(part.get(key)))

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        raise Unsupported("XDiT: videos are sampled by ComfyUI's own loop; use a KSampler")


@dataclass(frozen=True, eq=False)
class WanCall:
    """One call of ComfyUI's ``WanModel``; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`."""

    x: torch.Tensor
    numbers: Mapping[str, torch.Tensor]
    texts: Mapping[str, torch.Tensor]
    options: Mapping[str, Any]
    faults: Sequence[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return int(self.x.shape[0])

    def arguments(
        self,
        rows: slice,
        numbers: Mapping[str, list[float]],
        kept: Sequence[Kept],
        keep: Keep,
        dtype: torch.dtype,
    ) -> list[Arguments]:
        """Return one forward for all rows: ComfyUI batches only texts of equal length."""
        return [
            {
                "hidden_states": _padded(self.x[rows]).to(dtype),
                "timestep": torch.tensor(numbers["timestep"], dtype=torch.float32),
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


class Wan:
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "Wan 2.1 and 2.2 A14B (text and first image)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return (comfy.model_base.WAN21,)

    def config_classes(self) -> tuple[type, ...]:
        import comfy.supported_models

        return (comfy.supported_models.WAN21_T2V, comfy.supported_models.WAN21_I2V)

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
        elif (read.get("in_dim"), read.get("out_dim")) not in ((16, 16), (36, 16)):
            found = f"it has {read.get('in_dim')} channels, to {read.get('out_dim')}"
        if found is not None:
            raise Unsupported(
                f"{label}: {found}; XDiT runs Wan 2.1 and 2.2 A14B for text and a first image, use the stock loader"
            )

    def adapt(self, model: Any) -> ModelAdapter:
        return WanModel(has_image=model.diffusion_model.img_emb is not None)

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        return None

    def text_model(self, files: Mapping[str, RemoteWeights]) -> TextModel | None:
        return None


ADAPTER: Final[Adapter] = Wan()
