"""Lend modules to be run as their class, and call them, for ``accelerate``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch

from xditd.client.client import Client
from xditd.client.jobs.component import Component
from xditd.client.lending import Offer, describe
from xditd.client.loans import Loan
from xditd.client.loras.factors import describe_factors
from xditd.ipc.job_parts import LoraUse, Numerics
from xditd.ipc.loras import LoraPart
from xditd.ipc.tensors import FileBlock, ModuleDescription


class LentModule(NamedTuple):
    """A loan of a module, and the description with which it was lent."""

    loan: Loan
    description: ModuleDescription | None


def lend_module(
    client: Client,
    module: torch.nn.Module,
    *,
    label: str,
    generation: int,
    replaced: Collection[str],
    acceleration: str | None,
    base_layers: Collection[str] = (),
    before: LentModule | None = None,
) -> LentModule:
    """Lend a module to be run as its class does, without the attributes ``replaced`` of the module itself.

    At ``base_layers`` it has layers of PEFT, in whose place their base layers are lent. ``before`` is the module as it
    was lent last: its loan is returned, first if it runs in another way now, so that workers hold the weights once.
    The loan borrows the module's tensors: they must not be freed or written to while a call runs.
    """

    description: list[ModuleDescription | None] = []

    def make_offer() -> Offer:
        offer = describe(
            module,
            label=label,
            generation=generation,
            as_class=True,
            replaced=replaced,
            acceleration=acceleration,
            base_layers=base_layers,
        )
        if all(isinstance(block, FileBlock) for block in offer.manifest.blocks):
            # The daemon sees by itself whether files changed. Another module of these files may be lent, too, and has
            # generations of its own.
            offer.manifest = msgspec.structs.replace(offer.manifest, generation=0)
        description.append(offer.manifest.module)
        try:
            if before is not None and before.loan.is_live and before.description != offer.manifest.module:
                before.loan.return_()
        except BaseException:
            offer.close()
            raise
        return offer

    loan = client._current().lend(make_offer, None)
    if before is not None and before.loan.is_live and before.loan.component_id != loan.component_id:
        before.loan.return_()
    return LentModule(loan, description[-1])


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
