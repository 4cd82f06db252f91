"""Node XDiT UNet Loader: make a MODEL from a file; its forward runs in the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from xditd.client.comfyui.checkpoint_files import read_checkpoint
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.families import search_words, titles
from xditd.client.comfyui.patcher import make_model, plain_names
from xditd.client.comfyui.weights import check_plain
from xditd.ipc.errors import Unsupported

DTYPES = {"default": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class XditUnetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="XDiTUNetLoader",
            display_name="XDiT UNet Loader",
            category="xDiT",
            description="Loads a transformer once and lends it to the xDiT workers. The MODEL works with every "
            "sampler, guider and LoRA loader; its forward runs on all GPUs.",
            search_aliases=["xdit", "multi gpu", "load diffusion model", *search_words()],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip=f"a safetensors file in models/diffusion_models or models/unet: {titles()}",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    tooltip="default keeps the file's dtype, without conversion",
                ),
                io.Int.Input(
                    "ulysses_degree",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="0 accepts the daemon's layout; another number must equal the daemon's",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str, ulysses_degree: int) -> Any:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return io.NodeOutput(load_unet(path, DTYPES[weight_dtype], ulysses_degree))


def load_unet(path: str, dtype: torch.dtype | None = None, ulysses_degree: int = 0) -> Any:
    """Make a MODEL from a checkpoint file. It is lent when a sampler first needs it.

    Raises:
        Unsupported: another model family, quantised weights, or a layout that the daemon does not have.
        DaemonUnreachable: no daemon runs.
    """
    label = Path(path).stem
    check_layout(ulysses_degree)
    tensors = plain_names(read_checkpoint(path))
    check_plain(tensors, label)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return make_model(tensors, label)


def check_layout(ulysses_degree: int) -> None:
    """Connect to the daemon, and refuse a Ulysses degree that it was not started with; 0 is any."""
    client = connect()
    if not ulysses_degree:
        return
    status = client.status()
    found = status.parallel.get("ulysses", status.world_size)
    if status.world_size and found != ulysses_degree:
        raise Unsupported(
            f"ulysses_degree {ulysses_degree}: the daemon runs with {found}; set 0, or restart it with "
            f"xditd serve --layout ulysses={ulysses_degree}"
        )
