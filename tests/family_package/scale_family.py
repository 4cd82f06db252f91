"""The smallest model family of another package: one learned scale. A process finds it, on its path, as if installed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from xditd.gpu_workers.models.entries import Entry, Shape
from xditd.gpu_workers.models.family import Kind

if TYPE_CHECKING:
    from scale_operations import ScaleOperations


class ScaleFamily:
    """A factor for each channel, and nothing else. The configuration is how many there are."""

    name = "scale"
    title = "a scale of the tests (scale.safetensors)"
    kind: Kind = "transformer"
    tied: ClassVar[Mapping[str, str]] = {}
    ignored: re.Pattern[str] | None = None
    fused_widths: tuple[int, ...] = ()

    def claims(self, names: Collection[str]) -> bool:
        return "scale.weight" in names

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> int:
        return shapes["scale.weight"][0]

    def entries(self, config: int, names: Collection[str]) -> Iterator[Entry]:
        yield Entry("scale.weight", (config,), (("scale", config),))

    def heads(self, config: int) -> int:
        return 0

    @property
    def operations(self) -> ScaleOperations:
        from scale_operations import ScaleOperations

        return ScaleOperations()
