"""Detect changes of a model's modules, methods, hooks and settings since it was loaded.

Nodes change a model in ways that no patcher records: they replace a method of a module or of its class, register a
hook, replace a module, set a number. ComfyUI's own forward obeys all of these; a forward in the workers sees none.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

import torch.nn.modules.module as global_hooks

from xditd.client.comfyui.naming import name_of

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS: Final = tuple(getattr(global_hooks, f"_global{hook}") for hook in _HOOKS)
"""Hooks that torch calls for every module of the process."""

_WEIGHT_FUNCTIONS: Final = ("weight_function", "bias_function")
"""Functions that ComfyUI's layers call with their weights; ComfyUI itself puts a MODEL's patches there."""

_SCALARS: Final = (bool, int, float, str)
_DECORATORS: Final = ("torch", "contextlib", "functools")
"""Packages whose decorators wrap methods in functions of their own."""

_LOADING: Final = ("comfy", "training")
"""Parts of the names of attributes that ComfyUI sets when it loads and unloads weights."""


@dataclass(frozen=True)
class _Module:
    """``settings`` are the plain values of a module; the root has none, because ComfyUI changes its attributes."""

    kind: type
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Snapshot:
    """Attributes, hooks and children of all modules at the last full check.

    Parallel lists, so that comparing them takes a few C calls instead of a Python loop over modules.
    """

    attributes: list[dict[str, Any]]
    counts: list[int]
    children_of: list[dict[str, Any]]
    children_counts: list[int]
    hooks: list[Any]
    parents: list[dict[str, Any]]
    names: list[str]
    children: list[Any]

    def is_intact(self) -> bool:
        return (
            list(map(len, self.attributes)) == self.counts
            and list(map(len, self.children_of)) == self.children_counts
            and not any(self.hooks)
            and not any(_GLOBAL_HOOKS)
            and all(map(operator.is_, map(dict.get, self.parents, self.names), self.children))
        )


class Baseline:
    """Records all modules below ``root`` as they are now, except the root's children named in ``without``."""

    def __init__(self, root: Any, without: tuple[str, ...] = ()) -> None:
        self._without = without
        self._made = {
            path: _Module(type(module), _settings(module) if path else {}) for path, module in self._walk(root)
        }
        self._methods = {
            (kind, name): value
            for kind in {kind for each in self._made.values() for kind in each.kind.__mro__}
            for name, value in _methods(kind).items()
        }
        self._snapshot = self._take_snapshot(root)

    def differences(self, root: Any, unless: Mapping[str, Any] | None = None) -> list[str]:
        """Name what differs in ``root``; ``unless`` are dotted names of attributes that may differ."""
        found = dict(self._walk(root))
        faults = [
            f"all modules have a forward hook ({name_of(function)})"
            for hooks in _GLOBAL_HOOKS
            for function in hooks.values()
        ]
        faults += [f"the module {path} is missing" for path in self._made if path not in found]
        for path, module in found.items():
            faults += self._faults_of(path, module, unless or {})
        faults += [
            f"{kind.__name__}.{name} is that of {_origin(vars(kind).get(name))}"
            for (kind, name), made in self._methods.items()
            if vars(kind).get(name) is not made
        ]
        return faults

    def foreign_methods(self) -> list[str]:
        """Name methods that were replaced before recording: their code is from another package than their class."""
        return [
            f"{kind.__name__}.{name} is that of {_origin(value)}"
            for (kind, name), value in self._methods.items()
            if _origin_package(value) not in {_package(kind.__module__), *_DECORATORS}
        ]

    def is_intact(self, root: Any) -> bool:
        """Return whether surely nothing changed since the last full check; 0.1 ms for a thousand modules.

        On False, call :meth:`differences`: it names the changes, if there are any.
        """
        if self._snapshot.attributes[0] is not vars(root) or not self._snapshot.is_intact():
            return False
        return all(kind.__dict__.get(name) is made for (kind, name), made in self._methods.items())

    def accept(self, root: Any) -> None:
        """Record that ``root`` has no differences, for :meth:`is_intact`."""
        self._snapshot = self._take_snapshot(root)

    def _take_snapshot(self, root: Any) -> _Snapshot:
        modules = list(self._walk(root))
        links = [
            (module._modules, name, child)
            for path, module in modules
            for name, child in module._modules.items()
            if path or name not in self._without
        ]
        return _Snapshot(
            attributes=[vars(module) for _, module in modules],
            counts=[len(vars(module)) for _, module in modules],
            children_of=[module._modules for _, module in modules],
            children_counts=[len(module._modules) for _, module in modules],
            hooks=[getattr(module, hook) for _, module in modules for hook in _HOOKS],
            parents=[parent for parent, _, _ in links],
            names=[name for _, name, _ in links],
            children=[child for _, _, child in links],
        )

    def _walk(self, root: Any) -> Iterator[tuple[str, Any]]:
        for path, module in root.named_modules():
            if path.split(".")[0] not in self._without:
                yield path, module

    def _faults_of(self, path: str, module: Any, unless: Mapping[str, Any]) -> Iterator[str]:
        where = f"the module {path}" if path else "the model"
        made = self._made.get(path)
        if made is None:
            yield f"{where} was added ({name_of(module)})"
            return
        if path in unless:
            return
        if type(module) is not made.kind:
            yield f"{where} was replaced by {name_of(module)}"
            return
        for hook in _HOOKS:
            for function in getattr(module, hook).values():
                yield f"{where} has a forward hook ({name_of(function)})"
        for name, value in vars(module).items():
            full = f"{path}.{name}" if path else name
            if full in unless:
                continue
            if callable(value) and callable(getattr(type(module), name, None)):
                if value == types.MethodType(getattr(type(module), name), module):
                    continue  # its own method, put back by what had replaced it
                yield f"{full} was replaced ({name_of(value)})"
            elif name in _WEIGHT_FUNCTIONS:
                for function in value:
                    if not _is_of_comfyui(function):
                        yield f"{full} was set ({name_of(function)})"
            elif name in made.settings:
                yield from _changes(full, made.settings[name], value)


