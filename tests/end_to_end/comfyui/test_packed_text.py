"""Packed text encoders through Load Dual CLIP (xDiT): lent as bytes, with the conditioning of stock ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import packed_checkpoints
import pytest
import text_checkpoints
import torch
from safetensors.torch import load_file, save_file

from xditd.client import BadCheckpoint, Unsupported
from xditd.ipc.tensors import Tier

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 3e-6
"""As for plain encoders: transformers and ComfyUI sum in another order. The weights themselves have the same bits."""
INT8_ROUNDING = 5e-2
"""Stock rounds the inputs of int8 layers there, the workers do not."""
T5 = "t5xxl.transformer."
TABLES = ("shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
TEXT = "a lighthouse on a cliff at dusk"

WITH_TABLES = ("plain", "float8", "old", "old_full", "int8", "int8_rows", "int8_convrot")
"""Here every matrix is packed; in the others the tables of tokens and of positions are not, as in most files."""
FORMATS = (*((each, True) for each in WITH_TABLES), *((each, False) for each in (*WITH_TABLES[1:], "mxfp8", "nvfp4")))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Callable[..., Path]:
    """Write a T5 in a format, once."""
    folder = tmp_path_factory.mktemp("packed_text")
    state = text_checkpoints.t5_state_dict(6)

    def write(
        format: str, has_tables: bool = False, dtype: torch.dtype = torch.bfloat16, in_metadata: bool = False
    ) -> Path:
        path = folder / f"{format}-{has_tables}-{dtype}-{in_metadata}.safetensors"
        if not path.exists():
            apart = {} if has_tables else {name: state[name] for name in TABLES}
            given = {name: each for name, each in state.items() if name not in apart}
            made = packed_checkpoints.pack(given, format, dtype, in_metadata=in_metadata)
            made.tensors |= {name: each.to(dtype) for name, each in apart.items()}
            for name, each in made.tensors.items():
                if name.endswith("weight_scale") and each.ndim == 1:  # with one dimension, stock fails
                    made.tensors[name] = each[:, None]
            made.save(path)
        return path

    return write


@pytest.fixture(scope="module")
def clip_l(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed_text") / "clip_l.safetensors"
    text_checkpoints.write_clip_l(path, seed=5, dtype=torch.float16)
    return path


@pytest.fixture(scope="module")
def stock(comfy) -> Callable[[Path, Path], Any]:
    """Load files as ComfyUI's own loader does, which does not recognise encoders of this size."""
    from comfy.text_encoders import flux, sd3_clip

    sizes = {
        "clip_l_model_config": {
            "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 512,
        },
        "t5xxl_model_config": {"d_model": 128, "d_ff": 256, "d_kv": 64, "num_heads": 2, "num_layers": 2},
    }  # fmt: skip

    def load(t5: Path, clip: Path) -> Any:
        states = []
        for path in (clip, t5):
            tensors, metadata = comfy.comfy.utils.load_torch_file(str(path), return_metadata=True)
            states.append(comfy.comfy.utils.convert_old_quants(tensors, model_prefix="", metadata=metadata)[0])
        kind = flux.flux_clip(**sd3_clip.t5_xxl_detect(states[1]))
        target = comfy.comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, kind)
        return comfy.comfy.sd.CLIP(target, state_dict=states, model_options=dict(sizes))

    return load


