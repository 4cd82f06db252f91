"""Packed checkpoints in ComfyUI: sampled as stock samples them, through the loader and through Accelerate.

On a CPU stock dequantises fp8, scaled or not, and computes in float32: the same numbers to 1e-6. It multiplies int8
natively, with inputs rounded to int8: so do workers with ``native_products = "always"``; others dequantise, and differ
by that rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_checkpoints
import pytest
import torch
from packed_checkpoints import Packed
from safetensors.torch import load_file, save_file

from xditd.client import BadCheckpoint, Unsupported
from xditd.client.demo import checkpoints
from xditd.client.packed_weights import packing_of_tensors
from xditd.ipc.tensors import Tier

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6
"""After 4 steps on two ranks, as for plain checkpoints; one forward differs by less than 1e-6."""
INT8_ROUNDING = 2e-2
"""After 4 steps: stock rounds the inputs of int8 layers, the workers do not. Measured: 1e-2."""

DEQUANTISED = ("float8", "float8_e5m2", "old", "old_full", "plain", "half")
"""``half`` is scaled fp8 among tensors in bfloat16."""
MULTIPLIED = ("int8", "int8_rows", "int8_convrot")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Callable[..., Path]:
    """Write the session's transformer in a format, once."""
    folder = tmp_path_factory.mktemp("packed")
    state = checkpoints.flux1_state_dict(1)

    def write(format: str, **more: Any) -> Path:
        path = folder / f"{format}{'-header' if more.get('in_metadata') else ''}.safetensors"
        return path if path.exists() else make(format, **more).save(path)

    def make(format: str, **more: Any) -> Packed:
        if format == "half":
            return packed_checkpoints.pack(state, "float8", torch.bfloat16)
        if format != "float8_e5m2":
            return packed_checkpoints.pack(state, format, torch.float32, **more)
        made = packed_checkpoints.pack(state, "float8", torch.float32, **more)  # with one scale, as stock needs it
        for name in made.weights:
            made.tensors[name] = made.tensors[name].to(torch.float8_e5m2)
            marker = name.replace(".weight", ".comfy_quant")
            if marker in made.tensors:
                made.tensors[marker] = torch.tensor([*b'{"format": "float8_e5m2"}'], dtype=torch.uint8)
        made.metadata = {key: text.replace("e4m3fn", "e5m2") for key, text in made.metadata.items()}
        return made

    return write


@pytest.fixture(scope="module")
def stock(comfy) -> Callable[..., Any]:
    """Load a file as ComfyUI's own loader does."""

    def load(path: Path, weight_dtype: str = "default") -> Any:
        options: dict[str, Any] = {}
        if weight_dtype.startswith("fp8"):
            options["dtype"] = torch.float8_e5m2 if weight_dtype.endswith("e5m2") else torch.float8_e4m3fn
        if weight_dtype.endswith("_fast"):
            options["fp8_optimizations"] = True
        return comfy.comfy.sd.load_diffusion_model(str(path), model_options=options)

    return load


@pytest.fixture
def sample(connected, conditioning, ksample, latent) -> Callable[[Any], torch.Tensor]:
    return lambda model: ksample(model, conditioning(1), conditioning(2), dict(latent))


def remote_of(path: Path, weight_dtype: str = "default") -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet
    from xditd.client.comfyui.stock_dtypes import CHOICES

    return load_unet(str(path), CHOICES[weight_dtype])


def accelerated(model: Any) -> Any:
    from xditd.client.comfyui.accelerate import accelerate

    return accelerate(model)


@pytest.mark.parametrize("in_metadata", [False, True], ids=["markers", "header"])
@pytest.mark.parametrize("format", DEQUANTISED)
def test_what_stock_dequantises(format, in_metadata, packed, stock, sample, relative_error):
    if in_metadata and format not in ("float8", "float8_e5m2"):
        pytest.skip("this format has no description of its layers")
    path = packed(format, in_metadata=in_metadata)
    local = stock(path)
    expected = sample(local)
    assert relative_error(sample(remote_of(path)), expected) <= TOLERANCE
    assert relative_error(sample(accelerated(local)), expected) <= TOLERANCE


@pytest.mark.parametrize("format", MULTIPLIED)
def test_what_stock_multiplies_natively(format, packed, stock, sample, relative_error):
    path = packed(format)
    local = stock(path)
    expected = sample(local)
    loaded, through = sample(remote_of(path)), sample(accelerated(local))
    assert relative_error(loaded, expected) <= INT8_ROUNDING
    assert relative_error(through, loaded) <= TOLERANCE


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
@pytest.mark.parametrize("format", ["wide", "plain", "float8", "int8"])
def test_each_weight_dtype(format, weight_dtype, files, packed, stock, sample, relative_error):
    path = files.transformer if format == "wide" else packed(format)
    local = stock(path, weight_dtype)
    expected = sample(local)
    bar = INT8_ROUNDING if format == "int8" else TOLERANCE
    assert relative_error(sample(remote_of(path, weight_dtype)), expected) <= bar
    assert relative_error(sample(accelerated(local)), expected) <= bar


