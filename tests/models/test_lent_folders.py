"""Folders as ``save_pretrained`` writes them, lent to one worker: the bits of ``from_pretrained`` in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from class_entries import ENTRIES
from class_entry import ClassEntry, Random, fill
from nested_values import cast, tensors_of
from own_memory import move_to_own_memory
from safetensors.torch import load_file, save_file

from xditd.client import BadCheckpoint, BadRequest, Client, Loan, Unsupported
from xditd.ipc.tensors import ComponentKind, Tier

CASES = (
    "AnyFlowTransformer3DModel",  # keeps norms and time embedding in float32
    "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
    "HeliosTransformer3DModel",  # keeps parts in float32
    "Kandinsky5Transformer3DModel",  # keeps parts in float32
    "LTXVideoTransformer3DModel",
    "NucleusMoEImageTransformer2DModel",  # tables in attributes
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",  # tables in attributes
    "SanaWMTransformer3DModel",  # tables in attributes
    "SD3Transformer2DModel",
    "WanTransformer3DModel",  # keeps parts in float32
    "ZImageTransformer2DModel",  # tables in attributes
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOT_RUN = {("SanaWMTransformer3DModel", "bfloat16")}
"""On the CPU the class refuses cameras in bfloat16, and its other arguments beside cameras in float32."""
SHARD = "20KB"

pytestmark = pytest.mark.usefixtures("as_many_threads_as_the_worker")


def saved(entry: ClassEntry, folder: Path, dtype: torch.dtype, **how: Any) -> torch.nn.Module:
    """Save an entry's model in the dtypes that its class has with ``torch_dtype``; return what is loaded again."""
    model: Any = entry.build()
    model.save_pretrained(folder)
    kind = type(model)
    if dtype != torch.float32 or how:
        loaded = kind.from_pretrained(folder, torch_dtype=dtype)
        shutil.rmtree(folder)
        loaded.save_pretrained(folder, **how)
    result = kind.from_pretrained(folder, torch_dtype=dtype)
    move_to_own_memory(result)
    return result


def assert_same_bits(client: Client, loan: Loan, model: Any, arguments: Mapping[str, Any]) -> None:
    with torch.no_grad():
        expected = list(tensors_of(model(**arguments)))
    found = list(tensors_of(client.call(loan, arguments)))
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert found
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        pytest.param(key, dtype, marks=() if number % 4 == 0 else pytest.mark.long)
        for number, key in enumerate(CASES)
        for dtype in DTYPES
        if (key, dtype) not in NOT_RUN
    ],
)
@pytest.mark.slow
def test_a_saved_model_gives_the_bits_of_from_pretrained(client: Client, tmp_path: Path, key: str, dtype: str):
    """In float32 as one file, in bfloat16 as many, as the folder and by the index."""
    entry = ENTRIES[key]
    is_sharded = dtype != "float32"
    model = saved(entry, tmp_path, DTYPES[dtype], **({"max_shard_size": SHARD} if is_sharded else {}))
    arguments = cast(entry.arguments(Random(1)), DTYPES[dtype])
    with client.lend(tmp_path, as_class=True) as loan:
        assert loan.tiers == (Tier.FILE,)
        assert loan.kind is ComponentKind.MODULE
        assert loan.label == tmp_path.name
        assert loan.facts.dtype == dtype
        assert_same_bits(client, loan, model, arguments)
    if is_sharded:
        with client.lend(next(tmp_path.glob("*.index.json")), as_class=True) as loan:
            assert_same_bits(client, loan, model, arguments)


def bfloat16_everywhere(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["WanTransformer3DModel", "AnyFlowTransformer3DModel"])
def test_parts_that_a_class_keeps_in_float32_are_converted(client: Client, tmp_path: Path, key: str):
    """The file has bfloat16 alone; ``from_pretrained(torch_dtype=torch.bfloat16)`` makes some of it float32."""
    entry = ENTRIES[key]
    saved(entry, tmp_path, torch.float32)
    bfloat16_everywhere(tmp_path)
    model = getattr(diffusers, entry.name).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}
    with client.lend(tmp_path) as loan:
        wide = sum(each.nbytes for each in model.parameters() if each.dtype == torch.float32)
        assert loan.copied.host_to_host >= wide
        assert_same_bits(client, loan, model, cast(entry.arguments(Random(1)), torch.bfloat16))


@pytest.mark.slow
def test_tensors_of_a_minor_dtype_are_loaded_in_the_main_one(client: Client, tmp_path: Path):
    entry = ENTRIES["PixArtTransformer2DModel"]
    saved(entry, tmp_path, torch.float32)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    narrow = {name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in state.items()}
    save_file(narrow, path)
    model = getattr(diffusers, entry.name).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with client.lend(path) as loan:
        assert loan.facts.dtype == "bfloat16"
        assert_same_bits(client, loan, model, cast(entry.arguments(Random(1)), torch.bfloat16))


