"""Packed weights are found by markers, names and dtypes; what is unknown or does not fit is refused by name."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import FORMATS, GROUP, Packed, pack
from safetensors.torch import save_file

from xditd.client.lending import describe
from xditd.client.packed_weights import Packing, find_packing, packing_of_tensors
from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError, Unsupported, UnsupportedDtype
from xditd.ipc.packed import PackedWeight

State = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn


def marker(**config: Any) -> torch.Tensor:
    return torch.tensor([*json.dumps(config).encode()], dtype=torch.uint8)


def layer(dtype: torch.dtype = E4M3, **parts: torch.Tensor) -> State:
    """A layer ``a`` of 128 x 64, with these further parts."""
    return {"a.weight": torch.zeros(128, 64).to(dtype)} | {f"a.{name}": tensor for name, tensor in parts.items()}


def packing_with(state: State, metadata: str) -> Packing:
    """What is found in a file with these tensors and this metadata."""
    infos = {name: _Info(str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in state.items()}
    return find_packing(infos, lambda name: bytes(state[name].tolist()), [("a file", metadata)])


ONE = torch.tensor(0.5)
ROWS = torch.ones(128, 1)
WEIGHT = ("a.weight", "float8", (128, 64))

FOUND: list[tuple[State, PackedWeight]] = [
    (layer(), PackedWeight(*WEIGHT, quantises_input=False)),
    (layer(torch.float8_e5m2), PackedWeight(*WEIGHT, quantises_input=False)),
    (layer(weight_scale=ONE), PackedWeight(*WEIGHT, "a.weight_scale", quantises_input=False)),
    (layer(weight_scale=ONE, input_scale=ONE), PackedWeight(*WEIGHT, "a.weight_scale", None, "a.input_scale")),
    (layer(comfy_quant=marker(format="float8_e4m3fn")), PackedWeight(*WEIGHT)),
    (
        layer(weight_scale=ONE, comfy_quant=marker(format="float8_e4m3fn", full_precision_matrix_mult=True)),
        PackedWeight(*WEIGHT, "a.weight_scale", quantises_input=False),
    ),
    (
        layer(scale_weight=ONE, scale_input=ONE) | {"scaled_fp8": torch.zeros(0, dtype=E4M3)},
        PackedWeight(*WEIGHT, "a.scale_weight", None, "a.scale_input"),
    ),
    (
        layer(scale_weight=ONE) | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e5m2)},
        PackedWeight(*WEIGHT, "a.scale_weight", quantises_input=False),
    ),
    (layer() | {"scaled_fp8": torch.zeros(1)}, PackedWeight(*WEIGHT, quantises_input=False)),
    (
        layer(torch.int8, weight_scale=ONE.bfloat16(), comfy_quant=marker(format="int8_tensorwise", orig_dtype="x")),
        PackedWeight("a.weight", "int8", (128, 64), "a.weight_scale"),
    ),
    (
        layer(torch.int8, weight_scale=ROWS, comfy_quant=marker(format="int8_tensorwise", convrot=False)),
        PackedWeight("a.weight", "int8", (128, 64), "a.weight_scale"),
    ),
    *(
        (
            layer(torch.int8, weight_scale=ROWS, comfy_quant=marker(format="int8_tensorwise", **config)),
            PackedWeight("a.weight", "int8_convrot", (128, 64), "a.weight_scale", group=16),
        )
        for config in (
            {"convrot": True, "convrot_groupsize": 16},
            {"params": {"convrot": True, "convrot_groupsize": 16}},
            {"params": {"convrot": False, "convrot_groupsize": 4}, "convrot": True, "convrot_groupsize": 16},
        )
    ),
    (
        layer(weight_scale=torch.zeros(128, 4, dtype=torch.uint8), comfy_quant=marker(format="mxfp8")),
        PackedWeight("a.weight", "mxfp8", (128, 64), "a.weight_scale"),
    ),
    (
        layer(
            torch.uint8,
            weight_scale=torch.zeros(128, 8).to(E4M3),
            weight_scale_2=ONE,
            input_scale=ONE,
            comfy_quant=marker(format="nvfp4"),
        ),
        PackedWeight("a.weight", "nvfp4", (128, 128), "a.weight_scale", "a.weight_scale_2", "a.input_scale"),
    ),
    ({"norm": torch.ones(3).to(E4M3)}, PackedWeight("norm", "float8", (3,), quantises_input=False)),
]


@pytest.mark.parametrize(("state", "expected"), FOUND)
def test_a_layer_is_described(state: State, expected: PackedWeight) -> None:
    found = packing_of_tensors(state)
    assert found.packed == (expected,)
    assert found.markers == {name for name in state if name.endswith(("comfy_quant", "scaled_fp8"))}


def test_plain_tensors_of_any_dtype_are_no_packed_weights() -> None:
    assert packing_of_tensors({"a.weight": torch.zeros(2, 2, dtype=torch.int8), "b": torch.ones(3)}) == Packing()


def test_old_markers_count_below_their_prefix() -> None:
    state = {f"{part}.{name}": tensor for part in ("x", "y") for name, tensor in layer(scale_weight=ONE).items()}
    state |= {"x.scaled_fp8": torch.zeros(2).to(E4M3), "y.scaled_fp8": torch.zeros(0).to(E4M3)}
    assert [each.quantises_input for each in packing_of_tensors(state).packed] == [False, True]


def test_metadata_names_layers_with_or_without_the_prefix_of_the_file() -> None:
    state = {f"model.diffusion_model.{name}": each for name, each in layer(torch.int8, weight_scale=ONE).items()}
    for name in ("model.diffusion_model.a", "a"):
        text = json.dumps({"format_version": "1.0", "layers": {name: {"format": "int8_tensorwise"}}})
        (found,) = packing_with(state, text).packed
        assert (found.weight, found.format) == ("model.diffusion_model.a.weight", "int8")
    text = json.dumps({"layers": {"a": {"format": "int8_tensorwise"}, "of another part": {"format": "nvfp4"}}})
    assert len(packing_with(state, text).packed) == 1
    assert packing_with({**state, "b.a.weight": torch.ones(2, 2)}, text).packed == ()  # two layers may be meant


def test_many_long_names_take_little_time_and_memory() -> None:
    """With as many dots as a name can have; and metadata of a layer that is not there."""
    count = limits.MAX_TENSORS // 8
    state = {f"{'a.' * 240}{number}.weight": _Info("float8_e4m3fn", (2, 2)) for number in range(count)}
    state |= {f"b{number}.scaled_fp8": _Info("float32", (1,)) for number in range(count)}
    text = json.dumps({"layers": {"nowhere": {"format": "float8_e4m3fn"}}})
    tracemalloc.start()
    began_s = time.process_time()
    found = find_packing(state, lambda _: b"", [("x", text)])
    took_s, (_, peak_bytes) = time.process_time() - began_s, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.packed) == count
    assert peak_bytes < 30 * 2**20
    assert took_s < 10


def test_metadata_and_a_marker_may_say_the_same() -> None:
    text = json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})
    state = layer(weight_scale=ONE, comfy_quant=marker(format="float8_e4m3fn"))
    assert packing_with(state, text) == packing_of_tensors(state)
    with pytest.raises(BadCheckpoint, match=r"tensor a\.comfy_quant contradicts _quantization_metadata"):
        packing_with(state, text.replace("e4m3fn", "e5m2"))


@pytest.mark.parametrize("names", [("a", "a"), ("x.a", "a")])
def test_what_two_entries_of_metadata_say_of_a_layer_has_to_agree(names: tuple[str, str]) -> None:
    """Each shard of a model may have metadata, and a layer may be named with its prefix and without."""
    state = {f"x.{name}": each for name, each in layer(torch.int8, weight_scale=ROWS).items()}
    infos = {name: _Info(str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in state.items()}
    configs = {"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    for first, second in (configs, configs[::-1]):
        texts = [json.dumps({"layers": {name: config}}) for name, config in zip(names, (first, second), strict=True)]
        with pytest.raises(BadCheckpoint, match=r"_quantization_metadata of second says of x\.a .* and elsewhere"):
            find_packing(infos, lambda _: b"", [("first", texts[0]), ("second", texts[1])])
    same = [("first", texts[0]), ("second", texts[0])]
    assert len(find_packing(infos, lambda _: b"", same).packed) == 1


REFUSED: list[tuple[State, type[RequestError], str]] = [
    (layer(comfy_quant=marker(format="asym_w4a8_int8")), Unsupported, "a.comfy_quant: the format 'asym_w4a8_int8'"),
    (layer(comfy_quant=marker(form="mxfp8")), Unsupported, "the format None cannot be run; known formats are float8"),
    (layer(comfy_quant=marker(format=["mxfp8"])), Unsupported, r"the format \['mxfp8'\] cannot be run"),
    (
        layer(comfy_quant=marker(format="float8_e4m3fn", block=128)),
        Unsupported,
        "the parameters 'block' of float8_e4m3fn are not known",
    ),
    (
        layer(comfy_quant=marker(format="float8_e4m3fn", params={"convrot": True})),
        Unsupported,
        "the parameters 'convrot' of float8_e4m3fn are not known",
    ),
    (layer(comfy_quant=marker(format="int8_tensorwise", params=[1])), BadCheckpoint, "are not a JSON object"),
    (layer(comfy_quant=marker(format="int8_tensorwise", convrot=1)), BadCheckpoint, "convrot 1 is neither true nor"),
    (
        layer(torch.int8, comfy_quant=marker(format="int8_tensorwise", convrot=True, convrot_groupsize="64")),
        BadCheckpoint,
        "convrot_groupsize '64' is not a number of 1 to",
    ),
    (layer(comfy_quant=torch.tensor([7, 9], dtype=torch.uint8)), BadCheckpoint, r"a\.comfy_quant is no JSON"),
    (layer(comfy_quant=torch.tensor([91, 93], dtype=torch.uint8)), BadCheckpoint, r"is \[\], not a JSON object"),
    (layer(comfy_quant=torch.zeros(5_000, dtype=torch.uint8)), BadCheckpoint, "of 2 to 4096 bytes"),
    (layer(comfy_quant=torch.zeros(2)), BadCheckpoint, r"a\.comfy_quant is float32 \[2\]: a marker is JSON in uint8"),
    (layer() | {"scaled_fp8": torch.zeros(3).to(E4M3)}, BadCheckpoint, "scaled_fp8 is .3.: .* at most two elements"),
    ({"b.comfy_quant": marker(format="mxfp8")}, BadCheckpoint, r"b\.comfy_quant describes b\.weight, which is missing"),
    (
        layer(torch.float8_e5m2, comfy_quant=marker(format="float8_e4m3fn")),
        BadCheckpoint,
        r"a\.weight is float8_e5m2, but its marker says float8_e4m3fn",
    ),
    (layer(torch.int8, comfy_quant=marker(format="int8_tensorwise")), BadCheckpoint, "packed as int8, has no scale"),
    (
        layer(torch.int8, weight_scale=torch.ones(64), comfy_quant=marker(format="int8_tensorwise")),
        BadCheckpoint,
        r"has the scale a\.weight_scale of shape \[64\]: it has to be \[\] or \[128, 1\]",
    ),
    (
        layer(weight_scale=torch.ones(128, 4), comfy_quant=marker(format="mxfp8")),
        BadCheckpoint,
        "in float32: it has to be float8_e8m0fnu or uint8",
    ),
    (layer(weight_scale=torch.ones(2, 2)), BadCheckpoint, r"of shape \[2, 2\]"),
    (layer(pre_quant_scale=torch.ones(64)), Unsupported, r"tensor a\.pre_quant_scale, a scale of the layer's input"),
]


REFUSED += [
    (
        layer(**{name: ONE, other: ONE}),
        BadCheckpoint,
        rf"tensors a\.{name} and a\.{other} are both the same scale of a\.weight",
    )
    for name, other in (("weight_scale", "scale_weight"), ("input_scale", "scale_input"))
]


@pytest.mark.parametrize(("state", "error", "says"), REFUSED)
def test_what_is_unknown_or_malformed_is_named(state: State, error: type[RequestError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        packing_of_tensors(state)
    assert type(caught.value) is error
    assert len(caught.value.detail) < 500


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": []}', '{"layers": {"a": 1}}', "[" * 100_000])
def test_metadata_that_is_malformed_is_refused(text: str) -> None:
    with pytest.raises(BadCheckpoint, match="_quantization_metadata"):
        packing_with(layer(), text)


@pytest.mark.parametrize("config", [{"format": "x"}, {"format": "int8_tensorwise", "\ud800": 1}])
def test_what_metadata_says_is_cut_and_printable_in_errors(config: dict[str, Any]) -> None:
    text = json.dumps({"layers": {"\ud800" + 10**6 * "a": config}})
    with pytest.raises(Unsupported) as caught:
        find_packing({"a.weight": _Info("float8_e4m3fn", (2, 2))}, lambda _: b"", [("x", text)])
    assert len(caught.value.detail) < 700
    "".join((caught.value.detail, *caught.value.names)).encode()


def test_a_marker_without_memory_is_refused() -> None:
    state = layer(comfy_quant=marker(format="float8_e4m3fn").to("meta"))
    with pytest.raises(BadRequest, match=r"tensor a\.comfy_quant is on device meta: only cpu and cuda tensors can be"):
        packing_of_tensors(state)


@pytest.mark.parametrize("packed_format", FORMATS)
@pytest.mark.parametrize("in_metadata", [False, True])
def test_a_file_is_lent_as_it_is_without_its_markers(tmp_path: Path, packed_format: str, in_metadata: bool) -> None:
    state = {f"layer{number}.weight": torch.randn(128, GROUP) for number in range(2)} | {"norm": torch.ones(4)}
    packed = pack(state, packed_format, torch.bfloat16, in_metadata=in_metadata)
    offer = describe(packed.save(tmp_path / "x.safetensors"), compute_dtype="float16")
    manifest = offer.manifest
    offer.close()
    assert manifest.faults() == []
    assert manifest.compute_dtype == "float16"
    assert [each.weight for each in manifest.packed] == packed.weights
    names = {name for name in packed.tensors if not name.endswith(("comfy_quant", "scaled_fp8"))}
    assert {spec.name for spec in manifest.tensors} == names
    assert manifest.packed == _found(packed).packed


def _found(packed: Packed) -> Packing:
    if packed.metadata:
        return packing_with(packed.tensors, packed.metadata["_quantization_metadata"])
    return packing_of_tensors(packed.tensors)


def test_an_error_names_the_file_and_keeps_nothing_open(tmp_path: Path, open_fds: Any) -> None:
    save_file(layer(torch.int8, comfy_quant=marker(format="int8_tensorwise")), tmp_path / "x.safetensors")
    before = open_fds()
    with pytest.raises(BadCheckpoint, match=r"x: packed weights do not have .* tensor a\.weight.*get the file again"):
        describe(tmp_path / "x.safetensors")
    assert open_fds() == before


def test_other_compute_dtypes_are_refused() -> None:
    with pytest.raises(BadRequest, match="compute_dtype: 'float8'; use 'bfloat16', 'float16', 'float32'"):
        describe({"a": torch.ones(3)}, compute_dtype="float8")


def test_weights_of_formats_that_have_no_description_are_still_refused() -> None:
    """Of bitsandbytes, nunchaku and others, whose tensors are uint8 or int8 without a marker."""
    from xditd.ipc.recognition import form_error

    state = {"a.weight": torch.zeros(9, 1, dtype=torch.uint8), "a.weight.quant_state.bitsandbytes__nf4": torch.ones(1)}
    packing = packing_of_tensors(state)
    assert packing == Packing()
    infos = {name: _Info(str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in state.items()}
    assert isinstance(form_error(infos), UnsupportedDtype)


class _Info:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
