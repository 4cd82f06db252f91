"""Run stock ControlNets in the workers: when a run starts, each is replaced by a copy whose model is lent.

ComfyUI's own code resizes and encodes the picture, chooses the steps, and applies strengths and stacks. Where it would
run the ControlNet's model, :class:`RemoteControlModel` notes the call and returns :class:`Residual`, which notes how
ComfyUI scales and adds it. The workers then run the model before the transformer, and its residuals stay there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import comfy.controlnet
import torch

from xditd.client.comfyui.families.adapter import ControlCall, ControlledModelAdapter, ControlSource, Residual
from xditd.client.comfyui.naming import name_of

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import ModelAdapter
    from xditd.client.comfyui.weights import RemoteWeights

_PATCHES = ("patches", "object_patches", "injections", "hook_patches", "weight_wrapper_patches", "wrappers")
"""What nodes change in a patcher, and a lent ControlNet would not have."""


class RemoteControlModel(torch.nn.Module):
    """Replaces the model inside ComfyUI's ControlNet. It has no weights on this side."""

    def __init__(self, weights: RemoteWeights, source: ControlSource) -> None:
        super().__init__()
        self._weights = weights
        self._numbers = source.numbers
        self.dtype = source.dtype
        """To which ComfyUI casts what it gives."""

    def forward(self, **given: Any) -> dict[str, list[Residual]]:
        """Note a call; return what stands for its residuals, a list for each kind of blocks."""
        call = ControlCall(self._weights, given)
        found = {}
        for kind, numbers in self._numbers.items():
            made = {number: Residual(call, kind, number) for number in numbers}  # places share a residual
            found[kind] = [made[number] for number in numbers]
        return found


@dataclass(frozen=True)
class _Remote:
    """A ControlNet's model that is lent while ComfyUI counts it as loaded, and its patcher."""

    model: RemoteControlModel
    patcher: Any


Make = Callable[[ControlSource, Any], tuple["RemoteControlModel", Any]]
"""Makes the model that replaces a stock one and its patcher, to be loaded on a device."""


_remotes: weakref.WeakKeyDictionary[Any, _Remote] = weakref.WeakKeyDictionary()
"""By the stock model whose tensors they lend, so that queueing a prompt again lends nothing again."""


def place_controls(conditions: Mapping[str, Sequence[dict[str, Any]]], family: ModelAdapter, make: Make) -> list[str]:
    """Replace the ControlNets of one run's conditioning by copies that run in the workers.

    ``conditions`` belong to this run: other runs' stay as they are. Returns what cannot run there, for an error;
    nothing is replaced then.
    """
    parts = [part for each in conditions.values() for part in each if part.get("control") is not None]
    copies: dict[int, Any] = {}
    faults = list(dict.fromkeys(fault for part in parts for fault in _faults(part["control"], family)))
    if faults:
        return faults
    adapter = cast(ControlledModelAdapter, family)
    for part in parts:
        part["control"] = _copied(part["control"], adapter, make, copies)
    return []


def _chain(control: Any) -> Iterator[Any]:
    while control is not None:
        yield control
        control = control.previous_controlnet


def _faults(control: Any, family: ModelAdapter) -> Iterator[str]:
    """Name what of a ControlNet, and of those that are stacked with it, the workers cannot run."""
    for each in _chain(control):
        if type(each) is not comfy.controlnet.ControlNet:
            yield f"ControlNet of the kind {name_of(type(each))}"
        elif not hasattr(family, "control_source"):
            yield f"ControlNet ({name_of(type(each.control_model))}) for this model"
        else:
            yield from _changes(each)
            found = cast(ControlledModelAdapter, family).control_source(each)
            if isinstance(found, str):
                yield found


def _changes(control: Any) -> Iterator[str]:
    """Name what nodes have changed in a stock ControlNet's model or its settings."""
    wrapped = control.control_model_wrapped
    for name in _PATCHES:
        if getattr(wrapped, name, None):
            yield f"a ControlNet whose model has {name.replace('_', ' ')}"
    for module in control.control_model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            yield f"a ControlNet whose {name_of(type(module))} was changed"
            break
    if control.global_average_pooling:
        yield "a ControlNet with global average pooling"
    if control.strength_type is not comfy.controlnet.StrengthType.CONSTANT:
        yield "a ControlNet with strengths by block"
    if "get_control" in vars(control) or "control_merge" in vars(control):
        yield "a ControlNet whose methods were replaced"


def _copied(control: Any, family: ControlledModelAdapter, make: Make, copies: dict[int, Any]) -> Any:
    """Return the copy of a ControlNet; those that are one object in ComfyUI stay one."""
    found = copies.get(id(control))
    if found is None:
        found = copies[id(control)] = control.copy()
        remote = _remote_of(control, family, make)
        found.control_model, found.control_model_wrapped = remote.model, remote.patcher
        found.manual_cast_dtype = None  # the copy's dtype is what stock computes in
        if control.previous_controlnet is not None:
            found.set_previous_controlnet(_copied(control.previous_controlnet, family, make, copies))
    return found


def _remote_of(control: Any, family: ControlledModelAdapter, make: Make) -> _Remote:
    found = _remotes.get(control.control_model)
    if found is None:
        source = family.control_source(control)
        assert not isinstance(source, str)
        found = _remotes[control.control_model] = _Remote(*make(source, control.load_device))
    return found
