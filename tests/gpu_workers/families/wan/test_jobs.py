"""``Generate`` as a job: the weights of both transformers take turns in one model, and a VAE gives the frames."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import wan_models
import wan_vaes

from xditd.gpu_workers.parallel.rank_sync import using_all_cores
from xditd.ipc.errors import BadRequest, Cancelled, NotFinite
from xditd.ipc.job_parts import Sampling
from xditd.ipc.requests import Generate

if TYPE_CHECKING:
    from one_rank import OneRank, Room

    from xditd.gpu_workers.families.wan_vae.config import WanVaeConfig

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
    given = Sample().conditioning | changes.pop("pictures", {})
    conditioning: dict[str, Any] = {name: room.argument(each) for name, each in given.items()}
    latents = changes.pop("latents", (1, 16, 2, 4, 6))
    values = torch.randn(latents, generator=torch.Generator().manual_seed(1))  # that of Sample
    noise, out = room.input(values), room.output(*latents)
    if video := changes.pop("video", None):
        changes["out_image"] = room.output(*video)
    for name, shape in changes.pop("previews", {}).items():
        changes[name] = room.output(*shape)
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
    state = wan_vaes.state_dict()
    lent.lend("vae", state)
    room = lent.room()
    job = generate(room, {**PAIR, "vae": "vae"}, video=(1, 3, 5, 32, 48))
    lent.run(job)
    check_video(room, job, state, wan_vaes.SMALL)
    wrong = lent.room()
    with pytest.raises(BadRequest, match="out_image"):
        lent.run(generate(wrong, {**PAIR, "vae": "vae"}, video=(1, 3, 32, 48)))


def test_ti2v_and_its_vae_give_frames(rank: OneRank) -> None:
    state = wan_vaes.state_dict("diffusers", wan_vaes.SMALL_2_2)
    rank.lend("transformer", wan_models.state_dict(0, wan_models.TI2V))
    rank.lend("vae", state)
    rank.lend("other", wan_vaes.state_dict())
    changes: dict[str, Any] = {
        "latents": (1, 48, 2, 2, 4),
        "video": (1, 3, 5, 32, 64),
        "sampling": {"width": 64, "options": {}},
    }
    room = rank.room()
    job = generate(room, {"transformer": "transformer", "vae": "vae"}, **changes)
    rank.run(job)
    assert rank.frames == [(1, 5), (5, 5)]
    check_video(room, job, state, wan_vaes.SMALL_2_2)
    with pytest.raises(BadRequest, match="vae: its latents have 16 channels, the transformer's 48"):
        rank.run(generate(rank.room(), {"transformer": "transformer", "vae": "other"}, **changes))


def test_a_cancel_takes_effect_at_a_chunk_of_frames(lent: OneRank) -> None:
    lent.lend("vae", wan_vaes.state_dict())
    room = lent.room()
    changes: dict[str, Any] = {"latents": (1, 16, 3, 4, 6), "sampling": {"frames": 9}}
    job = generate(room, {**PAIR, "vae": "vae"}, video=(1, 3, 9, 32, 48), **changes)
    with pytest.raises(Cancelled, match="cancelled after frame 5 of 9"):
        lent.run(job, is_cancelled=lambda: len(lent.frames) == 2)
    assert lent.frames == [(1, 9), (5, 9)]
    assert job.out_image is not None
    assert (room.read(job.out_image)[:, :, :5].std(dim=(0, 1, 3, 4)) > 0.01).all()
    lent.run(job)  # the next one decodes all frames
    check_video(room, job, wan_vaes.state_dict(), wan_vaes.SMALL)


def test_the_preview_is_the_middle_frame_of_the_prediction(lent: OneRank) -> None:
    state = wan_vaes.state_dict()
    lent.lend("vae", state)
    room = lent.room()
    changes: dict[str, Any] = {"latents": (1, 16, 3, 4, 6), "sampling": {"frames": 9}, "video": (1, 3, 9, 32, 48)}
    changes["previews"] = {"out_denoised": (1, 16, 3, 4, 6), "out_preview": (1, 3, 32, 48)}
    job = generate(room, {**PAIR, "vae": "vae"}, **changes)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    assert job.out_denoised is not None
    assert job.out_preview is not None
    places = job.out_denoised, job.out_preview
    lent.run(job, on_step=lambda *_: seen.append((room.read(places[0]).clone(), room.read(places[1]).clone())))
    assert len(seen) == 6
    module = wan_vaes.reference(state)
    with using_all_cores(torch.device("cpu")):
        for denoised, preview in seen:
            expected = wan_vaes.reference_decode(module, wan_vaes.SMALL, denoised[:, :, 1:2])[:, :, 0]
            assert (preview - expected).abs().max() <= 2e-6
    assert (seen[0][1] - seen[-1][1]).abs().max() > 1e-3
    check_video(room, job, state, wan_vaes.SMALL)


def test_previews_that_cannot_be_are_refused(lent: OneRank) -> None:
    room = lent.room()
    with pytest.raises(BadRequest, match="out_preview without a vae"):
        lent.run(generate(room, PAIR, previews={"out_preview": (1, 3, 32, 48)}))
    lent.lend("vae", wan_vaes.state_dict())
    video = lent.room()
    changes: dict[str, Any] = {"video": (1, 3, 5, 32, 48), "previews": {"out_preview": (1, 3, 5, 32, 48)}}
    with pytest.raises(BadRequest, match=r"out_preview: the place for it is \[1, 3, 5, 32, 48\]"):
        lent.run(generate(video, {**PAIR, "vae": "vae"}, **changes))


def test_a_video_with_values_that_are_not_finite_is_refused(lent: OneRank) -> None:
    state = wan_vaes.state_dict()
    state["decoder.head.2.bias"][1] = torch.nan
    lent.lend("vae", state)
    with pytest.raises(NotFinite, match=r"vae .*: image: some values are NaN or infinite"):
        lent.run(generate(lent.room(), {**PAIR, "vae": "vae"}, video=(1, 3, 5, 32, 48)))


def test_a_picture_is_encoded_without_a_decode_and_its_memory_is_freed(rank: OneRank) -> None:
    import weakref

    from xditd.gpu_workers.jobs import generate as job_module

    rank.lend("transformer", wan_models.state_dict(0, wan_models.IMAGE))
    rank.lend("vae", wan_vaes.state_dict())
    rank.lend("broken", wan_vaes.state_dict() | {"conv1.bias": torch.full((32,), torch.nan)})
    image = torch.randint(0, 257, (1, 3, 32, 48), generator=torch.Generator().manual_seed(3)) / 128 - 1
    changes: dict[str, Any] = {"pictures": {"image": image}, "sampling": {"options": {}}}
    videos: list[weakref.ref[torch.Tensor]] = []
    living: list[bool] = []

    def encode(pictures: Any, *given: Any) -> Any:
        videos.extend(weakref.ref(each) for each in pictures.values())
        return encoded(pictures, *given)

    encoded = job_module.encode_pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "encode_pictures", encode)
        room = rank.room()
        job = generate(room, {"transformer": "transformer", "vae": "vae"}, **changes)
        rank.run(job, on_step=lambda *_: living.append(any(each() is not None for each in videos)))
    assert videos
    assert not any(living)
    module = wan_models.reference(wan_models.state_dict(0, wan_models.IMAGE), wan_models.IMAGE)
    sample = {name: getattr(Sample(), name) for name in ("scale", "steps", "sides", "noise")}
    pictured = Sample().conditioning | {"image": image}
    whole = SimpleNamespace(**sample, config=wan_models.IMAGE, options={}, conditioning=pictured)
    with using_all_cores(torch.device("cpu")):
        expected = wan_models.image_pipeline_latents(module, None, wan_vaes.reference(wan_vaes.state_dict()), whole)
    assert wan_models.relative_error(room.read(job.out_latents), expected) <= 1e-6
    with pytest.raises(NotFinite, match=r"vae broken .*: latents of image: some values are NaN or infinite"):
        rank.run(generate(rank.room(), {"transformer": "transformer", "vae": "broken"}, **changes))
    text = rank.room()
    rank.lend("text", wan_models.state_dict(0))
    with pytest.raises(BadRequest, match="a vae without out_image or a picture would have no effect"):
        rank.run(generate(text, {"transformer": "text", "vae": "vae"}, sampling={"options": {}}))
    with pytest.raises(BadRequest, match="image: the workers encode it, but the job has no vae"):
        rank.run(generate(rank.room(), {"transformer": "transformer"}, **changes))


def check_video(room: Room, job: Generate, state: wan_vaes.State, config: WanVaeConfig) -> None:
    assert job.out_image is not None
    module = wan_vaes.reference(state, config)
    with using_all_cores(torch.device("cpu")):  # as the job does
        expected = wan_vaes.reference_decode(module, config, room.read(job.out_latents))
    found = room.read(job.out_image)
    assert found.shape == job.out_image.shape
    assert (found - expected).abs().max() <= 1e-6
    assert found.std() > 0.01


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
