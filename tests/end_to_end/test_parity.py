"""The result is plain diffusers' result, for every path from a client's tensors to latents and images."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from xditd.client import BadRequest, Unsupported
from xditd.client.arenas import Arena
from xditd.client.demo import checkpoints
from xditd.client.demo.flux1_calls import Flux1Calls

BAR = 1e-6
ODD = [
    (15, 112),
    (301, 112),
    *(pytest.param(*each, marks=pytest.mark.long) for each in [(15, 128), (301, 128), (16, 112)]),
]


@pytest.mark.parametrize(("tokens", "pixels"), [(16, 128), *ODD])
def test_two_ranks_agree_with_diffusers_and_with_themselves(
    tokens, pixels, client, transformer, make_inputs, run, diffusers_run, relative_error
):
    inputs = make_inputs(tokens, pixels)
    first = run(client, transformer, inputs)
    assert relative_error(first, diffusers_run(inputs)) <= BAR
    assert torch.equal(first, run(client, transformer, inputs))


@pytest.mark.slow
def test_one_rank_has_the_same_bits_as_diffusers(one_worker, files, make_inputs, run, diffusers_run):
    with one_worker.connect() as client:
        loan = client.lend(files.transformer)
        for tokens, pixels in [(16, 128), (15, 112)]:
            inputs = make_inputs(tokens, pixels)
            assert torch.equal(run(client, loan, inputs), diffusers_run(inputs))


def test_sigmas_are_used_as_they_are(client, transformer, make_inputs, run, diffusers_run, relative_error):
    inputs = make_inputs()
    sigmas = [1.0, 0.8, 0.55, 0.2]
    ours = run(client, transformer, inputs, sigmas=sigmas)
    assert relative_error(ours, diffusers_run(inputs, sigmas=sigmas)) <= BAR
    assert relative_error(ours, diffusers_run(inputs)) > 1e-3


def test_a_step_cache_spares_steps_on_both_ranks_and_repeats_bit_by_bit(
    client, transformer, make_inputs, run, relative_error
):
    inputs = make_inputs()
    sigmas = [1.0, 0.9999, 0.9998, 0.5]  # three that random weights take for alike
    assert client.status().precision == "bf16"

    def cached(threshold):
        given = {"height": 128, "width": 128, "steps": len(sigmas), "sigmas": sigmas, "noise": inputs.noise}
        job = client.generate(transformer, inputs.conditioning, **given, step_cache=threshold)
        return job.result()

    off, unlike, alike, again = (cached(threshold) for threshold in (0.0, 1e-9, 0.1, 0.1))
    assert [result.reused_steps for result in (off, unlike, alike, again)] == [0, 0, 2, 2]
    assert torch.equal(off.latents, unlike.latents)
    assert torch.equal(alike.latents, again.latents)
    assert 1e-5 < relative_error(alike.latents, off.latents) < 0.02


def test_guidance_reaches_the_model(client, transformer, make_inputs, run, diffusers_run, relative_error):
    inputs = make_inputs()
    ours = run(client, transformer, inputs, guidance_scale=7.0)
    assert relative_error(ours, diffusers_run(inputs, guidance_scale=7.0)) <= BAR
    assert relative_error(ours, diffusers_run(inputs)) > 10 * BAR


def test_a_seed_stands_for_diffusers_noise(client, transformer, make_inputs, run):
    inputs = make_inputs()
    inputs.noise = torch.randn(1, 16, 16, 16, generator=torch.Generator("cpu").manual_seed(7))
    seeded = client.generate(transformer, inputs.conditioning, height=128, width=128, steps=4, seed=7).result()
    assert torch.equal(seeded.latents, run(client, transformer, inputs))


def test_a_loop_of_calls_is_generate(client, transformer, make_inputs, run, relative_error):
    inputs = make_inputs()
    sigmas = [1.0, 0.7, 0.4, 0.1]
    calls, latents = Flux1Calls(client, transformer), inputs.noise
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        velocity = calls.predict(latents, sigma, inputs.prompt, sigmas=sigmas)
        latents = latents + (following - sigma) * velocity
    assert relative_error(latents, run(client, transformer, inputs, sigmas=sigmas)) <= BAR


def test_a_job_shows_what_each_step_takes_the_clean_latents_for(client, transformer, make_inputs, relative_error):
    inputs = make_inputs()
    # Steps enough that the first is far from the last one even if this process comes late to look at it.
    given = dict(noise=inputs.noise, height=inputs.pixels, width=inputs.pixels, steps=20)
    seen = []
    with client.generate(transformer, inputs.conditioning, previews=True, **given) as job:
        for _ in job:
            seen.append(job.denoised())
        latents = job.result().latents
    assert len(seen) == 20
    assert relative_error(seen[-1], latents) <= 1e-6
    assert relative_error(seen[0], latents) > 1e-3
    with pytest.raises(BadRequest, match="has ended"):
        job.denoised()
    with client.generate(transformer, inputs.conditioning, **given) as plain:
        with pytest.raises(BadRequest, match="previews=True"):
            plain.denoised()
        assert torch.equal(plain.result().latents, latents)


def test_vae_decodes_and_encodes_as_diffusers_does(client, vae, files, relative_error):
    from xditd.gpu_workers.families.flux1 import reference

    plain = reference.load_vae(files.vae)
    latents = torch.randn(1, 16, 14, 14, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        image = plain.decode(latents / reference.SCALING + reference.SHIFT).sample.clamp(-1, 1)
        encoded = (plain.encode(image).latent_dist.mode() - reference.SHIFT) * reference.SCALING
    assert relative_error(client.decode(vae, latents), image) <= BAR
    assert relative_error(client.encode(vae, image), encoded) <= BAR


@pytest.mark.slow
def test_both_ranks_decode_a_large_image(client, relative_error):
    """The ranks share the work, an odd number of rows, and the picture is diffusers' all the same."""
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference

    state = checkpoints.flux_vae_state_dict(1, channels=(32, 32, 32, 32))
    latents = torch.randn(1, 16, 65, 64, generator=torch.Generator().manual_seed(2))
    expected = reference.reference_decode(reference.vae_from(state), latents)
    with client.lend(state) as loan:
        image = client.decode(loan, latents)
        assert relative_error(image, expected) <= 3 * BAR
        assert torch.equal(client.decode(loan, latents), image)


