"""Calls: how arguments are sent, what the workers keep, and how results are read."""

from __future__ import annotations

import os

import msgspec
import pytest

torch = pytest.importorskip("torch")

import sample_facts  # noqa: E402

from xditd.client import (  # noqa: E402
    BadRequest,
    Client,
    RowsOf,
    StaleSource,
    UnknownKept,
    UnsupportedDtype,
    WorkersLost,
)
from xditd.client.demo import flux1_calls  # noqa: E402
from xditd.ipc import limits  # noqa: E402
from xditd.ipc.arguments import InIo, Kept, ListOf, MapOf, Rows, TupleOf, Values, tensors  # noqa: E402
from xditd.ipc.processes import ProcessIdentity, identify  # noqa: E402
from xditd.ipc.replies import Called, Failed  # noqa: E402
from xditd.ipc.requests import Call  # noqa: E402
from xditd.ipc.tensors import HostShmBlock  # noqa: E402
from xditd.ipc.transports.host_shm import HostArena  # noqa: E402

TOKENS = torch.randn(2, 6, 64)
TEXT = torch.randn(1, 30, 8)


@pytest.fixture
def client(daemon, folder):
    """Its workers keep what they are sent, by id, and answer with the first argument, doubled."""
    daemon.kept = {}

    def answer(request):
        results = []
        for part in request.parts:
            for _, leaf in tensors(part.arguments):
                if isinstance(leaf, Kept) and leaf.kept_id not in daemon.kept:
                    return [Failed(request_id=request.request_id, code="unknown_kept", detail="not kept")]
                if isinstance(leaf, InIo) and leaf.kept_id is not None:
                    daemon.kept[leaf.kept_id] = daemon.open_io(request.io, leaf.place).clone()
            sample = part.arguments["hidden_states"]
            at = request.out_offset_bytes + sum(result.items[0].place.size_bytes for result in results)
            out = InIo(offset_bytes=at, dtype=sample.dtype, shape=sample.shape)
            daemon.open_io(request.io, out.place).copy_(daemon.open_io(request.io, sample.place) * 2)
            results.append(TupleOf(items=(out,)))
        return [Called(request_id=request.request_id, results=tuple(results), timings_ms={})]

    daemon.answers[Call] = answer
    with Client(folder) as connected:
        yield connected


def sent(daemon, number=-1, part=0):
    return daemon.requests(Call)[number].parts[part].arguments


def test_the_result_has_the_structure_that_forward_returns(client, daemon):
    (found,) = client.call("c1", {"hidden_states": TOKENS})
    assert torch.equal(found, TOKENS * 2)
    request = daemon.requests(Call)[0]
    assert (request.component_id, request.variant, request.foreseen) == ("c1", "class", {})


def test_arguments_are_sent_unchanged(client, daemon):
    client.call(
        "c1",
        {
            "hidden_states": TOKENS,
            "timestep": torch.tensor([0.7, 0.25]),
            "guidance": None,
            "cap_feats": [TEXT[0], TEXT[0, :20]],
            "sizes": (1, 2.5, "a", False),
            "more": {"scale": torch.tensor(3, dtype=torch.int64)},
        },
        foreseen={"timestep": [1.0, 0.5]},
        variant="float32_time",
    )
    found = sent(daemon)
    assert found["hidden_states"] == InIo(offset_bytes=0, dtype="float32", shape=(2, 6, 64))
    assert found["timestep"] == Values(dtype="float32", shape=(2,), values=tuple(torch.tensor([0.7, 0.25]).tolist()))
    assert found["guidance"] is None
    assert isinstance(found["cap_feats"], ListOf)
    assert [leaf.shape for leaf in found["cap_feats"].items] == [(30, 8), (20, 8)]
    assert found["sizes"] == TupleOf(items=(1, 2.5, "a", False))
    assert found["more"] == MapOf(items={"scale": Values(dtype="int64", shape=(), values=(3,))})
    request = daemon.requests(Call)[0]
    assert (request.foreseen, request.variant) == ({"timestep": (1.0, 0.5)}, "float32_time")


def test_a_tensor_that_two_parts_use_is_sent_once(client, daemon):
    first, second = client.call_parts("c1", [{"hidden_states": TOKENS, "text": TEXT}, {"hidden_states": TOKENS}])
    assert torch.equal(first[0], TOKENS * 2)
    assert torch.equal(second[0], TOKENS * 2)
    assert sent(daemon, part=0)["hidden_states"] == sent(daemon, part=1)["hidden_states"]


