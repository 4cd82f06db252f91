"""Show a text on a node in ComfyUI's page."""

from __future__ import annotations

import sys
from typing import Any


def show_on_node(node: Any, text: str) -> None:
    """Show a text on the running node; does nothing if no server runs.

    ComfyUI keeps ``ui.PreviewText`` in the history, but shows it on Preview as Text nodes only.
    """
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node.hidden is not None:
        instance.send_progress_text(text, node.hidden.unique_id)
