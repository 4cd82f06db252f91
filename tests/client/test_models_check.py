"""``xditd models check``: what it finds in files, and what the workers' code says of them without a daemon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import flux2_vaes  # noqa: E402
import pipeline_folders  # noqa: E402
import text_checkpoints  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from xditd.client import models_check, models_file  # noqa: E402
from xditd.client.demo import checkpoints  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of FLUX.1, and a VAE of another model."""
    folder = tmp_path_factory.mktemp("parts")
    checkpoints.write_flux1(folder / "flux1.safetensors", seed=1)
    checkpoints.write_flux_vae(folder / "ae.safetensors", seed=2)
    text_checkpoints.write_clip_l(folder / "clip_l.safetensors", seed=3, width=768)
    text_checkpoints.write_t5(folder / "small_t5.safetensors", seed=4)
    save_file(flux2_vaes.state_dict(5), folder / "flux2_vae.safetensors")
    (folder / "tokenizers").mkdir()
    (folder / "page.safetensors").write_text("<!doctype html>")
    return folder


def checked(parts: Path, text: str, *, asks_workers: bool = False) -> dict[str, models_check.ModelCheck]:
    file = parts / "models.toml"
    file.write_text(text)
    found = models_check.check_models(
        {name: models_file.find(name, file) for name in models_file.names(file)}, asks_workers=asks_workers
    )
    return {check.name: check for check in found}


@pytest.mark.long
@pytest.mark.slow
def test_the_workers_code_names_families_and_parts_that_do_not_fit(parts: Path) -> None:
    found = checked(
        parts,
        """
        [no_t5]
        transformer = "flux1.safetensors"
        vae = "ae.safetensors"
        text_encoders = ["clip_l.safetensors"]
        tokenizers = "tokenizers"
        [other_vae]
        transformer = "flux1.safetensors"
        vae = "flux2_vae.safetensors"
        [other_text]
        transformer = "flux1.safetensors"
        text_encoders = "small_t5.safetensors"
        [both_texts]
        transformer = "flux1.safetensors"
        text_encoders = ["small_t5.safetensors", "clip_l.safetensors"]
        [swapped]
        transformer = "ae.safetensors"
        [two]
        transformer = "flux1.safetensors"
        transformer_2 = "flux1.safetensors"
        """,
        asks_workers=True,
    )
    first = found["no_t5"]
    (fault,) = first.faults
    assert fault == "text_encoder_2: missing; prompts need one of t5 beside clip_l"
    assert [part.facts and part.facts.family for part in first.parts] == ["flux1", "flux_vae", "clip_l", None]
    assert first.parts[0].size_bytes == (parts / "flux1.safetensors").stat().st_size
    assert first.unchecked[0] == "whether the tokenizers are those of the text encoders"
    (fault,) = found["other_vae"].faults
    assert "transformer and vae: its latents have" in fault
    missing, fault = found["other_text"].faults
    assert missing == "text_encoder: missing; prompts need one of clip_l beside t5"
    assert "t5 gives states of width 128, and the transformer takes 768 and 4096" in fault
    (fault,) = found["both_texts"].faults
    assert "t5 gives states of width 128" in fault
    (fault,) = found["swapped"].faults
    assert fault.startswith("transformer: ")
    assert "flux_vae" in fault
    (fault,) = found["two"].faults
    assert fault == "transformer_2: flux1 runs one transformer; remove it"


def test_files_that_are_missing_or_none_are_named_without_workers(parts: Path) -> None:
    found = checked(
        parts,
        """
        [a]
        transformer = "gone.safetensors"
        vae = "page.safetensors"
        tokenizers = "ae.safetensors"
        [b]
        folder = "tokenizers"
        """,
    )
    gone, page, tokenizers = found["a"].faults
    assert gone.startswith(f"transformer: {parts}/gone.safetensors: no such file")
    assert "this is a web page" in page
    assert tokenizers.startswith("tokenizers: ")
    assert "not a folder" in tokenizers
    assert "has no model_index.json" in found["b"].faults[0]
    assert any("--quick" in each for each in found["b"].unchecked + found["a"].unchecked)


