"""Build modules of diffusers and transformers by their classes, from their configurations.

Parameters are on the meta device; buffers and all other tensors have values.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, Unsupported, XditdError
from xditd.ipc.tensors import ModuleDescription
from xditd.ipc.transports.module_classes import find_class

HERE: Final = "the workers"
"""Where classes are looked for, as errors say it."""
_CODE_CHOICES: Final = ("attn_implementation", "experts_implementation")
"""The ends of settings of transformers that may name code in a hub, for a model or by the names of its parts."""


def find_model_class(name: str) -> type[torch.nn.Module]:
    """Return a model class of diffusers or transformers.

    Raises:
        Unsupported: ``name`` is no model class, or is not installed here.
    """
    from diffusers.models.modeling_utils import ModelMixin

    kind = find_class(name, HERE)
    if not issubclass(kind, torch.nn.Module) or not (
        issubclass(kind, ModelMixin) or getattr(kind, "config_class", None) is not None
    ):
        raise Unsupported(f"{name} is no model class of diffusers or transformers")
    return kind


def build_module(described: ModuleDescription, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Build a module as its class makes it, in eval mode, with parameters on the meta device.

    With a ``dtype`` it is as ``from_pretrained(torch_dtype=dtype)`` makes it: ``dtype`` is torch's default while the
    class builds it.

    Raises:
        Unsupported: not a model class of diffusers or transformers, or one that is not installed here.
        BadRequest: a configuration that the class refuses.
    """
    kind: Any = find_model_class(described.class_name)
    try:
        config = json.loads(described.config)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"its configuration is not JSON: {error}") from error
    if not isinstance(config, dict):  # diffusers would take a text for the name of a repository
        raise BadRequest(f"its configuration is a {type(config).__name__}, not an object")
    _check_own_code(config)
    # Both packages take a second or more to import.
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import ModelMixin, no_init_weights

    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or default)
        # Weight initialisation takes two thirds of the time to build a module.
        with init_empty_weights(include_buffers=False), no_init_weights(), _limited_parameters():
            if issubclass(kind, ModelMixin):
                module: Any = kind.from_config(config)
            else:
                module = kind(_transformers_config(kind.config_class, config, dtype))
    except XditdError:
        raise
    except Exception as error:  # whatever the class raises
        raise BadRequest(
            f"{kind.__name__} cannot be made from its configuration: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_default_dtype(default)
    built: torch.nn.Module = module.eval().requires_grad_(False)
    return built


@contextmanager
def _limited_parameters() -> Iterator[None]:
    """Refuse to build a module with more parameters than a manifest may lend: a configuration may ask for any number.

    Raises:
        BadRequest: it has more than :data:`~xditd.ipc.limits.MAX_TENSORS`.
    """
    count = itertools.count(1)

    def check(*_: object) -> None:
        if next(count) > limits.MAX_TENSORS:
            raise BadRequest(f"its configuration makes more than {limits.MAX_TENSORS} parameters")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _check_own_code(config: Any) -> None:
    """Check that no code is from a hub: transformers would load and run it when the module is built.

    Raises:
        Unsupported: it is; the error names the setting.
    """
    pending = [config]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            for key, value in each.items():
                if key.endswith(_CODE_CHOICES):
                    chosen = value.values() if isinstance(value, dict) else (value,)
                    if any(isinstance(name, str) and "/" in name for name in chosen):
                        raise Unsupported(f"workers load no code from a hub, as {key} {value!r:.200} needs")
            pending += each.values()
        elif isinstance(each, list):
            pending += each


def _transformers_config(kind: Any, config: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """Make a configuration, for a ``dtype`` in which its parts are built.

    Raises:
        Unsupported: it is of another type of model, whose values the class would ignore.
    """
    given = config.get("model_type")
    if dtype is not None and given is not None and given != kind.model_type:
        raise Unsupported(f"its configuration is of model_type {given!r:.100}, its class is of {kind.model_type}")
    made = kind.from_dict(config)
    for each in (made, *(getattr(made, key, None) for key in made.sub_configs)):
        if dtype is not None and each is not None:
            each.dtype = dtype
    return made
