"""What the names of tensors in a LoRA mean: the layer, and which factor of its difference.

| written by | example |
|---|---|
| kohya's scripts | ``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight``, ``.alpha`` |
| OneTrainer | ``lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight`` |
| LyCORIS | ``lycoris_double_blocks_0_img_attn_qkv.lora_down.weight`` |
| diffusers | ``transformer.transformer_blocks.0.attn.to_q.lora_A.weight`` |
| PEFT | ``base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight`` |
| ai-toolkit, ComfyUI | ``diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight`` |
| XLabs | ``double_blocks.0.processor.qkv_lora1.down.weight`` |

Which layer of a model a name means, the workers know. Other adapters than LoRA (LoHa, DoRA and the like) are no product
of two factors: they cannot be branches.

Sources: kohya-ss/sd-scripts, ``networks/lora_flux.py``; PEFT, ``save_and_load.py``; diffusers,
``lora_conversion_utils.py``; ComfyUI, ``comfy/lora.py`` and ``comfy/weight_adapter``; KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from xditd.ipc.loras import LoraPart
from xditd.ipc.tensor_names import split_prefix

Role = Literal["down", "up", "alpha"]

_ROLES: Final[tuple[tuple[re.Pattern[str], Role], ...]] = (
    (re.compile(r"\.lora_down(?:\.\w+)?\.weight$"), "down"),
    (re.compile(r"\.lora_up(?:\.\w+)?\.weight$"), "up"),
    (re.compile(r"\.lora_A(?:\.(?!weight$)\w+)?(?:\.weight)?$"), "down"),
    (re.compile(r"\.lora_B(?:\.(?!weight$)\w+)?(?:\.weight)?$"), "up"),
    (re.compile(r"\.lora\.down\.weight$|\.lora_linear_layer\.down\.weight$"), "down"),
    (re.compile(r"\.lora\.up\.weight$|\.lora_linear_layer\.up\.weight$"), "up"),
    (re.compile(r"(?<=_lora)\.down\.weight$|(?<=_lora\d)\.down\.weight$"), "down"),
    (re.compile(r"(?<=_lora)\.up\.weight$|(?<=_lora\d)\.up\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)

_KOHYA_TEXT: Final = re.compile(r"^lora_te\d?_")
_KOHYA_MODEL: Final = re.compile(r"^(?:lora_unet_+|lora_transformer_|lycoris_)")
_PEFT: Final = re.compile(r"^base_model\.model\.")
_TEXT_PREFIX: Final = re.compile(r"(?:^|\.)(?:text_encoder(?:_\d)?|text_encoders|clip_l|t5xxl|cond_stage_model)\.")

OTHER_FORMATS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("LoHa", re.compile(r"\.hada_(?:w[12]_[ab]|t[12])$")),
    ("LoKr", re.compile(r"\.lokr_(?:w[12](?:_[ab])?|t2)$")),
    ("DoRA", re.compile(r"\.(?:dora_scale|lora_magnitude_vector)(?:\.\w+)*$")),
    ("OFT or BOFT", re.compile(r"\.(?:oft_blocks|oft_diag|boft_blocks|rescale)$|\.(?:oft|boft)_[RSs](?:\.\w+)*$")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("(IA)^3", re.compile(r"\.on_input$|\.ia3_l(?:\.\w+)*$")),
    ("AdaLoRA", re.compile(r"\.lora_E(?:\.\w+)*$")),
    ("LoRA of embeddings", re.compile(r"\.lora_embedding_[AB](?:\.\w+)*$")),
    ("LoRA of convolutions in three factors", re.compile(r"\.lora_mid(?:\.\w+)?\.weight$")),
    ("LoRA with biases", re.compile(r"\.lora_(?:A|B|up|down)(?:\.\w+)?\.bias$")),
    ("LoRA that reshapes weights", re.compile(r"\.reshape_weight$")),
    ("full differences", re.compile(r"\.(?:diff|diff_b|set_weight|w_norm|b_norm)$")),
)
"""Adapters that are no LoRA, with the ends of their names."""


@dataclass(frozen=True, slots=True)
class LoraName:
    """What a tensor of a LoRA is: ``target`` is its layer, with ``_`` for dots and without prefixes."""

    part: LoraPart
    target: str
    role: Role
    layer: str
    """The name up to the role, as it is spelled."""


def read_name(name: str) -> LoraName | None:
    """Read the name of a tensor; ``None`` if it is none of a LoRA."""
    for pattern, role in _ROLES:
        found = pattern.search(name)
        if found is not None and found.start():
            layer = name[: found.start()]
            part, bare = _split(layer)
            return LoraName(part, bare.replace(".", "_"), role, layer) if bare else None
    return None


def other_formats(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of tensors of other adapters than LoRA, by format."""
    every = list(names)
    found = {what: [name for name in every if pattern.search(name)] for what, pattern in OTHER_FORMATS}
    return {what: each for what, each in found.items() if each}


def _split(layer: str) -> tuple[LoraPart, str]:
    """Split the name of a layer into the part of the model that it is of, and its own name."""
    for pattern, part in ((_KOHYA_TEXT, "text_encoder"), (_KOHYA_MODEL, "model")):
        found = pattern.match(layer)
        if found is not None:
            return part, layer[found.end() :]  # type: ignore[return-value]
    prefix, bare = split_prefix(_PEFT.sub("", layer))
    return ("text_encoder" if _TEXT_PREFIX.search(prefix) else "model"), bare
