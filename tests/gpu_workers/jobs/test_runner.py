"""Jobs on one rank, and files that change meanwhile: no result is returned unchecked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import text_checkpoints
import torch
from safetensors.torch import save_file

from xditd.ipc.errors import BadRequest, StaleSource, UnknownComponent
from xditd.ipc.requests import Decode, Encode, EncodeText, InferenceRequest

if TYPE_CHECKING:
    from one_rank import OneRank, Room

State = dict[str, torch.Tensor]


def overwrite(path: Path) -> None:
    """Write other bytes over the last ones, and set the mtime back."""
    old = path.stat()
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 64)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


@pytest.fixture(scope="module")
def states(demo_transformer: State, demo_vae: State) -> dict[str, State]:
    return {"transformer": demo_transformer, "vae": demo_vae, "text": text_checkpoints.clip_l_state_dict(0)}


def generate(room: Room) -> InferenceRequest:
    import flux1_messages

    return flux1_messages.generate(room, noise=flux1_messages.noise(), sampling={"steps": 1})


def call(room: Room) -> InferenceRequest:
    import flux1_messages

    return flux1_messages.call(room)


def decode(room: Room) -> InferenceRequest:
    latents = room.input(torch.zeros(1, 16, 4, 4))
    return Decode(request_id="r", vae_id="vae", latents=latents, out=room.output(1, 3, 32, 32), io=room.block())


def encode(room: Room) -> InferenceRequest:
    image = room.input(torch.zeros(1, 3, 32, 32))
    return Encode(request_id="r", vae_id="vae", image=image, out=room.output(1, 16, 4, 4), io=room.block())


def encode_text(room: Room) -> InferenceRequest:
    ids = room.input(torch.zeros(1, 8, dtype=torch.int64))
    return EncodeText(request_id="r", encoder_id="text", token_ids=ids, out=room.output(1, 8, 128), io=room.block())


KINDS: dict[str, tuple[Callable[[Room], InferenceRequest], str, str]] = {
    "generate": (generate, "transformer", "run"),
    "call": (call, "transformer", "run"),
    "decode": (decode, "vae", "decode"),
    "encode": (encode, "vae", "encode"),
    "encode_text": (encode_text, "text", "encode"),
}
"""How a job is made, what is lent for it, and which of its family's operations computes."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_overwritten_while_a_job_computes(
    rank: OneRank, states: dict[str, State], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, source, operation = KINDS[kind]
    path = tmp_path / f"{source}.safetensors"
    save_file(states[source], path)
    rank.lend(source, path)
    job = make(rank.room())
    rank.run(job)
    path.chmod(0o600)
    rank.run(job)  # the ctime has moved alone
    component = rank.components.get(source, "text_encoder" if source == "text" else source)
    operations: Any = component.match.model.operations
    compute: Callable[..., object] = getattr(operations, operation)

    def overwrite_and_compute(*given: object, **named: object) -> object:
        overwrite(path)
        return compute(*given, **named)

    monkeypatch.setattr(operations, operation, overwrite_and_compute)
    with pytest.raises(StaleSource, match=r"safetensors: changed since it was lent \(ctime and bytes\)"):
        rank.run(job)
    monkeypatch.undo()
    with pytest.raises(StaleSource, match=r"safetensors: changed since it was lent \(ctime and bytes\)"):
        rank.run(job)


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_of_another_kind_and_one_that_is_not_lent_are_refused(
    rank: OneRank, states: dict[str, State], kind: str
) -> None:
    make, source, _ = KINDS[kind]
    with pytest.raises(UnknownComponent, match=f"component {source}: not lent to this worker; lend it again"):
        rank.run(make(rank.room()))
    other, is_kind = ("transformer", "a transformer") if source != "transformer" else ("vae", "a vae")
    rank.lend(source, states[other])
    needs = "text_encoder" if source == "text" else source
    with pytest.raises(BadRequest, match=f"component {source} is {is_kind}; this job needs a {needs}"):
        rank.run(make(rank.room()))


def test_every_job_says_what_it_took_by_phase(rank: OneRank, states: dict[str, State]) -> None:
    phases = {
        "generate": {"plug", "inputs", "steps", "outputs", "first_step", "total"},
        "call": {"plug", "inputs", "forward", "outputs", "total"},
        "decode": {"plug", "inputs", "decode", "total"},
        "encode": {"plug", "inputs", "encode", "total"},
        "encode_text": {"plug", "inputs", "encode_text", "outputs", "total"},
    }
    for name, state in states.items():
        rank.lend(name, state)
    for kind, (make, _, _) in KINDS.items():
        found = rank.run(make(rank.room())).timings_ms
        assert found.keys() == phases[kind], kind
        assert found["total"] >= sum(ms for name, ms in found.items() if name not in ("total", "first_step")) - 1e-3
