"""Node XDiT Accelerate: run the MODEL of any loader in the workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from xditd.client.comfyui.accelerate import accelerate
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.families import search_words, titles


class XditAccelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="XDiTAccelerate",
            display_name="XDiT Accelerate",
            category="xDiT",
            description="Put it between the model's loader (and its LoRAs) and the sampler: the transformer then runs "
            "on all GPUs. ComfyUI's weights are lent, not loaded again.",
            search_aliases=["xdit", "multi gpu", "speed up", *search_words()],
            inputs=[io.Model.Input("model", tooltip=f"a MODEL of any loader, with its LoRAs: {titles()}")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any) -> Any:
        connect()
        return io.NodeOutput(accelerate(model))
