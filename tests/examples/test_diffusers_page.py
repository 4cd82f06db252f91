"""The examples of ``docs/diffusers.md`` run, one after the other, as one program of a user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flux_pipelines import flux, lora_weights
from pipeline_parts import clip_text_encoder, t5_text_encoder, tokenizer
from running_daemon import RunningDaemon
from safetensors.torch import save_file

SMALLER = """\
from diffusers import FluxImg2ImgPipeline, FluxPipeline

for kind in (FluxImg2ImgPipeline, FluxPipeline):
    kind.default_sample_size = property(lambda pipe: 32, lambda pipe, size: None)
"""
"""Images of the pipelines' own default size, 1024 times 1024, take minutes on a CPU."""

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diffusers.md"


@pytest.mark.slow
def test_the_examples_of_the_page_run(one_worker: RunningDaemon, tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) > 5
    program = tmp_path / "program.py"
    program.write_text(SMALLER + "".join(examples), encoding="utf-8")
    encoders = {"text_encoder": clip_text_encoder(32), "text_encoder_2": t5_text_encoder(32)}
    flux(**encoders, tokenizer=tokenizer(), tokenizer_2=tokenizer()).save_pretrained(tmp_path / "flux1-dev")
    save_file(lora_weights(seed=31, rank=2), tmp_path / "style.safetensors")
    save_file(lora_weights(seed=32, rank=4), tmp_path / "detail.safetensors")
    ran = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=os.environ | {"XDITD_RUNTIME_DIR": str(one_worker.runtime_dir)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    for said in re.findall(r"print\(.*#  ?([{\[].*[}\]])$", "".join(examples), re.MULTILINE):
        assert said in ran.stdout
    assert "_forward_hooks of transformer_blocks.0 is function __main__:<lambda>" in ran.stdout
