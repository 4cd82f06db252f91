"""Nodes Load CLIP (xDiT) and Load Dual CLIP (xDiT): make a CLIP that encodes in the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from xditd.client.comfyui.checkpoint_files import read_with_metadata
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.families import search_words, text_adapters
from xditd.client.comfyui.families.text_adapter import EncoderFile, TextAdapter
from xditd.client.comfyui.gguf_models import END, gguf_encoder, gguf_files
from xditd.client.comfyui.source_files import while_unchanged
from xditd.client.comfyui.text import COMPUTE_DTYPE, make_clip, read_encoder
from xditd.client.packed_markers import METADATA
from xditd.ipc.transports.tensor_views import torch_dtype


class XditClipLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        types = {name: adapter.title for name, adapter in text_adapters().items() if adapter.clip_files == 1}
        models = ", ".join(f"{name}: {title}" for name, title in types.items())
        return io.Schema(
            node_id="XDiTCLIPLoader",
            display_name="Load CLIP (xDiT)",
            category="xDiT",
            description="Lends a model's text encoder to the xDiT workers. ComfyUI tokenizes; encoding runs in the "
            "workers.",
            search_aliases=["xdit", "multi gpu", "text encoder", *search_words()],
            inputs=[
                io.Combo.Input("clip_name", options=_names()),
                io.Combo.Input("type", options=list(types), tooltip=models),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name: str, type: str) -> Any:
        return io.NodeOutput(load_clip(folder_paths.get_full_path_or_raise("text_encoders", clip_name), type=type))


class XditDualClipLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        names = _names()
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


def load_clip(*paths: str, type: str | None = None) -> Any:
    """Make a CLIP from checkpoint files, in any order. They are lent when ComfyUI first encodes.

    ``type`` is a key of :func:`~xditd.client.comfyui.families.text_adapters`; without it, the first one of so many
    files.

    Raises:
        BadRequest: not the encoders of this type.
        BadCheckpoint: packed weights do not have the form of their format.
        Unsupported: an unknown format of weights, or a file without the tokenizer that ComfyUI reads.
        DaemonUnreachable: no daemon runs.
        StaleSource: a file is being written.
    """
    connect()
    known = text_adapters()
    adapter = known[type] if type else next(each for each in known.values() if each.clip_files == len(paths))
    return make_clip({Path(path).stem: _read(path, adapter) for path in paths}, adapter)


def _names() -> list[str]:
    return sorted({*folder_paths.get_filename_list("text_encoders"), *gguf_files("text_encoders")})


def _read(path: str, adapter: TextAdapter) -> EncoderFile:
    if path.lower().endswith(END):
        return EncoderFile(gguf_encoder(path, torch_dtype(COMPUTE_DTYPE)), {})
    with while_unchanged(path):
        tensors, metadata = read_with_metadata(path)
        return read_encoder(tensors, Path(path).stem, adapter, metadata.get(METADATA))
