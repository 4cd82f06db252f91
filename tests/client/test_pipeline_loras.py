"""LoRAs of a pipeline's text encoders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from xditd.client.pipeline.running import with_those_of
from xditd.ipc.errors import BadRequest

ENCODER: Any = SimpleNamespace(family="umt5", with_loras=lambda pairs: [(each.component_id, s) for each, s in pairs])


def lora(name: str, *families: str) -> Any:
    return SimpleNamespace(component_id=name, facts=SimpleNamespace(lora=SimpleNamespace(families=set(families))))


BOTH, PLAIN, OTHER = lora("both", "wan", "umt5"), lora("plain", "wan"), lora("other", "umt5")


def test_a_lora_of_both_transformers_acts_once_on_the_text_encoder() -> None:
    given = [
        (BOTH, 0.8, "transformer"), (PLAIN, 0.5, "transformer"), (BOTH, 0.8, "transformer_2"),
        (OTHER, 0.3, "transformer_2"),
    ]  # fmt: skip
    assert with_those_of(ENCODER, given) == [("both", 0.8), ("other", 0.3)]
    twice = [(BOTH, 0.8, "transformer"), (BOTH, 0.1, "transformer")]  # the sum, as named twice
    assert with_those_of(ENCODER, twice) == [("both", 0.8), ("both", 0.1)]
    assert with_those_of(ENCODER, [(PLAIN, 0.5, "transformer")]) is ENCODER


def test_two_strengths_for_one_text_encoder_are_refused() -> None:
    given = [(BOTH, 0.8, "transformer"), (BOTH, 0.4, "transformer_2")]
    with pytest.raises(BadRequest, match=r"layers of the text encoder umt5, and the strengths \[0.8\] and \[0.4\]"):
        with_those_of(ENCODER, given)
    assert with_those_of(ENCODER, [(PLAIN, 0.8, "transformer"), (PLAIN, 0.4, "transformer_2")]) is ENCODER
