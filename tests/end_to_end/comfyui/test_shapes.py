"""The example workflow of ``shapes``, as it stands, in a whole ComfyUI server: the pictures that diffusers draws.

And its files in the loaders: ComfyUI's own take the transformer alone, for they have sizes and tokens of other models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_workflows import prompt_of, read_example
from safetensors.torch import load_file, save_file
from shapes.original import COMFYUI_FOLDERS, TOKENIZER_TENSOR, write_for_comfyui
from shapes.samplers import open_pipeline
from shapes_files import (
    SEED,
    STEPS,
    TEXTS,
    draw_plain,
    shapes_folder,
    shown,
    write_random,
)

from xditd.client import Unsupported
from xditd.client.demo.shapes_model import SENTENCES, differs
from xditd.ipc.errors import BadCheckpoint, RequestError

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


EXACT = {
    "unet_name": "exact-flux1-shapes.safetensors",
    "vae_name": "exact-ae-shapes.safetensors",
    "clip_name1": "exact-clip_l-shapes.safetensors",
    "clip_name2": "exact-t5-shapes.safetensors",
}
"""The same files in float32, in which diffusers computes here."""


@pytest.fixture(scope="module", params=["random", "trained"])
def folder(request, comfy, tmp_path_factory) -> Path:
    if request.param == "trained":
        return shapes_folder()
    made = tmp_path_factory.mktemp("shapes")
    write_random(made)
    return made


@pytest.fixture(scope="module")
def draw(folder, start_server, tmp_path_factory, wait_until) -> Iterator[Callable[..., np.ndarray]]:
    """Run the workflow in a server of its own, which keeps what its loaders have read, with changes of its inputs."""
    server = start_server()
    models = server.base / "models"
    write_for_comfyui(folder, models)
    for part, path in write_for_comfyui(folder, tmp_path_factory.mktemp("exact"), torch.float32).items():
        shutil.move(path, models / COMFYUI_FOLDERS[part] / f"exact-{path.name}")
    inputs = {kind: node["input"] for kind, node in server.ask("/object_info").items()}

    def run(*, has_stock_loader: bool = False, **changes: Any) -> np.ndarray:
        prompt = prompt_of(read_example("shapes_xdit"), inputs.__getitem__, **changes)
        if has_stock_loader:
            (loader,) = (node for node in prompt.values() if node["class_type"] == "XDiTUNetLoader")
            loader["class_type"] = "UNETLoader"
            del loader["inputs"]["ulysses_degree"]
        found: np.ndarray = server.picture(server.queue(prompt), wait_until)
        return found

    yield run
    server.kill()


@pytest.mark.parametrize("at", range(len(TEXTS)))
def test_the_workflow_draws_what_diffusers_draws(at, folder, draw):
    expected = ((draw_plain(open_pipeline(folder), at) + 1) / 2 * 255).floor()  # as SaveImage rounds
    found = draw(**EXACT, text=TEXTS[at], steps=STEPS, seed=SEED)
    assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() <= 1
    assert found.std() > 5


def test_comfyuis_own_loader_of_transformers(draw):
    """Its MODEL is accelerated: the sampler's loop runs in the workers all the same."""
    given = {**EXACT, "text": TEXTS[0], "steps": 3}
    assert np.abs(draw(**given, seed=5) - draw(**given, seed=5, has_stock_loader=True)).max() <= 1


def test_it_runs_as_it_stands(folder, draw):
    assert SENTENCES[0].text in str(read_example("shapes_xdit"))
    found = draw()
    assert found.shape == (256, 256, 3)
    if folder == shapes_folder():
        assert_right(found)


@pytest.mark.parametrize("folder", ["trained"], indirect=True)
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "euler_ancestral"])
def test_other_samplers_draw_it_too(sampler, draw):
    """In ComfyUI's own loop, whose forwards run in the workers."""
    assert_right(draw(sampler_name=sampler, steps=12))


