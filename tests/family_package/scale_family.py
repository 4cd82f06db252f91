"""The smallest model family of another package: one layer. On the path of a process, it is found as if installed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

import torch

from xditd.gpu_workers.models.family import CallOptions, Entry, Inputs, Kind, Model, Shape
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.facts import ArgumentFacts, LatentFacts, TransformerFacts


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

    def entries(self, config: int, names: Collection[str]) -> Iterator[Entry]:
        yield Entry("scale.weight", (config, config), (("0.weight", config),))

    def heads(self, config: int) -> int:
        return 0

    @property
    def operations(self) -> ScaleOperations:
        return ScaleOperations()


class ScaleOperations:
    """Rows of numbers times the matrix, by ``Call`` alone: there is nothing to generate."""

    def build(self, config: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(config, config, bias=False))

    def fuse(self, *_: object) -> None:
        pass

    def facts(self, config: int, layout: ParallelLayout) -> TransformerFacts:
        return TransformerFacts(
            heads=0,
            ulysses=layout.degrees.ulysses,
            ring=layout.degrees.ring,
            arguments=(ArgumentFacts(name="rows", shape=("batch", config)),),
            variants=("class",),
            conditioning=(),
            latents=LatentFacts(channels=config, pixels=1),
            guidance="none",
            default_guidance_scale=0.0,
            default_steps=1,
        )

    def check(self, model: Model[int], inputs: Inputs) -> None:
        pass

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        return tuple(row.shape for row in inputs.arguments["rows"])

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        return Inputs({"rows": inputs.arguments["rows"][rows]})

    def run(self, model: Model[int], inputs: Inputs, options: CallOptions) -> torch.Tensor:
        return model.module(inputs.arguments["rows"])

    def tree(self, rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (rows,)