def lora(seed: int, kind: str = "diff") -> dict[str, torch.Tensor]:
    """A LoRA of a fused projection, with its bias, and of a layer of a single block; or their full differences.

    These are merged, and LoRAs are branches.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, rows, columns in (
        ("double_blocks.0.img_attn.qkv", 768, 256),
        ("single_blocks.1.linear2", 256, 1280),
    ):
        up, down = (0.1 * torch.randn(shape, generator=generator) for shape in ((rows, 4), (4, columns)))
        found |= (
            {f"diffusion_model.{name}.diff": up @ down}
            if kind == "diff"
            else {f"diffusion_model.{name}.lora_up.weight": up, f"diffusion_model.{name}.lora_down.weight": down}
        )
    found["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"] = 0.1 * torch.randn(768, generator=generator)
    return found


@pytest.mark.parametrize("through", ["loader", "whole", "accelerate"])
@pytest.mark.parametrize(
    ("format", "weight_dtype"),
    [("float8", "default"), ("float8_e5m2", "default"), ("old", "default"), ("wide", "fp8_e4m3fn")],
)
def test_a_difference_at_two_strengths(
    format, weight_dtype, through, comfy, files, packed, stock, sample, relative_error
):
    def with_lora(model: Any, strength: float) -> Any:
        return comfy.comfy.sd.load_lora_for_models(model, None, lora(3), strength, 0.0)[0]

    path = files.transformer if format == "wide" else packed(format)
    local = stock(path, weight_dtype)
    plain = sample(local)
    remote = None if through == "accelerate" else remote_of(path, weight_dtype)
    if through == "whole":  # one arena for all tensors, as where ComfyUI runs on a GPU
        remote.weights._is_whole = True
    for strength in (1.0, 0.4):
        patched = with_lora(local, strength)
        expected = sample(patched)
        assert relative_error(expected, plain) > 1e-3
        ours = accelerated(patched) if remote is None else with_lora(remote, strength)
        assert relative_error(sample(ours), expected) <= TOLERANCE
    assert relative_error(sample(remote or accelerated(local)), plain) <= TOLERANCE


@pytest.mark.parametrize("through", ["loader", "accelerate"])
@pytest.mark.parametrize(
    ("format", "distance"),
    [("float8", 2e-2), ("float8_e5m2", 4e-2), ("half", 2e-2), ("int8", 4e-2), ("int8_convrot", 4e-2)],
)
def test_a_lora_is_not_rounded(
    format, distance, through, comfy, packed, stock, sample, tmp_path, relative_error, record_property
):
    """It is a branch beside the packed weight: as stock on the numbers that this means. Stock rounds it into fp8."""
    path = packed(format)
    tensors, packing = load_file(path), packing_of_tensors(load_file(path))
    gone = {name for each in packing.packed for name in each.companions.values()} | packing.markers
    for each in packing.packed if format.startswith("float8") else ():
        scale = tensors[each.companions["scale"]].float()
        tensors[each.weight] = (tensors[each.weight].float() * scale).to(tensors["img_in.bias"].dtype)
    save_file({name: each for name, each in tensors.items() if name not in gone}, tmp_path / "meant.safetensors")

    def with_lora(model: Any) -> Any:
        return comfy.comfy.sd.load_lora_for_models(model, None, lora(3, "lora"), 0.7, 0.0)[0]

    local = stock(path)
    rounded, plain = sample(with_lora(local)), sample(local)
    ours = sample(with_lora(remote_of(path)) if through == "loader" else accelerated(with_lora(local)))
    if format.startswith("float8"):
        assert relative_error(ours, sample(with_lora(stock(tmp_path / "meant.safetensors")))) <= TOLERANCE
    measured = relative_error(ours, rounded)
    record_property("distance_to_stochastic_rounding", measured)
    print(f"{format}: {measured:.2e} from stock's stochastic rounding")
    assert 1e-6 < measured <= distance
    assert measured < 0.5 * relative_error(rounded, plain)


@pytest.mark.parametrize("format", ["float8", "old", "int8_rows", "int8_convrot", "mxfp8", "nvfp4"])
def test_a_lora_is_as_unrounded_in_stock(
    format, comfy, connected, stock, conditioning, ksample, latent, tmp_path, relative_error
):
    """One step against stock's ``calculate_weight`` in float32, on the numbers that the packed weights mean."""
    made = packed_checkpoints.pack(checkpoints.flux1_state_dict(1), format, torch.float32)
    meant = stock(Packed(tensors=made.meant).save(tmp_path / "meant.safetensors"))
    packed = remote_of(made.save(tmp_path / "packed.safetensors"), "float32")
    found = []
    for each in (packed, meant):
        for seed, strength in ((3, 0.7), (4, -0.5), (5, 0.2)):
            (each, _) = comfy.comfy.sd.load_lora_for_models(each, None, lora(seed, "lora"), strength, 0.0)
        found.append(ksample(each, conditioning(1), conditioning(2), dict(latent), steps=1))
    assert relative_error(*found) <= 1e-6


