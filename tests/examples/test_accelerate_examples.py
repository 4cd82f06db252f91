"""The examples of ``accelerate`` run as a user runs them, and load folders that diffusers wrote."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import subprocess
import sys
import wave
from pathlib import Path
from types import ModuleType

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from running_daemon import RunningDaemon

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

WRITES = {
    "accelerate_flux1": ("out-0.png", "out-1.png"),
    "accelerate_qwen_image_edit": ("out-0.png", "out-1.png"),
    "accelerate_wan22_two_transformers": ("out.gif",),
    "accelerate_ltx2_with_sound": ("out.gif", "out.wav"),
}
SAYS = {
    "accelerate_flux1": "4 calls of the transformer",
    # A step predicts for the prompt and for the negative one; the VAE encodes and decodes.
    "accelerate_qwen_image_edit": "8 of transformer, 2 of vae",
    "accelerate_wan22_two_transformers": "{'transformer': 4, 'transformer_2': 4}",
    "accelerate_ltx2_with_sound": "12 of transformer, 1 of connectors, 1 of vae, 1 of audio_vae, 1 of vocoder",
}
TINY = {
    "accelerate_flux1": "flux1",
    "accelerate_qwen_image_edit": "qwen_image_edit",
    "accelerate_wan22_two_transformers": "wan22",
    "accelerate_ltx2_with_sound": "ltx2",
}


def test_each_example_of_accelerate_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("accelerate_*.py")} == set(WRITES)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", WRITES)
def test_an_example_runs_with_tiny_weights(name: str, one_worker: RunningDaemon, tmp_path: Path) -> None:
    out = tmp_path / "results" / WRITES[name][0].replace("-0", "")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--tiny", "--out", str(out)]
    ran = subprocess.run(
        [*command, "--runtime-dir", str(one_worker.runtime_dir)], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "on worker 0 (cpu)" in ran.stdout
    assert SAYS[name] in ran.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(WRITES[name])
    for path in out.parent.iterdir():
        if path.suffix == ".wav":
            with wave.open(str(path)) as sound:
                assert sound.getnframes() > 0
        else:
            with Image.open(path) as image:
                assert len(set(image.convert("L").tobytes())) > 8, "the image is nearly constant"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", WRITES)
def test_an_example_loads_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    expected, _ = getattr(load_module("tiny_pipelines"), TINY[name])()
    expected.save_pretrained(tmp_path)
    absent = {part: None for part in expected.components if getattr(expected, part) is None}
    # Folders of real models have their text encoders.
    load = functools.partial(DiffusionPipeline.from_pretrained, **absent)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
    options = argparse.Namespace(tiny=False, model=tmp_path, prompt="a bird", negative_prompt="a cat", size=64)
    pipe, arguments = load_module(name).load(options)
    assert type(pipe) is type(expected)
    assert arguments["prompt"] == "a bird"
    if name == "accelerate_wan22_two_transformers":
        assert pipe.transformer_2 is not None


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
