"""Checkpoints as they come, through a real daemon: what differs is read all the same, or named in few words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_checkpoints import clip_l_state_dict, t5_state_dict

from xditd.gpu_workers.families.flux1 import reference
from xditd.ipc.errors import BadCheckpoint, Unsupported, UnsupportedDtype
from xditd.ipc.tensors import ComponentKind

MESSAGE_CHARS = 1_000
TEXT = {"prompt_embeds": torch.ones(1, 8, 4096), "pooled_prompt_embeds": torch.ones(1, 768)}


def log_of(client) -> str:
    """Everything that the daemon still has of its log, page by page: the session's other tests fill more than one."""
    found, after = [], 0
    while (page := client.logs(after))[0]:
        found += page[0]
        after = page[1]
    return "\n".join(found)


@pytest.fixture(scope="module")
def state(files) -> dict[str, torch.Tensor]:
    return load_file(files.transformer)


def test_an_eight_bit_checkpoint_without_markers_is_refused_in_few_words_and_all_of_its_tensors_are_on_the_error(
    client, state, wait_until
):
    eight = {name: tensor.to(torch.int8) if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    packed = {f"{name} is int8" for name, tensor in eight.items() if tensor.ndim == 2}
    with pytest.raises(UnsupportedDtype) as caught:
        client.lend(eight, label="eight")
    assert caught.value.detail.startswith("eight: FLUX.1 with int8 weights cannot be run: lend its")
    assert f"{len(packed)} of {len(state)} tensors: " in caught.value.detail
    assert f" and {len(packed) - 5} more" in caught.value.detail
    without_the_tests = caught.value.detail.replace(" or a scale of the tests (scale.safetensors)", "")
    assert len(without_the_tests) < MESSAGE_CHARS
    assert set(caught.value.names) == packed

    def is_logged() -> bool:
        lines = log_of(client)
        return all(name in lines for name in packed)

    wait_until(is_logged, "all of the names to be logged")


def test_an_all_in_one_checkpoint_is_named_with_its_parts(client, state, files):
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    whole |= {f"vae.{name}": tensor for name, tensor in load_file(files.vae).items()}
    whole |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in clip_l_state_dict(0).items()}
    with pytest.raises(Unsupported) as caught:
        client.lend(whole, label="whole")
    assert caught.value.detail.startswith(
        "whole: an all-in-one checkpoint of FLUX.1 cannot be lent as a whole: lend one part"
    )
    assert f"transformer or UNet ({len(state)} tensors)" in caught.value.names
    without_the_tests = caught.value.detail.replace(" or a scale of the tests (scale.safetensors)", "")
    assert len(without_the_tests) < MESSAGE_CHARS
    with client.lend(whole, kind=ComponentKind.TRANSFORMER) as part, client.lend(state) as alone:
        assert part.facts.transformer == alone.facts.transformer
        first, second = (
            client.generate(loan, TEXT, height=64, width=64, steps=2, seed=3).result() for loan in (part, alone)
        )
    assert torch.equal(first.latents, second.latents)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.gguf", b"GGUF\x01\0\0\0" + bytes(99), "a GGUF file of version 1; versions 2 and 3 are read"),
        ("x-00001-of-00003.safetensors", b"", "this is file 1 of the 3 that make this checkpoint: lend its index"),
        ("x.safetensors", b"<!DOCTYPE html>", "this is a web page"),
    ],
)
def test_other_files_are_named_before_anything_is_sent(client, tmp_path: Path, name: str, content: bytes, says: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint) as caught:
        client.lend(tmp_path / name)
    assert f"{name}: {says}" in caught.value.detail


def test_a_checkpoint_in_several_files_is_lent_as_one(client, state, tmp_path, make_inputs, run, diffusers_run):
    """By its index, without a configuration: a family knows it by its tensors."""
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    inputs = make_inputs()
    loan = client.lend(index)
    assert loan.family == "flux1"
    assert [tier.value for tier in loan.tiers] == ["file"]
    assert reference.relative_error(run(client, loan, inputs), diffusers_run(inputs)) < 1e-5


def test_a_folder_with_the_tensors_of_a_family_runs_as_the_family(client, tmp_path):
    """Its configuration has to name the family's heads, which no tensor shows; sizes are those of the tensors."""
    clip = clip_l_state_dict(5)
    save_file(clip, tmp_path / "model.safetensors")
    settings = {"architectures": ["CLIPTextModel"], "hidden_size": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ids = torch.randint(2, 400, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = client.encode_text(client.lend(clip), ids, pooled=True)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loan = client.lend(source)
        assert loan.kind is ComponentKind.TEXT_ENCODER
        assert [tier.value for tier in loan.tiers] == ["file"]
        assert torch.equal(client.encode_text(loan, ids, pooled=True).pooled, expected.pooled)
    with pytest.raises(BadCheckpoint, match="do not fit CLIPTextModel"):
        client.lend(tmp_path, as_class=True)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_attention_heads": 4}))
    with pytest.raises(BadCheckpoint, match="do not fit CLIPTextModel"):
        client.lend(tmp_path)


def test_a_compiled_training_checkpoint_of_two_dtypes_is_what_diffusers_makes_of_it(
    client, state, tmp_path, make_inputs, run
):
    """bfloat16 with float32 norms, under the prefixes of two wrappers, beside a marker; lent as a file."""
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state.items()}
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in mixed.items()}
    save_file({**wrapped, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "mixed.safetensors")
    inputs = make_inputs()
    latents = run(client, client.lend(tmp_path / "mixed.safetensors"), inputs)
    expected = reference.reference_latents(
        reference.transformer_from(mixed),
        prompt_embeds=inputs.prompt_embeds,
        pooled_prompt_embeds=inputs.pooled_prompt_embeds,
        noise=inputs.noise,
        height=inputs.pixels,
        width=inputs.pixels,
        steps=4,
    )
    assert torch.equal(latents, latents.bfloat16().float())
    assert not torch.equal(latents, run(client, client.lend(state), inputs))
    # Two ranks add in another order than one, which half precision shows.
    plain = {name: tensor.bfloat16() for name, tensor in state.items()}
    uniform = run(client, client.lend(plain), inputs)
    assert reference.relative_error(latents, expected) <= 2 * max(0.02, reference.relative_error(uniform, expected))


def test_text_encoders_as_transformers_holds_and_saves_them(client, tmp_path):
    """Names without ``text_model.``, and a decoder and a tokenizer that nobody reads."""
    clip = clip_l_state_dict(5)
    ids = torch.randint(2, 400, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = client.encode_text(client.lend(clip), ids, pooled=True)
    bare = {f"text_encoder.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
    save_file(bare, tmp_path / "model.safetensors")
    found = client.encode_text(client.lend(tmp_path / "model.safetensors"), ids, pooled=True)
    assert torch.equal(found.hidden_states, expected.hidden_states)
    assert torch.equal(found.pooled, expected.pooled)
    # No id is the end of a text: transformers takes the first token's state.
    assert torch.equal(found.pooled, found.hidden_states[:, 0])
    t5 = {name: tensor if name.endswith("wo.weight") else tensor.half() for name, tensor in t5_state_dict(6).items()}
    rest = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(3, 3), "lm_head.weight": torch.ones(3)}
    whole = client.encode_text(client.lend({**t5, **rest}), ids).hidden_states
    assert torch.equal(whole, client.encode_text(client.lend(t5), ids).hidden_states)
    lines = log_of(client)
    assert "tensors skipped, no job reads them: family=t5 count=2 names=decoder.block.0." in lines
