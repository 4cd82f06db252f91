"""Outlines that a LoRA draws are counted, by the judge's own reader, at each strength."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from shapes.draw import OUTLINE, draw, encode
from shapes.judge import held_out_requests
from shapes.judged_lora import STRENGTHS, count_forms, judge_strengths, write_report
from shapes.lora import Lora
from shapes.models import build_transformer
from shapes.samplers import Sampler

REQUESTS = held_out_requests(10)


def drawn_at(strength: float) -> Sampler:
    """Draw without a model: forms below a strength of 1, outlines at it."""

    def sample(texts: Sequence[str], _: int) -> torch.Tensor:
        scenes = {each.text: each.scene for each in REQUESTS}
        return draw(encode([scenes[text] for text in texts]), outline=OUTLINE if strength == 1 else 0.0)

    return sample


def test_outlines_are_counted_apart_from_filled_forms() -> None:
    texts = [each.text for each in REQUESTS]
    filled, outlines = (count_forms(REQUESTS, drawn_at(strength)(texts, 0)) for strength in (0.0, 1.0))
    objects = sum(thing.form != "ring" for each in REQUESTS for thing in each.scene.things)
    assert filled == {"objects": objects, "filled": objects, "outlines": 0}
    assert outlines == {"objects": objects, "filled": 0, "outlines": objects}
    nothing = count_forms(REQUESTS, torch.ones(len(REQUESTS), 3, 256, 256))
    assert nothing == {"objects": objects, "filled": 0, "outlines": 0}


def test_a_table_has_a_line_and_a_row_of_pictures_for_each_strength(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, shown = judge_strengths(drawn_at, REQUESTS, batch=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["strength", *map(str, STRENGTHS)]
    assert found["0.0"] == found["0.5"] != found["1.0"]
    write_report(found, shown, json_file=None, sheet=None)
    write_report(found, shown, json_file=tmp_path / "outlines.json", sheet=tmp_path / "outlines.png")
    assert json.loads((tmp_path / "outlines.json").read_text()) == found
    assert (tmp_path / "outlines.png").stat().st_size


def test_diffusers_reads_the_file_as_it_was_trained(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    transformer = build_transformer(1, 1).requires_grad_(False)
    for tensor in transformer.parameters():
        torch.nn.init.normal_(tensor, std=0.05)
    lora = Lora(transformer, 8, generator)
    with torch.no_grad():
        for factor in (*lora.down, *lora.up):
            factor.copy_(factor.normal_(std=0.1, generator=generator).bfloat16())
    given = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 192, generator=generator),
        "pooled_projections": torch.randn(1, 128, generator=generator),
        "timestep": torch.full((1,), 0.5),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    plain = transformer(**given).sample
    with lora.applied(0.5):
        expected = transformer(**given).sample
    assert (expected - plain).norm() > 0.01 * plain.norm()
    lora.save(tmp_path / "lora.safetensors")
    transformer.load_lora_adapter(tmp_path, weight_name="lora.safetensors", adapter_name="outlines")
    transformer.set_adapters("outlines", 0.5)
    torch.testing.assert_close(transformer(**given).sample, expected, rtol=1e-4, atol=1e-5)
