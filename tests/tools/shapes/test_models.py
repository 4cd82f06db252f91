"""The folder of shapes: diffusers opens it, and the workers' families read what is written from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from shapes.models import PARTS, build_parts, load_parts
from shapes.original import COMFYUI_FOLDERS, TOKENIZER_TENSOR, write_for_comfyui, write_originals
from shapes.text_tokens import clip_tokenizer, t5_tokenizer
from shapes_files import write_random
from tokenizers import Tokenizer

from xditd.client.demo.shapes_model import SENTENCES
from xditd.gpu_workers.families.clip_l import ClipL
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.families.flux1.checkpoint import Flux1
from xditd.gpu_workers.families.flux_vae.checkpoint import FluxVae
from xditd.gpu_workers.families.t5 import T5

FAMILIES = {"transformer": Flux1(), "vae": FluxVae(), "text_encoder": ClipL(), "text_encoder_2": T5()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_random(folder)
    return folder


def test_files_are_small(folder: Path) -> None:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert max(sizes) < 16_000_000
    assert sum(sizes) < 25_000_000


def test_diffusers_opens_the_folder_with_the_weights_that_were_written(folder: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(folder)
    parts = build_parts()
    assert load_parts(folder, parts) == list(parts)
    for name in PARTS:
        own, found = parts[name].state_dict(), getattr(pipeline, name).state_dict()
        for tensor_name, tensor in found.items():
            assert torch.equal(tensor.float(), own[tensor_name].float()), (name, tensor_name)
    assert pipeline.scheduler.config.use_dynamic_shifting
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxPipeline"


def test_families_of_the_workers_read_the_single_files(folder: Path, tmp_path: Path) -> None:
    for part, path in write_originals(folder, tmp_path).items():
        family, tensors = FAMILIES[part], load_file(path)
        names = {family.canonical(name) for name in tensors}
        assert [other for other, each in FAMILIES.items() if each.claims(set(tensors))] == [part]
        shapes = {family.canonical(name): tuple(tensor.shape) for name, tensor in tensors.items()}
        config = family.configure(shapes)
        assert {entry.source: entry.shape for entry in family.entries(config, names)} == shapes


def test_files_for_comfyui_are_the_single_files_with_tokenizers(folder: Path, tmp_path: Path) -> None:
    plain, placed = write_originals(folder, tmp_path / "plain"), write_for_comfyui(folder, tmp_path / "models")
    assert sorted((tmp_path / "models").iterdir()) == sorted({path.parent for path in placed.values()})
    for part, path in placed.items():
        assert path == tmp_path / "models" / COMFYUI_FOLDERS[part] / plain[part].name
        found, own = load_file(path), load_file(plain[part])
        data = found.pop(TOKENIZER_TENSOR, None)
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
        if not part.startswith("text_encoder"):
            assert data is None
            continue
        assert data is not None
        tokenizer = Tokenizer.from_str(bytes(data.tolist()).decode())
        whole = {"text_encoder": clip_tokenizer, "text_encoder_2": t5_tokenizer}[part]()
        for sentence in SENTENCES:
            assert tokenizer.encode(sentence.text).ids == whole(sentence.text).input_ids


def test_diffusers_converters_undo_the_names_of_single_files(folder: Path, tmp_path: Path) -> None:
    written = write_originals(folder, tmp_path)
    own = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    converted = reference.convert_transformer(load_file(written["transformer"]))
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in own.items())
    own = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    vae = reference.load_vae(written["vae"]).state_dict()
    assert all(torch.equal(vae[name].reshape(tensor.shape), tensor) for name, tensor in own.items())


def test_a_file_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes((folder / "text_encoder" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is it a file of shapes"):
        load_parts(tmp_path, build_parts())
