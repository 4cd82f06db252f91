"""Node XDiT UNet Loader: make a MODEL from a file; its forward runs in the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from xditd.client.comfyui.checkpoint_files import read_with_metadata
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.families import search_words, titles
from xditd.client.comfyui.gguf_models import END, gguf_files, make_gguf_model
from xditd.client.comfyui.patcher import make_model, plain_names
from xditd.client.comfyui.source_files import while_unchanged
from xditd.client.comfyui.stock_dtypes import CHOICES, WeightDtype
from xditd.ipc.errors import Unsupported


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
                    options=sorted(
                        {*folder_paths.get_filename_list("diffusion_models"), *gguf_files("diffusion_models")}
                    ),
                    tooltip=f"a safetensors or GGUF file in models/diffusion_models or models/unet: {titles()}",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(CHOICES),
                    default="default",
                    tooltip="default holds plain weights in the dtype that ComfyUI's own loader chooses on a GPU, and "
                    "those of the file on a CPU; packed weights (int8, fp8 with scales) stay packed with every choice; "
                    "fp8 casts all others as ComfyUI's own loader does",
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
        return io.NodeOutput(load_unet(path, CHOICES[weight_dtype], ulysses_degree))


def load_unet(path: str, choice: WeightDtype = CHOICES["default"], ulysses_degree: int = 0) -> Any:
    """Make a MODEL from a checkpoint file. It is lent when a sampler first needs it.

    Raises:
        Unsupported: another model family, an unknown format of weights, or a layout that the daemon does not have.
        BadCheckpoint: packed weights do not have the form of their format.
        DaemonUnreachable: no daemon runs.
        StaleSource: the file is being written.
    """
    check_layout(ulysses_degree)
    if path.lower().endswith(END):
        return make_gguf_model(path, choice)
    with while_unchanged(path):
        tensors, metadata = read_with_metadata(path)
        return make_model(plain_names(tensors), Path(path).stem, choice=choice, metadata=metadata)


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
