"""The extension that ComfyUI loads: the list of nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension

from xditd.client.comfyui.nodes.accelerate import XditAccelerate
from xditd.client.comfyui.nodes.clip_loader import XditClipLoader, XditDualClipLoader
from xditd.client.comfyui.nodes.clip_vision_loader import XditClipVisionLoader
from xditd.client.comfyui.nodes.ksampler import XditKSampler
from xditd.client.comfyui.nodes.status import XditStatus
from xditd.client.comfyui.nodes.unet_loader import XditUnetLoader
from xditd.client.comfyui.nodes.vae_loader import XditVaeLoader


class XditExtension(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        return [
            XditUnetLoader, XditAccelerate, XditVaeLoader, XditClipLoader, XditDualClipLoader, XditClipVisionLoader,
            XditKSampler, XditStatus,
        ]  # fmt: skip
