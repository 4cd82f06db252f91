"""Modules of a checkpoint beside what ``from_pretrained`` makes of the same files: every tensor and attribute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from xditd.gpu_workers.models.class_models import ClassModels
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.module_match import ModuleMatch
from xditd.gpu_workers.models.pretrained import main_dtype
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadCheckpoint, UnsupportedDtype
from xditd.ipc.tensors import ModuleDescription
from xditd.ipc.transports.module_walk import walk_module

State = dict[str, torch.Tensor]


@pytest.fixture
def models() -> ClassModels:
    return ClassModels(
        cast(
            "ParallelLayout",
            SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1, acceleration="eager"),
        )
    )


def match(models: ClassModels, kind: type, folder: Path, state: State) -> ModuleMatch:
    described = ModuleDescription(
        class_name=f"{kind.__module__.partition('.')[0]}:{kind.__name__}",
        config=(folder / "config.json").read_text(),
    )
    return models.match(described, {name: TensorInfo.of(tensor) for name, tensor in state.items()})


def assert_as_loaded(models: ClassModels, kind: Any, folder: Path, dtype: torch.dtype) -> ModuleMatch:
    """Compare a plugged module with the one that ``from_pretrained`` loads."""
    expected = kind.from_pretrained(folder, torch_dtype=dtype)
    state = load_file(next(folder.glob("*.safetensors")))
    found = match(models, kind, folder, state)
    assert found.dtype == dtype
    reserved = found.reserve()
    assert reserved == sum(tensor.nbytes for tensor in found._converted.values())
    found.model.plug(found.bind(state))
    theirs, their_tensors = walk_module(expected)
    ours, our_tensors = walk_module(found.model.module)
    assert ours == theirs
    assert our_tensors.keys() == their_tensors.keys()
    for name, tensor in their_tensors.items():
        assert our_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(our_tensors[name], tensor), name
    found.model.unplug()
    return found


def change(folder: Path, how: Callable[[State], State]) -> None:
    path = next(folder.glob("*.safetensors"))
    state = how(load_file(path))
    save_file(state, path)


def wan() -> Any:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=2, latent_channels=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip


def t5() -> Any:
    torch.manual_seed(0)
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_kept_in_float32_are_found_whatever_the_file_has(models: ClassModels, tmp_path: Path, dtype: torch.dtype):
    wan().to(dtype).save_pretrained(tmp_path)
    found = assert_as_loaded(models, diffusers.WanTransformer3DModel, tmp_path, dtype)
    assert "scale_shift_table" in found.shapes
    assert not any("attn1.to_q" in name for name in found.shapes)


def test_nothing_is_converted_of_what_save_pretrained_wrote(models: ClassModels, tmp_path: Path):
    wan().save_pretrained(tmp_path)
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path)
    assert not assert_as_loaded(models, diffusers.WanTransformer3DModel, tmp_path, torch.bfloat16).shapes


def test_t5_keeps_a_layer_in_float32_in_float16_alone(models: ClassModels, tmp_path: Path):
    for dtype in (torch.float16, torch.bfloat16):
        t5().to(dtype).save_pretrained(tmp_path)
        found = assert_as_loaded(models, transformers.T5EncoderModel, tmp_path, dtype)
        assert any(name.endswith("wo.weight") for name in found.shapes) == (dtype == torch.float16)


def test_tied_weights_have_either_name(models: ClassModels, tmp_path: Path):
    t5().save_pretrained(tmp_path)
    found = assert_as_loaded(models, transformers.T5EncoderModel, tmp_path, torch.float32)
    assert found.sources["shared.weight"] == found.sources["encoder.embed_tokens.weight"] == "shared.weight"
    change(
        tmp_path,
        lambda state: {
            name if name != "shared.weight" else "encoder.embed_tokens.weight": tensor for name, tensor in state.items()
        },
    )
    found = assert_as_loaded(models, transformers.T5EncoderModel, tmp_path, torch.float32)
    assert found.sources["shared.weight"] == "encoder.embed_tokens.weight"


def test_a_decoder_that_the_class_ignores_is_not_read(models: ClassModels, tmp_path: Path):
    t5().save_pretrained(tmp_path)
    change(tmp_path, lambda state: {**state, "decoder.final_layer_norm.weight": torch.ones(16)})
    found = assert_as_loaded(models, transformers.T5EncoderModel, tmp_path, torch.float32)
    assert "decoder.final_layer_norm.weight" not in found.sources.values()


def test_a_tensor_that_diffusers_ignores_is_not_read(models: ClassModels, tmp_path: Path):
    wan().save_pretrained(tmp_path)
    change(tmp_path, lambda state: {**state, "blocks.0.attn2.norm_added_q.weight": torch.ones(24)})
    assert_as_loaded(models, diffusers.WanTransformer3DModel, tmp_path, torch.float32)


def test_attention_of_older_vaes_is_renamed(models: ClassModels, tmp_path: Path):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae().save_pretrained(tmp_path)

    def rename(state: State) -> State:
        found = {}
        for name, tensor in state.items():
            for new, old in older.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            found[name] = tensor
        return found

    change(tmp_path, rename)
    found = assert_as_loaded(models, diffusers.AutoencoderKL, tmp_path, torch.float32)
    assert found.sources["encoder.mid_block.attentions.0.to_q.weight"] == "encoder.mid_block.attentions.0.query.weight"


def test_scales_and_tables_that_no_file_has_are_made_as_transformers_makes_them(models: ClassModels, tmp_path: Path):
    model = transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    model.bfloat16().save_pretrained(tmp_path)
    assert_as_loaded(models, transformers.Gemma3TextModel, tmp_path, torch.bfloat16)


def test_what_does_not_fit_is_named(models: ClassModels, tmp_path: Path):
    wan().save_pretrained(tmp_path)
    state = load_file(next(tmp_path.glob("*.safetensors")))
    state["other.weight"] = torch.ones(1)
    state["proj_out.bias"] = torch.ones(1)
    del state["patch_embedding.weight"]
    with pytest.raises(BadCheckpoint) as caught:
        match(models, diffusers.WanTransformer3DModel, tmp_path, state)
    assert list(caught.value.names) == [
        "missing: patch_embedding.weight",
        "unexpected: other.weight",
        f"wrongly shaped: proj_out.bias is [1], expected [{4 * 4}]",
    ]
    assert models.built == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_in_place_of_weights_are_named(models: ClassModels, tmp_path: Path, dtype: torch.dtype):
    """They belong to a format that nothing describes; cast to the dtype of the class they would be other numbers."""
    for kind, make in ((diffusers.AutoencoderKL, vae), (transformers.T5EncoderModel, t5)):
        folder = tmp_path / kind.__name__
        make().save_pretrained(folder)
        state = load_file(next(folder.glob("*.safetensors")))
        name = next(each for each, tensor in state.items() if tensor.ndim == 2)
        with pytest.raises(UnsupportedDtype, match="does not say what their integers mean") as caught:
            match(models, kind, folder, {**state, name: state[name].to(dtype)})
        assert caught.value.names == (f"{name} is {str(dtype).removeprefix('torch.')}",)


def test_the_same_names_and_dtypes_reuse_a_module(models: ClassModels, tmp_path: Path):
    wan().save_pretrained(tmp_path)
    state = load_file(next(tmp_path.glob("*.safetensors")))
    first = match(models, diffusers.WanTransformer3DModel, tmp_path, state)
    assert match(models, diffusers.WanTransformer3DModel, tmp_path, state).model is first.model
    half = {name: tensor.half() for name, tensor in state.items()}
    assert match(models, diffusers.WanTransformer3DModel, tmp_path, half).model is not first.model
    assert (models.built, models.reused) == (2, 1)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"a.weight": "bfloat16", "norm1.weight": "float32"}, torch.bfloat16),
        ({"norm1.weight": "float32"}, torch.float32),
        ({"a.ids": "int64"}, torch.float32),
        ({"a.weight": "float16", "a.ids": "int64"}, torch.float16),
    ],
)
def test_the_main_dtype_is_that_of_most_elements_that_are_not_kept(dtypes: dict[str, str], expected: torch.dtype):
    sizes = {"norm1.weight": (100,), "a.ids": (1_000,)}
    tensors = {name: TensorInfo(dtype, sizes.get(name, (10,))) for name, dtype in dtypes.items()}
    assert main_dtype(diffusers.WanTransformer3DModel, tensors) == expected


def test_no_class_computes_in_8_bits():
    with pytest.raises(UnsupportedDtype, match="most of its weights are float8_e5m2"):
        main_dtype(diffusers.WanTransformer3DModel, {"a": TensorInfo("float8_e5m2", (9,))})
