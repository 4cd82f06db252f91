"""The judge draws in several processes what it draws in one."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from shapes import judge
from shapes.models import build_parts, write_folder


@pytest.mark.parametrize("count", [1, 2, 4, 5, 40, 200])
def test_there_are_as_many_sentences_as_were_asked_for(count: int) -> None:
    requests = judge.held_out_requests(count)
    assert len(requests) == count
    objects = [len(each.scene.things) for each in requests]
    assert objects == sorted(objects)
    if count % 5 == 0:
        assert [objects.count(each) for each in (1, 2, 3)] == [count * 2 // 5, count * 2 // 5, count // 5]


@pytest.mark.slow
def test_processes_draw_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(5)
    parts = build_parts()
    for tensor in parts["transformer"].parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    write_folder(tmp_path, parts)
    given = argparse.Namespace(
        folder=tmp_path, dtype="float32", device="cpu", steps=1, guidance=3.5, text_tokens=64, batch=2, processes=2
    )
    requests = judge.held_out_requests(10)[3:6]
    images, found = judge.judge_in_processes(given, requests)
    expected, faults = judge.judge(judge._diffusers(given), requests, batch=2)
    assert found == faults
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