@pytest.mark.slow
def test_a_vae_and_its_methods(client: Client, tmp_path: Path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    vae.save_pretrained(tmp_path)
    vae = diffusers.AutoencoderKLWan.from_pretrained(tmp_path)
    latents = Random(2).normal(1, 4, 2, 4, 4)
    with client.lend(tmp_path) as loan, torch.no_grad():
        found = client.call(loan, {"z": latents}, method="decode")
        assert torch.equal(next(tensors_of(found)), vae.decode(latents).sample)


def small(**more: Any) -> dict[str, Any]:
    return {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, **more}


TRANSFORMERS: dict[str, Callable[[], torch.nn.Module]] = {
    "t5_with_tied_weights": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    ),
    "qwen3_with_rotary_tables": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**small(intermediate_size=32, num_key_value_heads=2, head_dim=8))
    ),
    "gemma2_with_a_scale": lambda: transformers.Gemma2Model(
        transformers.Gemma2Config(**small(intermediate_size=32, num_key_value_heads=2, head_dim=8))
    ),
    "qwen2_5_vl_with_older_names": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=small(
                intermediate_size=32,
                num_key_value_heads=2,
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0},
            ),
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "depth": 2,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_models_of_transformers(client: Client, tmp_path: Path, case: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model: Any = TRANSFORMERS[case]()
    fill(model, 0)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=SHARD)
    model = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    ids = Random(1).integers(2, 49, 2, 7)
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "t5" in case:
        arguments["decoder_input_ids"] = ids[:, :3]
    with client.lend(tmp_path, as_class=True) as loan:
        assert_same_bits(client, loan, model, arguments)


@pytest.mark.slow
def test_a_component_of_several_dtypes_is_not_mixed_up_with_that_of_one(client: Client, tmp_path: Path):
    """The same configuration in two dtypes: tables are made in each."""
    entry = ENTRIES["NucleusMoEImageTransformer2DModel"]
    models = {name: saved(entry, tmp_path / name, dtype) for name, dtype in DTYPES.items()}
    with client.lend(tmp_path / "float32") as one, client.lend(tmp_path / "bfloat16") as other:
        for name, loan in (("float32", one), ("bfloat16", other), ("float32", one)):
            arguments = cast(entry.arguments(Random(1)), DTYPES[name])
            assert_same_bits(client, loan, models[name], arguments)


class TestRefusals:
    """What the workers find out: each is named, and a correct lend works afterwards."""

    ENTRY = "PixArtTransformer2DModel"

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        saved(ENTRIES[self.ENTRY], tmp_path, torch.float32)
        return tmp_path

    @staticmethod
    def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = folder / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    @staticmethod
    def change_config(folder: Path, **values: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda state: state.pop("proj_out.weight"), "1 missing: proj_out.weight"),
            (lambda state: state.update({"other.weight": torch.ones(2)}), "1 unexpected: other.weight"),
            (
                lambda state: state.update({"proj_out.bias": torch.ones(3)}),
                r"1 wrongly shaped: proj_out.bias is \[3\], expected",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, client: Client, folder: Path, change: Any, says: str):
        self.change_weights(folder, change)
        with pytest.raises(BadCheckpoint, match=f"the tensors do not fit {self.ENTRY}: {says}"):
            client.lend(folder)

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("NoSuchTransformer", "has no such class"),
            ("DDIMScheduler", "whose classes cannot be used"),
            ("FluxPipeline", "no model class"),
            ("utils", "utils is a module, not a class"),
        ],
    )
    def test_classes_that_are_none(self, client: Client, folder: Path, name: str, says: str):
        self.change_config(folder, _class_name=name)
        with pytest.raises(Unsupported, match=says):
            client.lend(folder)

    def test_a_configuration_that_the_class_refuses(self, client: Client, folder: Path):
        self.change_config(folder, num_attention_heads="many")
        with pytest.raises(BadRequest, match=f"{self.ENTRY} cannot be made from its configuration"):
            client.lend(folder)

    def test_a_configuration_of_another_type_of_model(self, client: Client, tmp_path: Path):
        TRANSFORMERS["gemma2_with_a_scale"]().save_pretrained(tmp_path)
        self.change_config(tmp_path, architectures=["Qwen3Model"])
        with pytest.raises(Unsupported, match="of model_type 'gemma2', its class is of qwen3"):
            client.lend(tmp_path)

    def test_experts_that_the_class_joins(self, client: Client, tmp_path: Path):
        model: Any = transformers.MixtralModel(
            transformers.MixtralConfig(**small(intermediate_size=32, num_key_value_heads=2, num_local_experts=2))
        )
        model.save_pretrained(tmp_path)
        with pytest.raises(Unsupported, match=r"its class converts .* lend the module"):
            client.lend(tmp_path)

    def test_nothing_of_a_refused_folder_stays_mapped(self, client: Client, folder: Path):
        self.change_weights(folder, lambda state: state.pop("proj_out.weight"))
        before = client.status().components
        with pytest.raises(BadCheckpoint):
            client.lend(folder)
        assert client.status().components == before
        entry = ENTRIES[self.ENTRY]
        model = saved(entry, folder / "whole", torch.float32)
        with client.lend(folder / "whole") as loan:
            assert_same_bits(client, loan, model, entry.arguments(Random(1)))


@pytest.mark.slow
def test_two_workers_and_an_arena(two_workers: Any, tmp_path: Path):
    entry = ENTRIES["QwenImageTransformer2DModel"]
    model = saved(entry, tmp_path, torch.float32, max_shard_size=SHARD)
    with two_workers.connect() as client:
        for loan in (client.lend(tmp_path), client.lend(tmp_path, device="cpu")):
            with torch.no_grad():
                expected = next(tensors_of(model(**entry.arguments(Random(1)))))
            torch.testing.assert_close(
                next(tensors_of(client.call(loan, entry.arguments(Random(1))))), expected, rtol=1e-6, atol=1e-6
            )
        assert {tier for each in client.status().components for tier in each.tiers} == {Tier.FILE, Tier.HOST_SHM}
