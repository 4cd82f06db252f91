"""Manifests for the tensors that a client may have: the tier of each, the bytes copied, and the values."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from lent_values import VAE, State, check, values
from safetensors.torch import load_file, save_file

from xditd.client.arenas import Arena
from xditd.client.lending import Offer, describe
from xditd.ipc.errors import XditdError
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.tensors import CopiedBytes, FileBlock, HostShmBlock, Tier
from xditd.ipc.transports.host_shm import map_shm

NO_COPY = CopiedBytes()


def tiers(offer: Offer) -> dict[str, str]:
    blocks = offer.manifest.blocks
    return {spec.name: type(blocks[spec.block]).__name__ for spec in offer.manifest.tensors}


def test_a_path_is_lent_without_reading_the_file(path: Path, state: State, offers: list[Offer]) -> None:
    for source in (path, str(path), os.fsencode(path)):
        offer = describe(source)  # type: ignore[arg-type]
        offers.append(offer)
        assert offer.manifest.tiers == (Tier.FILE,)
        assert offer.copied == NO_COPY
        assert (offer.manifest.kind, offer.manifest.label) == (None, "vae")
        assert offer.manifest.blocks[0].size_bytes == path.stat().st_size
        found = values(offer)
        assert {name: found[name] for name in state}.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_the_whole_header_is_fingerprinted(path: Path, offers: list[Offer]) -> None:
    offers.append(describe(path))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert offers[0].manifest.blocks[0].fingerprint.length_bytes == header


def test_a_loaded_state_dict_is_lent_as_its_file(path: Path, offers: list[Offer]) -> None:
    loaded = load_file(path)
    offers.append(describe(loaded))
    assert offers[0].manifest.tiers == (Tier.FILE,)
    assert len(offers[0].manifest.blocks) == 1
    assert offers[0].copied == NO_COPY
    check(offers[0], loaded)


def test_a_changed_tensor_is_copied(path: Path, offers: list[Offer]) -> None:
    loaded = load_file(path)
    loaded["decoder.d"].add_(1)  # 24,000 bytes: has whole pages of its own
    offers.append(describe(loaded))
    found = tiers(offers[0])
    assert found["decoder.d"] == "HostShmBlock"
    assert "FileBlock" in found.values()
    moved = [name for name, tier in found.items() if tier == "HostShmBlock"]
    copied = sum(loaded[name].nbytes for name in moved)
    assert offers[0].copied == CopiedBytes(host_to_host=copied)
    assert offers[0].copied.total < sum(tensor.nbytes for tensor in loaded.values())
    assert any("copied once" in note for note in offers[0].tier_notes)
    check(offers[0], loaded)


def test_tensors_of_two_files_make_two_blocks(path: Path, tmp_path: Path, offers: list[Offer]) -> None:
    save_file({"encoder.x": torch.ones(5000)}, tmp_path / "more.safetensors")
    loaded = load_file(path) | load_file(tmp_path / "more.safetensors")
    offers.append(describe(loaded))
    assert [type(block) for block in offers[0].manifest.blocks] == [FileBlock, FileBlock]
    assert offers[0].copied == NO_COPY
    check(offers[0], loaded)


def test_renamed_and_sliced_tensors_of_a_file_stay_in_it(path: Path, offers: list[Offer]) -> None:
    loaded = load_file(path)
    part = {"decoder.rows": loaded["decoder.a"][10:20], "decoder.columns": loaded["decoder.d"][:, 1]}
    part["decoder.turned"] = loaded["decoder.a"].T
    offers.append(describe(part))
    assert offers[0].copied == NO_COPY
    strides = {spec.name: spec.stride for spec in offers[0].manifest.tensors}
    assert strides == {"decoder.rows": None, "decoder.columns": (3,), "decoder.turned": (1, 50)}
    check(offers[0], part)


def test_plain_tensors_are_copied_once_into_shared_memory(state: State, offers: list[Offer]) -> None:
    offers.append(describe(state))
    assert offers[0].manifest.tiers == (Tier.HOST_SHM,)
    assert len(offers[0].manifest.blocks) == 1
    assert offers[0].copied == CopiedBytes(host_to_host=sum(tensor.nbytes for tensor in state.values()))
    assert all(spec.offset_bytes % 256 == 0 for spec in offers[0].manifest.tensors)
    assert "no file holds them" in offers[0].tier_notes[0]
    check(offers[0], state)


def test_an_arenas_tensors_are_lent_without_a_copy(state: State, offers: list[Offer]) -> None:
    arena = Arena.copy_of(state)
    offers.append(describe(arena.tensors))
    assert offers[0].copied == NO_COPY
    assert [block.inode for block in offers[0].manifest.blocks] == [arena.block().inode]  # type: ignore[union-attr]
    check(offers[0], state)
    offers.pop().close()
    arena.close()


def test_another_process_reads_what_is_written_through_an_arenas_tensors(other_process: Any) -> None:
    arena = Arena({"decoder.a": (torch.float32, (4,)), "decoder.b": (torch.uint8, (300,))})
    offer = describe(arena.tensors)
    spec = next(spec for spec in offer.manifest.tensors if spec.name == "decoder.b")
    block = msgspec.to_builtins(offer.manifest.blocks[spec.block])
    exporter = msgspec.to_builtins(identify(os.getpid()))
    assert other_process.ask("map", block=block, exporter=exporter) is None
    for number in (1, 200):
        arena.tensors["decoder.b"].fill_(number)
        assert other_process.ask("read", offset=spec.offset_bytes, length=300) == f"{number:02x}" * 300
    assert other_process.ask("unmap") is None
    offer.close()
    arena.close()


def test_views_of_an_arena_and_plain_tensors_mix(state: State, offers: list[Offer]) -> None:
    arena = Arena.copy_of({"x": state["decoder.a"]})
    mixed = {"decoder.a": arena.tensors["x"].T, "decoder.b": state["decoder.b"], "decoder.part": arena.tensors["x"][3]}
    offers.append(describe(mixed))
    assert offers[0].copied == CopiedBytes(host_to_host=6000)
    check(offers[0], mixed)
    del mixed
    offers.pop().close()
    arena.close()


def test_an_arena_outlives_the_callers_name_for_it(state: State, offers: list[Offer]) -> None:
    """Restarted workers map a loan again."""
    offers.append(describe(Arena.copy_of(state).tensors))
    gc.collect()
    check(offers[0], state)


def test_a_module_is_lent_by_its_state_dict(offers: list[Offer]) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    offers.append(describe(module, kind=VAE, label="mine"))
    assert offers[0].manifest.label == "mine"
    check(offers[0], module.state_dict())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6).T,
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(4.0).expand(3, 4),
        torch.arange(24.0).as_strided((3, 3), (2, 1)),  # rows overlap
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(0),
        torch.zeros(3, 0, 2),
        torch.tensor(7),
        torch.nn.Parameter(torch.ones(3)),
        torch.randn(3, dtype=torch.complex64).conj().imag,  # a view with the negative bit, negated when it is read
        torch.tensor([True, False]),
        torch.randn(5).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.dtype}-{tuple(tensor.stride())}",
)
def test_odd_tensors_keep_their_values(tensor: torch.Tensor, offers: list[Offer]) -> None:
    offers.append(describe({"decoder.x": tensor, "decoder.y": torch.ones(2)}))
    found = values(offers[0])["decoder.x"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found.to(torch.float64), tensor.detach().to(torch.float64))


def test_conjugated_view_of_an_arena_keeps_its_values(offers: list[Offer]) -> None:
    table = torch.polar(torch.ones(6), torch.arange(6.0))
    arena = Arena.copy_of({"decoder.x": table}, "cpu")
    offers.append(describe({"decoder.x": arena.tensors["decoder.x"].conj(), "decoder.y": torch.ones(2)}))
    assert torch.equal(values(offers[0])["decoder.x"], table.conj().resolve_conj())


def test_empty_tensors_alone(offers: list[Offer]) -> None:
    offers.append(describe({"decoder.x": torch.zeros(0, 3)}))
    assert values(offers[0])["decoder.x"].shape == (0, 3)


def test_tied_tensors_share_their_bytes_where_nothing_is_copied(offers: list[Offer]) -> None:
    arena = Arena({"x": (torch.float32, (10,))})
    tied = {"decoder.a": arena.tensors["x"], "decoder.b": arena.tensors["x"], "decoder.c": arena.tensors["x"][5:]}
    arena.tensors["x"].copy_(torch.arange(10.0))
    offers.append(describe(tied))
    offsets = {spec.name: spec.offset_bytes for spec in offers[0].manifest.tensors}
    assert offsets["decoder.a"] == offsets["decoder.b"] == offsets["decoder.c"] - 20
    check(offers[0], tied)
    tied.clear()
    offers.pop().close()
    arena.close()


def test_tied_plain_tensors_keep_their_values(offers: list[Offer]) -> None:
    one = torch.arange(6.0)
    offers.append(describe({"decoder.a": one, "decoder.b": one}))
    check(offers[0], {"decoder.a": one, "decoder.b": one})


def test_a_file_that_was_replaced_after_loading_is_not_lent(path: Path, offers: list[Offer]) -> None:
    loaded = load_file(path)
    expected = {name: tensor.clone() for name, tensor in loaded.items()}
    save_file({name: torch.zeros_like(tensor) for name, tensor in loaded.items()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    offers.append(describe(loaded))
    assert offers[0].manifest.tiers == (Tier.HOST_SHM,)
    check(offers[0], expected)


def test_a_file_that_was_deleted_after_loading_is_copied(path: Path, offers: list[Offer]) -> None:
    loaded = load_file(path)
    path.unlink()
    offers.append(describe(loaded))
    assert offers[0].manifest.tiers == (Tier.HOST_SHM,)
    check(offers[0], loaded)


def test_a_path_onto_a_device_is_loaded_into_one_arena(path: Path, state: State, offers: list[Offer]) -> None:
    offers.append(describe(path, device="cpu"))
    assert offers[0].manifest.tiers == (Tier.HOST_SHM,)
    assert offers[0].copied == CopiedBytes(host_to_host=sum(tensor.nbytes for tensor in state.values()))
    assert any("loaded once into an arena" in note for note in offers[0].tier_notes)
    found = values(offers[0])
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_misaligned_file_is_lent_and_loaded_right(tmp_path: Path, offers: list[Offer]) -> None:
    """Older writers did not pad the header."""
    text = b'{"decoder.a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    data = torch.tensor([1.5, -2.0, 3.25]).view(torch.uint8).numpy().tobytes()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert (8 + len(text)) % 4
    for device in (None, "cpu"):
        offers.append(describe(path, device=device))
        assert values(offers[-1])["decoder.a"].tolist() == [1.5, -2.0, 3.25]


def test_generations_are_passed_on(path: Path, offers: list[Offer]) -> None:
    offers.append(describe(path, generation=7))
    assert offers[0].manifest.generation == 7
    assert offers[0].timings_ms["describe"] > 0


def test_a_file_name_need_not_be_unicode(state: State, tmp_path: Path, offers: list[Offer]) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors")
    save_file(state, name)
    offers.append(describe(name))
    assert offers[0].manifest.label.startswith("caf")
    values(offers[0])
    with open(name, "rb") as file:  # safetensors itself refuses such names
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    loaded = {"decoder.bytes": torch.frombuffer(memory, dtype=torch.uint8)}
    offers.append(describe(loaded))
    assert offers[1].manifest.tiers == (Tier.FILE,)
    check(offers[1], loaded)


def shared_kib() -> int:
    total = 0
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        if "/memfd:xditd" in line:
            start, end = line.split()[0].split("-")
            total += (int(end, 16) - int(start, 16)) // 1024
    return total


def test_closing_frees_everything(path: Path, state: State, open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds(), shared_kib()
    for _ in range(30):
        loaded = load_file(path)
        loaded["decoder.a"].add_(1)
        for source, device in ((path, None), (path, "cpu"), (state, None), (loaded, None)):
            offer = describe(source, device=device)
            offer.close()
            offer.close()
    del loaded, offer, source
    assert (open_fds(), shared_kib()) == before
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_closed_offers_cannot_be_mapped_any_more(state: State) -> None:
    offer = describe(state)
    block = offer.manifest.blocks[0]
    offer.close()
    assert isinstance(block, HostShmBlock)
    with pytest.raises(XditdError):
        map_shm(block, identify(os.getpid()))


def test_several_threads_may_describe(path: Path, state: State, open_fds: Callable[[], int]) -> None:
    gc.collect()
    before = open_fds()

    def work() -> None:
        for _ in range(10):
            arena = Arena.copy_of(state)
            for source in (path, state, arena.tensors):
                offer = describe(source)
                check(offer, {spec.name: state[spec.name] for spec in offer.manifest.tensors})
                offer.close()
            arena.close()

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert open_fds() == before


def test_a_forked_child_lends_nothing_of_its_parents_by_accident(state: State) -> None:
    """A child closes only its own descriptors; those in a manifest belong to the process that made it."""
    offer = describe(state)
    child = os.fork()
    if not child:
        offer.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check(offer, state)
    offer.close()


def test_the_manifest_has_the_pid_of_this_process(state: State) -> None:
    offer = describe(state)
    me = identify(os.getpid())
    block = offer.manifest.blocks[0]
    assert isinstance(block, HostShmBlock)
    with pytest.raises(XditdError):
        map_shm(block, ProcessIdentity(pid=os.getppid(), start_ticks=me.start_ticks))
    offer.close()
