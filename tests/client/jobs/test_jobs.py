"""Jobs: events, results, previews, and what their requests hold."""

import asyncio
import threading

import msgspec
import pytest

torch = pytest.importorskip("torch")

import sample_facts  # noqa: E402
from generated_jobs import TEXT, step, write  # noqa: E402

from xditd.client import AsyncClient  # noqa: E402
from xditd.client.async_client import AsyncGenerationJob  # noqa: E402
from xditd.client.jobs.generation import GenerationJob  # noqa: E402
from xditd.ipc.errors import BadRequest, UnknownComponent  # noqa: E402
from xditd.ipc.facts import LatentScaling  # noqa: E402
from xditd.ipc.replies import Decoded, Encoded, FramesDecoded, Generated, Queued, StepDone  # noqa: E402
from xditd.ipc.requests import Decode, Encode, Generate, GetStatus  # noqa: E402


def test_events_then_the_result(client, generates):
    job = client.generate("c1", TEXT, vae="c2", height=32, width=48, steps=3, seed=7)
    assert [event.step for event in job] == [1, 2, 3]
    result = job.result()
    assert result is job.result()
    assert result.latents.shape == (1, 16, 4, 6)
    assert torch.all(result.latents == 7.0)
    assert result.image.shape == (1, 3, 32, 48)
    assert result.seed == 7
    assert {"denoise", "round_trip"} <= set(result.timings_ms)


def test_events_include_queued(client, generates):
    job = client.generate("c1", TEXT, height=16, width=16, steps=1)
    assert [type(event) for event in job.events()] == [Queued, StepDone]


def test_events_include_the_frames_of_a_video(client, daemon):
    def answer(request):
        told = {"request_id": request.request_id, "total_frames": 9, "elapsed_s": 0.2}
        return [
            step(request, 1, 1),
            *(FramesDecoded(frames=frames, **told) for frames in (1, 5, 9)),
            Generated(request_id=request.request_id, timings_ms={}, reused_steps=0),
        ]

    daemon.answers[Generate] = answer
    job = client.generate("c1", TEXT, height=16, width=16, steps=1)
    assert [event.step for event in job] == [1]
    job = client.generate("c1", TEXT, height=16, width=16, steps=1)
    assert [event.frames for event in job.events() if isinstance(event, FramesDecoded)] == [1, 5, 9]
    assert job.result() is job.result()


def test_a_preview_is_an_image_of_what_the_last_step_predicted(client, daemon):
    def answer(request):
        assert request.out_denoised is None
        write(daemon, request.io, request.out_preview, 0.25)
        return [step(request, 1, 1), Generated(request_id=request.request_id, timings_ms={}, reused_steps=0)]

    daemon.answers[Generate] = answer
    job = client.generate("c1", TEXT, vae="c2", height=16, width=32, steps=1, previews="image")
    for _ in job:
        preview = job.preview()
        with pytest.raises(BadRequest, match="denoised: the job was started without previews=True"):
            job.denoised()
    assert preview.shape == (1, 3, 16, 32)
    assert torch.all(preview == 0.25)
    with pytest.raises(BadRequest, match="has ended: its result has the image"):
        job.preview()


@pytest.mark.parametrize("previews", ["image", True])
def test_a_preview_before_the_first_step_is_not_that_of_an_earlier_job(client, daemon, previews):
    def answer(request):
        write(daemon, request.io, request.out_preview or request.out_denoised, 0.25)
        return [step(request, 1, 1), Generated(request_id=request.request_id, timings_ms={}, reused_steps=0)]

    daemon.answers[Generate] = answer
    given = {"vae": "c2", "height": 16, "width": 32, "steps": 1, "previews": previews}
    client.generate("c1", TEXT, **given).result()
    daemon.answers[Generate] = lambda request: []  # which gets the same block
    job = client.generate("c1", TEXT, **given)
    with pytest.raises(BadRequest, match="no step of it was seen to be done: iterate over the job"):
        job.preview() if previews == "image" else job.denoised()
    job.cancel()


def test_previews_of_an_event_loop_are_those_of_the_job(client, daemon, folder):
    def answer(request):
        for place in (request.out_preview, request.out_denoised):
            if place is not None:
                write(daemon, request.io, place, 0.25)
        return [step(request, 1, 1), Generated(request_id=request.request_id, timings_ms={}, reused_steps=0)]

    daemon.answers[Generate] = answer
    sides = {"height": 16, "width": 32, "steps": 1}

    async def run():
        async with AsyncClient(folder) as looped:
            job = await looped.generate("c1", TEXT, vae="c2", previews="image", **sides)
            async for _ in job:
                preview = await job.preview()
                with pytest.raises(BadRequest, match="denoised: the job was started without previews=True"):
                    await job.denoised()
            with pytest.raises(BadRequest, match="has ended: its result has the image"):
                await job.preview()
            job = await looped.generate("c1", TEXT, previews=True, **sides)
            async for _ in job:
                denoised = await job.denoised()
            return preview, denoised

    preview, denoised = asyncio.run(run())
    assert (preview.shape, denoised.shape) == ((1, 3, 16, 32), (1, 16, 2, 4))
    assert torch.all(preview == 0.25)
    assert torch.all(denoised == 0.25)


