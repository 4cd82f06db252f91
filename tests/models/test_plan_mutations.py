"""Each declaration of each token plan matters: made wrong, a call fails or differs from the class's own forward."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forked_programs import ProgramServer

from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.plans import plans

_NOT_SPLIT_YET = "the stream is split behind this attention, and streams that a call lacks have no tokens"
_REPEATS = "ranks then send each head as often as the class repeats it, which gives the same result"
_SAME_TOKENS = "another tensor of the cache has the same tokens, and says so"
UNSEEN: dict[str, dict[str, str]] = {
    "BriaFibo2Transformer2DModel": {r"attention of noise_refiner.*: (queries|keys) with joint": _NOT_SPLIT_YET},
    "Flux2Transformer2DModel": {r"cache: [kv]_ref without read": _SAME_TOKENS},
    "GlmImageTransformer2DModel": {r"cache: [kv]_caches without read": _SAME_TOKENS},
    "Krea2Transformer2DModel": {r"attention of transformer_blocks.*: without repeats": _REPEATS},
    "Lumina2Transformer2DModel": {
        r"attention of noise_refiner.*: (queries|keys) with joint": _NOT_SPLIT_YET,
        r"attention of (noise_refiner|layers).*: without repeats": _REPEATS,
    },
    "MochiTransformer3DModel": {
        r"attention of transformer_blocks\.\*\.attn1: (queries|keys) (without .*|whole)": (
            "of an attention among picked tokens, ranks count those that each has, whatever its streams"
        ),
    },
    "SanaWMLTX2RefinerTransformer3DModel": {r"cache: (sink|history)_.* without read": _SAME_TOKENS},
}
"""By class: a pattern of mutations that change no result of its calls, and why."""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name, plan in plans().items() if isinstance(plan, TokenPlan)])
def test_every_wrong_declaration_shows(tmp_path: Path, fork_program: ProgramServer, name: str) -> None:
    program = Path(__file__).with_name("mutated_plans.py")
    done = fork_program(program, tmp_path, name, folders=[program.with_name("support")], timeout_s=550)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())[name]
    assert found
    unseen = {what for what, shown_by in found.items() if shown_by is None}
    expected = {what for what in found if any(re.fullmatch(each, what) for each in UNSEEN.get(name, {}))}
    assert unseen == expected
