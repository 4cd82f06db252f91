"""Node Load Dual CLIP (xDiT): make a CLIP that encodes in the workers from two files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from xditd.client.comfyui.checkpoint_files import read_with_metadata
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.gguf_models import END, gguf_encoder, gguf_files
from xditd.client.comfyui.text import COMPUTE_DTYPE, encoder_weights, make_clip
from xditd.client.comfyui.weights import RemoteWeights
from xditd.client.packed_markers import METADATA
from xditd.ipc.transports.tensor_views import torch_dtype


class XditDualClipLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        names = sorted({*folder_paths.get_filename_list("text_encoders"), *gguf_files("text_encoders")})
        return io.Schema(
            node_id="XDiTDualCLIPLoader",
            display_name="Load Dual CLIP (xDiT)",
            category="xDiT",
            description="Lends a model's text encoders to the xDiT workers. ComfyUI tokenizes; encoding runs in the "
            "workers.",
            search_aliases=["xdit", "multi gpu", "text encoder"],
            inputs=[io.Combo.Input("clip_name1", options=names), io.Combo.Input("clip_name2", options=names)],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name1: str, clip_name2: str) -> Any:
        paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in (clip_name1, clip_name2)]
        return io.NodeOutput(load_clip(*paths))


def load_clip(*paths: str) -> Any:
    """Make a CLIP from two checkpoint files, in either order. They are lent when ComfyUI first encodes.

    Raises:
        BadRequest: not the encoders of a family that the workers run.
        BadCheckpoint: packed weights do not have the form of their format.
        Unsupported: an unknown format of weights.
        DaemonUnreachable: no daemon runs.
    """
    connect()
    return make_clip({Path(path).stem: _read(path) for path in paths})


def _read(path: str) -> RemoteWeights:
    if path.lower().endswith(END):
        return gguf_encoder(path, torch_dtype(COMPUTE_DTYPE))
    tensors, metadata = read_with_metadata(path)
    return encoder_weights(tensors, Path(path).stem, metadata.get(METADATA))
