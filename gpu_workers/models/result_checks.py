"""Check that the results of a job are finite.

Finite inputs (``job_checks``) give other results if a weight is NaN, or if float16 overflows. Each result costs one
reduction on the device; the host reads all of them at once, when it waits for the job anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.finite import magnitude
from xditd.ipc.errors import NotFinite
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import ComponentKind


class FiniteCheck:
    """Finds the first result that is not finite: :meth:`note` all in order, :meth:`fetch`, then :meth:`fault`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._magnitudes: list[torch.Tensor] = []
        self._read: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def note(self, name: str, result: torch.Tensor) -> None:
        """Add a result; the host does not wait for it."""
        self._names.append(name)
        self._magnitudes.append(magnitude(result))

    def note_part(self, name: str, part: torch.Tensor) -> None:
        """Add a further part of the last result, or its first one; ``name`` is that of the whole."""
        if self._names[-1:] == [name]:
            self._magnitudes[-1] = torch.maximum(self._magnitudes[-1], magnitude(part))  # NaN if one of them is
        else:
            self.note(name, part)

    def fetch(self) -> None:
        """Start to copy the reductions to the host, in stream order, without waiting."""
        if not self._magnitudes:
            return  # all results are of whole numbers
        # torch pins the target memory, which an asynchronous copy needs.
        self._read = torch.stack(self._magnitudes).to("cpu", non_blocking=True)
        if self._magnitudes[0].is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def first(self) -> int | None:
        """Wait for the copy; return the number of the first result that is not finite, from 0, or ``None``."""
        if not self._names:
            return None
        if self._read is None:
            self.fetch()
        assert self._read is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        return next((number for number, found in enumerate(self._read.tolist()) if not math.isfinite(found)), None)

    def fault(self, component: Component, *into: torch.dtype, loras: Sequence[str] = ()) -> NotFinite | None:
        """Wait for the copy; return the error for the first result that is not finite, or ``None``.

        ``into`` are the dtypes to which the last result will be converted. ``loras`` describe those of the job.
        """
        first = self.first()
        if first is not None:
            return _fault(component, self._names[first], "", loras)
        for dtype in into:
            assert self._read is not None
            # If any value overflows, the largest one does.
            if not self._read[-1].to(dtype).isfinite():
                return _fault(component, self._names[-1], f" in {str(dtype).removeprefix('torch.')}", loras)
        return None


def _fault(component: Component, name: str, where: str, loras: Sequence[str]) -> NotFinite:
    manifest = component.manifest
    computed = str(component.match.dtype).removeprefix("torch.")
    # Arguments of a model class are not checked: some classes take infinity in a mask.
    where_to_look = (
        "the arguments and its weights" if component.match.family.kind == ComponentKind.MODULE.value else "its weights"
    )
    with_loras = f" with {listed(loras)}: try it without, or with smaller strengths;" if loras else ""
    return NotFinite(
        f"{component.match.family.kind} {component.component_id} ({manifest.label}): {name}: some values are NaN or "
        f"infinite{where};{with_loras} look for such values in {where_to_look}, which are {computed}, and if there are "
        "none, lend it in a dtype of more range (bfloat16, float32)"
    )
