"""The variants of the registered families, in the sizes of the released models, and the layouts of their files.

A test matches each layout with the registry, by names and shapes alone: what the page of models says is what is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import text_checkpoints

from xditd.gpu_workers.families.clip_l import ClipLConfig
from xditd.gpu_workers.families.flux1.config import CONTROL_CHANNELS, FILL_CHANNELS, Flux1Config
from xditd.gpu_workers.families.flux1.controlnet_config import Flux1ControlNetConfig
from xditd.gpu_workers.families.flux2.config import Flux2Config
from xditd.gpu_workers.families.flux2_vae.config import Flux2VaeConfig
from xditd.gpu_workers.families.flux_vae.config import FluxVaeConfig
from xditd.gpu_workers.families.language_models.config import LanguageModelConfig
from xditd.gpu_workers.families.qwen2_5_vl.config import Qwen25VlConfig, VisionConfig
from xditd.gpu_workers.families.qwen_image.config import QwenImageConfig
from xditd.gpu_workers.families.t5 import T5Config
from xditd.gpu_workers.families.wan.config import WanConfig, WanVaceConfig
from xditd.gpu_workers.families.wan_vae.config import WanVaeConfig
from xditd.gpu_workers.families.z_image.config import ZImageConfig
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.registry import own_families

ORIGINAL: Final = "original, ComfyUI"
COMFYUI: Final = "ComfyUI"
DIFFUSERS: Final = "diffusers"
TRANSFORMERS: Final = "transformers, ComfyUI"
WAN: Final = "Wan's own"

Tensors = dict[str, TensorInfo]


@dataclass(frozen=True)
class FamilyEntry:
    """A variant: its name, its configuration, and its layouts with what makes a file have them.

    A layout is a configuration, where that says it, or names that are only found in it. ``vae`` is the name of the
    VAE's family, ``encoders`` the variants that encode its texts, each with how many of its layers' states are joined.
    Files in the layouts ``by_class`` have the names of the class's parameters; ``renamed`` are those that the family
    does not list, each with what makes its names.
    """

    family: str
    variant: str
    config: Any
    layouts: Mapping[str, Any] = field(default_factory=lambda: {ORIGINAL: ()})
    vae: str = ""
    encoders: tuple[tuple[str, int], ...] = ()
    by_class: tuple[str, ...] = ()
    renamed: Mapping[str, Callable[[Any], Tensors]] = field(default_factory=dict)

    def tensors(self, layout: str) -> tuple[Any, Tensors]:
        """Return the configuration of a file in this layout, and its tensors without bytes."""
        given = self.layouts[layout]
        config, names = (self.config, given) if isinstance(given, tuple) else (given, ())
        (family,) = (each for each in own_families() if each.name == self.family)
        entries = family.entries(config, names)
        if layout in self.by_class:
            return config, {each.targets[0][0]: TensorInfo("bfloat16", each.shape) for each in entries}
        found = {each.source: TensorInfo("bfloat16", each.shape) for each in entries}
        return config, self.renamed[layout](found) if layout in self.renamed else found


def _flux1(variant: str, **changes: Any) -> FamilyEntry:
    config = Flux1Config(3072, 19, 38, context_channels=4096, pooled_channels=768, has_guidance=True)
    encoders = (("T5 v1.1 XXL", 1), ("CLIP-L", 1))
    config = replace(config, **changes)
    layouts = {ORIGINAL: config, DIFFUSERS: replace(config, is_original=False)}
    return FamilyEntry("flux1", variant, config, layouts, "flux_vae", encoders)


def _controlnet(variant: str, double: int, single: int, modes: int = 0) -> FamilyEntry:
    config = Flux1ControlNetConfig(3072, double, single, 4096, 768, has_guidance=True, modes=modes)
    layouts = {DIFFUSERS: config, COMFYUI: replace(config, is_original=True)}
    return FamilyEntry("flux1_controlnet", variant, config, layouts)


def _flux2(variant: str, config: Flux2Config, encoder: str) -> FamilyEntry:
    layouts = {ORIGINAL: config, DIFFUSERS: replace(config, is_original=False)}
    return FamilyEntry("flux2", variant, config, layouts, "flux2_vae", ((encoder, 3),))


def _wan(variant: str, hidden: int, blocks: int, ffn: int, **more: Any) -> FamilyEntry:
    is_vace = "control_blocks" in more
    config = (WanVaceConfig if is_vace else WanConfig)(hidden, blocks, ffn, **more)
    layouts = {ORIGINAL: config, DIFFUSERS: replace(config, is_original=False)}
    return FamilyEntry("wan_vace" if is_vace else "wan", variant, config, layouts, "wan_vae", (("UMT5-XXL", 1),))


def _qwen_image(variant: str, layouts: Mapping[str, Any], *, has_marker: bool = False) -> FamilyEntry:
    config = QwenImageConfig(3072, 60, 3584, has_marker=has_marker)
    return FamilyEntry("qwen_image", variant, config, layouts, "wan_vae", (("Qwen2.5-VL 7B", 1),))


def _language_model(family: str, variant: str, *sizes: int, epsilon: float, rope_theta: float) -> FamilyEntry:
    config = LanguageModelConfig(*sizes, has_head_norms=family == "qwen3", rope_theta=rope_theta, epsilon=epsilon)
    return FamilyEntry(family, variant, config, {TRANSFORMERS: ()})


def _vaes() -> tuple[FamilyEntry, ...]:
    widths = (128, 256, 512, 512)
    flux2 = Flux2VaeConfig(widths, widths, residuals=2, has_quant_conv=True)
    by_names = {ORIGINAL: ("decoder.middle.0.residual.0.gamma",), DIFFUSERS: ()}
    flux = FluxVaeConfig(widths, 2, has_mid_attention=True, has_encoder=True)
    return (
        FamilyEntry(
            "flux_vae",
            "FLUX.1, Z-Image",
            flux,
            {ORIGINAL: flux, DIFFUSERS: replace(flux, has_linear_attention=True)},
            by_class=(DIFFUSERS,),
        ),
        FamilyEntry(
            "flux2_vae",
            "FLUX.2",
            flux2,
            {ORIGINAL: flux2, DIFFUSERS: replace(flux2, has_linear_attention=True)},
            by_class=(DIFFUSERS,),
        ),
        FamilyEntry("wan_vae", "Wan 2.1, Qwen-Image", WanVaeConfig(96), by_names),
        FamilyEntry("wan_vae", "Wan 2.2 TI2V", WanVaeConfig(256, is_wan_2_2=True, encoder_width=160), by_names),
    )


def _encoders() -> tuple[FamilyEntry, ...]:
    return (
        FamilyEntry("clip_l", "CLIP-L", ClipLConfig(49_408, 77, 768, 12, 3072), {TRANSFORMERS: ()}),
        FamilyEntry("t5", "T5 v1.1 XXL", T5Config(32_128, 4096, 24, 64, 10_240), {TRANSFORMERS: ()}),
        FamilyEntry(
            "umt5",
            "UMT5-XXL",
            T5Config(256_384, 4096, 24, 64, 10_240, has_tables=True),
            {TRANSFORMERS: (), WAN: ()},
            renamed={WAN: text_checkpoints.in_wans_names},
        ),
        _language_model("qwen3", "Qwen3 4B", 151_936, 2560, 36, 32, 8, 9728, epsilon=1e-6, rope_theta=1e6),
        _language_model("qwen3", "Qwen3 8B", 151_936, 4096, 36, 32, 8, 12_288, epsilon=1e-6, rope_theta=1e6),
        _language_model(
            "mistral3", "Mistral Small 3 24B", 131_072, 5120, 40, 32, 8, 32_768, epsilon=1e-5, rope_theta=1e9
        ),
        _qwen_vl("Qwen2.5-VL 7B", VisionConfig(1280, 32, 3420)),
        _qwen_vl("Qwen2.5-VL 7B, language model alone", None),
    )


def _qwen_vl(variant: str, vision: VisionConfig | None) -> FamilyEntry:
    config = Qwen25VlConfig(152_064, 3584, 28, 28, 4, 18_944, vision)
    return FamilyEntry("qwen2_5_vl", variant, config, {TRANSFORMERS: ()})


_DEV = Flux2Config(6144, 8, 48, context_channels=15_360, has_guidance=True)
_IMAGE: Final[Mapping[str, int]] = {"in_channels": 36}
_CLIP: Final[Mapping[str, int]] = {**_IMAGE, "image_channels": 1280}

ENTRIES: Final = (
    _flux1("dev, Krea, Kontext"),
    _flux1("schnell", has_guidance=False),
    _flux1("Canny, Depth", in_channels=CONTROL_CHANNELS),
    _flux1("Fill", in_channels=FILL_CHANNELS),
    _flux2("dev", _DEV, "Mistral Small 3 24B"),
    _flux2("klein 9B", Flux2Config(4096, 8, 24, context_channels=12_288, has_guidance=False), "Qwen3 8B"),
    _flux2("klein 4B", Flux2Config(3072, 5, 20, context_channels=7680, has_guidance=False), "Qwen3 4B"),
    FamilyEntry(
        "z_image",
        "Turbo, Base",
        ZImageConfig(3840, 30, 2, 2560),
        {ORIGINAL: ("layers.0.attention.qkv.weight",), DIFFUSERS: ()},
        "flux_vae",
        (("Qwen3 4B", 1),),
    ),
    _qwen_image("base, 2512, Edit, Edit-2509", {f"{COMFYUI}, {DIFFUSERS}": ()}),
    _qwen_image("Edit-2511", {COMFYUI: ()}, has_marker=True),
    _wan("2.1 text to video 1.3B", 1536, 30, 8960),
    _wan("2.1 and 2.2 text to video 14B", 5120, 40, 13_824),
    _wan("2.1 image to video 14B", 5120, 40, 13_824, **_CLIP),
    _wan("2.1 first and last image to video 14B", 5120, 40, 13_824, **_CLIP, has_image_positions=True),
    _wan("2.2 image to video 14B", 5120, 40, 13_824, **_IMAGE),
    _wan("2.2 TI2V 5B", 3072, 30, 14_336, in_channels=48, out_channels=48),
    _wan("2.1 VACE 1.3B", 1536, 30, 8960, control_blocks=15),
    _wan("2.1 VACE 14B", 5120, 40, 13_824, control_blocks=8),
    *_vaes(),
    *_encoders(),
    _controlnet("Union, Union Pro", 5, 10, modes=10),
    _controlnet("Union Pro 2.0", 6, 0),
)
