"""ComfyUI node pack: runs existing workflows on all GPUs through a running xditd.

ComfyUI imports this folder, either directly or from the folder that ``xditd comfyui install`` writes. Nothing else is
imported until ComfyUI calls :func:`comfy_entrypoint`.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"
"""Folder of the nodes' help pages."""


async def comfy_entrypoint() -> Any:
    """Return the extension; ComfyUI calls this at start."""
    from xditd.client.comfyui.extension import XditExtension

    return XditExtension()