def test_the_block_has_room_for_results_like_the_sample(client, daemon):
    client.call("c1", {"text": TEXT, "hidden_states": TOKENS})
    request = daemon.requests(Call)[-1]
    assert request.out_size_bytes == TOKENS.nbytes
    assert request.out_offset_bytes + request.out_size_bytes <= request.io.size_bytes
    client.call("c1", {"hidden_states": TOKENS.half()})  # float32 weights may give float32
    assert daemon.requests(Call)[-1].out_size_bytes == TOKENS.nbytes
    daemon.facts["c4"] = sample_facts.LISTS
    rows = [torch.randn(16, 1, 4, 6), torch.randn(16, 1, 8, 8)]
    client.call("c4", {"hidden_states": TOKENS, "x": rows})
    assert daemon.requests(Call)[-1].out_size_bytes == sum(row.nbytes for row in rows)


def test_results_that_did_not_fit_are_read_from_the_workers(client, daemon):
    arena = HostArena(4096)
    arena.tensor(256, "bfloat16", (2, 3)).copy_(torch.arange(6).reshape(2, 3))
    leaf = InIo(offset_bytes=256, dtype="bfloat16", shape=(2, 3))
    answer = {"block": arena.block(), "provider": identify(os.getpid()), "timings_ms": {}}
    daemon.answers[Call] = lambda request: [
        Called(request_id=request.request_id, results=(ListOf(items=(leaf, 7)),), **answer)
    ]
    tensor, number = client.call("c1", {"hidden_states": TOKENS})
    arena.tensor(256, "bfloat16", (2, 3)).zero_()  # the result is a copy that the caller owns
    arena.close()
    assert (tensor.tolist(), tensor.dtype, number) == ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], torch.bfloat16, 7)


def test_results_in_a_worker_that_was_killed_since_are_lost_with_it(client, daemon, spawn_other):
    worker = spawn_other()
    block, provider = worker.ask("export", size_bytes=4096), worker.identity
    worker.kill()
    answer = {
        "results": (InIo(offset_bytes=0, dtype="float32", shape=(2,)),),
        "block": msgspec.convert(block, HostShmBlock),
        "provider": msgspec.convert(provider, ProcessIdentity),
        "timings_ms": {},
    }
    daemon.answers[Call] = lambda request: [Called(request_id=request.request_id, **answer)]
    with pytest.raises(WorkersLost, match=rf"the worker \(pid {provider['pid']}\) that held the results exited"):
        client.call("c1", {"hidden_states": TOKENS})


def test_a_call_whose_results_were_dropped_is_run_again_with_room(client, daemon):
    arena = HostArena(3 * 2**20)
    block, provider = arena.block(), identify(os.getpid())
    arena.close()
    leaf = InIo(offset_bytes=0, dtype="float32", shape=TOKENS.shape)
    gone = Called(request_id="", results=(TupleOf(items=(leaf,)),), block=block, provider=provider, timings_ms={})
    answer = daemon.answers[Call]
    daemon.answers[Call] = lambda request: [msgspec.structs.replace(gone, request_id=request.request_id)]
    with pytest.raises(StaleSource):
        client.call("c1", {"hidden_states": TOKENS})
    assert [request.out_size_bytes for request in daemon.requests(Call)] == [TOKENS.nbytes, block.size_bytes]

    daemon.answers[Call] = lambda request: (
        answer(request)
        if request.out_size_bytes >= block.size_bytes
        else [msgspec.structs.replace(gone, request_id=request.request_id)]
    )
    (found,) = client.call("c1", {"hidden_states": TOKENS})
    assert torch.equal(found, TOKENS * 2)


