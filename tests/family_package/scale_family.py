"""The smallest model family of another package: one layer. On the path of a process, it is found as if installed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

import torch

from xditd.gpu_workers.models.family import Entry, Kind, Shape


class ScaleFamily:
    """A square matrix, and nothing else."""

    name = "scale"
    title = "a matrix of the tests (scale.safetensors)"
    kind: Kind = "transformer"
    tied: ClassVar[Mapping[str, str]] = {}
    ignored: re.Pattern[str] | None = None

    def claims(self, names: Collection[str]) -> bool:
        return "scale.weight" in names

    def canonical(self, name: str) -> str:
        return name

    def configure(self, shapes: Mapping[str, Shape]) -> int:
        return shapes["scale.weight"][0]

    def entries(self, config: int) -> Iterator[Entry]:
        yield Entry("scale.weight", (config, config), (("0.weight", config),))

    def check_layout(self, config: int, layout: object) -> None:
        pass

    def build(self, config: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(config, config, bias=False))

    def fuse(self, *_: object) -> None:
        pass
