"""Wan's relatives, which the workers do not run, by name: some differ from it in one size or setting alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

RELATIVES: Final = {
    "WAN21_Camera": "Wan 2.1 Fun with a camera's path",
    "WAN21_CausalAR_T2V": "Wan that predicts one frame after another",
    "WAN21_FlowRVS": "FlowRVS",
    "WAN21_FunControl2V": "Wan 2.1 Fun Control",
    "WAN21_HuMo": "HuMo",
    "WAN21_SCAIL": "SCAIL",
    "WAN21_SCAIL2": "SCAIL 2",
    "WAN22_Animate": "Wan 2.2 Animate",
    "WAN22_Camera": "Wan 2.2 Fun with a camera's path",
    "WAN22_S2V": "Wan 2.2 S2V",
    "WAN22_WanDancer": "WanDancer",
    "WAN_Animate2": "Wan Animate 2",
}
"""By ComfyUI's configuration classes, all of which derive from that of Wan 2.1."""

_CHANNELS: Final = frozenset({(16, 16), (36, 16), (48, 48)})
"""Of the input and the output: text; first and last image; TI2V."""

_NAMES: Final = {
    (52, 16): "Wan 2.2 Fun Control",
    (100, 48): "Wan 2.2 Fun 5B",
    (148, 48): "Wan 2.2 Fun Control 5B",
}

_POSITIONS: Final = 514
"""Of the tokens of a first and a last image."""
_CONTROL_CHANNELS: Final = 96

_HEAD_SIZE: Final = 128
_SETTINGS: Final = {
    "patch_size": (1, 2, 2),
    "window_size": (-1, -1),
    "freq_dim": 256,
    "text_dim": 4096,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
"""What ComfyUI takes for granted of a file, unless its header says otherwise."""


def name_relative(kind: str, read: Mapping[str, Any]) -> str | None:
    """Return what a model is or has that the workers do not run; ``None`` if there is nothing.

    ``kind`` is the class of ComfyUI's configuration, ``read`` what it has read from the file.
    """
    if kind in RELATIVES:
        return f"it is {RELATIVES[kind]} ({kind})"
    if read.get("in_dim_ref_conv") is not None:
        return "it reads a reference image (Wan Fun)"
    channels = read.get("in_dim"), read.get("out_dim")
    if channels not in _CHANNELS:
        named = f" ({_NAMES[channels]})" if channels in _NAMES else ""
        return f"it has {channels[0]} channels, to {channels[1]}{named}"
    positions = read.get("flf_pos_embed_token_number")
    if positions not in (None, _POSITIONS):
        return f"it has positions of {positions} tokens of images, not of {_POSITIONS}"
    for name, usual in {**_SETTINGS, "num_heads": read["dim"] // _HEAD_SIZE}.items():
        found = read.get(name, usual)
        if (tuple(found) if isinstance(found, list) else found) != usual:
            return f"its header sets {name} to {found}, not {usual}"
    controls = read.get("vace_in_dim")
    if controls is not None and (controls != _CONTROL_CHANNELS or channels != (16, 16)):
        return f"it has controls of {controls} channels for {channels[0]}, not of {_CONTROL_CHANNELS} for 16"
    return None
