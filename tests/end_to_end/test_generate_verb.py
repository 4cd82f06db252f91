"""``xditd generate`` through a real daemon, for each family: the bits of the Python library, and what was used."""

from __future__ import annotations

import argparse
import json

import lora_files
import pytest
import torch
import z_image_models
from flux1_controlnets import MODES, comfyui_state, diffusers_state
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from xditd.client import Control
from xditd.client.cli import control_flags, exits
from xditd.client.cli.main import main

WIDTH, HEIGHT, STEPS, SEED = 96, 128, 2, 7


@pytest.fixture
def command(daemon, files, tmp_path):
    """Run the verb on a transformer and a file of embeddings; returns its exit status."""

    def run(transformer, embeds, *more):
        save_file(embeds, tmp_path / "embeds.safetensors")
        named = {"transformer": transformer, "vae": files.vae, "embeds": tmp_path / "embeds.safetensors",
                 "out": tmp_path / "a.png", "save-latents": tmp_path / "latents.safetensors",
                 "runtime-dir": daemon.runtime_dir}  # fmt: skip
        flags = [part for name, path in named.items() for part in (f"--{name}", str(path))]
        sizes = ["--size", f"{WIDTH}x{HEIGHT}", "--steps", str(STEPS), "--seed", str(SEED)]
        return main(["generate", "--json", *flags, *sizes, *more])

    return run


@pytest.fixture
def verb(command, capsys):
    """Run the verb; returns latents, images and what it said."""

    def run(*given):
        assert command(*given) == exits.DONE
        said = json.loads(capsys.readouterr().out)
        images = [Image.open(path) for path in said["images"]]
        return load_file(said["latents"])["latents"], images, said

    return run


def are_those_of(job, latents, images):
    result = job.result()
    assert torch.equal(latents, result.latents)
    assert len(images) == len(latents)
    assert all(
        ImageChops.difference(image, result.to_pil(number)).getbbox() is None for number, image in enumerate(images)
    )
    return True


def test_flux1(verb, files, client, make_inputs):
    conditioning = make_inputs().conditioning
    latents, images, said = verb(files.transformer, conditioning, "--guidance", "2.5")
    job = client.generate(
        client.lend(files.transformer), conditioning, vae=client.lend(files.vae), height=HEIGHT, width=WIDTH,
        steps=STEPS, seed=SEED, guidance_scale=2.5,
    )  # fmt: skip
    assert are_those_of(job, latents, images)
    assert said["sampling"]["guidance_scale"] == 2.5
    assert said["conditioning"] == {"prompt_embeds": [1, 16, 4096], "pooled_prompt_embeds": [1, 768]}


def test_loras(verb, command, files, client, make_inputs, tmp_path, capsys):
    state, conditioning = load_file(files.transformer), make_inputs().conditioning
    paths = [
        lora_files.make(lora_files.matrices(state), "kohya", seed).save(tmp_path / f"{seed}.safetensors")
        for seed in (1, 2)
    ]
    uses = [("--lora", f"{path}={strength}") for path, strength in zip(paths, (0.8, -0.3), strict=True)]
    latents, images, said = verb(files.transformer, conditioning, *uses[0], *uses[1])
    lent = [(client.lend_lora(path), strength) for path, strength in zip(paths, (0.8, -0.3), strict=True)]
    job = client.generate(
        client.lend(files.transformer).with_loras(lent), conditioning, vae=client.lend(files.vae), height=HEIGHT,
        width=WIDTH, steps=STEPS, seed=SEED,
    )  # fmt: skip
    assert are_those_of(job, latents, images)
    assert said["loras"] == [
        {"file": str(path), "strength": strength, "roles": ["transformer"]}
        for path, strength in zip(paths, (0.8, -0.3), strict=True)
    ]
    assert [each["kind"] for each in said["components"]] == ["transformer", "vae", "lora", "lora"]
    assert command(files.transformer, conditioning, "--lora", f"{files.vae}=1") == exits.FAILED
    assert "this is no LoRA" in capsys.readouterr().out


