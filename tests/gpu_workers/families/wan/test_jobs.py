"""``Generate`` as a job: the weights of both transformers take turns in one model, and a VAE gives the frames."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
import wan_models

from xditd.ipc.errors import BadRequest
from xditd.ipc.requests import Generate, Sampling

if TYPE_CHECKING:
    from one_rank import OneRank, Room

SIDES = {"frames": 5, "height": 32, "width": 48}
OPTIONS = {"boundary_ratio": 0.7, "guidance_scale_2": 3.0}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What :func:`wan_models.pipeline_latents` samples."""

    config = wan_models.TEXT
    scale = 5.0
    steps = 6
    sides = SIDES
    options = OPTIONS

    @property
    def noise(self) -> torch.Tensor:
        return torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        return {
            name: torch.randn(1, 9, 48, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")
        }


def generate(room: Room, components: dict[str, str], **changes: Any) -> Generate:
    conditioning: dict[str, Any] = {name: room.argument(each) for name, each in Sample().conditioning.items()}
    noise, out = room.input(Sample().noise), room.output(1, 16, 2, 4, 6)
    if video := changes.pop("video", None):
        changes["out_image"] = room.output(*video)
    sampling = {**SIDES, "steps": 6, "guidance_scale": 5.0, "options": OPTIONS, **changes.pop("sampling", {})}
    return Generate(
        request_id="r",
        components=components,  # type: ignore[arg-type]
        io=room.block(),
        conditioning=conditioning,
        sampling=Sampling(**sampling),
        noise=noise,
        out_latents=out,
        **changes,
    )


@pytest.fixture
def lent(rank: OneRank) -> OneRank:
    rank.lend("high", wan_models.state_dict(0))
    rank.lend("low", wan_models.state_dict(7))
    return rank


PAIR = {"transformer": "high", "transformer_2": "low"}


def test_two_transformers_of_one_size_take_turns_in_one_model(lent: OneRank) -> None:
    high, low = (lent.components.get(each, "transformer") for each in ("high", "low"))
    assert high.match.model is low.match.model
    references = [wan_models.reference(wan_models.state_dict(seed)) for seed in (0, 7)]
    expected = wan_models.pipeline_latents(*references, Sample())
    for _ in range(2):
        room = lent.room()
        job = generate(room, PAIR)
        lent.run(job)
        assert torch.equal(room.read(job.out_latents), expected)
    swapped = lent.room()
    job = generate(swapped, {"transformer": "low", "transformer_2": "high"})
    lent.run(job)
    assert torch.equal(swapped.read(job.out_latents), wan_models.pipeline_latents(*references[::-1], Sample()))


def test_a_vae_gives_the_frames_of_the_latents(lent: OneRank) -> None:
    from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
    from xditd.gpu_workers.families.wan_vae.config import WanVaeConfig

    generator = torch.Generator().manual_seed(0)
    state = {
        entry.source: torch.randn(entry.shape, generator=generator)
        / max(1.0, torch.Size(entry.shape[1:]).numel() ** 0.5)
        for entry in WanVae().entries(WanVaeConfig(width=8), ("decoder.middle.0.residual.0.gamma",))
    }
    lent.lend("vae", state)
    room = lent.room()
    job = generate(room, {**PAIR, "vae": "vae"}, video=(1, 3, 5, 32, 48))
    lent.run(job)
    vae = lent.components.get("vae", "vae")
    operations: Any = vae.match.model.operations
    latents = room.read(job.out_latents)
    video = operations.decode(vae.match.model, latents, vae.vae_facts.latents.scaling, is_shared=False)
    assert video.shape == (1, 3, 5, 32, 48)
    assert torch.allclose(room.read(job.out_image), video.clamp(-1, 1), atol=1e-5)
    assert video.std() > 0.01
    wrong = lent.room()
    with pytest.raises(BadRequest, match="out_image"):
        lent.run(generate(wrong, {**PAIR, "vae": "vae"}, video=(1, 3, 32, 48)))


def test_what_cannot_be_obeyed_is_refused(lent: OneRank) -> None:
    lent.lend("other", wan_models.state_dict(0, wan_models.TI2V))
    for components, changes, says in (
        ({"transformer": "high"}, {}, "boundary_ratio without a second transformer would have no effect"),
        ({**PAIR, "transformer_2": "other"}, {}, "transformer_2: a wan .* of other sizes or another dtype"),
        (PAIR, {"sampling": {"frames": 4}}, "frames: 4 is not 1 more than a multiple of 4"),
        (PAIR, {"sampling": {"frames": 9}}, "out_latents"),
        (PAIR, {"sampling": {"options": {"shft": 3.0}}}, "options: shft cannot be given to wan; it takes shift, euler"),
    ):
        with pytest.raises(BadRequest, match=says):
            lent.run(generate(lent.room(), components, **changes))
