"""Folders that a family runs: the bits of diffusers' ``from_pretrained`` with the dtype of most weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import flux1_variants
import pytest
import torch
import wan_models
from nested_values import tensors_of
from own_memory import move_to_own_memory
from packed_checkpoints import pack
from safetensors.torch import load_file, save_file

from xditd.client import Client, Loan
from xditd.ipc.tensors import ComponentKind

FILE = "diffusion_pytorch_model.safetensors"
WAN = {"text": wan_models.TEXT, "image with CLIP": wan_models.CLIP_IMAGE, "VACE": wan_models.TWO_CONTROLS}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIZE = (2, 4, 6)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_many_threads_as_the_worker", "convolutions_of_workers")]


def wan_folder(folder: Path, dtype: torch.dtype, config: Any = wan_models.TEXT, *, seed: int = 0, **how: Any) -> Path:
    """Save a model of Wan with all of its weights in one dtype."""
    wan_models.reference(wan_models.state_dict(seed, config, dtype=dtype), config).save_pretrained(folder, **how)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    """Load a folder as a program does."""
    kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    module = kind.from_pretrained(folder, torch_dtype=dtype)
    move_to_own_memory(module)
    return module


def arguments_of(config: Any, dtype: torch.dtype, rows: int = 1) -> dict[str, Any]:
    return wan_models.inputs(rows, 7, SIZE, config, dtype=dtype)


def bits(client: Client, loan: Loan, arguments: dict[str, Any]) -> torch.Tensor:
    return next(tensors_of(client.call(loan, arguments)))


def of_class(module: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(**arguments, return_dict=False)[0]
    return found


def wide_bytes(module: torch.nn.Module) -> int:
    return sum(each.nbytes for each in module.parameters() if each.dtype == torch.float32)


@HALVES
@pytest.mark.parametrize("config", list(WAN.values()), ids=list(WAN))
def test_parts_that_the_class_keeps_in_float32_are_float32(
    client: Client, tmp_path: Path, config: Any, dtype: torch.dtype
) -> None:
    module = loaded(wan_folder(tmp_path, dtype, config), dtype)
    assert {each.dtype for each in module.parameters()} == {torch.float32, dtype}
    arguments = arguments_of(config, dtype)
    expected = of_class(module, arguments)
    for given in ({}, {"kind": "transformer"}):
        with client.lend(tmp_path, **given) as loan:
            assert loan.kind is ComponentKind.TRANSFORMER
            assert loan.facts.dtype == str(dtype).removeprefix("torch.")
            assert loan.copied.host_to_host >= wide_bytes(module)
            assert torch.equal(bits(client, loan, arguments), expected)
    with client.lend(load_file(tmp_path / FILE)) as loan:  # a program that holds these tensors, and no others
        assert not torch.equal(bits(client, loan, arguments), expected)


@HALVES
def test_an_index_and_an_adopted_component(client: Client, tmp_path: Path, dtype: torch.dtype) -> None:
    wan_folder(tmp_path, dtype, max_shard_size="1MB")
    arguments = arguments_of(wan_models.TEXT, dtype)
    expected = of_class(loaded(tmp_path, dtype), arguments)
    with client.lend(next(tmp_path.glob("*.index.json"))) as loan:
        assert torch.equal(bits(client, loan, arguments), expected)
        loan.adopt()
        assert torch.equal(bits(client, loan, arguments), expected)
        client.revoke(loan)


def test_fine_tunes_with_and_without_these_parts_in_float32_take_turns_in_one_model(
    client: Client, tmp_path: Path
) -> None:
    """One file has bfloat16 alone, the other what diffusers saves of a model that it has loaded in bfloat16."""
    dtype = torch.bfloat16
    folders = [wan_folder(tmp_path / str(seed), dtype, seed=seed) for seed in range(2)]
    loaded(folders[1], dtype).save_pretrained(folders[1])
    assert {each.dtype for each in load_file(folders[1] / FILE).values()} == {torch.float32, dtype}
    arguments = arguments_of(wan_models.TEXT, dtype)
    expected = [of_class(loaded(folder, dtype), arguments) for folder in folders]
    assert not torch.equal(*expected)
    with client.lend(folders[0]) as one:
        built = client.status().counters.models_built
        with client.lend(folders[1]) as other:
            assert client.status().counters.models_built == built
            for loan, right in ((one, expected[0]), (other, expected[1]), (one, expected[0])):
                assert torch.equal(bits(client, loan, arguments), right)


def test_weights_of_another_dtype_than_most_get_that(client: Client, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    from xditd.gpu_workers.families.flux1 import reference

    reference.transformer_from(flux1_variants.state_of(64)).save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    save_file({name: each if each.ndim == 1 else each.to(dtype) for name, each in state.items()}, tmp_path / FILE)
    module = loaded(tmp_path, dtype)
    assert {each.dtype for each in module.parameters()} == {dtype}
    config = module.config
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "hidden_states": torch.randn(1, 24, config.in_channels, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, 5, config.joint_attention_dim, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0)),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5]) if config.guidance_embeds else None,
    }
    with client.lend(tmp_path) as loan:
        assert loan.kind is ComponentKind.TRANSFORMER
        assert torch.equal(bits(client, loan, arguments), of_class(module, arguments))


@pytest.mark.parametrize("packed_format", ["int8_rows", "plain"])
def test_packed_weights_of_these_parts_are_computed_with_in_float32(
    client: Client, tmp_path: Path, packed_format: str
) -> None:
    folder = wan_folder(tmp_path, torch.float32)
    pack(load_file(folder / FILE), packed_format, torch.bfloat16).save(folder / FILE)
    arguments = arguments_of(wan_models.TEXT, torch.bfloat16)
    with client.lend(folder, as_class=True, compute_dtype="bfloat16") as loan:
        expected = bits(client, loan, arguments)
    with client.lend(folder, compute_dtype="bfloat16") as loan:
        assert loan.kind is ComponentKind.TRANSFORMER
        assert loan.facts.bytes_by_format
        assert torch.equal(bits(client, loan, arguments), expected)


@pytest.fixture(params=["one worker", "two workers"])
def workers(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("one_worker" if request.param == "one worker" else "two_workers")


@HALVES
def test_a_pair_of_wan_2_2_generates_what_the_pipeline_does(workers: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    folders = [wan_folder(tmp_path / f"transformer_{seed}", dtype, seed=seed) for seed in range(2)]
    texts = {
        name: torch.randn(1, 12, wan_models.TEXT.text_channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }

    @dataclasses.dataclass
    class Sample:
        config = wan_models.TEXT
        options = {"shift": 3.0}  # noqa: RUF012
        conditioning = texts
        noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(5))
        sides = {"frames": 9, "height": 32, "width": 48}  # noqa: RUF012
        steps, scale = 3, 3.0

    expected = wan_models.pipeline_latents(*(loaded(folder, dtype) for folder in folders), Sample())
    with workers.connect() as client, client.lend(folders[0]) as high, client.lend(folders[1]) as low:
        found = client.generate(
            high, texts, transformer_2=low, steps=3, guidance_scale=3.0, noise=Sample.noise,
            options=Sample.options, **Sample.sides,
        ).result().latents  # fmt: skip
        is_alone = len(client.status().workers) == 1
    if is_alone:
        assert torch.equal(found, expected)
    else:
        assert wan_models.relative_error(found, expected) < 1e-2
