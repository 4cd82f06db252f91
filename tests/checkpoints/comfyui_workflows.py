"""For tests: workflows of ComfyUI's page as the prompts that the page sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xditd.client.cli import comfyui as pack

EXAMPLES = Path(pack.__file__).parents[1] / "comfyui" / "example_workflows"

Prompt = dict[str, dict[str, Any]]
InputsOf = Callable[[str], Mapping[str, Any]]
"""Of a node's type: its inputs as ``INPUT_TYPES`` describes them."""


def read_example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / f"{name}.json").read_text())
    return found


def prompt_of(drawn: Mapping[str, Any], inputs_of: InputsOf, **changes: Any) -> Prompt:
    """Convert a workflow; ``changes`` replace the inputs of these names in all nodes that have them."""
    sources = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    found = {}
    for node in drawn["nodes"]:
        inputs = {each["name"]: sources[each["link"]] for each in node["inputs"] if each["link"] is not None}
        inputs |= _widgets(inputs_of(node["type"]), set(inputs), list(node["widgets_values"]))
        inputs |= {name: value for name, value in changes.items() if name in inputs}
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return found


def _widgets(described: Mapping[str, Any], linked: set[str], values: list[Any]) -> dict[str, Any]:
    """Return a node's widget values by name; the workflow has them in the order of the inputs."""
    found = {}
    for name, spec in {**described.get("required", {}), **described.get("optional", {})}.items():
        is_widget = isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
        if is_widget and name not in linked:
            found[name] = values.pop(0)
            options = spec[1] if len(spec) > 1 else {}
            if options.get("control_after_generate") or options.get("image_upload"):
                values.pop(0)  # the widget behind it, which is for the page alone
    assert not values
    return found