@pytest.mark.parametrize("format", ["int8", "int8_convrot", "float8"])
def test_a_patched_weight_has_the_bytes_of_stock(format, comfy, packed, stock, sample):
    path, name = packed(format), "double_blocks.0.img_attn.qkv.weight"
    local, remote = (
        comfy.comfy.sd.load_lora_for_models(each, None, lora(3), 1.0, 0.0)[0] for each in (stock(path), remote_of(path))
    )
    sample(local)
    expected = local.model.diffusion_model.get_submodule(name.removesuffix(".weight")).weight.state_dict(name)
    saved = remote.model_state_dict_for_saving(remote.model.diffusion_model, "diffusion_model.")
    assert saved[name].dtype == expected[name].dtype
    assert torch.equal(saved[name].view(torch.uint8), expected[name].view(torch.uint8))
    scale = saved[f"{name}_scale"]
    assert torch.equal(scale.reshape(-1), expected[f"{name}_scale"].reshape(-1).expand(scale.numel()))
    assert not torch.equal(saved[name].view(torch.uint8), load_file(path)[name].view(torch.uint8))


def test_stock_loads_what_a_packed_model_saves(packed, stock, sample, tmp_path, relative_error):
    remote = remote_of(packed("float8"))
    saved = remote.model_state_dict_for_saving(remote.model.diffusion_model, "diffusion_model.")
    save_file({name: each.clone() for name, each in saved.items()}, tmp_path / "saved.safetensors")
    assert relative_error(sample(stock(tmp_path / "saved.safetensors")), sample(remote)) <= TOLERANCE


def test_row_scales_of_fp8_run_unpatched_and_cannot_be_patched(comfy, files, sample, tmp_path, relative_error):
    """ComfyUI's own fp8 has one scale, so stock fails with such a file."""
    made = packed_checkpoints.pack(load_file(files.transformer), "float8_e5m2", torch.float32)
    meant = Packed(tensors=made.meant).save(tmp_path / "meant.safetensors")
    remote = remote_of(made.save(tmp_path / "rows.safetensors"))
    assert relative_error(sample(remote), sample(remote_of(meant))) <= TOLERANCE
    branched = comfy.comfy.sd.load_lora_for_models(remote, None, lora(3, "lora"), 1.0, 0.0)[0]
    expected = comfy.comfy.sd.load_lora_for_models(remote_of(meant), None, lora(3, "lora"), 1.0, 0.0)[0]
    assert relative_error(sample(branched), sample(expected)) <= TOLERANCE
    patched = comfy.comfy.sd.load_lora_for_models(remote, None, lora(3), 1.0, 0.0)[0]
    with pytest.raises(Unsupported, match=r"double_blocks.0.img_attn.qkv.weight.* a scale for each row"):
        sample(patched)
    assert relative_error(sample(remote), sample(remote_of(meant))) <= TOLERANCE


@pytest.mark.parametrize("through", ["loader", "accelerate"])
@pytest.mark.parametrize(
    ("format", "weight_dtype"), [("wide", "fp8_e4m3fn"), ("plain", "default"), ("float8", "default")]
)
def test_models_that_were_made_under_dynamic_vram(
    format, weight_dtype, through, comfy, files, packed, stock, sample, relative_error, monkeypatch
):
    """With DynamicVRAM linear layers keep the file's tensors, and are cast when they are loaded."""
    path = files.transformer if format == "wide" else packed(format)
    expected = sample(stock(path, weight_dtype))
    with monkeypatch.context() as dynamic:
        dynamic.setattr(comfy.comfy.memory_management, "aimdo_enabled", True)
        model = remote_of(path, weight_dtype) if through == "loader" else accelerated(stock(path, weight_dtype))
    assert relative_error(sample(model), expected) <= TOLERANCE


def test_the_workers_loop_and_the_memory_that_is_lent(packed, stock, sample, xsample, conditioning, relative_error):
    path = packed("float8")
    local = stock(path)
    expected = sample(local)
    remote = remote_of(path)
    for model in (remote, accelerated(local)):
        ours, _, note = xsample(model, positive=conditioning(1), negative=conditioning(2))
        assert note.startswith("fused: 4 steps in the workers")
        assert relative_error(ours, expected) <= TOLERANCE
        assert Tier.FILE in model.weights.loan.tiers
        weight = local.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
        if model.model is not remote.model:
            assert model.weights.base["double_blocks.0.img_attn.qkv.weight"].data_ptr() == weight._qdata.data_ptr()
    assert remote.weights.loan.tiers == (Tier.FILE,)


