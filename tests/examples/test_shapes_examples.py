"""The examples that draw with ``models/shapes`` run as they stand, as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from running_daemon import RunningDaemon
from shapes.reading import read_file

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a large purple heart to the left of a small blue star"
RUNS = {
    "lend_and_generate": ["--steps", "8", "--prompt", PROMPT],
    "per_step_denoise": ["--steps", "8", "--prompt", PROMPT],
    "folder_to_picture": ["models/shapes", PROMPT, "--size", "256x256", "--steps", "8", "--seed", "7"],
    "accelerate_flux1": ["--model", "models/shapes", "--size", "256", "--images", "1", "--prompt", PROMPT],
}
SAYS = {
    "lend_and_generate": "step 8 of 8",
    "per_step_denoise": "relative difference from generate: ",
    "folder_to_picture": "step 8 of 8",
    "accelerate_flux1": "28 calls of the transformer",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "accelerate_flux1" else ()) for name in RUNS]
)
def test_an_example_draws_with_shapes(name: str, one_worker: RunningDaemon, tmp_path: Path) -> None:
    command = [sys.executable, f"examples/{name}.py", *RUNS[name], "--out", str(tmp_path / "out.png")]
    ran = subprocess.run(
        [*command, "--runtime-dir", str(one_worker.runtime_dir)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert SAYS[name] in ran.stdout
    if name == "per_step_denoise":
        # In bfloat16: the example keeps latents in float32 between steps, generate as diffusers does.
        assert float(ran.stdout.partition("from generate: ")[2].split()[0]) < 0.1
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert image.size == (256, 256)
    read = read_file(path)
    assert {(each["colour"], each["form"]) for each in read["things"]} == {("purple", "heart"), ("blue", "star")}
