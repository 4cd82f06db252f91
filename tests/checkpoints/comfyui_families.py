"""For tests: tiny checkpoints of each family's variants for ComfyUI, and conditioning as its nodes make it.

ComfyUI reads some sizes from no file, and knows a family by its real width: see :func:`detect_small_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import flux2_models
import pytest
import qwen_image_models
import torch
import wan_models
import z_image_models

from xditd.client.demo import checkpoints
from xditd.gpu_workers.families.z_image.config import ZImageConfig

State = dict[str, torch.Tensor]
Conditioning = list[Any]

PREFIX = "model.diffusion_model."
Z_IMAGE = ZImageConfig(hidden=1152, layers=1, refiners=2, text_channels=64)
"""The smallest width for which ComfyUI's module and diffusers' class round the MLP's and time's widths equally."""
FLUX2_DEV, FLUX2_KLEIN = (
    replace(each, double_blocks=1, single_blocks=1) for each in (flux2_models.DEV, flux2_models.KLEIN)
)
_OF_WAN = {"text_channels": 4096}
"""ComfyUI reads neither these from the file, nor those of CLIP's vision model, 1280."""
WAN_TEXT, WAN_IMAGE, WAN_TI2V = (
    replace(each, **_OF_WAN) for each in (wan_models.TEXT, wan_models.IMAGE, wan_models.TI2V)
)
WAN_CLIP, WAN_TWO_IMAGES = (
    replace(each, image_channels=1280, **_OF_WAN) for each in (wan_models.CLIP_IMAGE, wan_models.TWO_IMAGES)
)
WAN_VACE = replace(wan_models.TWO_CONTROLS, **_OF_WAN)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model: ``make`` gives its checkpoint from a seed, in the names of ComfyUI's files."""

    make: Callable[[int], State]
    channels: int
    """Of latents."""
    size: tuple[int, ...] = (16, 16)
    """Of latents: frames, where the family has them, rows and columns."""
    odd: tuple[int, ...] = (15, 11)
    """A size that is no multiple of a token's."""
    text_channels: int
    tokens: int = 16
    extras: Callable[[int, tuple[int, ...]], dict[str, Any]] = lambda *_: {}
    """What a conditioning has beside its text, from a seed and the size of latents."""
    sampler: tuple[str, str] = ("dpmpp_2m", "sgm_uniform")
    """The second sampler, with its scheduler."""

    def text(self, seed: int, tokens: int = 0, size: tuple[int, ...] = (), **more: Any) -> Conditioning:
        """Make conditioning as text encoding and the nodes behind it do."""
        embeds = drawn(1, tokens or self.tokens, self.text_channels, seed=seed)
        return [[embeds, {"pooled_output": None, **self.extras(seed, size or self.size), **more}]]

    def latent(self, batch: int = 1, size: tuple[int, ...] = (), seed: int | None = None) -> dict[str, torch.Tensor]:
        """Make latents: empty, or drawn."""
        shape = (batch, self.channels, *(size or self.size))
        return {"samples": torch.zeros(shape) if seed is None else drawn(*shape, seed=seed)}

    def references(self, *sizes: tuple[int, int]) -> dict[str, Any]:
        """Return the part of a conditioning that ReferenceLatent makes, of images of these rows and columns."""
        frames = (1,) * (len(self.size) - 2)
        if not sizes:
            return {}
        return {"reference_latents": [drawn(1, self.channels, *frames, *size, seed=sum(size)) for size in sizes]}


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _flux1(seed: int, channels: int = 16, *, guidance: bool = True) -> State:
    state = checkpoints.flux1_state_dict(seed, guidance=guidance)
    if channels != 16:
        state["img_in.weight"] = drawn(256, 4 * channels) / (4 * channels) ** 0.5
    return state