PRODUCTS = [
    ("float8", "default", True),
    ("old", "default", True),
    ("old_full", "default", False),
    ("plain", "default", False),
    ("plain", "fp8_e4m3fn_fast", True),
    ("plain", "fp8_e5m2", False),
    ("wide", "fp8_e4m3fn", False),
    ("wide", "fp8_e4m3fn_fast", True),
    ("int8_convrot", "default", True),
]


@pytest.mark.parametrize("has_float8", [False, True])
@pytest.mark.parametrize(("format", "weight_dtype", "multiplies"), PRODUCTS)
def test_layers_may_be_multiplied_in_fp8_where_stock_does_that(
    format, weight_dtype, multiplies, has_float8, comfy, connected, files, packed, stock, monkeypatch
):
    """On a device that has fp8 products; without one, stock dequantises."""
    monkeypatch.setattr(comfy.comfy.model_management, "supports_fp8_compute", lambda device=None: has_float8)
    path = files.transformer if format == "wide" else packed(format)
    expected = multiplies and (has_float8 or format == "int8_convrot")
    for model in (remote_of(path, weight_dtype), accelerated(stock(path, weight_dtype))):
        lendable = model.weights.lendable
        found = lendable.packed.get("double_blocks.0.img_attn.qkv.weight")
        if found is None:  # ComfyUI has cast fp8 to a wider dtype
            assert (format, has_float8) == ("plain", False)
            continue
        assert found.quantises_input is expected
        described = packing_of_tensors({**lendable.tensors, **lendable.markers})
        assert {each.weight: each for each in described.packed} == lendable.packed


def test_a_wide_and_a_packed_model_take_turns(files, packed, stock, sample, relative_error):
    paths = files.transformer, packed("float8")
    expected = [sample(stock(path)) for path in paths]
    models = [remote_of(path) for path in paths]
    for _ in range(2):
        for model, wanted in zip(models, expected, strict=True):
            assert relative_error(sample(model), wanted) <= TOLERANCE
    wide, narrow = (dict(model.weights.loan.facts.bytes_by_format) for model in models)
    assert "float8" in narrow
    assert "float8" not in wide


def test_unknown_formats_are_refused_and_the_next_prompt_is_served(
    packed, stock, sample, tmp_path, relative_error, daemon
):
    path = packed("float8")
    tensors = load_file(path)
    marker = "single_blocks.0.linear1.comfy_quant"
    for content, error, said in (
        (b'{"format": "convrot_w4a4"}', Unsupported, "convrot_w4a4.*cannot be run"),
        (b'{"format": "float8_e4m3fn", "rotation": 3}', Unsupported, "'rotation'.*not known"),
        (b'{"format": ', BadCheckpoint, "no JSON"),
    ):
        bad = tmp_path / "bad.safetensors"
        save_file({**tensors, marker: torch.tensor([*content], dtype=torch.uint8)}, bad)
        with pytest.raises(error, match=f"^bad: .*{marker}.*{said}"):
            remote_of(bad)
        assert not daemon.status().components
    assert relative_error(sample(remote_of(path)), sample(stock(path))) <= TOLERANCE


def test_int8_products_are_those_of_stock(
    comfy, start_daemon, packed, stock, conditioning, ksample, relative_error, monkeypatch
):
    """Workers that multiply natively round the inputs where stock does.

    So a step is the same, unless sums in another order bring a number to the other side of the middle between two
    integers, which then shows in all later layers.
    """
    from xditd.client.comfyui import connections

    native = start_daemon(1, flags=["--native-products", "always"])
    native.wait_ready()
    monkeypatch.setenv("XDITD_RUNTIME_DIR", str(native.runtime_dir))
    monkeypatch.setattr(connections, "_client", None)
    # Few tokens, so that in some runs no number is between two integers.
    given = conditioning(1, tokens=2), conditioning(2, tokens=2), {"samples": torch.zeros(1, 16, 4, 4)}
    try:
        for format in MULTIPLIED:
            ours, theirs = remote_of(packed(format)), stock(packed(format))
            errors = [
                relative_error(ksample(ours, *given, steps=1, seed=seed), ksample(theirs, *given, steps=1, seed=seed))
                for seed in range(6)
            ]
            assert min(errors) <= TOLERANCE, errors
            assert max(errors) <= INT8_ROUNDING, errors
        assert all(each.native and not each.reference for each in native.status().packed_products)
    finally:
        comfy.comfy.model_management.unload_all_models()
        if connections._client is not None:
            connections._client.close()
