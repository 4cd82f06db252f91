"""Folders, single files, all-in-one checkpoints and names give the same pipeline; what is none is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux1_variants
import flux1_words
import pipeline_folders as folders
import pytest
import torch
import wan_vaes
from safetensors.torch import save_file

from xditd.client import BadCheckpoint, BadRequest, Client, Pipeline, UnknownFamily, Unsupported
from xditd.client.demo.checkpoints import flux_vae_state_dict

GIVEN: dict[str, Any] = {"steps": 2, "seed": 1, "width": 96, "height": 64}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True,
             "base_shift": 0.6, "max_shift": 1.3}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved(folders.flux1(), tmp_path / "flux")


@pytest.fixture
def right(client: Client, folder: Path) -> torch.Tensor:
    with Pipeline.open(folder, client=client) as pipe:
        return pipe(conditioning=folders.flux1_texts(), **GIVEN).generation.latents


def test_single_files_and_an_all_in_one_checkpoint_give_the_same(
    client: Client, tmp_path: Path, right: torch.Tensor
) -> None:
    transformer, vae = flux1_variants.state_of(64), flux_vae_state_dict(1)
    save_file(transformer, tmp_path / "t.safetensors")
    save_file(vae, tmp_path / "v.safetensors")
    whole = {f"model.diffusion_model.{name}": each for name, each in transformer.items()}
    whole |= {f"first_stage_model.{name}": each for name, each in vae.items()}
    save_file(whole, tmp_path / "all.safetensors")
    texts = folders.flux1_texts()
    parts = {"transformer": tmp_path / "t.safetensors", "vae": tmp_path / "v.safetensors"}
    with Pipeline.open(**parts, scheduler=SCHEDULER, client=client) as pipe:
        assert pipe.name == "t"
        assert torch.equal(pipe(conditioning=texts, **GIVEN).generation.latents, right)
    with Pipeline.open(tmp_path / "all.safetensors", scheduler=SCHEDULER, client=client) as pipe:
        assert set(pipe.loans) == {"transformer", "vae"}
        assert torch.equal(pipe(conditioning=texts, **GIVEN).generation.latents, right)
    with Pipeline.open(transformer=parts["transformer"], client=client) as pipe:
        assert not torch.equal(pipe(conditioning=texts, **GIVEN).generation.latents, right)  # the family's scheduler


def test_a_folder_has_its_whole_name(client: Client, folder: Path, tmp_path: Path) -> None:
    """What follows a dot tells FLUX.1-dev from FLUX.1-schnell; only files have a suffix."""
    (tmp_path / "FLUX.1-dev").symlink_to(folder)
    (tmp_path / "FLUX.1-copy").mkdir()
    for each in folder.iterdir():
        (tmp_path / "FLUX.1-copy" / each.name).symlink_to(each)
    with Pipeline.open(tmp_path / "FLUX.1-copy", client=client) as pipe:
        assert pipe.name == "FLUX.1-copy"
        assert pipe.loans["transformer"].label == "FLUX.1-copy/transformer"
    with Pipeline.open(tmp_path / "FLUX.1-dev", client=client) as pipe:
        assert pipe.name == folder.name  # of what a link leads to


def test_a_name_of_models_toml(
    client: Client, tmp_path: Path, folder: Path, right: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "xditd").mkdir()
    entry = f'[mine]\nfolder = "{folder}"\ndefaults = {{ steps = 2, size = "96x64" }}\n'
    (tmp_path / "xditd" / "models.toml").write_text(entry)
    with Pipeline.open("mine", client=client) as pipe:
        assert (pipe.name, pipe.defaults["steps"], pipe.defaults["width"]) == ("mine", 2, 96)
        assert torch.equal(pipe(conditioning=folders.flux1_texts(), seed=1).generation.latents, right)
    with pytest.raises(BadRequest, match="mind"):
        Pipeline.open("mind", client=client)


def test_a_scheduler_is_obeyed_or_refused_by_name_and_value(client: Client, folder: Path, right: torch.Tensor) -> None:
    texts = folders.flux1_texts()

    def run(**scheduler: Any) -> torch.Tensor:
        with Pipeline.open(folder, scheduler={**SCHEDULER, **scheduler}, client=client) as pipe:
            return pipe(conditioning=texts, **GIVEN).generation.latents

    assert torch.equal(run(), right)
    for changed in ({"max_shift": 2.0}, {"shift_terminal": 0.1}, {"use_dynamic_shifting": False}):
        assert not torch.equal(run(**changed), right), changed
    for changed, message in (
        ({"stochastic_sampling": True}, r"stochastic_sampling=True .* cannot be run"),
        ({"num_train_timesteps": 500}, "num_train_timesteps=500"),
        ({"shifted": 1}, "shifted=1 is no setting of FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "DDIMScheduler"}, "scheduler DDIMScheduler: this model runs with"),
    ):
        with pytest.raises((BadRequest, Unsupported), match=message):
            run(**changed)


def test_sigmas_say_how_many_steps_there_are(client: Client, folder: Path) -> None:
    texts = folders.flux1_texts()
    given = {name: value for name, value in GIVEN.items() if name != "steps"}
    with Pipeline.open(folder, client=client) as pipe:
        found = pipe(conditioning=texts, sigmas=[1.0, 0.5, 0.25], **given)
        assert found.settings.steps == 3
        with pytest.raises(BadRequest, match="sigmas: 3 values for 2 steps"):
            pipe(conditioning=texts, sigmas=[1.0, 0.5, 0.25], **GIVEN)
        with pytest.raises(BadRequest, match="leave the final 0 out"):
            pipe(conditioning=texts, sigmas=[1.0, 0.5, 0.0], **given)
        with pytest.raises(BadRequest, match="sigmas: 0 values for 1 steps"):
            pipe(conditioning=texts, sigmas=[], **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "a StableDiffusionPipeline, which no family runs.*accelerate"),
        ({"_class_name": None}, "names no class"),
        ({"transformer": [None, None]}, "it has no transformer"),
        ({"adapter": ["diffusers", "X"]}, "the part adapter of a FluxPipeline is not known"),
        (
            {"transformer": ["own_flux", "FluxTransformer2DModel"]},
            "a FluxTransformer2DModel of own_flux, code of its own",
        ),
        ({"scheduler": ["own_flux", "Euler"]}, "the scheduler is a Euler of own_flux, code of its own"),
        ({"magic": 3}, "magic=3 of FluxPipeline is not known"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder, and there is no such folder"),
    ],
)
def test_folders_that_cannot_be_opened(client: Client, folder: Path, change: dict[str, Any], message: str) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises((BadCheckpoint, Unsupported), match=message):
        Pipeline.open(folder, client=client)
    assert not client.status().components


def test_a_configuration_that_the_family_does_not_have(client: Client, folder: Path) -> None:
    """Such a model would run as its class does; a pipeline says so, and runs it not otherwise."""
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 1.5}))
    with pytest.raises(
        Unsupported, match=r"vae: .*no family runs \(flux_vae: its configuration differs: scaling_factor=1.5\)"
    ):
        Pipeline.open(folder, client=client)


def test_what_is_no_pipeline(client: Client, folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.safetensors"
    save_file({"a.b": torch.zeros(3)}, odd)
    for given, error, message in (
        ({}, BadRequest, "no transformer"),
        ({"source": tmp_path / "nothing"}, BadRequest, "no such file or folder"),
        ({"source": folder / "vae"}, BadCheckpoint, "no folder of a pipeline"),
        ({"source": folder, "defaults": {"stepz": 3}}, BadRequest, "defaults: 'stepz' is not known.*steps"),
        ({"source": folder, "keep_alive": -1.0}, BadRequest, "keep_alive"),
        ({"source": folder, "text_encoders": {"clip": folder}}, BadRequest, "'clip' is no role"),
        ({"source": 5}, BadRequest, "source: 5 of type int is no path"),
        ({"source": folder, "text_encoders": 5}, BadRequest, "text_encoders: 5 of type int; give paths"),
        ({"source": folder, "tokenizers": 5}, BadRequest, "tokenizers: 5 of type int is no path"),
        ({"source": folder, "scheduler": ""}, BadRequest, "scheduler: '' of type str is no path"),
        ({"source": folder, "vae": "gone"}, BadRequest, "vae: gone: no such file or folder; name one"),
        ({"source": folder, "name": 5}, BadRequest, "name: 5 of type int; give a text"),
        ({"source": folder, "variant": ""}, BadRequest, "variant: '' of type str; give a text"),
        ({"source": folder, "defaults": 5}, BadRequest, "defaults: 5 of type int; give a dict"),
        ({"source": folder, "defaults": {"steps": "a"}}, BadRequest, "defaults: steps: 'a' is not a whole number"),
        ({"source": folder, "defaults": {"guidance": "a"}}, BadRequest, "defaults: guidance: 'a' is not a number"),
        ({"source": folder, "defaults": {"fps": 0}}, BadRequest, "defaults: fps: 0 is not a whole number"),
        ({"source": folder, "deadline_s": 3.0}, BadRequest, "client beside runtime_dir, wait_s or deadline_s"),
        ({"source": odd}, UnknownFamily, f"^{odd}: no known model family"),
        ({"source": folder, "vae": odd}, UnknownFamily, f"^{odd}: no known model family"),
    ):
        with pytest.raises(error, match=message):
            Pipeline.open(**given, client=client)  # type: ignore[arg-type]


def test_words_need_encoders_and_tokenizers(opened: Callable[..., Pipeline]) -> None:
    pipe = opened(folders.flux1())
    with pytest.raises(Unsupported, match=r"has no text_encoder .*give text_encoders= to Pipeline\.open"):
        pipe("a cat", **GIVEN)


def test_parts_that_have_no_use_are_refused_when_they_are_given(client: Client, tmp_path: Path) -> None:
    folder = flux1_words.saved(tmp_path / "flux")
    parts = tmp_path / "flux-parts"
    clip, t5 = parts / "text_encoder", parts / "text_encoder_2"
    save_file(wan_vaes.state_dict(), tmp_path / "wan.safetensors")
    for given, error, message in (
        (
            {"text_encoders": [clip, t5, clip]},
            BadRequest,
            rf"text_encoder_3: {clip}: a clip_l, and there is another clip_l; remove it",
        ),
        (
            {"text_encoders": [clip, folder / "transformer"]},
            BadRequest,
            r"text_encoder_2: .*transformer: a FluxTransformer2DModel, and prompts of flux1 are read by",
        ),
        ({"tokenizers": {"tokenizer_3": parts / "tokenizer"}}, BadRequest, "tokenizers: 'tokenizer_3' has no use in"),
        (
            {"tokenizers": parts / "tokenizer"},
            BadRequest,
            rf"tokenizers: {parts / 'tokenizer'}: a CLIPTokenizer, and tokenizer_2 is a T5Tokenizer; give",
        ),
        ({"transformer_2": folder / "transformer"}, BadRequest, r"transformer_2: .*: flux1 runs one transformer"),
        (
            {"vae": tmp_path / "wan.safetensors"},
            BadRequest,
            "transformer and vae: its latents are of the space wan",
        ),
        ({"image_encoder": clip}, BadRequest, r"image_encoder: .*: this flux1 shows no picture to one; remove it"),
    ):
        with pytest.raises(error, match=message):
            Pipeline.open(folder, client=client, **given)  # type: ignore[arg-type]
        assert not client.status().components