def test_the_job_of_an_event_loop_has_what_the_job_has():
    """What is added to the job is added there, too."""
    public = {name for name in dir(GenerationJob) if not name.startswith("_")}
    assert public - set(dir(AsyncGenerationJob)) == set()


def test_previews_that_cannot_be_are_refused(client, stalls):
    with pytest.raises(BadRequest, match="previews: an image needs vae="):
        client.generate("c1", TEXT, height=16, width=16, previews="image")
    with pytest.raises(BadRequest, match="previews: 'frames' is not True, False or 'image'"):
        client.generate("c1", TEXT, height=16, width=16, previews="frames")
    job = client.generate("c1", TEXT, height=16, width=16)
    with pytest.raises(BadRequest, match="preview: the job was started without previews='image'"):
        job.preview()
    job.cancel()


def test_blocks_of_long_videos_fit_the_limits():
    from xditd.client.io_places import IoPlaces
    from xditd.ipc import limits
    from xditd.ipc.settings.daemon import DaemonSettings

    places, video = IoPlaces(), (1, 3, 161, 720, 1280)
    places.add_output(torch.float32, (1, 16, 41, 90, 160))
    place = places.add_output(torch.float32, video)
    assert 2 * places.size_bytes < DaemonSettings().client_io_bytes
    assert place.size_bytes * 4 / 3 < limits.MAX_ARGUMENT_BYTES  # such a video and its mask


def test_inputs_are_sent_unchanged_and_results_have_the_noises_dtype(client, daemon, generates):
    noise = torch.randn(1, 16, 4, 4, dtype=torch.bfloat16)
    seen = {}

    def answer(request):
        seen["noise"] = daemon.open_io(request.io, request.noise).clone()
        seen["embeds"] = daemon.open_io(request.io, request.conditioning["prompt_embeds"].place).clone()
        write(daemon, request.io, request.out_latents, 1.0)
        return [Generated(request_id=request.request_id, timings_ms={})]

    daemon.answers[Generate] = answer
    job = client.generate("c1", TEXT, height=32, width=32, steps=2, noise=noise, sigmas=[1.0, 0.5])
    assert job.result().latents.dtype is torch.bfloat16
    assert torch.equal(seen["noise"], noise)
    assert torch.equal(seen["embeds"], TEXT["prompt_embeds"])
    request = daemon.requests(Generate)[0]
    assert request.sampling.sigmas == (1.0, 0.5)
    assert request.sampling.seed is None
    assert request.out_image is None
    assert job.result().image is None
    with pytest.raises(BadRequest, match="had no VAE"):
        job.result().to_pil()


def test_a_drawn_seed_is_in_the_result(client, daemon, generates):
    result = client.generate("c1", TEXT, height=16, width=16, steps=1).result()
    assert result.seed == daemon.requests(Generate)[0].sampling.seed


def test_the_step_cache_is_off_by_default_and_counts_reused_steps(client, daemon, generates):
    size = {"height": 16, "width": 16, "steps": 4}
    results = [client.generate("c1", TEXT, **size, **more).result() for more in ({}, {"step_cache": 0.08})]
    assert [request.sampling.step_cache_threshold for request in daemon.requests(Generate)] == [0.0, 0.08]
    assert [result.reused_steps for result in results] == [0, 2]


