"""Results and arguments are described with all that they hold; what cannot be described says so."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.result_describer import ResultDescriber
from xditd.ipc.arguments import ListOf, MapOf, Named, Opaque, PairsOf, SetOf, TupleOf
from xditd.ipc.processes import ProcessIdentity


class Named2(NamedTuple):
    first: int


@pytest.fixture
def describer() -> ResultDescriber:
    job: Any = type("Job", (), {"parts": ()})
    return ResultDescriber(HeldTensors(), ProcessIdentity(pid=1, start_ticks=1), job, [])


BACKEND = "diffusers.models.attention_dispatch:AttentionBackendName.NATIVE"


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ({"a", "b"}, SetOf(items=("a", "b"))),
        (frozenset({1, 2}), SetOf(items=(1, 2))),
        (AttentionBackendName.NATIVE, Named(name=BACKEND)),
        ([1, (2.5, None)], ListOf(items=(1, TupleOf(items=(2.5, None))))),
        ({"a": True}, MapOf(items={"a": True})),
        ({1: "x"}, PairsOf(items=((1, "x"),))),
        (torch.bfloat16, Named(name="torch.bfloat16")),
    ],
)
def test_values_are_described(describer: ResultDescriber, value: Any, described: Any) -> None:
    assert describer.describe(value, lambda _: None) == described


def test_what_cannot_be_described_says_so(describer: ResultDescriber) -> None:
    assert isinstance(describer.describe(Named2(1), lambda _: None), Opaque)
    assert isinstance(describer.describe(object(), lambda _: None), Opaque)
