"""Detect changes of a module since it was lent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from xditd.ipc.module_state import ModuleState
from xditd.ipc.transports.module_walk import walk_module


class _Content(NamedTuple):
    """What changes when a tensor is replaced or written to. Writes through ``.data`` are not counted by torch."""

    address: int
    version: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]


class Snapshot:
    """The state of a module at one moment. ``replaced`` are attributes of the module itself that do not count."""

    def __init__(self, module: torch.nn.Module, replaced: Collection[str]) -> None:
        self._module = module
        self._replaced = replaced
        self._config = _config_of(module)
        self._state, self._contents = self._take()

    def changes(self) -> list[str]:
        """Return the names of what has changed since, at most a few."""
        state, contents = self._take()
        config = _config_of(self._module)
        if state == self._state and contents == self._contents and config == self._config:
            return []
        found = [f"config.{name}" for name in {**self._config, **config} if self._config.get(name) != config.get(name)]
        found += [
            path or type(self._module).__name__
            for path in {**self._state.submodules, **state.submodules}
            if self._state.submodules.get(path) != state.submodules.get(path)
        ]
        found += [name for name in {**self._contents, **contents} if self._contents.get(name) != contents.get(name)]
        return found or ["the sharing of submodules"]

    def _take(self) -> tuple[ModuleState, dict[str, _Content]]:
        state, tensors = walk_module(self._module, self._replaced)
        return state, {name: _content(tensor) for name, tensor in tensors.items()}


def _config_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return the configuration, which adapters change too."""
    config: Any = module.config
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def _content(tensor: torch.Tensor) -> _Content:
    version = 0 if tensor.is_inference() else tensor._version
    return _Content(tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.shape, tensor.stride())
