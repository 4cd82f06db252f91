"""RemoteWeights: what is lent, what a patch changes, and what a release frees."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch

from xditd.client import OutOfMemory, Unsupported
from xditd.client.comfyui.packed_tensors import LendableTensors
from xditd.client.comfyui.weights import Edit, RemoteWeights, check_plain
from xditd.ipc.packed import PackedWeight
from xditd.ipc.tensors import ComponentKind


class Lender:
    """Replaces the client, and records what it was lent."""

    def __init__(self) -> None:
        self.lends: list[tuple[dict[str, torch.Tensor], int]] = []
        self.changed: list[set[str] | None] = []
        self.live = 0
        self.live_before: list[int] = []
        """How many loans there were at each lend."""
        self.has_room_for = 2
        self.prepared: list[tuple[set[str], Any]] = []

    def prepare(self, tensors: dict[str, torch.Tensor], *, kind: Any, label: str, compute_dtype: str | None) -> None:
        if label == "broken":
            raise Unsupported("no such model")
        self.prepared.append((set(tensors), kind))

    def lend(
        self,
        tensors: dict[str, torch.Tensor],
        *,
        kind: Any,
        label: str,
        generation: int,
        changed: Collection[str] | None,
        compute_dtype: str | None,
    ) -> Loan:
        self.live_before.append(self.live)
        if self.live >= self.has_room_for:
            raise OutOfMemory("no room")
        self.changed.append(None if changed is None else set(changed))
        self.lends.append(({name: tensor.clone() for name, tensor in tensors.items()}, generation))
        self.live += 1
        return Loan(self)


class Loan:
    def __init__(self, lender: Lender) -> None:
        self.lender = lender
        self.is_live = True

    def return_(self) -> None:
        assert self.is_live
        self.is_live = False
        self.lender.live -= 1


@pytest.fixture
def lender() -> Lender:
    return Lender()


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(4), "b": torch.ones(4)}


@pytest.fixture(params=[False, True], ids=["as they are", "whole"])
def weights(lender, base, request) -> Iterator[RemoteWeights]:
    made = RemoteWeights(
        base,
        kind=ComponentKind.TRANSFORMER,
        label="x",
        device="cpu",
        is_whole=request.param,
        connect=lambda: lender,  # type: ignore[arg-type, return-value]
    )
    yield made
    made.release()
    assert lender.live == 0


def add(amount: float) -> Edit:
    return Edit((amount,), lambda value: value + amount)


@pytest.mark.parametrize(("kind", "given"), [(ComponentKind.VAE, ComponentKind.VAE), (ComponentKind.MODULE, None)])
def test_announced_weights_are_lent_with_the_same_kind(lender, base, kind, given):
    weights = RemoteWeights(base, kind=kind, label="x", device="cpu", is_whole=False, connect=lambda: lender)
    weights.announce()
    assert lender.prepared == [({"a", "b"}, given)]
    assert not lender.lends


def test_an_announcement_that_fails_is_left_to_the_lend(lender, base):
    weights = RemoteWeights(
        base, kind=ComponentKind.VAE, label="broken", device="cpu", is_whole=False, connect=lambda: lender
    )
    weights.announce()
    assert lender.prepared == []


def test_lends_once_and_again_after_the_loan_is_lost(weights, lender):
    first = weights.loan
    assert weights.loan is first
    first.is_live = False
    lender.live -= 1
    assert weights.loan is not first
    assert [generation for _, generation in lender.lends] == [0, 0]


def test_a_patch_changes_its_tensor_alone_and_leaves_the_base(weights, lender, base):
    weights.apply({"b": add(1.0)})
    (tensors, _) = lender.lends[-1]
    assert tensors["a"].tolist() == [0.0] * 4
    assert tensors["b"].tolist() == [2.0] * 4
    assert base["b"].tolist() == [1.0] * 4
    assert lender.live == 1


def test_the_same_patch_again_is_no_work(weights, lender):
    weights.apply({"b": add(1.0)})
    weights.apply({"b": add(1.0)})
    assert len(lender.lends) == 1


def test_another_strength_is_written_in_place_as_the_next_generation(weights, lender):
    merged = []

    def edit(name: str, amount: float) -> Edit:
        return Edit((amount,), lambda value: (merged.append(name), value + amount)[1])

    weights.apply({"a": edit("a", 1.0), "b": edit("b", 1.0)})
    first = lender.lends[-1][1]
    weights.apply({"a": edit("a", 1.0), "b": edit("b", 3.0)})
    assert merged == ["a", "b", "b"]
    assert lender.lends[-1][1] == first + 1
    assert lender.changed[-1] == {"b"}
    assert lender.lends[-1][0]["b"].tolist() == [4.0] * 4


def test_a_patch_that_goes_is_undone(weights, lender):
    weights.apply({"a": add(1.0), "b": add(1.0)})
    weights.apply({"a": add(1.0)})
    assert lender.lends[-1][0]["b"].tolist() == [1.0] * 4
    weights.apply({})
    assert lender.lends[-1][0]["a"].tolist() == [0.0] * 4
    assert lender.live == 1


def test_a_merge_that_failed_is_done_again(weights, lender):
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no room")

    weights.apply({"b": add(1.0)})
    with pytest.raises(RuntimeError, match="no room"):
        weights.apply({"b": Edit((9.0,), fail)})
    weights.apply({"b": add(1.0)})
    assert lender.lends[-1][0]["b"].tolist() == [2.0] * 4
    with pytest.raises(RuntimeError, match="no room"):
        weights.apply({"b": Edit((9.0,), fail)})
    weights.apply({})
    assert lender.lends[-1][0]["b"].tolist() == [1.0] * 4
    assert lender.changed[-1] in ({"b"}, None)


def test_what_goes_and_what_a_failed_merge_wrote_is_copied_again(lender, base):
    weights = RemoteWeights(
        base,
        kind=ComponentKind.TRANSFORMER,
        label="x",
        device="cpu",
        is_whole=True,
        connect=lambda: lender,  # type: ignore[arg-type, return-value]
    )

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no room")

    weights.apply({})
    weights.apply({"a": add(1.0)})
    with pytest.raises(RuntimeError, match="no room"):
        weights.apply({"a": add(1.0), "b": Edit((9.0,), fail)})
    weights.apply({"b": add(2.0)})
    assert [generation for _, generation in lender.lends] == [0, 1, 2]
    assert lender.changed == [None, {"a"}, {"a", "b"}]
    weights.release()


def test_the_older_loan_stays_until_the_next_one_is_lent(lender, base):
    """The workers have copied its file. Without memory for both it goes first."""
    weights = RemoteWeights(
        base,
        kind=ComponentKind.TRANSFORMER,
        label="x",
        device="cpu",
        is_whole=False,
        connect=lambda: lender,  # type: ignore[arg-type, return-value]
    )
    weights.apply({})
    weights.apply({"a": add(1.0)})
    weights.apply({"b": add(1.0)})
    weights.apply({})
    assert lender.live_before == [0, 1, 1, 1]
    assert lender.live == 1
    lender.has_room_for = 1
    weights.apply({"a": add(2.0)})
    assert lender.live_before == [0, 1, 1, 1, 1, 0]
    assert lender.lends[-1][0]["a"].tolist() == [2.0] * 4
    lender.has_room_for = 0
    with pytest.raises(OutOfMemory):
        weights.apply({"b": add(3.0)})
    assert lender.live == 0
    lender.has_room_for = 2
    weights.apply({"b": add(3.0)})
    assert lender.lends[-1][0]["b"].tolist() == [4.0] * 4
    weights.release()


def test_release_gives_back_and_the_next_use_lends_again(weights, lender):
    weights.apply({"b": add(1.0)})
    weights.release()
    assert lender.live == 0
    weights.release()
    weights.apply({"b": add(1.0)})
    assert lender.lends[-1][0]["b"].tolist() == [2.0] * 4


def test_a_packed_weight_is_patched_together_with_its_companions(lender):
    packed = PackedWeight("b", "float8", (4,), scale="b_scale")
    tensors = {"a": torch.zeros(4), "b": torch.ones(4).to(torch.float8_e4m3fn), "b_scale": torch.ones(())}
    marker = torch.tensor([*b"{}"], dtype=torch.uint8)

    def merge(weight: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return [(weight.float() * 2).to(weight.dtype), scale * 3]

    for is_whole in (False, True):
        weights = RemoteWeights(
            LendableTensors(dict(tensors), {"b": packed}, {"b.comfy_quant": marker}),
            kind=ComponentKind.TRANSFORMER,
            label="x",
            device="cpu",
            is_whole=is_whole,
            connect=lambda: lender,  # type: ignore[arg-type, return-value]
            compute_dtype="bfloat16",
        )
        weights.apply({"b": Edit((1,), merge)})
        lent = lender.lends[-1][0]
        assert (lent["b"].float().tolist(), lent["b_scale"].item()) == ([2.0] * 4, 3.0)
        assert torch.equal(lent["b.comfy_quant"], marker)
        assert lender.changed[-1] == ({"b", "b_scale"} if is_whole else None)
        weights.apply({})
        lent = lender.lends[-1][0]
        assert (lent["b"].float().tolist(), lent["b_scale"].item()) == ([1.0] * 4, 1.0)
        weights.release()
    assert lender.live == 0


def test_quantised_weights_are_refused_by_name():
    with pytest.raises(Unsupported, match=r"^x: a checkpoint with fp8 .*: lend its bfloat16.*blk is float8_e4m3fn"):
        check_plain({"blk": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "x")

    check_plain({"blk": torch.zeros(2), "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "x")

    class GGMLTensor(torch.Tensor):
        pass

    with pytest.raises(Unsupported, match="GGUF"):
        check_plain({"blk": torch.zeros(2).as_subclass(GGMLTensor)}, "x")
