"""Node XDiT Status: show the state of the daemon, its workers and the lent components."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io, ui

from xditd.client.cli.status_text import describe
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.node_text import show_on_node


class XditStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="XDiTStatus",
            display_name="XDiT Status",
            category="xDiT",
            description="Workers, lent components with their tier and bytes, queue and last timings, as text.",
            search_aliases=["xdit", "multi gpu"],
            inputs=[],
            outputs=[io.String.Output()],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return time.time()  # never equal, so that ComfyUI runs the node every time

    @classmethod
    def execute(cls) -> Any:
        text = describe(connect().status())
        show_on_node(cls, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