def test_images_are_saved(client, generates, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    result = client.generate("c1", TEXT, vae="c2", height=16, width=32, steps=1, seed=1).result()
    path = result.save(tmp_path / "new" / "out.png")
    with image_module.open(path) as image:
        assert image.size == (32, 16)
        assert image.getpixel((0, 0)) == (128, 128, 128)


def test_steps_and_guidance_are_the_familys_own_unless_they_are_given(client, daemon, generates):
    job = client.generate("c1", TEXT, height=16, width=16)
    job.result()
    assert job.total_steps == 28
    own = daemon.requests(Generate)[0].sampling
    assert (own.steps, own.guidance_scale, own.variant, own.options) == (28, None, "class", {})
    client.generate("c1", TEXT, height=16, width=16, steps=2, guidance_scale=5, options={"shift": 3.0}).result()
    given = daemon.requests(Generate)[1].sampling
    assert (given.steps, given.guidance_scale, given.options) == (2, 5.0, {"shift": 3.0})


def test_conditioning_may_be_lists_with_a_tensor_for_each_image(client, daemon, generates):
    daemon.facts["c1"] = sample_facts.LISTS
    texts = [torch.randn(5, 8), torch.randn(3, 8)]
    result = client.generate("c1", {"prompt_embeds": texts}, height=16, width=16, steps=1, seed=3).result()
    assert result.latents.shape == (2, 16, 2, 2)
    request = daemon.requests(Generate)[0]
    assert list(request.conditioning) == ["prompt_embeds"]
    assert [leaf.shape for leaf in request.conditioning["prompt_embeds"].items] == [(5, 8), (3, 8)]


def test_facts_of_a_component_id_are_requested_once(client, daemon, generates):
    for _ in range(2):
        assert client.facts("c1") == sample_facts.TRANSFORMER
        client.generate("c1", TEXT, height=16, width=16, steps=1).result()
    assert len(daemon.requests(GetStatus)) == 1
    with pytest.raises(UnknownComponent, match="component c9: not on loan"):
        client.facts("c9")
    with pytest.raises(BadRequest, match="component c2: a vae where a transformer is needed"):
        client.generate("c2", TEXT, height=16, width=16)


def test_decode_and_encode(client, daemon):
    def decode(request):
        write(daemon, request.io, request.out, 0.5)
        return [Decoded(request_id=request.request_id, timings_ms={})]

    def encode(request):
        write(daemon, request.io, request.out, 0.25)
        return [Encoded(request_id=request.request_id, timings_ms={})]

    daemon.answers[Decode], daemon.answers[Encode] = decode, encode
    image = client.decode("c2", torch.randn(1, 16, 4, 6, dtype=torch.float16))
    assert image.shape == (1, 3, 32, 48)
    assert image.dtype is torch.float16
    latents = client.encode("c2", image)
    assert latents.shape == (1, 16, 4, 6)
    assert torch.all(latents == 0.25)


def test_a_video_is_encoded(client, daemon):
    def encode(request):
        write(daemon, request.io, request.out, 0.25)
        return [Encoded(request_id=request.request_id, timings_ms={})]

    daemon.answers[Encode] = encode
    vae = daemon.facts["c2"].vae
    latents = msgspec.structs.replace(vae.latents, frames=4)
    daemon.facts["c2"] = msgspec.structs.replace(daemon.facts["c2"], vae=msgspec.structs.replace(vae, latents=latents))
    assert client.encode("c2", torch.randn(1, 3, 5, 32, 48)).shape == (1, 16, 2, 4, 6)


def test_latents_of_a_transformer_are_scaled_as_its_facts_say(client, daemon, monkeypatch):
    given = []

    def answer(request):
        given.append(request.scaling)
        write(daemon, request.io, request.out, 0.5)
        return [(Decoded if isinstance(request, Decode) else Encoded)(request_id=request.request_id, timings_ms={})]

    daemon.answers[Decode] = daemon.answers[Encode] = answer
    latents, image = torch.zeros(1, 16, 4, 6), torch.zeros(1, 3, 32, 48)
    for transformer in (None, "c1"):
        client.decode("c2", latents, transformer=transformer)
        client.encode("c2", image, transformer=transformer)
    sd3 = LatentScaling(factor=1.5305, shift=0.0609)
    assert given == [None, None, sd3, sd3]
    with pytest.raises(BadRequest, match="component c2: a vae where a transformer is needed"):
        client.decode("c2", latents, transformer="c2")
    facts = client.facts
    for change, refusal in (
        ({"pixels": 16}, "vae: its latents have 8 pixels on a side for each latent, the transformer's 16"),
        ({"space": "wan_2_1"}, "vae: its latents are of the space flux1, the transformer's of wan_2_1"),
    ):
        other = msgspec.structs.replace(sample_facts.LATENTS, **change)
        told = msgspec.structs.replace(sample_facts.TRANSFORMER.transformer, latents=other)
        changed = msgspec.structs.replace(sample_facts.TRANSFORMER, transformer=told)
        found = {"c1": changed, "c2": facts("c2")}
        monkeypatch.setattr(client, "facts", found.__getitem__)
        for run, tensor in ((client.decode, latents), (client.encode, image)):
            with pytest.raises(BadRequest, match=refusal):
                run("c2", tensor, transformer="c1")
    assert len(given) == 4


def test_threads_run_jobs_in_parallel(client, daemon, generates):
    results = {}

    def work(seed):
        results[seed] = client.generate("c1", TEXT, height=16, width=16, steps=2, seed=seed).result()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert all(torch.all(results[seed].latents == float(seed)) for seed in range(6))


def test_a_bad_value_is_never_sent(client, daemon):
    with pytest.raises(BadRequest, match="steps"):
        client.generate("c1", TEXT, height=16, width=16, steps=0)
    with pytest.raises(BadRequest, match="seed and noise"):
        client.generate("c1", TEXT, height=16, width=16, steps=1, seed=1, noise=torch.zeros(1, 16, 2, 2))
    assert daemon.requests(Generate) == []


def test_a_result_that_several_threads_wait_for_is_given_to_each(daemon, client):
    daemon.answers[Generate] = lambda request: []
    job = client.generate("c1", TEXT, height=32, width=32, steps=1)
    found = []
    threads = [threading.Thread(target=lambda: found.append(job.result()), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    daemon.send(Generated(request_id=daemon.wait_for(Generate).request_id, timings_ms={}))
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert all(each is found[0] for each in found)
