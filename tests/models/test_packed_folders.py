"""Packed weights in folders of diffusers' models: the bits of ``from_pretrained`` on the weights that they mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random
from nested_values import cast, tensors_of
from packed_checkpoints import pack
from safetensors.torch import load_file, save_file

from xditd.client import BadCheckpoint, Client, Unsupported
from xditd.ipc.tensors import ComponentKind, Tier

FILE = "diffusion_pytorch_model.safetensors"
CASES = (
    ("FluxTransformer2DModel", "float8"),
    ("QwenImageTransformer2DModel", "int8_convrot"),
    ("WanTransformer3DModel", "int8_rows"),  # keeps parts in float32
    ("WanTransformer3DModel", "plain"),
    ("PixArtTransformer2DModel", "nvfp4"),
    ("HunyuanDiT2DModel", "int8_rows"),  # gives the weights of its pooling to a function
)

pytestmark = pytest.mark.usefixtures("as_many_threads_as_the_worker")


def packed_folder(key: str, packed_format: str, folder: Path, dtype: torch.dtype) -> tuple[Path, Any]:
    """Save a model packed, and return its folder, and diffusers' model of what its weights mean."""
    entry = ENTRIES[key]
    model: Any = entry.build()
    plain, meant = folder / "packed", folder / "meant"
    model.save_pretrained(plain)
    shutil.copytree(plain, meant)
    state = load_file(plain / FILE)
    kept = getattr(diffusers, entry.name).from_pretrained(plain, torch_dtype=dtype).state_dict()
    packed, wide = (pack(state, packed_format, each) for each in (dtype, torch.float32))
    packed.save(plain / FILE)
    in_float32 = {name for name in packed.weights if kept[name].dtype == torch.float32}
    save_file({name: (wide if name in in_float32 else packed).meant[name] for name in state}, meant / FILE)
    return plain, getattr(diffusers, entry.name).from_pretrained(meant, torch_dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key", "packed_format"), CASES)
def test_a_packed_folder_has_the_bits_of_what_it_means(
    client: Client, tmp_path: Path, key: str, packed_format: str, dtype: torch.dtype
) -> None:
    folder, model = packed_folder(key, packed_format, tmp_path, dtype)
    arguments = cast(ENTRIES[key].arguments(Random(1)), dtype)
    with client.lend(folder, as_class=True, compute_dtype=str(dtype).removeprefix("torch.")) as loan:
        assert loan.kind is ComponentKind.MODULE
        assert loan.facts.bytes_by_format
        assert loan.facts.scratch_bytes > 0
        with torch.no_grad():
            expected = list(tensors_of(model(**arguments, return_dict=False)))
        found = list(tensors_of(client.call(loan, arguments | {"return_dict": False})))
        assert [each.dtype for each in found] == [each.dtype for each in expected]
        assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))
        again = list(tensors_of(client.call(loan, arguments | {"return_dict": False})))
        assert all(torch.equal(mine, its) for mine, its in zip(again, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("others", [torch.bfloat16, torch.float32], ids=str)
def test_the_compute_dtype_is_that_of_the_class_where_plain_weights_of_another_one_outnumber_the_packed(
    client: Client, tmp_path: Path, others: torch.dtype
) -> None:
    """A class has one ``torch_dtype``: the plain weights are converted, too, as ``from_pretrained`` does."""
    entry = ENTRIES["FluxTransformer2DModel"]
    plain, meant = tmp_path / "packed", tmp_path / "meant"
    model: Any = entry.build()
    model.save_pretrained(plain)
    shutil.copytree(plain, meant)
    state = {name: each.to(others) for name, each in load_file(plain / FILE).items()}
    layer = {name: each for name, each in state.items() if name == "transformer_blocks.0.attn.to_q.weight"}
    packed = pack({name: each.float() for name, each in layer.items()}, "float8", torch.float16)
    assert len(packed.weights) == 1
    rest = {name: each for name, each in state.items() if name not in layer}
    save_file(rest | packed.tensors, plain / FILE)
    save_file(rest | packed.meant, meant / FILE)
    model = getattr(diffusers, entry.name).from_pretrained(meant, torch_dtype=torch.float16)
    arguments = cast(entry.arguments(Random(1)), torch.float16)
    with client.lend(plain, as_class=True, compute_dtype="float16") as loan:
        assert loan.facts.dtype == "float16"
        with torch.no_grad():
            (expected,) = tensors_of(model(**arguments, return_dict=False))
        (found,) = tensors_of(client.call(loan, arguments | {"return_dict": False}))
        assert torch.equal(found, expected)
    with client.lend(plain, as_class=True) as loan:
        assert loan.facts.dtype == str(others).removeprefix("torch.")
    save_file(state, plain / FILE)
    with client.lend(plain, as_class=True, compute_dtype="float16") as loan:  # nothing is packed
        assert loan.facts.dtype == str(others).removeprefix("torch.")


@pytest.mark.slow
def test_the_text_encoder_of_z_image_with_the_packed_file_of_comfyui(client: Client, tmp_path: Path) -> None:
    """Such a file (qwen_3_4b_fp8_mixed) has some layers packed and the names of transformers, but no configuration."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    plain, meant = tmp_path / "packed", tmp_path / "meant"
    Qwen3ForCausalLM(config).save_pretrained(plain)
    shutil.copytree(plain, meant)
    file = "model.safetensors"
    state = load_file(plain / file)
    layers = {name: each for name, each in state.items() if each.ndim == 2 and "layers.0." in name}
    assert all(name.startswith("model.") for name in state)
    rest = {name: each.bfloat16() for name, each in state.items() if name not in layers}
    packed = pack(layers, "float8", torch.bfloat16)
    save_file(rest | packed.tensors, plain / file)
    save_file(rest | packed.meant, meant / file)
    model: Any = Qwen3ForCausalLM.from_pretrained(meant, dtype=torch.bfloat16).eval()
    arguments = {"input_ids": torch.tensor([[5, 9, 9, 41, 0, 95]]), "output_hidden_states": True}
    with client.lend(plain) as loan:
        assert loan.kind is ComponentKind.MODULE
        assert loan.tiers == (Tier.FILE,)
        assert set(loan.facts.bytes_by_format) == {"float8"}
        found = client.call(loan, arguments)["hidden_states"][-2]
    with torch.no_grad():
        assert torch.equal(found, model(**arguments).hidden_states[-2])


@pytest.mark.slow
def test_what_does_not_fit_is_named(client: Client, tmp_path: Path) -> None:
    folder, _ = packed_folder("FluxTransformer2DModel", "float8", tmp_path, torch.bfloat16)
    state = load_file(folder / FILE)
    name = next(each for each in state if each.endswith(".weight_scale"))
    save_file(state | {name: torch.tensor(torch.nan)}, folder / FILE)
    with pytest.raises(BadCheckpoint, match="1 scales of packed weights are not finite") as caught:
        client.lend(folder, as_class=True)
    assert caught.value.names == (name,)
    del state[name.removesuffix("weight_scale") + "weight"]
    save_file(state, folder / FILE)
    with pytest.raises((BadCheckpoint, Unsupported)):
        client.lend(folder, as_class=True)
