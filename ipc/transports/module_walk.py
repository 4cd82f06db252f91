"""Describe a module of torch: the class and the attributes of each submodule, and all of its tensors by name.

A client describes the module that it lends; a worker describes the one that it has built, and compares.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final

import torch

from xditd.ipc import limits
from xditd.ipc.arguments import (
    Argument,
    LentTensor,
    ListOf,
    MapOf,
    Named,
    ObjectOf,
    Opaque,
    PairsOf,
    SetOf,
    Special,
    TupleOf,
)
from xditd.ipc.errors import BadRequest
from xditd.ipc.module_state import PACKAGES, ModuleState, SubmoduleState

HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

OWN: Final = frozenset(vars(torch.nn.Module()))
"""The attributes of every module: parameters, buffers, submodules and hooks are described apart."""

CONFIG: Final = "_internal_dict"
"""The configuration of diffusers, which is sent apart. Adapters set attributes of it, which differ from its items."""

_IGNORED: Final = frozenset(
    {
        CONFIG,
        "peft_config",  # the layers that PEFT has put in are described themselves
        "_hf_peft_config_loaded",
        "name_or_path",  # where transformers has loaded it from
        "_weight_conversions",  # with which transformers saves it
        "gradient_checkpointing",  # of training alone
        "_gradient_checkpointing_func",
    }
)

_MAX_DEPTH: Final = 8


def walk_module(module: torch.nn.Module, replaced: Collection[str] = ()) -> tuple[ModuleState, dict[str, torch.Tensor]]:
    """Return the state of a module, and its tensors by name, in the order of the submodules.

    ``replaced`` are attributes of ``module`` itself that are left out, and with any its own hooks. The tensors are the
    module's own, not copies. Names are those of the state dict for parameters and buffers, and ``path.attribute`` or
    ``path.attribute[0]`` for tensors in attributes.

    Raises:
        BadRequest: an attribute too large or too deeply nested to be described; the error has its path.
    """
    return _Walk(module, replaced).run()


def version_of(package: str) -> str:
    """Return the version of an imported package, without its build: 2.13.0 of 2.13.0+cu130."""
    return str(getattr(sys.modules[package], "__version__", "unknown")).partition("+")[0]


def class_name(kind: type) -> str:
    """Return ``module:Class``."""
    return f"{kind.__module__}:{kind.__qualname__}"


class _Walk:
    def __init__(self, module: torch.nn.Module, replaced: Collection[str]) -> None:
        self._module = module
        self._replaced = replaced
        self._paths = {id(each): path for path, each in module.named_modules()}
        self._tensors: dict[str, torch.Tensor] = {}
        self._parents: set[int] = set()
        self._has_host_tensor = False

    def run(self) -> tuple[ModuleState, dict[str, torch.Tensor]]:
        submodules = {path: self._submodule(path, each) for path, each in self._module.named_modules()}
        same = {
            path: self._paths[id(each)]
            for path, each in self._module.named_modules(remove_duplicate=False)
            if self._paths[id(each)] != path
        }
        packages = {each.class_name.partition(".")[0] for each in submodules.values()}.intersection(PACKAGES)
        versions = {each: version_of(each) for each in sorted({"torch", *packages})}
        return ModuleState(submodules=submodules, same=same, versions=versions), self._tensors

    def _submodule(self, path: str, module: torch.nn.Module) -> SubmoduleState:
        start = f"{path}." if path else ""
        parameters = self._filled(start, module._parameters)
        buffers = self._filled(start, module._buffers)
        attributes: dict[str, Argument] = {}
        on_host: list[str] = []
        for name in HOOKS:
            # Those of a module whose methods are replaced run in the caller's process.
            if (path or not self._replaced) and (hooks := getattr(module, name)):
                attributes[name] = ListOf(items=tuple(Opaque(text=_text_of(hook)) for hook in hooks.values()))
        if module.training:
            attributes["training"] = True
        if changed := _changed_settings(vars(module).get(CONFIG)):
            attributes[CONFIG] = MapOf(
                items={key: self._value(f"{start}{CONFIG}.{key}", changed[key], 0) for key in changed}
            )
        for name, value in vars(module).items():
            if name in OWN or name in _IGNORED or (not path and name in self._replaced):
                continue
            if _is_idle(module, name, value):
                continue
            if name == "_diffusers_hook":
                attributes[name] = Opaque(text=f"hooks of diffusers, {', '.join(map(str, value.hooks))}")
                continue
            self._has_host_tensor = False
            attributes[name] = self._value(f"{start}{name}", value, 0)
            if self._has_host_tensor:
                on_host.append(name)
        return SubmoduleState(
            class_name=class_name(type(module)),
            parameters=parameters,
            buffers=buffers,
            not_saved=tuple(sorted(module._non_persistent_buffers_set & set(buffers))),
            empty_parameters=_empty(module._parameters),
            empty_buffers=_empty(module._buffers),
            empty_modules=_empty(module._modules),
            on_host=tuple(on_host),
            attributes=attributes,
        )

    def _filled(self, start: str, tensors: Mapping[str, torch.Tensor | None]) -> tuple[str, ...]:
        for name, tensor in tensors.items():
            if tensor is not None:
                self._tensors[start + name] = tensor
        return tuple(name for name, tensor in tensors.items() if tensor is not None)

    def _value(self, path: str, value: Any, depth: int) -> Argument:
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, enum.Enum)):
            return describe_constant(value)
        if isinstance(value, torch.Tensor):
            self._tensors[path] = value
            self._has_host_tensor |= value.device.type == "cpu"
            return LentTensor(name=path)
        if isinstance(value, torch.nn.Module):
            found = self._paths.get(id(value))
            return (
                Opaque(text=f"{_text_of(value)} outside the module")
                if found is None
                else Named(name=f"submodule:{found}")
            )
        if id(value) in self._parents:
            return Opaque(text=f"{_text_of(value)} that holds itself")
        if depth == _MAX_DEPTH:
            raise BadRequest(f"{path}: attributes that are nested deeper than {_MAX_DEPTH} levels cannot be described")
        self._parents.add(id(value))
        try:
            return self._nested(path, value, depth + 1)
        finally:
            self._parents.discard(id(value))

    def _nested(self, path: str, value: Any, depth: int) -> Argument:
        if isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > limits.MAX_ARGUMENTS:
            if not _is_plain(value):
                raise BadRequest(f"{path}: {len(value)} items with tensors or objects among them cannot be described")
            return Opaque(text=f"{type(value).__name__} {_digest(repr(value))}")
        if isinstance(value, (list, tuple)):
            items = tuple(self._value(f"{path}[{number}]", each, depth) for number, each in enumerate(value))
            return ListOf(items=items) if isinstance(value, list) else TupleOf(items=items)
        if isinstance(value, (set, frozenset)):
            return SetOf(items=tuple(self._value(path, each, depth) for each in sorted(value, key=repr)))
        if isinstance(value, dict):
            if all(isinstance(key, str) and len(key) <= limits.MAX_NAME_CHARS for key in value):
                return MapOf(items={key: self._value(f"{path}.{key}", each, depth) for key, each in value.items()})
            return PairsOf(
                items=tuple(
                    (self._value(path, key, depth), self._value(f"{path}[{key!r}]", each, depth))
                    for key, each in value.items()
                )
            )
        if is_describable(value):
            return ObjectOf(
                class_name=class_name(type(value)),
                attributes={name: self._value(f"{path}.{name}", each, depth) for name, each in vars(value).items()},
            )
        return Opaque(text=_text_of(value))


def is_describable(value: object) -> bool:
    """Return whether an object is all in its ``__dict__``, and of a package whose objects workers can make."""
    kind = type(value)
    if kind.__module__.partition(".")[0] not in PACKAGES or isinstance(
        value, (type, FunctionType, BuiltinFunctionType)
    ):
        return False
    return hasattr(value, "__dict__") and kind.__reduce_ex__ is object.__reduce_ex__ and not _is_config(value)


def _is_config(value: object) -> bool:
    """Return whether this is a configuration of transformers, which all submodules share, and which is sent apart."""
    return any(each.__name__ in ("PretrainedConfig", "PreTrainedConfig") for each in type(value).__mro__)


def _changed_settings(config: object) -> dict[str, Any]:
    """Return the attributes of a configuration of diffusers that differ from its items."""
    if not isinstance(config, dict):
        return {}
    return {key: value for key, value in vars(config).items() if key in config and config[key] != value}


def _is_idle(module: torch.nn.Module, name: str, value: object) -> bool:
    """Return whether an attribute changes no forward: what removed hooks of diffusers leave; kernels that are off."""
    is_off = (name == "_diffusers_hook" and not getattr(value, "hooks", True)) or (name == "_use_kernels" and not value)
    return is_off or is_own_method(module, name, value)


def is_own_method(module: torch.nn.Module, name: str, value: object) -> bool:
    """Return whether an attribute of a module is the method of its class."""
    return (
        isinstance(value, MethodType)
        and value.__self__ is module
        and value.__func__ is getattr(type(module), name, None)
    )


def describe_constant(value: Any) -> Argument:
    """Describe a number, a text, ``None``, a dtype, a device, or a member of an enumeration."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, torch.dtype):
        return Named(name=str(value))
    if isinstance(value, torch.device):
        return Named(name=f"device:{value.type}")  # each process numbers its GPUs in its own way
    if isinstance(value, enum.Enum):
        is_known = type(value).__module__.partition(".")[0] in PACKAGES
        return Named(name=f"{class_name(type(value))}.{value.name}") if is_known else Opaque(text=_text_of(value))
    if isinstance(value, str):
        return value if len(value) <= limits.MAX_NAME_CHARS else Opaque(text=f"text {_digest(value)}")
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else Opaque(text=f"{value:#x}"[: limits.MAX_NAME_CHARS])
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, float):
        return Special(value="nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
    return Opaque(text=_text_of(value))


def describe_class(kind: type) -> Argument:
    """Describe a class: one of the packages by its name, any other by a text that says what it is."""
    is_known = kind.__module__.partition(".")[0] in PACKAGES
    return Named(name=f"class:{class_name(kind)}") if is_known else Opaque(text=_text_of(kind))


def method_signature(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a method, also of one that diffusers' ``apply_forward_hook`` has wrapped.

    That wrapper takes anything, and does not name the function that it wraps.
    """
    found = inspect.signature(method)
    if all(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in list(found.parameters.values())[1:]):
        inner = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
        functions = [each for each in inner if isinstance(each, FunctionType)]
        if len(functions) == 1:
            return method_signature(functions[0])
    return found


def _empty(registered: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(name for name, value in registered.items() if value is None)


def _text_of(value: object) -> str:
    """Return what a value is: the same text for the same function or the same class of object in any process."""
    return "".join(_text_parts(value))[: limits.MAX_NAME_CHARS]


def _text_parts(value: Any) -> Iterator[str]:
    if isinstance(value, functools.partial):
        given = [*value.args, *(each for pair in sorted(value.keywords.items()) for each in pair)]
        yield f"partial of {_text_of(value.func)} with {', '.join(map(_argument_text, given))}"
    elif isinstance(value, MethodType):
        yield f"method {_text_of(value.__func__)} of a {class_name(type(value.__self__))}"
    elif isinstance(value, type):
        yield f"class {class_name(value)}"
    elif hasattr(value, "__qualname__") and callable(value):
        yield f"function {getattr(value, '__module__', None)}:{value.__qualname__}"
    else:
        yield f"{class_name(type(value))} object"
        if hasattr(value, "tobytes") and hasattr(value, "shape"):  # an array of numpy
            yield f" {value.dtype} {value.shape} {_digest(value.tobytes())}"
        elif not _is_config(value):
            # Two objects of one class are not the same if their numbers and texts are not.
            plain = {name: each for name, each in getattr(value, "__dict__", {}).items() if _is_plain(each)}
            yield f" with {_digest(repr(plain))}" if plain else ""


def _argument_text(value: object) -> str:
    is_plain = value is None or isinstance(value, (bool, int, float, str))
    return f"{value!r:.100}" if is_plain else _text_of(value)


def _is_plain(value: object) -> bool:
    """Return whether the text of a value says all of it: numbers, texts, and containers of them."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, complex, str, bytes)


def _digest(content: str | bytes) -> str:
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).hexdigest()
