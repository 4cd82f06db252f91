"""Prefixes that wrappers add to tensor names are removed, and nothing else."""

from __future__ import annotations

import pytest

from xditd.ipc.tensor_names import bare_name, by_prefix, split_prefix


@pytest.mark.parametrize(
    ("name", "prefix", "bare"),
    [
        ("img_in.weight", "", "img_in.weight"),
        ("module.img_in.weight", "module.", "img_in.weight"),
        ("_orig_mod.module._orig_mod.model.diffusion_model.x.y", "module.model.diffusion_model.", "x.y"),
        ("text_encoders.clip_l.transformer.text_model.x", "text_encoders.clip_l.transformer.", "text_model.x"),
        ("text_encoder_2.shared.weight", "text_encoder_2.", "shared.weight"),
        ("cond_stage_model.transformer.text_model.x", "cond_stage_model.transformer.", "text_model.x"),
        ("first_stage_model.vae.decoder.x", "first_stage_model.vae.", "decoder.x"),
        ("double_blocks.0._orig_mod.img_mod.lin.weight", "", "double_blocks.0.img_mod.lin.weight"),
        ("blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.x", "", "blocks.1.x"),
        ("img_mod.lin.weight", "", "img_mod.lin.weight"),
        ("my_orig_mod.weight", "", "my_orig_mod.weight"),
        ("transformer_blocks.0.x", "", "transformer_blocks.0.x"),
        ("modules.x", "", "modules.x"),
        ("model", "", "model"),
        ("", "", ""),
    ],
)  # fmt: skip
def test_prefixes_and_wrappers(name: str, prefix: str, bare: str) -> None:
    assert split_prefix(name) == (prefix, bare)
    assert bare_name(name) == bare


def test_names_of_one_tensor_under_one_prefix_are_kept_together() -> None:
    names = ["a.b", "module.a.b", "a._orig_mod.b", "module.c"]
    assert by_prefix(names) == {
        "": {"a.b": ["a.b", "a._orig_mod.b"]},
        "module.": {"a.b": ["module.a.b"], "c": ["module.c"]},
    }


def test_a_hostile_name_takes_no_time() -> None:
    assert bare_name("model." * 80 + "x" * 32) == "x" * 32
    assert bare_name("model" * 100) == "model" * 100
