"""Tensors in the workers: they are read like any other, and writes that the workers would not see are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue

import pytest
import torch

from xditd.client.jobs.held_tensors import HeldStore, HeldTensor
from xditd.ipc.arguments import Held
from xditd.ipc.errors import Unsupported

CPU = torch.device("cpu")
VALUES = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def held() -> Iterator[HeldTensor]:
    store = HeldStore(lambda _: VALUES.clone(), lambda _: None)
    yield HeldTensor(Held(held_id="h1", dtype="float32", shape=(3, 4)), store, torch.device("cpu"))
    store.close()


Operation = Callable[[torch.Tensor], object]

READS: list[Operation] = [
    lambda each: each + 1,
    lambda each: each[1],
    lambda each: each[:, 1:3].T.reshape(-1) * 2,
    lambda each: torch.cat([each, each[:1]]),
    lambda each: each.split(1)[2].view(2, 2),
    lambda each: each.detach().to(torch.float64),
    lambda each: each.clone().add_(1),
    lambda each: each[1].clone().zero_(),
    lambda each: each.max(),
]


@pytest.mark.parametrize("read", READS)
def test_operations_give_what_they_give_for_the_values(
    held: HeldTensor, read: Callable[[torch.Tensor], object]
) -> None:
    found, expected = read(held), read(VALUES)
    assert torch.equal(torch.as_tensor(found) + 0, torch.as_tensor(expected))


def test_values_leave_torch(held: HeldTensor) -> None:
    assert held.tolist() == VALUES.tolist()
    assert held[1].tolist() == VALUES[1].tolist()
    assert (held[:, 1].numpy() == VALUES[:, 1].numpy()).all()
    assert held[2, 3].item() == 11.0
    assert torch.zeros(3, 4).copy_(held).equal(VALUES)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda each: copy.deepcopy({"a": each})["a"],
        lambda each: ForkingPickler.loads(ForkingPickler.dumps(each)),
        torch.from_dlpack,
    ],
)
def test_copies_are_plain_tensors(held: HeldTensor, copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = copied(held)
    assert type(found) is torch.Tensor
    assert torch.equal(found, VALUES)
    found.add_(1)  # it is this process's own
    assert torch.equal(held.read(), VALUES)


def test_one_id_is_one_tensor_until_all_uses_have_ended() -> None:
    """A call returns the cache that it was given: to drop one of both must not free what the other needs."""
    released: SimpleQueue[tuple[str, ...]] = SimpleQueue()
    store = HeldStore(lambda _: VALUES.clone(), released.put)
    first, second = (store.tensor(Held(held_id=each, dtype="float32", shape=(3, 4)), CPU) for each in ("h1", "h2"))
    again = store.tensor(Held(held_id="h1", dtype="float32", shape=(3, 4)), CPU)
    assert again is first
    del again, second
    assert released.get(timeout=60) == ("h2",)
    del first
    assert released.get(timeout=60) == ("h1",)
    store.close()


def assign_data(tensor: torch.Tensor) -> None:
    tensor.data = VALUES + 1


def write_item(tensor: torch.Tensor) -> None:
    tensor[0, 0] = 1.0


def add_to_row(tensor: torch.Tensor) -> None:
    row = tensor[1]
    row += 1


WRITES: list[Operation] = [
    lambda each: each.add_(1),
    lambda each: each[1].zero_(),
    lambda each: each[:, :2].T.copy_(torch.zeros(2, 3)),
    lambda each: each.detach().fill_(0),
    lambda each: each.split(1)[0].zero_(),
    lambda each: torch.add(VALUES, 1, out=each),
    lambda each: torch._foreach_add_([each], 1),
    lambda each: each.data.add_(1),
    assign_data,
    write_item,
    add_to_row,
]


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_refused(held: HeldTensor, write: Operation) -> None:
    with pytest.raises(Unsupported, match=r"would change a copy of .*clone it before you write to it"):
        write(held)
    assert held.tolist() == VALUES.tolist()