@pytest.fixture
def encode(comfy, connected) -> Callable[[Any], tuple[torch.Tensor, torch.Tensor]]:
    def run(clip: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ((states, extras),) = comfy.nodes.CLIPTextEncode().encode(clip, TEXT)[0]
        return states, extras["pooled_output"]

    return run


def remote(*paths: Path) -> Any:
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    return load_clip(*map(str, paths))


def t5_of(clip: Any) -> Any:
    """The weights of the T5 of an xDiT CLIP."""
    return clip.cond_stage_model._t5._weights


@pytest.mark.parametrize(
    ("format", "has_tables", "dtype"),
    [
        *((*each, torch.bfloat16) for each in FORMATS),
        ("float8", False, torch.float32),
        ("int8_convrot", True, torch.float32),
    ],
)
def test_each_format(format, has_tables, dtype, packed, clip_l, stock, encode, relative_error):
    """In float32 files stock casts the tensors without a format to float16."""
    path = packed(format, has_tables, dtype)
    expected = encode(stock(path, clip_l))
    clip = remote(path, clip_l)
    for ours, theirs in zip(encode(clip), expected, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize(("format", "has_tables"), FORMATS)
def test_weights_have_the_bits_that_stock_multiplies(
    format, has_tables, comfy, packed, clip_l, stock, encode, tmp_path, monkeypatch
):
    """Encoding with stock's dequantised weights gives the same bits, so that no rounding differs."""
    path = packed(format, has_tables, torch.float32)
    found, _ = encode(remote(path, clip_l))
    model = stock(path, clip_l).cond_stage_model.t5xxl.transformer
    meant = {}
    for name, parameter in model.named_parameters():
        if name.endswith("input_scale"):
            continue
        rounds = name in TABLES and format.startswith("int8")  # stock rounds looked up rows to its dtype
        meant[name] = dequantised(parameter if rounds else parameter.to(torch.float32)).float().contiguous()
    save_file(meant, tmp_path / "meant.safetensors")
    monkeypatch.setattr(comfy.comfy.cli_args.args, "fp32_text_enc", True)
    expected, _ = encode(remote(tmp_path / "meant.safetensors", clip_l))
    assert torch.equal(found, expected)


def dequantised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if type(tensor).__name__ == "QuantizedTensor" else tensor


@pytest.mark.parametrize(("format", "has_tables"), [("plain", True), ("float8", False), ("old", True)])
def test_files_are_lent_as_they_are(format, has_tables, packed, clip_l, encode):
    path = packed(format, has_tables)
    clip = remote(path, clip_l)
    encode(clip)
    weights = t5_of(clip)
    assert weights.loan.tiers == (Tier.FILE,)
    assert "float8" in weights.loan.facts.bytes_by_format
    stored = load_file(path)
    for name, tensor in weights.base.items():
        assert (
            tensor.nbytes == stored.get(name, stored.get(name.replace("weight_scale", "scale_weight"), tensor)).nbytes
        )


@pytest.mark.parametrize("format", ["float8", "int8_convrot"])
def test_formats_in_the_header(format, packed, clip_l, stock, encode, relative_error):
    path = packed(format, in_metadata=True)
    assert not any(name.endswith("comfy_quant") for name in load_file(path))
    for ours, theirs in zip(encode(remote(path, clip_l)), encode(stock(path, clip_l)), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


def lora(seed: int, kind: str) -> dict[str, torch.Tensor]:
    """A LoRA, which is a branch, or its full differences, which are merged."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, rows, columns in (
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 512, 128),
        ("lora_te2_encoder_block_1_layer_0_SelfAttention_v", 128, 128),
        ("lora_te2_encoder_block_0_layer_1_DenseReluDense_wo", 128, 256),
    ):
        up, down = (0.3 * torch.randn(shape, generator=generator) for shape in ((rows, 4), (4, columns)))
        found |= (
            {f"{name}.diff": up @ down}
            if kind == "diff"
            else {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        )
    return found


def with_lora(comfy: Any, clip: Any, strength: float, kind: str = "diff") -> Any:
    return comfy.comfy.sd.load_lora_for_models(None, clip, lora(3, kind), 0.0, strength)[1]


@pytest.mark.parametrize("format", ["plain", "float8", "int8_convrot"])
def test_a_lora_is_not_rounded(format, comfy, packed, clip_l, stock, encode, relative_error):
    """Stock rounds the patched weight into its format, by chance up or down."""
    path = packed(format, format != "int8_convrot")
    local, clip = stock(path, clip_l), remote(path, clip_l)
    plain, expected = encode(local)[0], encode(with_lora(comfy, local, 0.4, "lora"))[0]
    measured = relative_error(encode(with_lora(comfy, clip, 0.4, "lora"))[0], expected)
    print(f"{format}: {measured:.2e} from stock's stochastic rounding")
    assert TOLERANCE < measured <= 0.1
    assert measured < 0.5 * relative_error(expected, plain)
    assert not t5_of(clip)._merged


@pytest.mark.parametrize(
    ("format", "has_tables"), [("plain", True), ("float8", True), ("old", False), ("int8_convrot", False)]
)
@pytest.mark.parametrize("is_whole", [False, True], ids=["file", "arena"])
def test_a_difference_at_two_strengths(
    format, has_tables, is_whole, comfy, packed, clip_l, stock, encode, relative_error
):
    path = packed(format, has_tables)
    local, clip = stock(path, clip_l), remote(path, clip_l)
    plain = encode(local)
    if is_whole:  # one arena for all tensors, as where ComfyUI runs on a GPU
        t5_of(clip)._is_whole = True
    for strength in (1.0, 0.4):
        expected = encode(with_lora(comfy, local, strength))
        assert relative_error(expected[0], plain[0]) > 1e-3
        for ours, theirs in zip(encode(with_lora(comfy, clip, strength)), expected, strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE
    for ours, theirs in zip(encode(clip), plain, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


def test_a_patch_of_a_packed_table_is_refused(comfy, packed, clip_l, encode):
    name = T5 + "shared.weight"
    for has_tables in (True, False):
        clip = remote(packed("float8", has_tables), clip_l).clone()
        clip.add_patches({name: (torch.ones(32128, 128),)})
        if has_tables:
            with pytest.raises(Unsupported, match=f"{name} is a packed table of tokens"):
                encode(clip)
        else:
            encode(clip)


def test_clip_save_writes_files_that_stock_loads(comfy, packed, clip_l, stock, encode, tmp_path, relative_error):
    from comfy_extras.nodes_model_merging import CLIPSave

    clip = with_lora(comfy, remote(packed("float8"), clip_l), 1.0)
    expected = encode(clip)
    node = CLIPSave()
    node.output_dir = str(tmp_path)
    node.save(clip, "clip/saved")
    saved = {("t5xxl" if "t5xxl" in path.name else "clip_l"): path for path in tmp_path.rglob("*.safetensors")}
    stored = load_file(saved["t5xxl"])
    assert stored["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype == torch.float8_e4m3fn
    for ours, theirs in zip(encode(stock(saved["t5xxl"], saved["clip_l"])), expected, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


MARKER = "encoder.block.1.layer.0.SelfAttention.q.comfy_quant"


def marker(content: Any) -> torch.Tensor:
    given = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.tensor([*given], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        (MARKER, marker({"format": "convrot_w4a4"}), Unsupported, "'convrot_w4a4' cannot be run"),
        (MARKER, marker({"format": "float8_e4m3fn", "rotation": 3}), Unsupported, "'rotation'.*not known"),
        (MARKER, marker(b'{"format": '), BadCheckpoint, "no JSON"),
        (MARKER, marker({"format": "float8_e5m2"}), BadCheckpoint, "float8_e4m3fn, but its marker says float8_e5m2"),
        ("encoder.block.9.layer.0.SelfAttention.q.comfy_quant", marker({"format": "float8_e4m3fn"}), BadCheckpoint,
         "is missing"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight_scale", torch.ones(3), BadCheckpoint, "q.weight"),
        ("encoder.block.1.layer.0.SelfAttention.q.pre_quant_scale", torch.ones(128), Unsupported, "AWQ"),
        ("scaled_fp8", torch.zeros(3), BadCheckpoint, "at most two elements"),
    ],
    ids=["format", "parameter", "json", "dtype", "layer", "scale", "awq", "old"],
)  # fmt: skip
def test_hostile_markers_are_refused_by_name(
    name, change, error, said, packed, clip_l, stock, encode, tmp_path, daemon
):
    tensors = load_file(packed("float8"))
    tensors[name] = change
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(error, match=f"^bad: .*{said}") as refused:
        remote(tmp_path / "bad.safetensors", clip_l)
    assert name.removesuffix("_scale").split(".comfy_quant")[0] in str(refused.value)
    assert not daemon.status().components


def test_a_scale_that_is_not_finite_is_refused_when_it_is_lent(packed, clip_l, encode, tmp_path, relative_error):
    tensors = load_file(packed("float8"))
    name = "encoder.block.1.layer.0.SelfAttention.q.weight_scale"
    tensors[name] = torch.tensor(torch.nan)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(BadCheckpoint, match=f"bad.*{name}"):
        encode(remote(tmp_path / "bad.safetensors", clip_l))
    encode(remote(packed("float8"), clip_l))


def test_clip_l_in_plain_fp8_and_in_other_dtypes(packed, stock, encode, tmp_path, relative_error):
    """Stock holds CLIP-L in float16, whatever the file has."""
    state = text_checkpoints.clip_l_state_dict(5)
    path = packed("plain", True)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        clip = tmp_path / f"clip_{dtype.itemsize}.safetensors"
        save_file({name: each.to(dtype) for name, each in state.items()}, clip)
        for ours, theirs in zip(encode(remote(path, clip)), encode(stock(path, clip)), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("flag", ["fp8_e4m3fn_text_enc", "bf16_text_enc"])
@pytest.mark.parametrize("format", ["float8", "wide"])
def test_flags_for_text_encoders(
    format, flag, comfy, packed, clip_l, stock, encode, tmp_path, relative_error, monkeypatch
):
    path = packed("float8")
    if format == "wide":
        path = tmp_path / "wide.safetensors"
        text_checkpoints.write_t5(path, 6)
    before = encode(remote(path, clip_l))
    monkeypatch.setattr(comfy.comfy.cli_args.args, flag, True)
    expected = encode(stock(path, clip_l))
    ours = encode(remote(path, clip_l))
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) <= TOLERANCE
    assert max(relative_error(one, other) for one, other in zip(ours, before, strict=True)) > 1e-4


@pytest.fixture
def gguf_t5(tmp_path) -> tuple[Path, Path]:
    """A GGUF file with llama.cpp's names, and a plain file of the numbers that it means."""
    state = text_checkpoints.t5_state_dict(6)
    packed = gguf_files.write_t5(tmp_path / "t5.gguf", state, "q8_0")
    meant = {name: gguf_files.dequantise(blocks, kind, torch.float32) for name, (kind, blocks) in packed.items()}
    save_file({**state, **meant}, tmp_path / "meant.safetensors")
    return tmp_path / "t5.gguf", tmp_path / "meant.safetensors"


def test_a_t5_in_gguf(gguf_t5, comfy, clip_l, stock, encode, monkeypatch, relative_error):
    path, meant = gguf_t5
    clip = remote(clip_l, path)
    found = encode(clip)
    assert t5_of(clip).loan.tiers == (Tier.FILE,)
    assert "q8_0" in t5_of(clip).loan.facts.bytes_by_format
    monkeypatch.setattr(comfy.comfy.cli_args.args, "fp32_text_enc", True)
    assert torch.equal(found[0], encode(remote(meant, clip_l))[0])
    assert relative_error(found[0], encode(stock(meant, clip_l))[0]) <= 2 * TOLERANCE


def test_a_t5_in_gguf_is_neither_patched_nor_saved(gguf_t5, comfy, clip_l, connected, encode, tmp_path):
    from comfy_extras.nodes_model_merging import CLIPSave

    clip = remote(gguf_t5[0], clip_l)
    with pytest.raises(Unsupported, match=r"^t5: patches that are no LoRA.*GGUF file .*SelfAttention.v.weight"):
        encode(with_lora(comfy, clip, 1.0))
    node = CLIPSave()
    node.output_dir = str(tmp_path)
    with pytest.raises(Unsupported, match=r"^t5: weights of a GGUF file cannot be read in"):
        node.save(clip, "clip/saved")
    encode(clip)


def test_int8_is_dequantised_where_the_flag_for_float32_makes_stock_round_inputs(
    comfy, packed, clip_l, stock, encode, relative_error, monkeypatch
):
    """The norm is in float32, so that stock holds T5 in it: then it multiplies int8 weights in int8."""
    monkeypatch.setattr(comfy.comfy.cli_args.args, "fp32_text_enc", True)
    path = packed("int8_convrot", dtype=torch.float32)
    error = relative_error(encode(remote(path, clip_l))[0], encode(stock(path, clip_l))[0])
    assert 100 * TOLERANCE < error < INT8_ROUNDING