def test_a_pipelines_folder_has_the_parts_of_its_index(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    for name, source in (("transformer", "flux1"), ("vae", "ae")):
        (folder / name).mkdir(parents=True)
        shutil.copy(parts / f"{source}.safetensors", folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (folder / "scheduler").mkdir()
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (check,) = checked(parts, f'[x]\nfolder = "{folder}"\nvariant = "fp16"').values()
    (fault,) = check.faults
    assert fault.startswith("text_encoder: ")
    assert "names this folder, and it is not there" in fault
    assert [part.part for part in check.parts if part.files] == ["transformer", "vae"]
    index["../up"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (check,) = checked(parts, f'[x]\nfolder = "{folder}"').values()
    assert any(fault.startswith("../up: ") for fault in check.faults)


@pytest.mark.slow
def test_a_part_that_no_family_runs_is_a_fault(parts: Path, tmp_path: Path) -> None:
    folder = pipeline_folders.saved(pipeline_folders.flux1(), tmp_path / "flux")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 1.5}))
    found = checked(
        parts,
        f"""
        [x]
        folder = "{folder}"
        [y]
        transformer = "{folder}/transformer"
        vae = "{folder}/vae"
        """,
        asks_workers=True,
    )
    (fault,) = found["x"].faults
    assert found["y"].faults == [fault]
    assert fault.startswith(
        "vae: a AutoencoderKL that no family runs (flux_vae: its configuration differs: scaling_factor=1.5), and a "
        "pipeline needs a vae of a family"
    )


def test_a_variant_that_no_model_has_is_a_fault(parts: Path, tmp_path: Path) -> None:
    folder = pipeline_folders.saved(pipeline_folders.flux1(), tmp_path / "flux")
    text = f'[x]\nfolder = "{folder}"\nvariant = "fp16"'
    (check,) = checked(parts, text).values()
    (fault,) = check.faults
    assert "no model in it has weights of variant 'fp16'" in fault
    plain = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (check,) = checked(parts, text).values()
    assert check.faults == []


def test_a_pipeline_that_no_family_runs_is_a_fault(parts: Path, tmp_path: Path) -> None:
    folder = pipeline_folders.saved(pipeline_folders.flux1(), tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    (check,) = checked(parts, f'[x]\nfolder = "{folder}"').values()
    (fault,) = check.faults
    assert "a StableDiffusionPipeline, which no family runs from words to pictures" in fault


def test_parts_that_no_job_reads_may_be_missing(parts: Path, tmp_path: Path) -> None:
    """As where only what is needed was downloaded. ``Pipeline.open`` takes the folder."""
    folder = pipeline_folders.saved(pipeline_folders.flux1(), tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    more = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | more))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.json").write_text("{}")  # as transformers reads it, beside its vocabulary
    (check,) = checked(parts, f'[x]\nfolder = "{folder}"').values()
    assert check.faults == []
    assert [part.part for part in check.parts] == ["transformer", "vae"]


def test_a_model_of_a_folder_without_its_configuration_is_a_fault(parts: Path, tmp_path: Path) -> None:
    folder = pipeline_folders.saved(pipeline_folders.flux1(), tmp_path / "flux")
    (folder / "transformer" / "config.json").unlink()
    (check,) = checked(parts, f'[x]\nfolder = "{folder}"').values()
    (fault,) = check.faults
    assert fault.startswith(f"transformer: {folder}/transformer: this is a folder without a config.json")


@pytest.mark.slow
def test_what_open_refuses_of_parts_that_it_takes_is_a_fault(parts: Path, tmp_path: Path) -> None:
    folder = pipeline_folders.saved(pipeline_folders.flux1(), tmp_path / "flux")
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))
    found = checked(
        parts,
        f"""
        [fits]
        folder = "{folder}"
        defaults = {{ steps = 4, guidance = 2.5, size = "96x64" }}
        [family]
        folder = "{other}"
        [accelerated]
        folder = "{folder}"
        acceleration = "eager"
        """,
        asks_workers=True,
    )
    assert found["fits"].faults == []
    assert "whether the transformer runs with the settings of the scheduler" in found["fits"].unchecked
    assert found["family"].faults == [
        "family: the folder is of a WanPipeline, and its transformer of flux1; open the parts of one model"
    ]
    assert "acceleration 'eager' would have no effect" in found["accelerated"].faults[0]


def test_why_the_workers_code_did_not_answer_is_said(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        models_check, "module_command", lambda *_: ["sh", "-c", "echo ModuleNotFoundError: x >&2; exit 1"]
    )
    (check,) = checked(parts, '[x]\ntransformer = "flux1.safetensors"', asks_workers=True).values()
    assert check.faults == []
    assert "pip install 'xditd[workers]'" in check.unchecked[0]