def test_a_kept_tensor_is_sent_once_and_then_by_id(client, daemon):
    text = client.keep(TEXT)
    for _ in range(3):
        client.call("c1", {"hidden_states": TOKENS, "encoder_hidden_states": text})
    leaves = [sent(daemon, number)["encoder_hidden_states"] for number in range(3)]
    assert isinstance(leaves[0], InIo)
    assert leaves[1:] == [Kept(kept_id=text.kept_id, dtype="float32", shape=(1, 30, 8))] * 2
    assert torch.equal(daemon.kept[text.kept_id], TEXT)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda kept: kept,
        lambda kept: [kept],
        lambda kept: {"deep": (kept, 1)},
        lambda kept: RowsOf([(kept, 2)]),
        lambda kept: [RowsOf([(kept, 1), (kept, 3)])],
    ],
)
def test_a_kept_tensor_that_the_workers_lost_is_sent_again(client, daemon, wrap):
    text, other = client.keep(TEXT), client.keep(TEXT + 1)
    parts = [{"hidden_states": TOKENS, "a": wrap(text)}, {"hidden_states": TOKENS, "b": wrap(other)}]
    client.call_parts("c1", parts)
    del daemon.kept[other.kept_id]
    results = client.call_parts("c1", parts)
    assert all(torch.equal(result[0], TOKENS * 2) for result in results)
    assert len(daemon.requests(Call)) == 3
    client.call_parts("c1", parts)
    assert len(daemon.requests(Call)) == 4
    assert torch.equal(daemon.kept[other.kept_id], TEXT + 1)


def test_a_kept_tensor_is_sent_again_only_once(client, daemon):
    daemon.answers[Call] = lambda request: [
        Failed(request_id=request.request_id, code="unknown_kept", detail="never kept")
    ]
    with pytest.raises(UnknownKept):
        client.call("c1", {"hidden_states": TOKENS, "text": client.keep(TEXT)})
    assert len(daemon.requests(Call)) == 2


def test_kept_tensors_are_sent_to_the_next_daemon(client, daemon):
    arguments = {"hidden_states": TOKENS, "text": client.keep(TEXT)}
    client.call("c1", arguments)
    client._current().connection.close()
    daemon.kept.clear()
    client.call("c1", arguments)
    assert [type(sent(daemon, number)["text"]) for number in range(2)] == [InIo, InIo]


def test_a_kept_tensor_is_a_copy(client, daemon):
    mine = TEXT.clone()
    kept = client.keep(mine.transpose(1, 2))
    mine.zero_()
    client.call("c1", {"hidden_states": TOKENS, "text": kept})
    assert torch.equal(daemon.kept[kept.kept_id], TEXT.transpose(1, 2))


def test_a_tensor_too_large_to_be_kept_is_sent_every_time(client, daemon, monkeypatch):
    monkeypatch.setattr(limits, "MAX_KEPT_BYTES", 100)
    kept = client.keep(TEXT)
    assert kept.kept_id is None
    assert repr(kept) == "<KeptTensor too large to be kept (1, 30, 8) float32 on cpu>"
    for _ in range(2):
        client.call("c1", {"hidden_states": TOKENS, "text": kept})
    assert [sent(daemon, number)["text"].kept_id for number in range(2)] == [None, None]


def test_rows_are_joined_and_repeated_by_the_workers(client, daemon):
    kept = client.keep(TEXT)
    client.call("c1", {"hidden_states": TOKENS, "text": RowsOf([(kept, 2), (TEXT, 1), (torch.ones(1, 3), 4)])})
    rows = sent(daemon)["text"]
    assert isinstance(rows, Rows)
    assert [(type(part.tensor), part.times) for part in rows.parts] == [(InIo, 2), (InIo, 1), (Values, 4)]
    assert [part.tensor.kept_id for part in rows.parts[:2]] == [kept.kept_id, None]


