"""Describe a module of diffusers or transformers, so that the workers run it as its own class does."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

from xditd.client.accelerated_methods import is_accelerated
from xditd.client.base_layers import with_base_layers
from xditd.ipc import limits, module_state
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.tensors import ModuleDescription

if TYPE_CHECKING:
    import torch

_PACKAGES: Final = ("diffusers", "transformers")


def is_described(source: object) -> bool:
    """Return whether a module's class and configuration tell the workers how to make it."""
    return (
        type(source).__module__.partition(".")[0] in _PACKAGES
        and hasattr(source, "config")
        and hasattr(source, "named_modules")
    )


def describe_module(
    module: torch.nn.Module,
    label: str,
    *,
    replaced: Collection[str] = (),
    base_layers: Collection[str] = (),
    allows_family: bool = False,
) -> tuple[ModuleDescription, dict[str, torch.Tensor]]:
    """Return the description of a module, and all of its tensors by name.

    The tensors are the module's own: parameters, buffers, and tensors among the attributes of its submodules.
    ``replaced`` are attributes of the module itself that are left out. The layers of PEFT at ``base_layers`` are
    described as their base layers. With ``allows_family``, workers may run it as
    its family does, if one of theirs has a faster way and the module is as its class makes it.

    Raises:
        BadRequest: not a model of diffusers or transformers, or a configuration or state that is too large to send.
        Unsupported: the module is accelerated.
    """
    if not is_described(module):
        raise BadRequest(
            f"{label}: {type(module).__module__}.{type(module).__qualname__} is no model class of "
            f"{' or '.join(_PACKAGES)}: workers cannot make it"
        )
    if not replaced and is_accelerated(module):
        raise Unsupported(
            f"{label}: it runs in the workers by accelerate(): leave that block before you lend it, or call the model "
            "itself"
        )
    from xditd.ipc.transports.module_walk import class_name, walk_module

    state, tensors = with_base_layers(*walk_module(module, replaced), base_layers)
    config = _config_of(module)
    if len(config) > limits.MAX_TEXT_CHARS:
        raise BadRequest(f"{label}: its configuration takes {len(config)} characters, at most {limits.MAX_TEXT_CHARS}")
    described = ModuleDescription(
        class_name=class_name(type(module)),
        config=config,
        state=module_state.encode(state, label),
        allows_family=allows_family,
    )
    return described, tensors


def _config_of(module: Any) -> str:
    if hasattr(module, "to_json_string"):  # diffusers
        return str(module.to_json_string())
    config = module.config
    found = json.loads(config.to_json_string(use_diff=False))
    return json.dumps({**found, **implementations_of(config)})


def implementations_of(config: Any) -> dict[str, Any]:
    """Return which attention and experts a configuration of transformers chooses, which its JSON does not have.

    A text, or texts by the names of its parts, and "" for itself, if one of them chooses otherwise.
    Source: transformers, ``PreTrainedConfig._attn_implementation``.
    """
    found: dict[str, Any] = {}
    for name in ("attn_implementation", "experts_implementation"):
        own = getattr(config, f"_{name}", None)
        parts = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", ())}
        of_parts = {key: getattr(part, f"_{name}", None) for key, part in parts.items() if part is not None}
        is_one = all(each == own for each in of_parts.values())
        found[name] = own if is_one else {"": own, **of_parts}
    return found
