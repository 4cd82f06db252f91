"""Node Load VAE (xDiT): make a VAE that runs in the workers from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from xditd.client.comfyui.checkpoint_files import read_checkpoint
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.families import search_words
from xditd.client.comfyui.source_files import while_unchanged
from xditd.client.comfyui.vae import make_vae


class XditVaeLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="XDiTVAELoader",
            display_name="Load VAE (xDiT)",
            category="xDiT",
            description="Loads a VAE once and lends it to the xDiT workers. Works with every node that takes a VAE.",
            search_aliases=["xdit", "multi gpu", *search_words()],
            inputs=[io.Combo.Input("vae_name", options=folder_paths.get_filename_list("vae"))],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name: str) -> Any:
        return io.NodeOutput(load_vae(folder_paths.get_full_path_or_raise("vae", vae_name)))


def load_vae(path: str) -> Any:
    """Make a VAE from a checkpoint file. It is lent when ComfyUI first needs it.

    Raises:
        Unsupported: not the VAE of a family that the workers run.
        DaemonUnreachable: no daemon runs.
        StaleSource: the file is being written.
    """
    connect()
    with while_unchanged(path):
        return make_vae(read_checkpoint(path), Path(path).stem)
