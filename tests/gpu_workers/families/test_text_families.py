"""CLIP-L, T5 and UMT5: recognition, configuration, tied and ignored names, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from text_checkpoints import clip_l_state_dict, in_wans_names, t5_state_dict, umt5_state_dict

from xditd.gpu_workers.families.clip_l import ClipL, ClipLConfig
from xditd.gpu_workers.families.t5 import T5, UMT5, T5Config
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, UnknownFamily, Unsupported, UnsupportedDtype

Infos = dict[str, TensorInfo]
State = dict[str, torch.Tensor]
Describe = Callable[[State], Infos]
CLIP_DEMO = ClipLConfig(vocabulary=300, max_tokens=77, width=128, layers=2, inner=512)
T5_DEMO = T5Config(vocabulary=300, width=128, layers=2, heads=2, inner=256)
CLIP_FULL = ClipLConfig(vocabulary=49_408, max_tokens=77, width=768, layers=12, inner=3072)
T5_FULL = T5Config(vocabulary=32_128, width=4096, layers=24, heads=64, inner=10_240)
UMT5_DEMO = replace(T5_DEMO, has_tables=True)
UMT5_FULL = replace(T5_FULL, vocabulary=256_384, has_tables=True)
CLIP_LAYER = "text_model.encoder.layers.0"
T5_ATTENTION = "encoder.block.{}.layer.0.SelfAttention"


@pytest.fixture(scope="module")
def clip(describe: Callable[[State], Infos]) -> Infos:
    return describe(clip_l_state_dict(0, vocabulary=300))


@pytest.fixture(scope="module")
def t5(describe: Callable[[State], Infos]) -> Infos:
    return describe(t5_state_dict(0, vocabulary=300))


@pytest.fixture(scope="module")
def umt5(describe: Callable[[State], Infos]) -> Infos:
    return describe(umt5_state_dict(0, vocabulary=300))


def fitted(infos: Infos) -> Resolution:
    return resolve(detect(infos.keys()), infos)


@pytest.mark.parametrize("prefix", ["", "transformer.", "clip_l.transformer.", "text_encoders.clip_l.transformer."])
def test_every_prefix_of_clip_is_recognised(clip: Infos, prefix: str) -> None:
    found = fitted({prefix + name: info for name, info in clip.items()})
    assert (found.family.name, found.family.kind, found.config) == ("clip_l", "text_encoder", CLIP_DEMO)


@pytest.mark.parametrize("prefix", ["", "transformer.", "t5xxl.transformer.", "text_encoders.t5xxl.transformer."])
def test_every_prefix_of_t5_is_recognised(t5: Infos, prefix: str) -> None:
    found = fitted({prefix + name: info for name, info in t5.items()})
    assert (found.family.name, found.family.kind, found.config) == ("t5", "text_encoder", T5_DEMO)


@pytest.mark.parametrize("prefix", ["", "umt5xxl.transformer.", "text_encoders.umt5xxl.transformer.", "text_encoder."])
def test_every_prefix_of_umt5_is_recognised(umt5: Infos, prefix: str) -> None:
    found = fitted({prefix + name: info for name, info in umt5.items()})
    assert (found.family.name, found.family.kind, found.config) == ("umt5", "text_encoder", UMT5_DEMO)


@pytest.mark.parametrize("tokenizer", ["spiece_model", "tekken_model", "tokenizer_json"])
def test_a_tokenizer_in_a_file_is_skipped(t5: Infos, umt5: Infos, tokenizer: str) -> None:
    for infos in (t5, umt5):
        found = fitted({**infos, tokenizer: TensorInfo("uint8", (4_500_000,))})
        assert found.skipped == (tokenizer,)


def test_umt5_in_wans_own_names_fills_the_same_parameters(describe: Callable[[State], Infos], umt5: Infos) -> None:
    state = umt5_state_dict(0, vocabulary=300)
    named = in_wans_names(state)
    found = fitted(describe(named))
    assert found.config == UMT5_DEMO
    assert not set(state) & set(named)
    for parameter, part in fitted(umt5).key_map.items():
        assert named[found.key_map[parameter].source] is state[part.source], parameter


def test_a_block_of_umt5_without_its_table_is_named(describe: Callable[[State], Infos]) -> None:
    three = describe(umt5_state_dict(0, layers=3, vocabulary=300))
    lost = f"{T5_ATTENTION.format(2)}.relative_attention_bias.weight"
    with pytest.raises(
        BadCheckpoint,
        match=re.escape(f"does not fit umt5: lend all of its tensors, and nothing else; 1 missing: {lost}"),
    ):
        fitted({name: info for name, info in three.items() if name != lost})
    first = f"{T5_ATTENTION.format(1)}.relative_attention_bias.weight"
    with pytest.raises(
        BadCheckpoint,
        match=re.escape(f"does not fit t5: lend all of its tensors, and nothing else; 1 unexpected: {lost}"),
    ):
        fitted({name: info for name, info in three.items() if name != first})


@pytest.mark.parametrize(
    ("family", "config", "tensors", "elements"),
    [
        (ClipL(), CLIP_FULL, 196, 123_060_480),
        (T5(), T5_FULL, 219, 4_762_310_656),
        (UMT5(), UMT5_FULL, 242, 5_680_910_336),
    ],
    ids=["clip_l", "t5", "umt5"],
)
def test_full_size_has_the_known_counts_and_fills_transformers_module(family, config, tensors, elements) -> None:
    from diffusers.models.modeling_utils import no_init_weights

    entries = list(family.entries(config, ()))
    found = fitted({entry.source: TensorInfo("float16", entry.shape) for entry in entries})
    assert found.config == config
    assert len(entries) == tensors
    assert sum(torch.Size(entry.shape).numel() for entry in entries) == elements
    with torch.device("meta"), no_init_weights():
        module = family.operations.build(config)
    check_targets(family, iter(entries), {name: tuple(p.shape) for name, p in module.named_parameters()})


def test_what_flux_does_not_read_of_a_clip_is_accepted_in_any_dtype(clip: Infos) -> None:
    extras = {
        "text_projection.weight": TensorInfo("float16", (128, 128)),
        "logit_scale": TensorInfo("float32", ()),
        "text_model.embeddings.position_ids": TensorInfo("int64", (1, 77)),
    }
    extras["vision_model.encoder.layers.0.self_attn.q_proj.weight"] = TensorInfo("float16", (1024, 1024))
    extras["visual_projection.weight"] = TensorInfo("float16", (768, 1024))
    found = fitted({**clip, **extras})
    assert found.config == CLIP_DEMO
    assert found.key_map == fitted(clip).key_map
    assert set(found.skipped) == set(extras)
    assert "vision_model" not in fitted({**clip, **extras}).sources


def test_the_decoder_of_a_whole_t5_is_skipped(t5: Infos) -> None:
    rest = {
        "decoder.embed_tokens.weight": t5["shared.weight"],
        "decoder.block.0.layer.0.SelfAttention.q.weight": TensorInfo("float32", (128, 128)),
        "lm_head.weight": t5["shared.weight"],
        "spiece_model": TensorInfo("uint8", (791_656,)),
    }
    found = fitted({**t5, **rest})
    assert (found.config, set(found.skipped)) == (T5_DEMO, set(rest))
    wrapped = fitted({f"module._orig_mod.{name}": info for name, info in {**t5, **rest}.items()})
    assert wrapped.key_map.keys() == found.key_map.keys()


@pytest.mark.parametrize("prefix", ["", "text_encoder.", "module.", "_orig_mod.module.text_encoder_2."])
def test_what_transformers_holds_and_saves_is_read(tmp_path: Path, describe: Describe, prefix: str) -> None:
    """Its CLIPTextModel has no ``text_model.`` since 5.6; the projecting one and the whole CLIP still do."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5EncoderModel,
        T5ForConditionalGeneration,
    )
    from transformers import T5Config as WholeT5Config

    text = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 2, "bos_token_id": 298, "eos_token_id": 299, "projection_dim": 128}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = {"vocab_size": 300, "d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 2, "num_heads": 2,
             "feed_forward_proj": "gated-gelu"}  # fmt: skip
    modules = {
        CLIPTextModel(CLIPTextConfig(**text)): CLIP_DEMO,
        CLIPTextModelWithProjection(CLIPTextConfig(**text)): CLIP_DEMO,
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision)): CLIP_DEMO,
        T5EncoderModel(WholeT5Config(**whole)): T5_DEMO,
        T5ForConditionalGeneration(WholeT5Config(**whole, num_decoder_layers=1)): T5_DEMO,
    }
    for number, (module, config) in enumerate(modules.items()):
        module.save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        for state in (module.state_dict(), saved):
            found = fitted({prefix + name: info for name, info in describe(state).items()})
            assert found.config == config, type(module).__name__


