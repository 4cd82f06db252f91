"""The node pack for ComfyUI: existing workflows on all GPUs, through a running xditd.

This folder is the pack's root: ComfyUI imports it, or the small folder that ``xditd comfyui install`` writes, which
imports this. Nothing is loaded until ComfyUI asks for the extension.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"
"""Where ComfyUI finds the help pages of the nodes."""


async def comfy_entrypoint() -> Any:
    """Make the extension; ComfyUI calls this at start."""
    from xditd.client.comfyui.extension import XditExtension

    return XditExtension()
