"""Detect changes of a module since it was lent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import torch

from xditd.client.base_layers import with_base_layers
from xditd.client.diffusers.adapters import NO_ADAPTERS, Adapters, find_adapters
from xditd.client.diffusers.code_origin import CodeRecord, namespaces_of
from xditd.client.diffusers.shallow_record import Content, ShallowRecord, content_of
from xditd.client.module_descriptions import implementations_of
from xditd.ipc.module_state import ModuleState
from xditd.ipc.transports.module_walk import walk_module

_CODE: Final = (staticmethod, classmethod, property)
_PLAIN: Final = (bool, int, float, str, type(None))

_WRITTEN_BY_DIFFUSERS: Final = ("_class_name", "_diffusers_version")
"""Items that appear in a configuration when it is first written as JSON, as for a loan."""


class Snapshot:
    """The state of a module at one moment. ``replaced`` are attributes of the module itself that do not count.

    It does not find writes through ``.data`` to tensors on a GPU, nor those to few elements of a tensor on the CPU.

    With ``has_branches``, LoRA layers of PEFT are ``adapters``, if they can be, and the rest is the module without
    them. Which of them are active, and their scales, are then no part of the state: read them for each call.
    """

    def __init__(self, module: torch.nn.Module, replaced: Collection[str], *, has_branches: bool = False) -> None:
        self._module = module
        self._replaced = replaced
        self._has_branches = has_branches
        self.adapters = NO_ADAPTERS
        self.namespaces = namespaces_of(module)
        # The record is made first, so that a change during the walk is found.
        self._record = self._take_record()
        self._functions = CodeRecord(self.namespaces)
        self._code = self._take_code()
        self._config = _config_of(module)
        self._state, self._contents, self.adapters = self._take()

    def has_same_base(self, other: Snapshot) -> bool:
        """Return whether the module without adapters is that of an earlier snapshot, after which none was fused."""
        if any(layer.merged_adapters for layer in other.adapters.layers.values()):  # before it was unloaded
            return False
        return (self._state, self._contents, self._config) == (other._state, other._contents, other._config)

    def changes(self) -> list[str]:
        """Return the names of what has changed since; fast if nothing has.

        Raises:
            Unsupported: a function has other code or defaults.
        """
        return [] if self._record.is_same() and self._functions.is_same() else self.described_changes()

    def described_changes(self) -> list[str]:
        """Return the names of what has changed since, by a complete description of the module.

        Raises:
            Unsupported: a function has other code or defaults.
        """
        self._functions.check()
        record = self._take_record()
        state, contents, adapters = self._take()
        config = _config_of(self._module)
        code = self._take_code()
        is_same = (state, contents, config, code) == (self._state, self._contents, self._config, self._code)
        if is_same and adapters.contents == self.adapters.contents:
            self._record, self.adapters = record, adapters  # other objects of the same values
            return []
        found = [f"config.{name}" for name in {**self._config, **config} if self._config.get(name) != config.get(name)]
        found += [
            path or type(self._module).__name__
            for path in {**self._state.submodules, **state.submodules}
            if self._state.submodules.get(path) != state.submodules.get(path)
        ]
        found += [name for name in {**self._contents, **contents} if self._contents.get(name) != contents.get(name)]
        before, after = self.adapters.contents, adapters.contents
        found += [f"adapter {name}" for name in {**before, **after} if before.get(name) != after.get(name)]
        found += [name for name in {**self._code, **code} if self._code.get(name) != code.get(name)]
        return found or ["the sharing of submodules"]

    def _take_record(self) -> ShallowRecord:
        return ShallowRecord(self._module, self._replaced, self.namespaces)

    def _take(self) -> tuple[ModuleState, dict[str, Content], Adapters]:
        adapters = find_adapters(self._module) if self._has_branches else NO_ADAPTERS
        state, tensors = with_base_layers(*walk_module(self._module, self._replaced), adapters.layers)
        return state, {name: content_of(tensor) for name, tensor in tensors.items()}, adapters

    def _take_code(self) -> dict[str, object]:
        """Return the functions of all classes and their modules, and the plain values of the classes."""
        return {
            f"{namespace.__name__}.{name}": value
            for namespace in self.namespaces
            for name, value in vars(namespace).items()
            if callable(value)
            or isinstance(value, _CODE)
            or (isinstance(namespace, type) and isinstance(value, _PLAIN))
        }


def _config_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return the configuration, which adapters change too."""
    config: Any = module.config
    found = dict(config) if isinstance(config, Mapping) else {**config.to_dict(), **implementations_of(config)}
    return {name: value for name, value in found.items() if name not in _WRITTEN_BY_DIFFUSERS}
