"""Calls on one rank: the tree of the class's own forward, part by part, and what is refused before any part runs."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.gpu_workers.families.flux1 import reference
from xditd.ipc.arguments import Argument, InIo, Kept, TupleOf, Values
from xditd.ipc.errors import BadRequest, NotFinite, UnknownKept
from xditd.ipc.requests import Call
from xditd.ipc.transports.host_shm import map_shm

if TYPE_CHECKING:
    from one_rank import OneRank, Room

State = dict[str, torch.Tensor]


@pytest.fixture
def messages(rank: OneRank) -> ModuleType:
    import flux1_messages

    return flux1_messages


@pytest.fixture(scope="module")
def state() -> State:
    """As few blocks as there can be: what they compute is for other tests."""
    return flux1_state_dict(0, double_blocks=1, single_blocks=1)


@pytest.fixture
def lent(rank: OneRank, state: State) -> OneRank:
    rank.lend("transformer", state)
    return rank


@pytest.fixture(scope="module")
def model(state: State) -> Any:
    return reference.transformer_from(state)


def given(room: Room, part: dict[str, Argument]) -> dict[str, torch.Tensor]:
    """The arguments of a forward that were written to the room, or are in the message."""
    found = {}
    for name, leaf in part.items():
        if isinstance(leaf, InIo):
            found[name] = room.read(leaf.place)
        elif isinstance(leaf, Values):
            found[name] = torch.tensor(leaf.values, dtype=getattr(torch, leaf.dtype)).reshape(leaf.shape)
    return found


def results(rank: OneRank, room: Room, job: Call) -> list[torch.Tensor]:
    """Run a call, and read the one tensor of each part's tuple from the room."""
    called = rank.run(job).results
    assert called is not None
    assert called.block is None
    found = []
    for tree in called.trees:
        assert isinstance(tree, TupleOf)
        (leaf,) = tree.items
        assert isinstance(leaf, InIo)
        found.append(room.read(leaf.place))
    return found


@torch.no_grad()
def test_each_part_gives_what_the_class_gives(lent: OneRank, messages: ModuleType, model: Any) -> None:
    room = lent.room()
    parts = [messages.forward(room, 2, sigma=0.75), messages.forward(room, 1, seed=9)]
    found = results(lent, room, messages.call(room, *parts))
    for result, part in zip(found, parts, strict=True):
        (expected,) = model(**given(room, part), return_dict=False)
        assert torch.equal(result, expected)


def test_results_that_are_larger_than_the_room_come_in_a_block_of_the_rank(lent: OneRank, messages: ModuleType) -> None:
    room, small = lent.room(), lent.room()
    (expected,) = results(lent, room, messages.call(room))
    called = lent.run(messages.call(small, size_bytes=messages.TOKENS * 64 * 4 - 1)).results
    assert called is not None
    assert called.block is not None
    assert called.provider == lent.client  # the rank's process, which is this one
    (tree,) = called.trees
    assert isinstance(tree, TupleOf)
    (leaf,) = tree.items
    assert isinstance(leaf, InIo)
    mapping = map_shm(called.block, called.provider)
    stretch = mapping.bytes_tensor()[leaf.offset_bytes :][: leaf.place.size_bytes]
    assert torch.equal(stretch.clone().view(torch.float32).view(leaf.shape), expected)
    del stretch
    mapping.close()


def test_what_is_foreseen_changes_no_bit(lent: OneRank, messages: ModuleType) -> None:
    rooms = [lent.room() for _ in range(4)]
    foreseen: list[dict[str, tuple[float, ...]]] = [
        {}, {"timestep": (1.0, 0.5, 0.25)}, {"timestep": (0.7,)}, {"guidance": (5.0,), "timestep": ()}
    ]  # fmt: skip
    first, *others = (
        results(lent, room, messages.call(room, foreseen=each))[0] for room, each in zip(rooms, foreseen, strict=True)
    )
    assert all(torch.equal(first, other) for other in others)


