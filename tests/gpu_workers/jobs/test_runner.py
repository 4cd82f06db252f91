"""Jobs on one rank, and files that change under them: no result of a job is given out unchecked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from xditd.client.demo import text_checkpoints
from xditd.client.io_blocks import IoLayout, IoPool
from xditd.client.lending import Offer, describe
from xditd.gpu_workers.jobs.job_io import JobIo
from xditd.gpu_workers.jobs.progress import Progress
from xditd.gpu_workers.models.components import Components
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import StaleSource
from xditd.ipc.processes import identify
from xditd.ipc.requests import Decode, Denoise, Encode, EncodeText, Generate, Part

State = dict[str, torch.Tensor]
CPU = torch.device("cpu")


def overwrite(path: Path) -> None:
    """Write other bytes over the last ones, and set the mtime back."""
    old = path.stat()
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 64)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


@pytest.fixture
def rank(layout: ParallelLayout) -> Iterator[SimpleNamespace]:
    from xditd.gpu_workers.jobs import runner as jobs  # xfuser can be imported once the group is started

    me = identify(os.getpid())
    components, io = Components(layout, "", ("",)), JobIo(CPU)
    offers: list[Offer] = []

    def lend(path: Path) -> str:
        offers.append(describe(path))
        components.prepare(path.stem, offers[-1].manifest, me)
        components.plug(path.stem)
        return path.stem

    def run(job: object) -> object:
        progress = Progress(True, CPU, lambda: False, lambda *_: None)
        return jobs.JobRunner(components, 0, CPU).run(job, lambda: io.open(job.io, me), progress, me)

    yield SimpleNamespace(lend=lend, run=run, jobs=jobs)
    components.close()
    io.close()
    for offer in offers:
        offer.close()


@pytest.fixture(scope="module")
def states(demo_transformer: State, demo_vae: State) -> dict[str, State]:
    return {"transformer": demo_transformer, "vae": demo_vae, "text": text_checkpoints.clip_l_state_dict(0)}


class _Job:
    """A job's message with room for its tensors, all zeros."""

    def __init__(self) -> None:
        self._pool = IoPool()
        self._layout = IoLayout()
        self.io = None

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> object:
        return self._layout.add_input(torch.zeros(shape, dtype=dtype))

    def output(self, *shape: int) -> object:
        return self._layout.add_output(torch.float32, shape)

    def block(self) -> object:
        self.io = self._pool.borrow(self._layout.size_bytes)
        return self.io.describe()

    def close(self) -> None:
        self._pool.give_back(self.io)
        self._pool.close()


def generate(job: _Job, component_id: str) -> Generate:
    embeds, pooled, noise = job.input(1, 4, 4096), job.input(1, 768), job.input(1, 16, 8, 8)
    return Generate(
        request_id="r",
        transformer_id=component_id,
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        noise=noise,
        height=64,
        width=64,
        steps=1,
        out_latents=job.output(1, 16, 8, 8),
        io=job.block(),
    )


def denoise(job: _Job, component_id: str) -> Denoise:
    latents = job.input(1, 16, 8, 8)
    part = Part(rows=1, prompt_embeds=job.input(1, 4, 4096), pooled_prompt_embeds=job.input(1, 768), guidance=3.5)
    return Denoise(
        request_id="r",
        transformer_id=component_id,
        latents=latents,
        timestep=(0.5,),
        parts=(part,),
        out=job.output(1, 16, 8, 8),
        io=job.block(),
    )


def decode(job: _Job, component_id: str) -> Decode:
    latents = job.input(1, 16, 4, 4)
    return Decode(request_id="r", vae_id=component_id, latents=latents, out=job.output(1, 3, 32, 32), io=job.block())


def encode(job: _Job, component_id: str) -> Encode:
    image = job.input(1, 3, 32, 32)
    return Encode(request_id="r", vae_id=component_id, image=image, out=job.output(1, 16, 4, 4), io=job.block())


def encode_text(job: _Job, component_id: str) -> EncodeText:
    ids = job.input(1, 8, dtype=torch.int64)
    return EncodeText(request_id="r", encoder_id=component_id, token_ids=ids, out=job.output(1, 8, 128), io=job.block())


KINDS = {
    "generate": (generate, "transformer", "pipelines.generate"),
    "denoise": (denoise, "transformer", "pipelines.denoise_batches"),
    "decode": (decode, "vae", "image_coding.decode"),
    "encode": (encode, "vae", "image_coding.encode"),
    "encode_text": (encode_text, "text", "text_encoding.encode_text"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_overwritten_while_a_job_computes(
    rank: SimpleNamespace,
    states: dict[str, State],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    make, source, function = KINDS[kind]
    path = tmp_path / f"{source}.safetensors"
    save_file(states[source], path)
    component_id = rank.lend(path)
    room = _Job()
    request.addfinalizer(room.close)
    job = make(room, component_id)
    rank.run(job)
    path.chmod(0o600)
    rank.run(job)  # the ctime has moved alone
    module, _, name = function.partition(".")
    compute: Callable[..., object] = getattr(getattr(rank.jobs, module), name)

    def overwrite_and_compute(*given: object, **named: object) -> object:
        overwrite(path)
        return compute(*given, **named)

    monkeypatch.setattr(getattr(rank.jobs, module), name, overwrite_and_compute)
    with pytest.raises(StaleSource, match=r"safetensors: changed since it was lent \(ctime and bytes\)"):
        rank.run(job)
    monkeypatch.undo()
    with pytest.raises(StaleSource, match=r"safetensors: changed since it was lent \(ctime and bytes\)"):
        rank.run(job)