def _settings(module: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in _WEIGHT_FUNCTIONS and not any(part in name for part in _LOADING):
            if _is_dataclass(value):
                found[name] = _plain_fields(value)
            elif _is_plain(value):
                found[name] = list(value) if isinstance(value, list) else value  # a list may be changed in place
    return found


def _changes(full: str, made: Any, value: Any) -> Iterator[str]:
    if _is_dataclass(value):
        now = _plain_fields(value)
        for name, before in made.items() if isinstance(made, dict) else ():
            if now.get(name) != before:
                yield f"{full}.{name} was changed from {before!r} to {now.get(name)!r}"
    elif made != value:
        yield f"{full} was changed from {made!r} to {value!r}"


def _is_plain(value: object) -> bool:
    return isinstance(value, _SCALARS) or (
        isinstance(value, (list, tuple)) and all(isinstance(each, _SCALARS) for each in value)
    )


def _is_dataclass(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _plain_fields(record: Any) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name, None) for field in fields(record)}
    return {name: list(each) if isinstance(each, list) else each for name, each in values.items() if _is_plain(each)}


def _is_of_comfyui(function: Any) -> bool:
    return _package(getattr(type(function), "__module__", "")) == "comfy"


def _methods(kind: type) -> dict[str, Any]:
    if kind.__name__ in ("object", "Module"):  # base classes of every model
        return {}
    return {
        name: value
        for name, value in vars(kind).items()
        if isinstance(value, types.FunctionType) and (not name.startswith("__") or name == "__call__")
    }


def _origin(value: object) -> str:
    return "nobody" if value is None else name_of(value)


def _origin_package(value: Any) -> str:
    return _package(value.__globals__.get("__name__", ""))


def _package(module: str) -> str:
    return module.partition(".")[0]
