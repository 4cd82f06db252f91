"""Modules that run as their class, on a GPU: lent from its memory, with the bits of the class in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from class_entries import ENTRIES
from class_entry import ClassEntry, Random
from nested_values import tensors_of
from running_daemon import RunningDaemon
from torch.utils._pytree import tree_map_only

from xditd.client import Client, Tier, accelerate

pytestmark = pytest.mark.gpu

SKIPPED = {"AnyFlowFARTransformer3DModel-kv_write", "WanAnimate2Transformer3DModel-kv_cached"}
"""One is refused, and one compiles for a minute: see ``test_every_class.py``."""


@pytest.fixture(scope="module")
def gpu_client(start_daemon: Callable[..., RunningDaemon]) -> Iterator[Client]:
    daemon = start_daemon(1, "cuda")
    daemon.wait_ready()
    with daemon.connect() as client:
        yield client


def to_gpu(value: Any) -> Any:
    """Move tensors to the GPU, in lists and maps, and in objects such as KV caches."""
    if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        for name, each in vars(value).items():
            setattr(value, name, to_gpu(each))
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_gpu, value))
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), value)


@pytest.mark.parametrize("key", [key for key in ENTRIES if key not in SKIPPED])
@torch.no_grad()
def test_a_worker_gives_the_bits_of_the_class(gpu_client: Client, key: str) -> None:
    entry: ClassEntry = ENTRIES[key]
    model = entry.build().cuda()
    ours, theirs = ({name: to_gpu(each) for name, each in entry.arguments(Random(1)).items()} for _ in range(2))
    with accelerate(model, client=gpu_client) as fast:
        found = model(**ours)
        assert all(fast.calls.values())
    expected = model(**theirs)
    assert type(found) is type(expected)
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert pairs
    for one, other in pairs:
        assert (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape)
        assert torch.equal(one.clone(), other)


@torch.no_grad()
def test_nothing_is_copied(gpu_client: Client) -> None:
    model = ENTRIES["FluxTransformer2DModel"].build().cuda()
    with gpu_client.lend(model, as_class=True) as loan:
        assert loan.tiers == (Tier.CUDA_IPC,)
        assert loan.copied.total == 0
