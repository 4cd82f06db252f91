"""What the operations of transformer families have in common that run as their diffusers class by its token plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from xditd.gpu_workers.models.operations import Inputs, RowResults
from xditd.gpu_workers.models.planned_path import PlannedPath
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import Unsupported


def check_has_plain_settings(layout: ParallelLayout, name: str, title: str) -> None:
    """Check that settings ask for nothing that a family without kernels of its own lacks.

    ``name`` is the family's, ``title`` what users call it.

    Raises:
        Unsupported: the settings ask for fused kernels, or for products in eight bits.
    """
    if layout.precision != "bf16":
        raise Unsupported(
            f"{name}: precision {layout.precision!r}: {title} has no products in eight bits; start the daemon with "
            "precision bf16"
        )
    if layout.requested_kernels == "fused":
        raise Unsupported(f"{name}: kernels 'fused': {title} has none; start the daemon with kernels auto")


class PlannedOperations:
    """Part of :class:`~xditd.gpu_workers.models.operations.TransformerOperations`, for results that are one tensor."""

    name: ClassVar[str]
    """Of the family."""
    title: ClassVar[str]
    """What users call it."""
    class_name: ClassVar[str]
    """Of diffusers' class, which has a token plan."""
    of_all_rows: ClassVar[frozenset[str]] = frozenset()
    """Arguments that all rows share."""

    def fuse(
        self,
        config: object,  # noqa: ARG002 - those of the protocol
        module: torch.nn.Module,
        layout: ParallelLayout,
        dtype: torch.dtype,  # noqa: ARG002
        exceptions: Mapping[str, torch.dtype],  # noqa: ARG002
    ) -> PlannedPath:
        check_has_plain_settings(layout, self.name, self.title)
        return PlannedPath(module, self.class_name, layout)

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        return Inputs(
            {
                name: each if name in self.of_all_rows or each is None else each[rows]
                for name, each in inputs.arguments.items()
            },
            {name: each if name in self.of_all_rows else each[rows] for name, each in inputs.known.items()},
        )

    def tree(self, rows: RowResults) -> tuple[torch.Tensor]:
        return (rows if isinstance(rows, torch.Tensor) else torch.stack(rows),)