def test_the_image_of_generate_is_its_latents_decoded(client, transformer, vae, make_inputs, relative_error):
    inputs = make_inputs()
    result = client.generate(transformer, inputs.conditioning, vae=vae, height=128, width=128, steps=2, seed=1).result()
    assert result.image is not None
    assert relative_error(result.image, client.decode(vae, result.latents)) <= BAR


@pytest.mark.parametrize("name", ["single_blocks.1.linear2.bias", "double_blocks.0.txt_attn.norm.key_norm.scale"])
def test_lent_tensors_are_the_same_memory(name, client, files, make_inputs, run, diffusers_run, relative_error):
    from safetensors.torch import load_file

    arena = Arena.copy_of(load_file(files.transformer))
    inputs = make_inputs()
    expected = diffusers_run(inputs)
    with client.lend(arena.tensors) as loan:
        assert loan.copied.total == 0
        assert relative_error(run(client, loan, inputs), expected) <= BAR
        kept = arena.tensors[name].clone()
        arena.tensors[name].zero_()
        assert relative_error(run(client, loan, inputs), expected) > 10 * BAR
        arena.tensors[name].copy_(kept)
        assert relative_error(run(client, loan, inputs), expected) <= BAR
    arena.close()


def test_a_second_checkpoint_reuses_the_skeleton(client, files, make_inputs, run, diffusers_run, relative_error):
    first = client.lend(files.transformer)
    before = client.status()
    second = client.lend(files.tuned)
    after = client.status()
    assert after.counters.models_built == before.counters.models_built
    assert after.counters.models_reused > before.counters.models_reused
    assert [worker.pid for worker in after.workers] == [worker.pid for worker in before.workers]
    inputs = make_inputs()
    for loan, path in [(second, files.tuned), (first, files.transformer), (second, files.tuned)]:
        assert relative_error(run(client, loan, inputs), diffusers_run(inputs, path)) <= BAR
    assert relative_error(diffusers_run(inputs, files.tuned), diffusers_run(inputs)) > 0.1


def test_models_of_other_heads_take_turns_in_the_same_group(
    daemon, client, transformer, files, tmp_path, make_inputs, run, diffusers_run, relative_error
):
    inputs, pids = make_inputs(), [worker.pid for worker in client.status().workers]
    models = {2: (files.transformer, transformer)}
    for heads in (3, 1):
        path = tmp_path / f"{heads}_heads.safetensors"
        save_file(checkpoints.flux1_state_dict(heads, heads=heads, double_blocks=1, single_blocks=1), path)
        models[heads] = (path, client.lend(path))
    for heads in (3, 2, 1, 2, 3):
        path, loan = models[heads]
        assert relative_error(run(client, loan, inputs), diffusers_run(inputs, path)) <= BAR, heads
    assert [worker.pid for worker in client.status().workers] == pids
    for heads, layout in ((1, "ring=2"), (2, "ulysses=2"), (3, "ring=2")):
        line = f"component_id={models[heads][1].component_id} family=flux1 heads={heads} layout={layout}"
        assert daemon.log_text().count(line) == 1  # of two ranks, one says it


@pytest.mark.long
@pytest.mark.slow
def test_a_ring_that_the_attention_asked_for_cannot_do_is_refused_at_the_lend(start_daemon, make_inputs, run):
    daemon = start_daemon(2, flags=["--attention-backend", "SDPA_MATH"])
    daemon.wait_ready()
    even, odd = (checkpoints.flux1_state_dict(1, heads=heads, double_blocks=1, single_blocks=1) for heads in (2, 3))
    with daemon.connect() as client:
        workers = client.status().workers
        with pytest.raises(Unsupported, match=r"3 attention heads need the layout ring=2, .*'SDPA_MATH'.* use SDPA;"):
            client.lend(odd)
        run(client, client.lend(even), make_inputs(), steps=1)
        assert [worker.pid for worker in client.status().workers] == [worker.pid for worker in workers]


def test_lending_the_same_again_does_nothing(client, transformer, files):
    before = client.status().counters.plugs
    again = client.lend(files.transformer)
    assert again.is_reused
    assert client.status().counters.plugs == before


def test_nothing_of_another_host_was_touched(daemon, client, transformer, make_inputs, run):
    run(client, transformer, make_inputs(), steps=1)
    status = client.status()
    assert status.counters.outside_connections == 0
    ours = {daemon.process.pid, *(worker.pid for worker in status.workers)}
    assert listeners_outside_loopback(ours) == []


def listeners_outside_loopback(pids: set[int]) -> list[str]:
    """TCP sockets of these processes that listen on an address other than loopback, as /proc shows them."""
    from pathlib import Path

    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = str(descriptor.readlink()) if descriptor.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = line.split()[1], line.split()[3], line.split()[9]
            address = local.split(":")[0]
            is_loopback = address.endswith("7F") if table == "tcp" else address in LOOPBACK_6
            if state == "0A" and inode in inodes and not is_loopback:
                found.append(local)
    return found


# ::1 and ::ffff:127.0.0.1 as /proc/net/tcp6 spells them on a little-endian machine.
LOOPBACK_6 = {"00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