def assert_right(found: np.ndarray) -> None:
    things, _, _ = shown(torch.from_numpy(found).permute(2, 0, 1) / 127.5 - 1)
    read = {"things": [{"colour": colour, "form": form} for colour, form, _, _ in things]}
    assert not differs(SENTENCES[0], read)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with random weights."""
    made = tmp_path_factory.mktemp("made")
    write_random(made)
    return made


@pytest.fixture(scope="module")
def files(made, tmp_path_factory) -> dict[str, str]:
    """Its files for ComfyUI, in float32."""
    placed = write_for_comfyui(made, tmp_path_factory.mktemp("models"), torch.float32)
    return {part: str(path) for part, path in placed.items()}


@pytest.fixture
def load_encoders(connected) -> Callable[..., Any]:
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    return load_clip


def test_of_comfyuis_loaders_that_of_transformers_reads_it(comfy, files):
    """What docs/comfyui.md says of them. If another one reads it one day, the workflow needs fewer of our nodes."""
    model = comfy.comfy.sd.load_diffusion_model(files["transformer"])
    assert model.model.diffusion_model.num_heads == 2
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        comfy.comfy.sd.VAE(sd=load_file(files["vae"]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        comfy.comfy.sd.load_clip(
            [files["text_encoder"], files["text_encoder_2"]], clip_type=comfy.comfy.sd.CLIPType.FLUX
        )


@torch.inference_mode()
def test_a_vae_of_other_widths_encodes(connected, made, files, relative_error):
    from diffusers import AutoencoderKL

    from xditd.client.comfyui.nodes.vae_loader import load_vae

    pixels = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(2))
    plain = AutoencoderKL.from_pretrained(made / "vae", dtype=torch.float32)
    expected = plain.encode(pixels.movedim(3, 1) * 2 - 1).latent_dist.mode()
    assert relative_error(load_vae(files["vae"]).encode(pixels), expected) <= 1e-5


def test_a_vae_in_other_names_and_widths_is_refused(connected, made):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    with pytest.raises(Unsupported, match=r"diffusion_pytorch_model: .*names"):
        load_vae(str(made / "vae" / "diffusion_pytorch_model.safetensors"))


def test_a_saved_clip_has_its_tokenizers(comfy, load_encoders, files, tmp_path):
    from comfy_extras.nodes_model_merging import CLIPSave

    clip = load_encoders(files["text_encoder"], files["text_encoder_2"])
    text = "a (large:1.2) purple heart, 一个小的蓝色星形"
    ((states, extras),) = comfy.nodes.CLIPTextEncode().encode(clip, text)[0]
    node = CLIPSave()
    node.output_dir = str(tmp_path)
    node.save(clip, "saved")
    written = sorted(map(str, tmp_path.glob("*.safetensors")))
    assert len(written) == 2
    ((again, more),) = comfy.nodes.CLIPTextEncode().encode(load_encoders(*written), text)[0]
    assert torch.equal(again, states)
    assert torch.equal(more["pooled_output"], extras["pooled_output"])


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (None, "it has 339 tokens, and FLUX.1's tokenizer in ComfyUI makes 32100.*tokenizer_json"),
        (b"{", "cannot be read as a tokenizer.json"),
        ("clip", "makes 2 tokens of an empty text, but this encoder's texts have 1"),
    ],
)
def test_an_encoder_of_other_tokens_needs_their_tokenizer(tokenizer, said, load_encoders, files, tmp_path):
    tensors = load_file(files["text_encoder_2"])
    del tensors[TOKENIZER_TENSOR]
    if tokenizer == "clip":
        tensors[TOKENIZER_TENSOR] = load_file(files["text_encoder"])[TOKENIZER_TENSOR]
    elif tokenizer is not None:
        tensors[TOKENIZER_TENSOR] = torch.tensor(list(tokenizer), dtype=torch.uint8)
    save_file(tensors, tmp_path / "t5-other.safetensors")
    with pytest.raises(RequestError, match=f"t5-other: .*{said}"):
        load_encoders(files["text_encoder"], str(tmp_path / "t5-other.safetensors"))


def test_the_pooled_state_is_that_of_the_token_that_ends_a_text(load_encoders, files, tmp_path):
    tensors = load_file(files["text_encoder"])
    table = "text_model.embeddings.token_embedding.weight"
    tensors[table] = torch.cat([tensors[table], tensors[table][:1]])  # one token more, behind that of the end
    save_file(tensors, tmp_path / "clip_l-other.safetensors")
    with pytest.raises(
        BadCheckpoint, match=r"clip_l-other: .*with token 1018, but the pooled state is that of token 1019"
    ):
        load_encoders(str(tmp_path / "clip_l-other.safetensors"), files["text_encoder_2"])
