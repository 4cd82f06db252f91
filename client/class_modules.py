"""Lend modules to be run as their class, and call them, for ``accelerate``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch

from xditd.client.client import Client
from xditd.client.jobs.component import Component
from xditd.client.lending import Offer, describe
from xditd.client.loans import Loan
from xditd.client.loras.factors import describe_factors
from xditd.ipc.job_parts import LoraUse, Numerics
from xditd.ipc.loras import LoraPart


def lend_module(
    client: Client,
    module: torch.nn.Module,
    *,
    label: str,
    generation: int,
    replaced: Collection[str],
    acceleration: str | None,
    base_layers: Collection[str] = (),
) -> Loan:
    """Lend a module to be run as its class does, without the attributes ``replaced`` of the module itself.

    At ``base_layers`` it has layers of PEFT, in whose place their base layers are lent.
    The loan borrows the module's tensors: they must not be freed or written to while a call runs.
    """

    def make_offer() -> Offer:
        return describe(
            module,
            label=label,
            generation=generation,
            as_class=True,
            replaced=replaced,
            acceleration=acceleration,
            base_layers=base_layers,
        )

    return client._current().lend(make_offer, None)


def lend_factors(
    client: Client,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
    *,
    label: str,
    part: LoraPart,
    generation: int,
) -> Loan:
    """Lend the factors and scales of LoRA layers, by path; they must not be freed or written to while a call runs."""
    make_offer = partial(describe_factors, factors, label=label, part=part, generation=generation)
    return client._current().lend(make_offer, None)


def call_module(
    client: Client,
    loan: Loan,
    arguments: Mapping[str, Any],
    *,
    method: str,
    numerics: Numerics,
    device: torch.device,
    while_running: Callable[[], None],
    loras: tuple[LoraUse, ...] = (),
) -> Any:
    """Run a method of a lent module with the caller's numerics and ``loras``; results are on ``device``.

    ``while_running`` is called when the request is sent. If it raises, the job is cancelled, and no object among the
    arguments changes.
    """
    loan.check()
    return client._runner.call_class(
        Component(loan.component_id, loan.facts, loras),
        [arguments],
        method=method,
        numerics=numerics,
        device=device,
        deadline_s=None,
        while_running=while_running,
    )[0]


def read_tensors(client: Client, loan: Loan, into: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors of a component from the workers, by name: each of ``into`` gets new memory, of its dtype and shape.

    Raises:
        LeaseLost, UnknownComponent: the component has ended.
    """
    for name, tensor in into.items():
        tensor.data = client._runner.read_tensor(loan.component_id, name, tensor)


def connect_again(client: Client) -> Client:
    """Return a new client of the same daemon: adopted weights outlive the session of ``client``."""
    return Client(client._lifetime.runtime.path, name="diffusers")