def test_kept_tensors_are_named_in_later_calls(lent: OneRank, messages: ModuleType) -> None:
    first, second = lent.room(), lent.room()
    sent = messages.forward(first)
    sent["encoder_hidden_states"] = msgspec.structs.replace(sent["encoder_hidden_states"], kept_id="k1")
    named = messages.forward(second)
    named["encoder_hidden_states"] = Kept(kept_id="k1", dtype="float32", shape=(1, messages.TEXT_TOKENS, 4096))
    later = messages.call(second, named)
    with pytest.raises(UnknownKept, match="kept tensor k1: not known to this worker; send it again"):
        lent.run(later)
    (expected,) = results(lent, first, messages.call(first, sent))
    assert torch.equal(results(lent, second, later)[0], expected)
    lent.forget(lent.client)
    with pytest.raises(UnknownKept):
        lent.run(later)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.pop("timestep"), r"arguments: timestep is missing; it takes encoder_hidden_states, guid"),
        (lambda part: part.update(return_dict=False), r"arguments: return_dict cannot be given; it takes"),
        (lambda part: part.update(img_ids=None), r"img_ids: NoneType where a tensor is needed, \[16, 3\]"),
        (
            lambda part: part.update(timestep=Values(dtype="float32", shape=(1,), values=(900.0,))),
            "timestep: 900 is not a number from 0 to 1; give sigmas, not the 0 to 1000 of a scheduler",
        ),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_bad_part_is_refused_before_any_runs(
    lent: OneRank, messages: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Any, message: str, number: int
) -> None:
    room = lent.room()
    parts = [messages.forward(room), messages.forward(room, seed=9)]
    change(parts[number])
    operations: Any = lent.components.get("transformer", "transformer").match.model.operations
    monkeypatch.setattr(operations, "run", lambda *_: pytest.fail("a part ran"))
    with pytest.raises(BadRequest, match=message) as caught:
        lent.run(messages.call(room, *parts))
    assert f"parts[{number}]" in caught.value.detail


def test_values_that_are_not_finite_are_refused_by_part_and_name(lent: OneRank, messages: ModuleType) -> None:
    room = lent.room()
    part, other = messages.forward(room), messages.forward(room)
    other["pooled_projections"] = room.argument(torch.full((1, 768), torch.nan))
    with pytest.raises(BadRequest, match=r"parts\[1\]\.pooled_projections: some values are not finite in float32"):
        lent.run(messages.call(room, part, other))
    alone = lent.room()
    part = {**messages.forward(alone), "pooled_projections": alone.argument(torch.full((1, 768), torch.inf))}
    with pytest.raises(BadRequest, match=r"^pooled_projections: some values are not finite in float32"):
        lent.run(messages.call(alone, part))


def test_what_is_foreseen_of_no_argument_is_refused(lent: OneRank, messages: ModuleType) -> None:
    room = lent.room()
    job = messages.call(room, messages.forward(room), foreseen={"timesteps": (0.5,)})
    with pytest.raises(BadRequest, match=r"foreseen: timesteps is no argument; it takes .*, timestep, "):
        lent.run(job)


def test_a_variant_that_the_family_lacks_is_refused(lent: OneRank, messages: ModuleType) -> None:
    with pytest.raises(BadRequest, match="variant 'half': use one of class, float32_time"):
        lent.run(messages.call(lent.room(), variant="half"))


def test_a_result_that_is_not_finite_says_of_which_timestep_it_is(rank: OneRank, messages: ModuleType) -> None:
    broken = flux1_state_dict(0, double_blocks=1, single_blocks=1)
    broken["img_in.bias"][5] = torch.nan
    rank.lend("transformer", broken)
    room = rank.room()
    part = {**messages.forward(room, 2), "timestep": messages.numbers(0.75, 0.25)}
    with pytest.raises(NotFinite, match=r"transformer transformer \(.*\): result at timestep 0.75 to 0.25: some val"):
        rank.run(messages.call(room, part))