def _of_flux1(seed: int, size: tuple[int, ...], *, image: bool = False, mask: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {"pooled_output": drawn(1, 768, seed=seed), "guidance": 3.0}
    if image:
        found["concat_latent_image"] = drawn(1, 16, *size, seed=3)
    if mask:
        pixels = torch.rand(1, 1, *(8 * side for side in size), generator=torch.Generator().manual_seed(4))
        found["concat_mask"] = (pixels > 0.5).float()
    return found


def _of_first_image(seed: int, size: tuple[int, ...], *, clip: bool = False) -> dict[str, Any]:
    """As WanImageToVideo makes it: the first frame's latents, those of grey, and a mask."""
    mask = torch.ones(1, 1, *size)
    mask[:, :, :1] = 0.0
    found: dict[str, Any] = {"concat_latent_image": drawn(1, 16, *size, seed=3), "concat_mask": mask}
    if clip:
        seen = drawn(1, 257, 1280, seed=4)
        found["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=seen)
    return found


def _of_two_images(seed: int, size: tuple[int, ...]) -> dict[str, Any]:
    """As WanFirstLastFrameToVideo makes it: a mask for each frame of pixels, and what is seen of both images."""
    mask = torch.ones(1, 4, *size)
    mask[:, :, :1] = mask[:, -1:, -1:] = 0.0
    seen = SimpleNamespace(penultimate_hidden_states=drawn(1, 514, 1280, seed=4))
    return {"concat_latent_image": drawn(1, 16, *size, seed=3), "concat_mask": mask, "clip_vision_output": seen}


def of_vace(size: tuple[int, ...], strength: float = 1.0) -> dict[str, Any]:
    """As WanVaceToVideo makes it, of latents of a whole number of tokens."""
    sides = tuple(side + -side % patch for side, patch in zip(size, (1, 2, 2), strict=True))
    mask = (drawn(1, 64, *sides, seed=6) > 0).float()
    return {"vace_frames": [drawn(1, 32, *sides, seed=5)], "vace_mask": [mask], "vace_strength": [strength]}


def _of_vace(_seed: int, size: tuple[int, ...]) -> dict[str, Any]:
    return of_vace(size, 0.7)


def _of_z_image(_seed: int, _size: tuple[int, ...]) -> dict[str, Any]:
    return {"attention_mask": torch.ones(1, 16)}


_WAN: Mapping[str, Any] = {
    "channels": 16, "size": (2, 4, 6), "odd": (1, 5, 7), "text_channels": 4096, "sampler": ("uni_pc", "simple"),
}  # fmt: skip
_QWEN: Mapping[str, Any] = {"channels": 16, "size": (1, 16, 16), "odd": (1, 15, 11), "text_channels": 96}
_FLUX2: Mapping[str, Any] = {"channels": 128, "size": (8, 8), "odd": (5, 7), "text_channels": 96}
_FLUX1: Mapping[str, Any] = {"channels": 16, "text_channels": 4096}


def _of_flux2(_seed: int, _size: tuple[int, ...]) -> dict[str, Any]:
    return {"guidance": 3.0}


VARIANTS: Mapping[str, Variant] = {
    "flux1_dev": Variant(make=_flux1, extras=_of_flux1, **_FLUX1),
    "flux1_schnell": Variant(make=partial(_flux1, guidance=False), extras=_of_flux1, **_FLUX1),
    "flux1_depth": Variant(make=partial(_flux1, channels=32), extras=partial(_of_flux1, image=True), **_FLUX1),
    "flux1_fill": Variant(
        make=partial(_flux1, channels=96), extras=partial(_of_flux1, image=True, mask=True), **_FLUX1
    ),
    "flux2_dev": Variant(
        make=partial(flux2_models.state_dict, config=FLUX2_DEV, prefix=PREFIX), extras=_of_flux2, **_FLUX2
    ),
    "flux2_klein": Variant(make=partial(flux2_models.state_dict, config=FLUX2_KLEIN, prefix=PREFIX), **_FLUX2),
    "qwen_image": Variant(make=partial(qwen_image_models.state_dict, prefix=PREFIX), **_QWEN),
    "qwen_image_edit_2511": Variant(
        make=partial(qwen_image_models.state_dict, config=qwen_image_models.EDIT_2511, prefix=PREFIX), **_QWEN
    ),
    "wan_text": Variant(make=partial(wan_models.state_dict, config=WAN_TEXT, prefix=PREFIX), **_WAN),
    "wan22_image": Variant(
        make=partial(wan_models.state_dict, config=WAN_IMAGE, prefix=PREFIX), extras=_of_first_image, **_WAN
    ),
    "wan21_image": Variant(
        make=partial(wan_models.state_dict, config=WAN_CLIP, prefix=PREFIX),
        extras=partial(_of_first_image, clip=True),
        **_WAN | {"tokens": 512},
    ),
    "wan21_two_images": Variant(
        make=partial(wan_models.state_dict, config=WAN_TWO_IMAGES, prefix=PREFIX),
        extras=_of_two_images,
        **_WAN | {"tokens": 512},
    ),
    "wan_vace": Variant(make=partial(wan_models.state_dict, config=WAN_VACE, prefix=PREFIX), extras=_of_vace, **_WAN),
    "wan22_ti2v": Variant(
        make=partial(wan_models.state_dict, config=WAN_TI2V, prefix=PREFIX), **_WAN | {"channels": 48}
    ),
    "z_image": Variant(
        make=partial(z_image_models.state_dict, config=Z_IMAGE, names=z_image_models.COMFYUI, prefix=PREFIX),
        channels=16,
        text_channels=Z_IMAGE.text_channels,
        extras=_of_z_image,
        sampler=("res_multistep", "simple"),
    ),
}


def detect_small_models(patch: pytest.MonkeyPatch) -> None:
    """Let ComfyUI build Qwen-Image and Z-Image in the sizes of a tiny file."""
    import comfy.model_detection as detection
    import comfy.supported_models as known

    detect = detection.detect_unet_config

    def as_small(state: Mapping[str, torch.Tensor], prefix: str, *given: Any, **more: Any) -> Any:
        mark = f"{prefix}cap_embedder.1.weight"
        if mark in state and state[mark].shape[0] == Z_IMAGE.hidden:
            wide = {**state, mark: torch.empty(3840, state[mark].shape[1], device="meta")}
            sizes = {"dim": Z_IMAGE.hidden, "n_heads": Z_IMAGE.heads, "n_kv_heads": Z_IMAGE.heads}
            return detect(wide, prefix, *given, **more) | sizes
        found = detect(state, prefix, *given, **more)
        if found is not None and found.get("image_model") == "qwen_image":
            heads = state[f"{prefix}img_in.weight"].shape[0] // 128
            return found | {
                "num_attention_heads": heads,
                "joint_attention_dim": state[f"{prefix}txt_in.weight"].shape[1],
            }
        return found

    patch.setattr(detection, "detect_unet_config", as_small)
    patch.setattr(known.ZImage, "unet_config", known.ZImage.unet_config | {"dim": Z_IMAGE.hidden})