def test_controlnets(verb, command, files, client, make_inputs, tmp_path, capsys):
    conditioning, union, picture = make_inputs().conditioning, tmp_path / "union.safetensors", tmp_path / "edges.png"
    save_file(diffusers_state(comfyui_state(5, modes=MODES)), union)
    Image.radial_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB").save(picture)
    flag = f"{union}={picture}@0.6:end=0.9:mode=2"
    latents, images, said = verb(files.transformer, conditioning, "--control", flag)
    image = control_flags.read_pictures(
        argparse.Namespace(control=control_flags.parse(flag), vae=files.vae, size=(WIDTH, HEIGHT))
    )[0]
    control = Control(client.lend(union), image, scale=0.6, end=0.9, mode=2)
    given = dict(vae=client.lend(files.vae), height=HEIGHT, width=WIDTH, steps=STEPS, seed=SEED)
    lent = client.lend(files.transformer)
    assert are_those_of(client.generate(lent, conditioning, controls=[control], **given), latents, images)
    assert not torch.equal(latents, client.generate(lent, conditioning, **given).result().latents)
    assert [each["kind"] for each in said["components"]] == ["transformer", "vae", "controlnet"]

    assert command(files.transformer, conditioning, "--control", f"{union}={picture}") == exits.MISUSE
    assert "a union ControlNet needs the kind of its picture" in capsys.readouterr().err
    state = z_image_models.state_dict(0, names=z_image_models.COMFYUI)
    save_file(state, tmp_path / "z.safetensors")
    texts = {"prompt_embeds.0": torch.randn(20, z_image_models.SMALL.text_channels)}
    assert command(tmp_path / "z.safetensors", texts, "--control", flag) == exits.MISUSE
    assert "gives residuals for flux1, and the transformer is z_image" in capsys.readouterr().err


def test_z_image_with_texts_of_unequal_lengths_guidance_and_options(verb, command, files, client, tmp_path, capsys):
    checkpoint = tmp_path / "z_image.safetensors"
    save_file(z_image_models.state_dict(0, names=z_image_models.COMFYUI), checkpoint)
    conditioning = {
        "prompt_embeds": z_image_models.inputs((33, 7), ((8, 8),))["cap_feats"],
        "negative_prompt_embeds": z_image_models.inputs((12, 5), ((8, 8),))["cap_feats"],
    }
    embeds = {f"{name}.{number}": each for name, texts in conditioning.items() for number, each in enumerate(texts)}
    options = ["--option", "shift=1.5", "--option", "cfg_normalization=1"]
    latents, images, said = verb(checkpoint, embeds, "--guidance", "1", *options)
    lent, vae = client.lend(checkpoint), client.lend(files.vae)
    given = {"vae": vae, "height": HEIGHT, "width": WIDTH, "steps": STEPS, "seed": SEED}
    chosen = {"shift": 1.5, "cfg_normalization": 1}
    job = client.generate(lent, conditioning, **given, guidance_scale=1.0, options=chosen)
    assert are_those_of(job, latents, images)
    assert (said["sampling"]["guidance_scale"], said["sampling"]["options"]) == (1.0, chosen)
    assert said["conditioning"] == {"prompt_embeds": [[33, 64], [7, 64]], "negative_prompt_embeds": [[12, 64], [5, 64]]}

    latents, images, said = verb(checkpoint, {"prompt_embeds": conditioning["prompt_embeds"][0]})
    job = client.generate(lent, {"prompt_embeds": conditioning["prompt_embeds"][:1]}, **given)
    assert are_those_of(job, latents, images)
    assert (said["sampling"]["guidance_scale"], said["sampling"]["options"]) == (0.0, {})

    assert command(checkpoint, embeds, "--option", "cfg_normalisation=1") == exits.MISUSE
    assert "cfg_truncation; did you mean cfg_normalization?" in capsys.readouterr().err
