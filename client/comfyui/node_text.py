"""Text on a node, where the page shows what it did."""

from __future__ import annotations

import sys
from typing import Any


def show_on_node(node: Any, text: str) -> None:
    """Show a text on the node that runs; where no server runs, there is no page to show it on.

    An output ``ui.PreviewText`` is kept in the history, but the page draws it on Preview as Text nodes alone.
    """
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node.hidden is not None:
        instance.send_progress_text(text, node.hidden.unique_id)
