"""The folder of shapes through the daemon: its families take the small sizes, and draw what diffusers draws."""

from __future__ import annotations

from pathlib import Path

import torch
from shapes.models import PARTS, build_parts, build_pipeline, load_parts, save_weights, weights_file, write_folder
from shapes.samplers import daemon_sampler, pipeline_sampler

from xditd.client import Client, Pipeline

TEXTS = ["a large purple heart to the left of a small blue star", "一个绿色的圆环，米色条纹背景。"]


def test_words_become_the_pictures_of_diffusers(client: Client, tmp_path: Path) -> None:
    torch.manual_seed(1)
    parts = build_parts()
    for tensor in parts["transformer"].parameters():  # what starts at zero would hide all that lies before it
        torch.nn.init.normal_(tensor, std=0.05)
    write_folder(tmp_path, parts)
    load_parts(tmp_path, parts)  # as rounded
    with torch.no_grad():
        pipeline = build_pipeline({name: each.eval() for name, each in parts.items()})
        expected = pipeline_sampler(pipeline, steps=2, text_tokens=512)(TEXTS, 3)
    # The folder has bfloat16, as published; float32 files of it compute in float32.
    for name in PARTS:
        save_weights(parts[name], tmp_path / name / weights_file(name), torch.float32)
    with Pipeline.open(tmp_path, client=client) as pipe:
        found = daemon_sampler(pipe, steps=2, text_tokens=512)(TEXTS, 3)
    assert found.shape == expected.shape == (2, 3, 256, 256)
    assert not torch.equal(found[0], found[1])
    assert (found.clamp(-1, 1) - expected).norm() < 1e-3 * expected.norm()
