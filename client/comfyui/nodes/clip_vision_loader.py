"""Node Load CLIP Vision (xDiT): make a CLIP_VISION that runs in the workers from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from xditd.client.comfyui.checkpoint_files import read_checkpoint
from xditd.client.comfyui.clip_vision import make_clip_vision
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.source_files import while_unchanged


class XditClipVisionLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="XDiTCLIPVisionLoader",
            display_name="Load CLIP Vision (xDiT)",
            category="xDiT",
            description="Lends CLIP's vision model to the xDiT workers, for CLIP Vision Encode.",
            search_aliases=["xdit", "multi gpu", "image encoder"],
            inputs=[io.Combo.Input("clip_name", options=folder_paths.get_filename_list("clip_vision"))],
            outputs=[io.ClipVision.Output()],
        )

    @classmethod
    def execute(cls, clip_name: str) -> Any:
        return io.NodeOutput(load_clip_vision(folder_paths.get_full_path_or_raise("clip_vision", clip_name)))


def load_clip_vision(path: str) -> Any:
    """Make a CLIP_VISION from a checkpoint file. It is lent when ComfyUI first encodes an image.

    Raises:
        Unsupported: no vision model that the workers run, or packed weights.
        DaemonUnreachable: no daemon runs.
        StaleSource: the file is being written.
    """
    connect()
    with while_unchanged(path):
        return make_clip_vision(read_checkpoint(path), Path(path).stem)