def test_encoders_of_other_things_with_the_same_layers_are_no_clip() -> None:
    layer = {
        f"encoder.layers.0.self_attn.{part}.weight": TensorInfo("float32", (64, 64)) for part in ("q_proj", "k_proj")
    }
    with pytest.raises(UnknownFamily):
        fitted({**layer, "embeddings.patch_embedding.weight": TensorInfo("float32", (64, 3, 14, 14))})


def test_the_token_embedding_of_t5_may_be_there_twice_or_under_its_other_name(t5: Infos) -> None:
    copy, original = "encoder.embed_tokens.weight", "shared.weight"
    assert fitted({copy: t5[original], **t5}).key_map == fitted(t5).key_map
    renamed = {copy if name == original else name: info for name, info in t5.items()}
    assert fitted(renamed).key_map["shared.weight"].source == copy


def test_a_second_token_embedding_of_another_shape_is_refused(t5: Infos) -> None:
    with pytest.raises(BadCheckpoint, match=r"embed_tokens\.weight \(not of the shape of shared\.weight"):
        fitted({**t5, "encoder.embed_tokens.weight": TensorInfo("float32", (301, 128))})


def test_the_end_of_a_text_is_clips_own_token_also_in_a_larger_vocabulary() -> None:
    assert CLIP_FULL.end_of_text == 49_407
    assert replace(CLIP_FULL, vocabulary=49_410).end_of_text == 49_407
    assert CLIP_DEMO.end_of_text == 299