def deep(levels):
    found = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"x": object()}, "x: object cannot be sent; give a torch tensor, what keep"),
        ({"x": [1, {"y": b"z"}]}, r"x\[1\]\.y: bytes cannot be sent"),
        ({"x": float("nan")}, "x: nan is not finite"),
        ({"x": [torch.tensor([0.5, float("inf")])]}, r"x\[0\]: inf is not finite"),
        ({"x": (2**63,)}, r"x\[0\]: an integer of 64 bits; use one of at most 63 bits"),
        ({7: 1.0}, "arguments: name: 7 is of type int, use a string"),
        ({"x": [{7: 1.0}]}, r"x\[0\]: key: 7 is of type int, use a string"),
        ({"x": "y" * 513}, "x: a string of 513 characters, use 512 at most"),
        ({"x" * 513: 1.0}, "arguments: name: a string of 513 characters, use 512 at most"),
        ({"x": [0] * 1024}, r"x\[1023\]: one forward takes 1024 values in total"),
        ({"x": -(10**5000)}, "x: an integer of 16610 bits"),
        ({"x": deep(13)}, "arguments may be nested 12 levels deep at most"),
        ({"x": RowsOf([("text", 1)])}, r"x\.rows\[0\]: str cannot be sent"),
        ([("x", 1)], "arguments: a dict by name is needed, not list"),
    ],
)
def test_arguments_that_cannot_be_sent_are_refused_with_their_path(client, daemon, arguments, says):
    with pytest.raises(BadRequest, match=says):
        client.call("c1", arguments)
    assert daemon.requests(Call) == []


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (lambda client: client.call_parts("c1", []), "parts: 0 sets of arguments; give from 1 to 64"),
        (lambda client: client.call_parts("c1", [{"x": 1}, {"y": b""}]), r"parts\[1\]\.y: bytes cannot be sent"),
        (lambda client: client.call("c1", {}, variant="fast"), "variant: 'fast' is not one of 'class', 'float32_time'"),
        (lambda client: client.call("c1", {}, foreseen={"t": [0.5, float("nan")]}), r"foreseen\.t\[1\]: nan is not"),
        (lambda client: client.call("c1", {}, foreseen={7: [0.5]}), "foreseen: name: 7 is of type int, use a string"),
        (lambda client: client.call("c2", {}), "component c2: a vae where a transformer is needed"),
        (lambda client: client.keep([1.0]), "keep: a torch tensor is needed, not list"),
        (lambda client: RowsOf([]), "rows: 0 tensors; give from 1 to 64"),
        (lambda client: RowsOf([(TEXT, 0)]), "rows: 0 times is not a whole number from 1 to 64"),
    ],
)
def test_bad_arguments_are_refused(client, daemon, refused, says):
    with pytest.raises(BadRequest, match=says):
        refused(client)
    assert daemon.requests(Call) == []


def test_a_dtype_that_cannot_be_sent_is_named(client):
    with pytest.raises(
        UnsupportedDtype, match=r"^hidden_states: dtype complex32 cannot be sent: convert it to one of bfloat16"
    ):
        client.call("c1", {"hidden_states": torch.zeros(99, dtype=torch.complex32)})
    with pytest.raises(UnsupportedDtype, match=r"^keep: dtype complex32 cannot be sent"):
        client.keep(torch.zeros(1, dtype=torch.complex32))


def test_predictions_of_flux1_have_the_shape_of_their_latents(client, daemon):
    """Prompts of one text length are one batch, and unpacking inverts packing."""
    calls = flux1_calls.Flux1Calls(client, "c1")
    latents = torch.randn(4, 16, 4, 6)
    short = calls.keep(torch.randn(1, 3, 8), torch.randn(1, 4), 1.5)
    long = calls.keep(torch.randn(1, 9, 8), torch.randn(1, 4))
    assert torch.equal(calls.predict(latents, 0.5, [short, short, long, short], sigmas=[1.0, 0.5]), latents * 2)
    assert [part.arguments["hidden_states"].shape[0] for part in daemon.requests(Call)[-1].parts] == [2, 1, 1]
    assert sent(daemon)["guidance"].values == (1.5, 1.5)
    assert daemon.requests(Call)[-1].foreseen == {"timestep": (1.0, 0.5)}
    assert torch.equal(calls.predict(latents, 0.5, short), latents * 2)
    assert [part.times for part in sent(daemon)["encoder_hidden_states"].parts] == [4]
    assert torch.equal(flux1_calls.unpack(flux1_calls.pack(latents), 4, 6), latents)


@pytest.mark.parametrize(("images", "prompts"), [(1, 2), (3, 2), (2, 0), (0, 1)])
def test_predictions_of_flux1_refuse_a_batch_that_prompts_do_not_divide(client, daemon, images, prompts):
    calls = flux1_calls.Flux1Calls(client, "c1")
    prompt = calls.keep(torch.randn(1, 3, 8), torch.randn(1, 4))
    with pytest.raises(BadRequest, match=f"prompts: {prompts} for {images} latents"):
        calls.predict(torch.randn(images, 16, 4, 6), 0.5, [prompt] * prompts)
    assert daemon.requests(Call) == []


def test_a_method_of_what_a_family_runs_is_refused_with_the_remedy(client):
    with pytest.raises(BadRequest, match=r"method 'decode': .* family flux1 .* lend it with as_class=True"):
        client.call("c1", {"z": TOKENS}, method="decode")
