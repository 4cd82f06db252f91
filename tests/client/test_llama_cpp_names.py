"""llama.cpp's names of encoders: those of T5, as the ``gguf`` package knows them, and nothing else."""

from __future__ import annotations

import pytest
from gguf_files import LLAMA_CPP
from text_checkpoints import t5_state_dict

from xditd.client.llama_cpp_names import transformers_name


def spelled(name: str) -> str:
    for part, theirs in LLAMA_CPP.items():
        name = name.replace(part, theirs)
    return name


def test_every_name_of_t5_is_found_again() -> None:
    names = [*t5_state_dict(0, layers=12, width=64, vocabulary=8, inner=64)]
    assert [transformers_name(spelled(name)) for name in names] == names


def test_they_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 12)
    for name in t5_state_dict(0, layers=12, width=64, vocabulary=8, inner=64):
        assert known.get_name(name.removesuffix(".weight")) + ".weight" == spelled(name)


@pytest.mark.parametrize(
    "name", ["enc.blk.0.attn_q.bias", "enc.blk.0.unknown.weight", "enc.blk.12345.attn_q.weight", "blk.0.attn_q.weight"]
)
def test_others_stay(name: str) -> None:
    assert transformers_name(name) == name


def test_the_decoder_gets_names_that_no_encoder_reads() -> None:
    assert transformers_name("dec.blk.0.cross_attn_q.weight") == "decoder.blk.0.cross_attn_q.weight"
    assert transformers_name("output.weight") == "lm_head.weight"