@pytest.mark.parametrize(("width", "known_as"), [(1024, "CLIP-H"), (1280, "CLIP-G")])
def test_clips_with_another_activation_are_refused(width: int, known_as: str) -> None:
    infos = {
        entry.source: TensorInfo("float16", entry.shape)
        for entry in ClipL().entries(replace(CLIP_FULL, width=width), ())
    }
    with pytest.raises(Unsupported, match=f"width {width} is {known_as}"):
        fitted(infos)


def test_relatives_of_t5_are_refused_by_name(t5: Infos) -> None:
    ungated = {name.replace("wi_0", "wi"): info for name, info in t5.items() if "wi_1" not in name}
    with pytest.raises(Unsupported, match=r"T5 1\.0"):
        fitted(ungated)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(clip: Infos, t5: Infos) -> None:
    broken = {**clip, "text_model.x": TensorInfo("float32", (2, 2))}
    del broken["text_model.final_layer_norm.bias"]
    broken[f"{CLIP_LAYER}.self_attn.q_proj.weight"] = TensorInfo("float32", (64, 128))
    with pytest.raises(BadCheckpoint) as caught:
        fitted(broken)
    assert "1 missing: text_model.final_layer_norm.bias" in caught.value.detail
    assert "1 unexpected: text_model.x" in caught.value.detail
    assert f"{CLIP_LAYER}.self_attn.q_proj.weight is [64, 128], expected [128, 128]" in caught.value.detail
    with pytest.raises(BadCheckpoint, match=r"1 missing: encoder\.block\.1\.layer\.1\.DenseReluDense\.wo\.weight"):
        fitted({name: info for name, info in t5.items() if name != "encoder.block.1.layer.1.DenseReluDense.wo.weight"})


@pytest.mark.parametrize("name", ["text_model.embeddings.token_embedding.weight", f"{CLIP_LAYER}.mlp.fc1.weight"])
def test_a_size_that_cannot_be_read_is_a_bad_checkpoint(clip: Infos, name: str) -> None:
    with pytest.raises(BadCheckpoint, match="is missing: the size of the model"):
        fitted({other: info for other, info in clip.items() if other != name})
    with pytest.raises(BadCheckpoint, match="not a matrix"):
        fitted({**clip, name: TensorInfo("float32", (128,))})


def test_a_layer_number_that_no_model_has_is_refused(clip: Infos, t5: Infos) -> None:
    with pytest.raises(BadCheckpoint, match=r"encoder\.layers\.9999 exceeds"):
        fitted({**clip, "text_model.encoder.layers.9999.mlp.fc1.bias": TensorInfo("float32", (512,))})
    with pytest.raises(BadCheckpoint, match=r"encoder\.block\.9999 exceeds"):
        fitted({**t5, "encoder.block.9999.layer.0.layer_norm.weight": TensorInfo("float32", (128,))})


def test_eight_bit_weights_are_refused(t5: Infos) -> None:
    with pytest.raises(UnsupportedDtype, match="float8_e4m3fn"):
        fitted({name: replace(info, dtype="float8_e4m3fn") for name, info in t5.items()})
