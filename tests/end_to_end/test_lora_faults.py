"""LoRAs that are refused, and loans of LoRAs that end, through a real daemon with two workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lora_files
import pytest
import torch
from lora_files import matrices
from lora_runs import called, latents_of

from xditd.client import BadRequest, Closed, LeaseLost, NotFinite, StaleSource, UnknownComponent, Unsupported


def test_other_models_and_wrong_shapes_are_refused_by_name(client, transformer, state, of_class, leaves_nothing):
    sdxl = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640)}
    with pytest.raises(Unsupported, match=r"^lora: a LoRA of another model: of its 1 layers, 0 have names") as caught:
        client.lend_lora(lora_files.make(sdxl, "kohya", 0).tensors)
    assert caught.value.names[0].startswith("lora_unet_down_blocks_1")
    z_image = lora_files.make({"layers.0.attention.qkv": (768, 256)}, "comfyui", 0)
    says = r"LoRA z is of z_image, and .* of flux1: use it with the model"
    with client.lend_lora(z_image.tensors, label="z") as lent, pytest.raises(BadRequest, match=says):
        transformer.with_loras([(lent, 1.0)])
    wide = {name: (2 * rows, 2 * columns) for name, (rows, columns) in of_class.items() if "attn" in name}
    with client.lend_lora(lora_files.make(wide, "diffusers", 0).tensors, label="wide") as lent:
        with pytest.raises(BadRequest, match=r"LoRA wide is of another model than this flux1: .* 512 inputs") as caught:
            client.generate(
                transformer.with_loras([(lent, 1.0)]),
                {"prompt_embeds": torch.zeros(1, 4, 4096), "pooled_prompt_embeds": torch.zeros(1, 768)},
                height=128,
                width=128,
                steps=1,
            ).result()
        assert len(caught.value.names) == len(wide)
    deep = {f"transformer_blocks.{number}.attn.to_q": (256, 256) for number in range(5)}
    says = "this flux1 has 2 of its 5 layers"
    with client.lend_lora(lora_files.make(deep, "diffusers", 0).tensors) as lent, pytest.raises(BadRequest, match=says):
        called(client, transformer.with_loras([(lent, 1.0)]))


def test_names_of_no_layer_are_listed_and_left_out(client, transformer, state, caplog, leaves_nothing):
    lora = lora_files.make(matrices(state), "kohya", 1)
    odd = lora_files.make({"strange.part": (64, 64)}, "kohya", 1).tensors
    with client.lend_lora(lora.tensors | odd | {"bundle_emb.a": torch.zeros(2)}) as lent:
        assert lent.facts.lora.unknown == ("lora_unet_strange_part.lora_down.weight",)
        assert "lora_unet_strange_part.lora_down.weight" in caplog.text
        assert "bundle_emb.a" in caplog.text
        found = called(client, transformer.with_loras([(lent, 1.0)]))
    with client.lend_lora(lora.tensors) as lent:
        assert torch.equal(called(client, transformer.with_loras([(lent, 1.0)])), found)


def test_bad_strengths_and_loans(client, daemon, transformer, vae, state, leaves_nothing):
    lora = lora_files.make(matrices(state), "kohya", 1)
    with client.lend_lora(lora.tensors, label="good") as lent:
        for bad in (float("nan"), float("inf"), "1", True, 1e9):
            with pytest.raises(BadRequest, match="loras: the strength"):
                transformer.with_loras([(lent, bad)])
        with pytest.raises(BadRequest, match=r"lora: .* is a transformer; name a lora"):
            transformer.with_loras([(transformer, 1.0)])
        with pytest.raises(BadRequest, match="pairs of a loan"):
            transformer.with_loras([lent])
        with pytest.raises(BadRequest, match="is of flux1, and ae of flux_vae"):
            vae.with_loras([(lent, 1.0)])
        with pytest.raises(BadRequest, match="loras: ae is a vae, which takes none; leave them out"):
            vae.with_loras([(lent.component_id, 1.0)])
        with pytest.raises(UnknownComponent, match="lora-99-zzz: not on loan"):
            called(client, transformer.with_loras([("lora-99-zzz", 1.0)]))
        with pytest.raises(BadRequest, match="a transformer where a lora is needed"):
            called(client, transformer.with_loras([(transformer.component_id, 1.0)]))
        with pytest.raises(BadRequest, match="a lora where a transformer is needed"):
            called(client, lent.component_id)
        view = transformer.with_loras([(lent, 1.0)])
        right = called(client, view)
    with pytest.raises(LeaseLost, match=r"component good \(lora-.*was returned"):
        called(client, view)
    other = daemon.connect()
    theirs = other.lend_lora(lora.tensors)
    foreign = transformer.with_loras([(theirs.component_id, 1.0)])
    assert torch.equal(called(client, foreign), right)
    other.close()
    with pytest.raises(Closed):
        transformer.with_loras([(theirs, 1.0)])
    with pytest.raises(LeaseLost, match="it said goodbye"):
        called(client, foreign)


def test_a_revoked_lora_ends_the_jobs_that_use_it(client, daemon, transformer, state, inputs):
    lora = lora_files.make(matrices(state), "kohya", 1)
    with client.lend_lora(lora.tensors) as lent, daemon.connect() as other:
        view = transformer.with_loras([(lent, 1.0)])
        given = {"height": inputs.pixels, "width": inputs.pixels, "noise": inputs.noise}
        running = client.generate(transformer, inputs.conditioning, steps=500, **given)
        next(iter(running.events()))
        waiting = client.generate(view, inputs.conditioning, steps=2, **given)
        other.revoke(lent.component_id)
        with pytest.raises(LeaseLost, match="revoked"):
            waiting.result()
        running.cancel()
        with pytest.raises(LeaseLost):
            called(client, view)
    assert latents_of(client, transformer, inputs).isfinite().all()


def test_a_rewritten_file_is_stale_and_an_adopted_lora_stays(
    client, daemon, transformer, state, tmp_path: Path, leaves_nothing
):
    path = lora_files.make(matrices(state), "kohya", 1).save(tmp_path / "x.safetensors")
    with client.lend_lora(path) as lent:
        right = called(client, transformer.with_loras([(lent, 1.0)]))
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"1234")
        with pytest.raises(StaleSource):
            called(client, transformer.with_loras([(lent, 1.0)]))
    other = daemon.connect()
    adopted = other.lend_lora(lora_files.make(matrices(state), "kohya", 1).tensors)
    adopted.adopt()
    other.close()
    assert torch.equal(called(client, transformer.with_loras([(adopted.component_id, 1.0)])), right)
    client.revoke(adopted.component_id)


def test_results_that_are_not_finite_name_the_loras(client, transformer, state, of_class, inputs, leaves_nothing):
    """And the LoRA can be returned at once: whoever has seen the error views its factors no more."""
    right, starts = latents_of(client, transformer, inputs), client.status().counters.group_starts
    broken = lora_files.make(matrices(state), "kohya", 1)
    name = next(name for name in broken.tensors if name.endswith("lora_up.weight"))
    broken.tensors[name][0, 0] = float("nan")
    for strength, says in ((0.5, "at strength 0.5"), ([0.0, 2.0], "at strength 0 to 2")):
        with client.lend_lora(broken.tensors, label="broken") as lent:
            says = rf"some values are NaN or infinite; with LoRA broken {says}: try it without"
            with pytest.raises(NotFinite, match=says):
                latents_of(client, transformer.with_loras([(lent, strength)]), inputs)
    with client.lend_lora(broken.tensors, label="broken") as lent, pytest.raises(NotFinite, match="with LoRA broken"):
        called(client, transformer.with_loras([(lent, 0.5)]))
    assert torch.equal(latents_of(client, transformer, inputs), right)
    assert client.status().counters.group_starts == starts


def test_a_stale_file_that_is_not_adopted_can_be_returned(client, state, tmp_path: Path, leaves_nothing):
    starts = client.status().counters.group_starts
    path = lora_files.make(matrices(state), "kohya", 1).save(tmp_path / "x.safetensors")
    with client.lend_lora(path) as lent:
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"1234")
        with pytest.raises(StaleSource):
            lent.adopt()
    assert client.status().counters.group_starts == starts


@pytest.mark.long
@pytest.mark.slow
def test_a_rebuilt_group_maps_loras_again(client, transformer, state, wait_until, processes):
    lora = lora_files.make(matrices(state), "kohya", 1)
    with client.lend_lora(lora.tensors) as lent:
        view = transformer.with_loras([(lent, 1.0)])
        right = called(client, view)
        starts = client.status().counters.group_starts
        os.kill(client.status().workers[0].pid, signal.SIGKILL)
        wait_until(lambda: client.status().counters.group_starts > starts, "a new group")
        client.wait_ready(60)
        assert torch.equal(called(client, view), right)
        assert client.status().loras.jobs == 1
