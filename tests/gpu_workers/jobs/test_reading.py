"""Reading argument trees: every kind of leaf, kept tensors, and refusals by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.job_io import JobIo
from xditd.gpu_workers.jobs.kept import KeptTensors
from xditd.gpu_workers.jobs.reading import ArgumentReader, check_names
from xditd.ipc.arguments import Argument, InIo, Kept, ListOf, MapOf, Named, PairsOf, Repeated, Rows, TupleOf, Values
from xditd.ipc.errors import BadRequest, LimitExceeded, UnknownKept
from xditd.ipc.facts import ArgumentFacts
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.transports.host_shm import HostArena

CPU = torch.device("cpu")
SIZE = 2**20
ALICE, BOB = ProcessIdentity(pid=1, start_ticks=1), ProcessIdentity(pid=2, start_ticks=1)


class Jobs:
    """One block, and readers of one job after the other on it."""

    def __init__(self) -> None:
        self.arena = HostArena(SIZE)
        self.kept = KeptTensors()
        self._io = JobIo(CPU)
        self._end = 0

    def put(self, tensor: torch.Tensor, kept_id: str | None = None) -> InIo:
        """Write a tensor into the block."""
        name: Any = str(tensor.dtype).removeprefix("torch.")
        leaf = InIo(offset_bytes=self._end, dtype=name, shape=tuple(tensor.shape), kept_id=kept_id)
        self.arena.tensor(leaf.offset_bytes, leaf.dtype, leaf.shape).copy_(tensor)
        self._end += -(-max(tensor.nbytes, 1) // 256) * 256
        return leaf

    def reader(self, client: ProcessIdentity = ALICE, held: HeldTensors | None = None) -> ArgumentReader:
        return ArgumentReader(self._io.open(self.arena.block(), identify(os.getpid())), CPU, self.kept, client, held)

    def read(self, node: Argument, client: ProcessIdentity = ALICE) -> Any:
        """Read one argument as a job does, to its end."""
        reader = self.reader(client)
        found = reader.read({"x": node}).arguments["x"]
        reader.finish()
        return found

    def close(self) -> None:
        self._io.close()
        self.arena.close()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


def kept(kept_id: str, *shape: int, dtype: Any = "float32") -> Kept:
    return Kept(kept_id=kept_id, dtype=dtype, shape=shape)


def rows(*parts: tuple[Any, int]) -> Rows:
    return Rows(parts=tuple(Repeated(tensor=tensor, times=times) for tensor, times in parts))


def values(*numbers: float, dtype: Any = "float32") -> Values:
    return Values(dtype=dtype, shape=(len(numbers),), values=numbers)


@pytest.mark.parametrize("plain", [None, True, 7, -0.5, "text"], ids=repr)
def test_what_is_no_tensor_is_as_it_was_given(jobs: Jobs, plain: Any) -> None:
    assert jobs.read(plain) is plain


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_a_tensor_in_the_block_is_copied_in_its_dtype_and_shape(jobs: Jobs, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    leaf = jobs.put(tensor)
    found = jobs.read(leaf)
    jobs.arena.tensor(leaf.offset_bytes, leaf.dtype, leaf.shape).zero_()
    assert found.dtype == dtype
    assert torch.equal(found.double(), tensor.double())


@pytest.mark.parametrize("shape", [(), (1,), (2, 2), (0,)], ids=str)
def test_values_are_a_tensor_that_the_host_knows(jobs: Jobs, shape: tuple[int, ...]) -> None:
    numbers = [0.1, 0.25, 0.5, 0.75][: torch.zeros(shape).numel()]
    reader = jobs.reader()
    inputs = reader.read({"timestep": Values(dtype="bfloat16", shape=shape, values=tuple(numbers))})
    reader.finish()
    found = inputs.arguments["timestep"]
    assert (found.dtype, found.shape) == (torch.bfloat16, shape)
    # As the tensor has them, so that equal tensors are equal numbers.
    assert inputs.known == {"timestep": tuple(torch.tensor(numbers, dtype=torch.bfloat16).tolist())}


def test_the_host_knows_nothing_of_other_tensors_nor_of_those_below_the_top(jobs: Jobs) -> None:
    reader = jobs.reader()
    inputs = reader.read({
        "a": jobs.put(torch.ones(2)),
        "b": ListOf(items=(values(0.5),)),
        "c": rows((values(0.5), 2)),
        "d": 0.5,
    })  # fmt: skip
    assert inputs.known == {}
    assert inputs.arguments["b"][0].tolist() == [0.5]
    assert inputs.arguments["c"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_values_that_are_not_as_many_as_the_shape_says_are_refused(jobs: Jobs, count: int) -> None:
    with pytest.raises(BadRequest, match=rf"x\[1\]: {count} values for the shape \[2, 2\]"):
        jobs.read(ListOf(items=(None, Values(dtype="float32", shape=(2, 2), values=(0.5,) * count))))


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (values(1e300), "x: some values are not finite in float32"),
        (values(0.5, 70_000.0, dtype="float16"), "x: some values are not finite in float16"),
        (values(300, dtype="uint8"), "x: not all of its values can be uint8: value cannot be converted"),
        (values(2**40, dtype="int32"), "x: not all of its values can be int32"),
    ],
    ids=str,
)
def test_values_that_their_dtype_does_not_hold_are_refused(jobs: Jobs, node: Values, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        jobs.read(node)
    with pytest.raises(BadRequest, match=says.replace("x:", r"x\[0\]:")):
        jobs.read(ListOf(items=(node,)))


def test_trees_keep_their_form(jobs: Jobs) -> None:
    tensor = torch.arange(3.0)
    found = jobs.read(MapOf(items={"a": ListOf(items=(jobs.put(tensor), 1)), "b": TupleOf(items=(None, values(2.0)))}))
    assert list(found) == ["a", "b"]
    assert isinstance(found["a"], list)
    assert torch.equal(found["a"][0], tensor)
    assert found["a"][1] == 1
    assert isinstance(found["b"], tuple)
    assert found["b"][0] is None
    assert found["b"][1].tolist() == [2.0]


def test_a_tensor_beyond_the_block_is_refused_by_its_path(jobs: Jobs) -> None:
    outside = InIo(offset_bytes=SIZE, dtype="float32", shape=(2**20,))
    with pytest.raises(BadRequest, match=rf"x\.a\[1\]: ends at byte {SIZE + 2**22} of an I/O block of"):
        jobs.read(MapOf(items={"a": ListOf(items=(None, outside))}))
    with pytest.raises(BadRequest, match=r"parts\[3\]\.x: ends at byte"):
        jobs.reader().read({"x": outside}, "parts[3].")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_values_that_are_not_finite_are_refused_by_path_and_not_kept(
    jobs: Jobs, value: float, dtype: torch.dtype
) -> None:
    sound, broken = torch.ones(4, dtype=dtype), torch.ones(4, dtype=dtype)
    broken[2] = value
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(BadRequest, match=rf"x\[1\]: some values are not finite in {name}"):
        jobs.read(ListOf(items=(jobs.put(sound, "sound"), jobs.put(broken, "broken"))))
    with pytest.raises(BadRequest, match=rf"x\.rows\[1\]: some values are not finite in {name}"):
        jobs.read(rows((jobs.put(sound), 2), (jobs.put(broken), 1)))
    assert len(jobs.kept) == 0


def test_what_is_kept_is_found_by_its_id_at_one_address(jobs: Jobs) -> None:
    tensor = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    leaf = jobs.put(tensor, "k1")
    first = jobs.read(leaf)
    jobs.arena.tensor(leaf.offset_bytes, leaf.dtype, leaf.shape).zero_()
    second, third = (jobs.read(kept("k1", 2, 3)) for _ in range(2))
    assert torch.equal(second, tensor)
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()


def test_nothing_is_kept_before_the_job_was_checked_to_its_end(jobs: Jobs) -> None:
    reader = jobs.reader()
    reader.read({"x": jobs.put(torch.ones(2), "k1")})
    assert len(jobs.kept) == 0
    reader.finish()
    assert len(jobs.kept) == 1


def test_what_is_not_kept_is_asked_for_again(jobs: Jobs) -> None:
    jobs.read(jobs.put(torch.ones(2), "k1"))
    for client, leaf in ((ALICE, kept("k2", 2)), (BOB, kept("k1", 2))):
        with pytest.raises(UnknownKept, match=f"kept tensor {leaf.kept_id}: not known to this worker; send it again"):
            jobs.read(leaf, client)
    jobs.kept.forget(ALICE)
    with pytest.raises(UnknownKept):
        jobs.read(kept("k1", 2))


@pytest.mark.parametrize("leaf", [kept("k1", 2), kept("k1", 3, dtype="bfloat16")], ids=str)
def test_another_tensor_under_the_same_id_is_not_taken_for_it(jobs: Jobs, leaf: Kept) -> None:
    jobs.read(jobs.put(torch.ones(2), "k1"))
    jobs.read(jobs.put(torch.zeros(3), "k1"))
    assert jobs.read(kept("k1", 3)).tolist() == [0, 0, 0]
    with pytest.raises(UnknownKept, match="x: kept tensor k1 has another shape or dtype; send it again"):
        jobs.read(leaf)


def test_a_single_row_is_repeated_without_a_copy(jobs: Jobs) -> None:
    jobs.read(jobs.put(torch.arange(4.0).view(1, 4), "k1"))
    one = jobs.read(kept("k1", 1, 4))
    assert jobs.read(rows((kept("k1", 1, 4), 1))).data_ptr() == one.data_ptr()
    many = jobs.read(rows((kept("k1", 1, 4), 3)))
    assert many.tolist() == [[0, 1, 2, 3]] * 3
    assert many.data_ptr() == one.data_ptr()


def test_each_of_several_rows_is_repeated_by_itself(jobs: Jobs) -> None:
    assert jobs.read(rows((jobs.put(torch.tensor([[1.0], [2.0]])), 2))).tolist() == [[1], [1], [2], [2]]


def test_rows_of_several_tensors_are_joined_in_order(jobs: Jobs) -> None:
    jobs.read(jobs.put(torch.full((1, 2), 2.0), "k1"))
    found = jobs.read(
        rows(
            (jobs.put(torch.full((1, 2), 1.0), "k2"), 2),
            (kept("k1", 1, 2), 1),
            (Values(dtype="float32", shape=(1, 2), values=(3.0, 3.0)), 1),
        )
    )
    assert found.tolist() == [[1, 1], [1, 1], [2, 2], [3, 3]]
    assert jobs.read(kept("k2", 1, 2)).tolist() == [[1, 1]]  # kept as it was sent, not as it was repeated


@pytest.mark.parametrize("other", [torch.ones(1, 3), torch.ones(1, 2, 1), torch.ones(1, 2).half()], ids=str)
def test_rows_that_cannot_be_joined_are_refused_with_their_shapes(jobs: Jobs, other: torch.Tensor) -> None:
    with pytest.raises(BadRequest, match=r"x: rows of different shapes or dtypes cannot be joined: \[2, 2\] torch"):
        jobs.read(rows((jobs.put(torch.ones(1, 2)), 2), (jobs.put(other), 1)))


@pytest.mark.parametrize("times", [[1], [2], [1, 1]], ids=str)
def test_a_number_has_no_rows(jobs: Jobs, times: list[int]) -> None:
    number = Values(dtype="float32", shape=(), values=(1.0,))
    with pytest.raises(BadRequest, match=r"x\.rows\[0\]: a tensor without dimensions has no rows"):
        jobs.read(rows(*((number, each) for each in times)))


FACTS = (
    ArgumentFacts(name="hidden_states", shape=("rows", 4)),
    ArgumentFacts(name="timestep", shape=("rows",)),
    ArgumentFacts(name="guidance", shape=("rows",), is_needed=False),
)


def test_what_arguments_take_is_bounded_before_it_is_taken(jobs: Jobs) -> None:
    jobs.kept.keep(ALICE, "k1", torch.zeros(1, 2**26))  # 256 MiB, which one row may stand for 64 times
    many = rows((kept("k1", 1, 2**26), 8), (kept("k1", 1, 2**26), 9))
    with pytest.raises(LimitExceeded, match=r"^x: with it, the arguments of one job take 4563402752 bytes, at most"):
        jobs.read(many)
    assert jobs.read(rows((kept("k1", 1, 2**26), 64))).shape == (64, 2**26)  # as a view


def test_values_with_fractions_are_no_whole_numbers(jobs: Jobs) -> None:
    with pytest.raises(BadRequest, match="x: not all of its values are whole numbers, as int64 needs"):
        jobs.read(values(1.0, 1.5, dtype="int64"))
    assert jobs.read(values(1.0, 2.0, dtype="int64")).tolist() == [1, 2]


def test_names_that_are_taken_and_needed_pass() -> None:
    check_names({"hidden_states", "timestep"}, FACTS, "arguments")
    check_names(["guidance", "timestep", "hidden_states"], FACTS, "arguments")


def test_names_that_are_not_taken_are_refused_with_those_that_are() -> None:
    says = r"parts\[1\]\.arguments: latents, return_dict cannot be given; it takes guidance, hidden_states, timestep"
    with pytest.raises(BadRequest, match=says):
        check_names({"hidden_states", "timestep", "return_dict", "latents"}, FACTS, "parts[1].arguments")


def test_names_that_are_missing_are_said() -> None:
    with pytest.raises(BadRequest, match=r"arguments: timestep is missing; it takes guidance, hidden_states, timestep"):
        check_names({"hidden_states"}, FACTS, "arguments")


def test_a_tensor_in_device_memory_needs_a_block_of_it(jobs: Jobs) -> None:
    leaf = InIo(offset_bytes=4096, dtype="float32", shape=(2,), in_device_io=True)
    with pytest.raises(BadRequest, match=r"x\[0\]: is in device memory, but the request describes no block of it"):
        jobs.read(ListOf(items=(leaf,)))


@pytest.mark.parametrize("keys", [(1, True), (Named(name="device:cuda"), Named(name="device:cuda")), (0.0, False)])
def test_keys_that_are_one_key_are_refused(jobs: Jobs, keys: tuple[Argument, Argument]) -> None:
    node = PairsOf(items=tuple((key, number) for number, key in enumerate(keys)))
    reader = jobs.reader(held=HeldTensors())
    with pytest.raises(BadRequest, match=r"x: two of its keys are the same key here"):
        reader.read({"x": node})
