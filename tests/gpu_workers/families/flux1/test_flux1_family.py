"""The FLUX.1 family: recognition, configuration, the key map against diffusers' converter, and every refusal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.gpu_workers.families.flux1.checkpoint import Flux1, Flux1Config
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.registry import detect, families
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, Internal, UnknownFamily, Unsupported, UnsupportedDtype

Infos = dict[str, TensorInfo]
State = dict[str, torch.Tensor]
PREFIX = "model.diffusion_model."
DEMO = Flux1Config(
    hidden=256, double_blocks=2, single_blocks=2, context_channels=4096, pooled_channels=768, has_guidance=True
)


@pytest.fixture(scope="module")
def infos(demo_transformer: State, describe: Callable[[State], Infos]) -> Infos:
    return describe(demo_transformer)


def fitted(infos: Infos) -> Resolution:
    return resolve(detect(infos.keys()), infos)


def respelled(infos: Infos, prefix: str, norm_suffix: str) -> Infos:
    return {
        prefix + (name.removesuffix("scale") + norm_suffix if name.endswith("_norm.scale") else name): info
        for name, info in infos.items()
    }


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("norm_suffix", ["scale", "weight"])
def test_every_spelling_is_recognised_as_one_configuration(infos: Infos, prefix: str, norm_suffix: str) -> None:
    spelled = respelled(infos, prefix, norm_suffix)
    found = fitted(spelled)
    assert found.family.name == "flux1"
    assert found.config == DEMO
    assert found.dtype == torch.float32
    assert {part.source for part in found.key_map.values()} == set(spelled)


def test_schnell_is_told_by_missing_guidance_tensors(infos: Infos) -> None:
    schnell = {name: info for name, info in infos.items() if "guidance_in" not in name}
    config = fitted(schnell).config
    assert config == replace(DEMO, has_guidance=False)
    assert config.scheduler["use_dynamic_shifting"] is False
    assert config.scheduler["shift"] == 1.0
    assert DEMO.scheduler["use_dynamic_shifting"] is True
    assert (DEMO.scheduler["base_shift"], DEMO.scheduler["max_shift"]) == (0.5, 1.15)


def test_full_size_dev_has_the_known_counts(describe: Callable[[State], Infos]) -> None:
    with torch.device("meta"):
        state = {
            name: torch.empty(entry_shape, dtype=torch.bfloat16)
            for name, entry_shape in (
                (entry.source, entry.shape) for entry in Flux1().entries(Flux1Config(3072, 19, 38, 4096, 768, True), ())
            )
        }
    found = fitted(describe(state))
    assert len(state) == 780
    assert len(found.key_map) == 1160
    assert found.config.heads == 24
    assert sum(tensor.numel() for tensor in state.values()) == 11_901_408_320


def test_key_map_equals_diffusers_converter_for_every_element() -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = Flux1Config(3072, 1, 1, 4096, 768, True)
    generator = torch.Generator().manual_seed(0)
    # Random bits, compared as bits: every element differs from its neighbours, and nothing is rounded.
    state = {
        entry.source: torch.empty(entry.shape, dtype=torch.int16).random_(generator=generator).view(torch.bfloat16)
        for entry in Flux1().entries(config, ())
    }
    found = fitted({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    assert found.config == config
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    assert expected.keys() == found.key_map.keys()
    for target, part in found.key_map.items():
        ours = state[part.source][part.start : part.stop]
        if target.startswith("norm_out."):
            # The one difference: the converter swaps these halves, our norm reads them where they are.
            ours = torch.cat(ours.chunk(2)[::-1])
        assert torch.equal(ours.view(torch.int16), expected[target].view(torch.int16)), target


def test_every_element_is_used_exactly_once(infos: Infos) -> None:
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for part in fitted(infos).key_map.values():
        rows[part.source].append((part.start, part.stop))
    assert rows.keys() == infos.keys()
    for name, ranges in rows.items():
        ranges.sort()
        assert ranges[0][0] == 0
        assert ranges[-1][1] == infos[name].shape[0]
        assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))


def test_missing_unexpected_and_misshapen_tensors_are_all_named(infos: Infos) -> None:
    broken = dict(infos)
    del broken["img_in.bias"]
    del broken["single_blocks.1.linear2.weight"]
    broken["double_blocks.0.img_attn.extra"] = TensorInfo("float32", (1,))
    broken["text_encoders.t5xxl.shared.weight"] = TensorInfo("float32", (1,))
    broken["txt_in.weight"] = TensorInfo("float32", (255, 4096))
    broken["final_layer.linear.bias"] = TensorInfo("float32", (63,))
    with pytest.raises(BadCheckpoint) as caught:
        fitted(broken)
    message = caught.value.detail
    assert "2 missing: img_in.bias, single_blocks.1.linear2.weight" in message
    assert "2 unexpected: double_blocks.0.img_attn.extra, text_encoders.t5xxl.shared.weight" in message
    assert "2 wrongly shaped" in message
    assert "txt_in.weight is [255, 4096], expected [256, 4096]" in message
    assert "final_layer.linear.bias is [63], expected [64]" in message


def test_a_long_list_of_missing_tensors_is_complete_and_spelled_as_in_the_file(infos: Infos) -> None:
    lost = [name for name in infos if name.startswith("double_blocks.0.")]
    broken = respelled({name: info for name, info in infos.items() if name not in lost}, PREFIX, "scale")
    with pytest.raises(BadCheckpoint) as caught:
        fitted(broken)
    assert f"{len(lost)} missing" in caught.value.detail
    assert len(caught.value.detail) < 1_000
    assert set(caught.value.names) == {f"missing: {PREFIX}{name}" for name in lost}


@pytest.mark.parametrize("victim", ["img_in.weight", "txt_in.weight", "double_blocks.1.img_attn.proj.weight"])
def test_one_misshapen_tensor_does_not_bend_the_configuration(infos: Infos, victim: str) -> None:
    broken = dict(infos)
    broken[victim] = TensorInfo("float32", (512, infos[victim].shape[1]))
    with pytest.raises(BadCheckpoint, match="1 wrongly shaped") as caught:
        fitted(broken)
    assert f"{victim} is [512, " in caught.value.detail


def test_a_tensor_under_two_spellings_is_unexpected(infos: Infos) -> None:
    twice = dict(infos)
    name = "double_blocks.0.img_attn.norm.query_norm.weight"
    twice[name] = TensorInfo("float32", (128,))
    with pytest.raises(BadCheckpoint, match="1 unexpected") as caught:
        fitted(twice)
    assert name in caught.value.detail


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "float64"])
def test_a_dtype_that_cannot_run_is_named_with_its_tensors(infos: Infos, dtype: str) -> None:
    quantised = {name: replace(info, dtype=dtype) if "linear1.weight" in name else info for name, info in infos.items()}
    with pytest.raises(UnsupportedDtype) as caught:
        fitted(quantised)
    assert f"single_blocks.0.linear1.weight is {dtype}" in caught.value.detail
    assert f"single_blocks.1.linear1.weight is {dtype}" in caught.value.detail


def test_several_dtypes_are_kept_and_most_elements_are_the_main_one(infos: Infos) -> None:
    vectors = {name for name, info in infos.items() if len(info.shape) == 1}
    mixed = {name: replace(info, dtype="float32" if name in vectors else "bfloat16") for name, info in infos.items()}
    assert len(vectors) > len(mixed) / 2
    found = fitted(mixed)
    assert found.dtype == torch.bfloat16
    assert found.exceptions["transformer_blocks.0.attn.norm_q.weight"] == torch.float32
    assert set(found.exceptions) == {target for target, part in found.key_map.items() if part.source in vectors}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "diffusion_model.",
        "transformer.",
        "module._orig_mod.model.diffusion_model.",
        "model.model.",
    ],
)
def test_any_prefix_is_left_out(infos: Infos, prefix: str) -> None:
    found = fitted({prefix + name: info for name, info in infos.items()})
    assert found.key_map.keys() == fitted(infos).key_map.keys()
    assert all(source == prefix + canonical for canonical, source in found.sources.items())


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrapped_blocks_are_unwrapped(infos: Infos, wrapper: str) -> None:
    wrapped = {name.replace("_blocks.1.", f"_blocks.1.{wrapper}."): info for name, info in infos.items()}
    found = fitted(wrapped)
    assert found.key_map.keys() == fitted(infos).key_map.keys()
    assert {part.source for part in found.key_map.values()} == set(wrapped)


def test_a_marker_is_skipped_under_any_prefix(infos: Infos) -> None:
    for marker in ("scaled_fp8", "model.diffusion_model.scaled_fp8"):
        found = fitted({**infos, marker: TensorInfo("float8_e4m3fn", (2,))})
        assert found.skipped == (marker,)
        assert found.dtype == torch.float32


def test_half_a_model_under_another_prefix_is_not_put_together(infos: Infos) -> None:
    """Two models in one file would be mixed."""
    split = {("module." if name.startswith("txt_in") else "") + name: info for name, info in infos.items()}
    with pytest.raises(BadCheckpoint, match=r"unexpected: module\.txt_in\.bias, module\.txt_in\.weight"):
        fitted(split)
    with pytest.raises(BadCheckpoint, match=f"{len(infos)} unexpected"):
        fitted({**infos, **{f"module.{name}": info for name, info in infos.items()}})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_that_run(infos: Infos, dtype: str) -> None:
    found = fitted({name: replace(info, dtype=dtype) for name, info in infos.items()})
    assert str(found.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    "names",
    [
        {"model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.weight"},
        {"double_blocks.0.img_attn.qkv.weight", "early_stream_modulations.0.lin.weight"},
        {"double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"},
        {"transformer_blocks.0.attn.to_q.weight"},
        set(),
    ],
    ids=["sd", "flux3", "chroma", "diffusers names", "nothing"],
)
def test_other_models_are_unknown(names: set[str]) -> None:
    with pytest.raises(UnknownFamily) as caught:
        detect(names)
    assert all(family.title in caught.value.detail for family in families())
    assert all(name in caught.value.detail for name in names)


def test_other_channels_are_refused_by_name(infos: Infos) -> None:
    wide = dict(infos)
    wide["img_in.weight"] = TensorInfo("float32", (256, 320))
    del wide["final_layer.linear.weight"]
    with pytest.raises(Unsupported, match="img_in takes 320 channels"):
        fitted(wide)
    wide = {**infos, "final_layer.linear.weight": TensorInfo("float32", (128, 256))}
    with pytest.raises(Unsupported, match="final_layer gives 128"):
        fitted(wide)


def test_a_hidden_size_without_whole_heads_is_refused() -> None:
    odd = {entry.source: TensorInfo("float32", entry.shape) for entry in Flux1().entries(replace(DEMO, hidden=200), ())}
    with pytest.raises(BadCheckpoint, match="hidden size 200 is not a multiple of the head size 128"):
        fitted(odd)


def test_a_missing_kind_of_block_is_refused(infos: Infos) -> None:
    with pytest.raises(BadCheckpoint, match=r"no tensor of single_blocks\.0"):
        fitted({name: info for name, info in infos.items() if not name.startswith("single_blocks")})


def test_an_absurd_block_number_is_refused_at_once(infos: Infos) -> None:
    with pytest.raises(BadCheckpoint, match=r"double_blocks\.999999999 exceeds the limit"):
        fitted({**infos, "double_blocks.999999999.img_mod.lin.weight": TensorInfo("float32", (1, 1))})


def test_marks_alone_are_not_enough_to_read_the_sizes() -> None:
    names = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")
    marks = {name: TensorInfo("float32", (9,)) for name in names}
    with pytest.raises(BadCheckpoint, match="hidden size cannot be read"):
        fitted(marks)


def test_a_map_that_does_not_fit_the_module_is_our_own_mistake() -> None:
    family = Flux1()
    parameters = {
        target: (rows, *entry.shape[1:]) for entry in family.entries(DEMO, ()) for target, rows in entry.targets
    }
    check_targets(family, family.entries(DEMO, ()), parameters)
    for broken in (
        {**parameters, "extra.weight": (1,)},
        {name: shape for name, shape in parameters.items() if name != "x_embedder.bias"},
        {**parameters, "proj_out.bias": (65,)},
    ):
        with pytest.raises(Internal, match="does not fit its module"):
            check_targets(family, family.entries(DEMO, ()), broken)


def test_the_demo_can_be_written_in_every_spelling() -> None:
    small = {"heads": 1, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 32}
    state = flux1_state_dict(0, prefix=PREFIX, norm_suffix="weight", guidance=False, dtype=torch.bfloat16, **small)
    found = fitted({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    assert found.config == Flux1Config(128, 1, 1, 64, 32, False)
    assert found.dtype == torch.bfloat16
