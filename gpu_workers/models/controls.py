"""ControlNets of a forward: each runs before the transformer, which gets the sum of their residuals.

Several ControlNets of one architecture have a model each, whose weights stay plugged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from xditd.gpu_workers.models.operations import (
    Inputs,
    Residuals,
    TakesControls,
    TransformerOperations,
)
from xditd.gpu_workers.parallel import component_layouts
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.transports.tensor_views import dtype_name

if TYPE_CHECKING:
    from xditd.gpu_workers.models.cached_model import CachedModel
    from xditd.gpu_workers.models.component import Component


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """One ControlNet of one forward. Its model has its weights."""

    model: CachedModel
    inputs: Inputs
    scale: float
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By the transformer's argument: for each block in turn, the number of its residual."""
    note: Callable[[torch.Tensor], object] = lambda _: None
    """Gets every residual, not scaled."""
    check: Callable[[], object] = lambda: None
    """Raises ``NotFinite`` if a residual that was noted is not finite; waits for the device."""

    def take_rows(self, rows: slice) -> Control:
        return replace(self, inputs=self.model.operations_for("controlnet").take_rows(self.inputs, rows))


def check_fits(
    transformer: Component, control: Component, where: str, *, generates: bool, names: Sequence[str] = ()
) -> None:
    """Check that a ControlNet is one for this transformer. ``where`` begins errors.

    A generation gives it the transformer's arguments, in the transformer's dtype. A call gives it its own.

    Raises:
        BadRequest: it is for another family, of other sizes, or in a dtype with which the transformer cannot compute.
        Unsupported: the family takes none, or not with this variant or conditioning.
    """
    family, facts = transformer.match.family.name, control.controlnet_facts
    operations = transformer.model.operations_for("transformer")
    if facts.controls != family:
        raise BadRequest(
            f"{where}: {control.match.family.name} gives residuals for {facts.controls}, and the transformer is "
            f"{family}; lend a ControlNet of that model"
        )
    if not hasattr(operations, "with_residuals"):
        raise Unsupported(f"{where}: {family} takes no residuals of ControlNets; leave it out")
    dtype, of_control = transformer.model.dtype, control.model.dtype
    if (of_control if generates else torch.promote_types(of_control, dtype)) != dtype:
        raise BadRequest(
            f"{where}: the ControlNet is {dtype_name(of_control)}, and the transformer is {dtype_name(dtype)}; lend a "
            f"ControlNet in {dtype_name(dtype)}"
        )
    cast(TakesControls[Any], operations).check_control(
        transformer.match.config, control.match.config, generates=generates, names=names
    )


def with_controls(model: CachedModel, operations: TransformerOperations[Any], inputs: Inputs, variant: str) -> Inputs:
    """Run the ControlNets of a forward of this variant, and return its inputs with the sum of their residuals.

    The ranks of a sequence call this together. The layout in use is that of ``model`` again at the end.
    """
    total: dict[str, list[torch.Tensor]] = {}
    for control in inputs.controls:
        component_layouts.use(control.model.layout)
        found = control.model.operations_for("controlnet").residuals(control.model, control.inputs, variant)
        for each in found.values():
            for residual in each:
                control.note(residual)
        _add(total, _of_blocks(found, control))
    component_layouts.use(model.layout)
    plain = replace(inputs, controls=())
    return cast(TakesControls[Any], operations).with_residuals(plain, total)


def _of_blocks(found: Residuals, control: Control) -> dict[str, list[torch.Tensor]]:
    """Return the residuals times the scale; those that several blocks get are one tensor."""
    scaled = {
        name: list(each) if control.scale == 1.0 else [residual * control.scale for residual in each]
        for name, each in found.items()
        if each
    }
    if not control.blocks:
        return scaled
    return {name: [scaled[name][number] for number in numbers] for name, numbers in control.blocks.items()}


def check_blocks(blocks: Mapping[str, Sequence[int]], residuals: Mapping[str, int], where: str) -> None:
    """Check the numbers of the residuals that blocks get.

    Raises:
        BadRequest: an argument or a number that the ControlNet does not give.
    """
    for name, numbers in blocks.items():
        count = residuals.get(name, 0)
        wrong = sorted({number for number in numbers if number >= count})
        if wrong or not count:
            what = f"residual {wrong[0]}" if wrong else name
            given = listed(f"{count} of {each}" for each, count in residuals.items())
            raise BadRequest(f"{where}.blocks.{name}: there is no {what}; this ControlNet gives {given}")


def _add(total: dict[str, list[torch.Tensor]], found: Mapping[str, list[torch.Tensor]]) -> None:
    """Add residuals; pairs that several blocks get are added once."""
    for name, added in found.items():
        before = total.get(name)
        if before is None:
            total[name] = list(added)
            continue
        sums: dict[tuple[int, int], torch.Tensor] = {}
        longest = []
        for number in range(max(len(before), len(added))):
            if number >= len(added):
                longest.append(before[number])
            elif number >= len(before):
                longest.append(added[number])
            else:
                pair = before[number], added[number]
                key = id(pair[0]), id(pair[1])
                if key not in sums:
                    sums[key] = pair[0] + pair[1]
                longest.append(sums[key])
        total[name] = longest
