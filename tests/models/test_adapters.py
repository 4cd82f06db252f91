"""LoRA layers of PEFT in an accelerated pipeline: branches beside its loan, which stays; the bits of this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random
from fault_parts import embedded_call, same
from flux_pipelines import (
    build_lora,
    build_with_text_encoders,
    flux,
    flux_call,
    lora_weights,
    run_lora,
    run_plain,
    run_prompt,
)
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from pipeline_parts import tensors
from running_daemon import RunningDaemon

from xditd.client import Client, accelerate
from xditd.client.loans import Loan
from xditd.client.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_many_threads_as_the_worker")]

Change = Callable[[Any], Any]


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Loan]]:
    """All loans, in their order."""
    found: list[Loan] = []
    lend = Session.lend

    def noted(session: Session, *given: Any) -> Loan:
        loan = lend(session, *given)
        found.append(loan)
        return loan

    monkeypatch.setattr(Session, "lend", noted)
    return found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT warns of a second adapter, and of layers of which an adapter is deleted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BLOCKS = {"transformer_blocks.0": 0.2, "transformer_blocks.1": 0.9, "single_transformer_blocks.0": 0.5}


def load(name: str, seed: int, rank: int) -> Change:
    return lambda pipe: pipe.load_lora_weights(lora_weights(seed=seed, rank=rank), adapter_name=name)


@torch.no_grad()
def write(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn.to_q.lora_B["style"].weight.mul_(0.5)


def replace_factor(pipe: Any) -> None:
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.lora_A["style"].weight.data = layer.lora_A["style"].weight.data * 2.0


# Each with the labels of what it lends. The module itself is lent at the begin alone.
SWITCHES: tuple[tuple[str, Change, list[str]], ...] = (
    ("load", load("style", 31, 2), ["style"]),
    ("weight", lambda pipe: pipe.set_adapters(["style"], [0.3]), []),
    ("negative", lambda pipe: pipe.set_adapters(["style"], [-1.3]), []),
    ("zero", lambda pipe: pipe.set_adapters(["style"], [0.0]), []),
    ("per block", lambda pipe: pipe.transformer.set_adapters(["style"], [BLOCKS]), ["style"]),
    ("again for all", lambda pipe: pipe.set_adapters(["style"], [0.7]), []),
    ("load another", load("subject", 32, 4), ["subject"]),
    ("both", lambda pipe: pipe.set_adapters(["style", "subject"], [0.8, 0.5]), []),
    ("disable", lambda pipe: pipe.disable_lora(), []),
    ("enable", lambda pipe: pipe.enable_lora(), []),
    ("write", write, ["style"]),
    ("replace", replace_factor, ["style"]),
    ("one layer", lambda pipe: pipe.transformer.transformer_blocks[1].attn.to_k.set_scale("style", 3.0), ["style"]),
    ("delete", lambda pipe: pipe.delete_adapters(["style"]), []),
    ("unload", lambda pipe: pipe.unload_lora_weights(), []),
)


@pytest.mark.parametrize("is_loaded", [False, True], ids=["after", "before"])
def test_a_switch_lends_nothing_of_the_base(client: Client, lent: list[Loan], is_loaded: bool) -> None:
    here, there = flux(), flux()
    switches = SWITCHES
    if is_loaded:
        for pipe in (here, there):
            SWITCHES[0][1](pipe)
        switches = SWITCHES[1:]
    with accelerate(there, client=client):
        base = lent[0].lent_bytes
        run_plain(there)
        built = client.status().counters
        before = run_plain(here)
        lent.clear()
        for name, change, labels in switches:
            change(here)
            change(there)
            expected = run_plain(here)
            assert same(run_plain(there), expected), name
            assert [each.label for each in lent] == [f"transformer adapter {label}" for label in labels], name
            assert all(each.lent_bytes < base / 10 for each in lent)
            assert not same(expected, before) or name in ("disable",), name
            before = expected
            lent.clear()
        after = client.status()
        assert after.counters.models_built == built.models_built
        assert after.counters.plugs == built.plugs + sum(len(labels) for _, _, labels in switches)
        # Nothing is left of adapters that are gone.
        assert [each.label for each in after.components] == ["transformer"]
    assert not client.status().components


def test_a_module_that_was_lent_before_is_not_built_again(client: Client) -> None:
    """The module without its LoRA layers has the description of one that never had any."""
    with accelerate(flux(), client=client):
        built = client.status().counters.models_built
    pipe = build_lora()
    with accelerate(pipe, client=client):
        assert same(run_plain(pipe), run_plain(build_lora()))
        assert client.status().counters.models_built == built


@pytest.mark.parametrize("scale", [0.6, 0.0])
def test_scale_in_a_call(client: Client, lent: list[Loan], scale: float) -> None:
    here, there = build_lora(), build_lora()
    arguments = {"joint_attention_kwargs": {"scale": scale}}
    with accelerate(there, client=client):
        for _ in range(2):
            assert same(_run(there, arguments), _run(here, arguments))
        assert same(run_plain(there), run_plain(here))  # after a scale of 0, diffusers has reset all weights to 1
        assert same(run_lora(there), run_lora(here))
        assert [each.label for each in lent].count("transformer") == 1


def _run(pipe: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    return tensors(pipe(**flux_call(**arguments)).images)


def test_fused_adapters_are_lent_in_the_weights(client: Client, lent: list[Loan]) -> None:
    here, there = build_lora(), build_lora()
    steps: tuple[tuple[Change, list[str]], ...] = (
        (lambda _: None, ["transformer adapter style", "transformer adapter subject"]),
        (lambda pipe: pipe.fuse_lora(adapter_names=["style"], lora_scale=0.5), ["transformer"]),
        (lambda pipe: pipe.unfuse_lora(), ["transformer", "transformer adapter style", "transformer adapter subject"]),
        (_fuse_and_unload, ["transformer"]),
    )
    with accelerate(there, client=client):
        for number, (change, labels) in enumerate(steps):
            lent.clear()
            change(here)
            change(there)
            assert same(run_plain(there), run_plain(here)), number
            assert [each.label for each in lent] == labels, number


def _fuse_and_unload(pipe: Any) -> None:
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def test_an_adapter_of_a_text_encoder(client: Client, lent: list[Loan]) -> None:
    here, there = build_with_text_encoders(), build_with_text_encoders()
    with accelerate(there, client=client, components=("transformer", "text_encoder", "text_encoder_2")):
        plain = run_prompt(here)
        assert same(run_prompt(there), plain)
        lent.clear()
        for pipe in (here, there):
            torch.manual_seed(0)
            clip = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            t5 = LoraConfig(r=3, target_modules=["q", "wo"], init_lora_weights=False, use_rslora=True)
            pipe.text_encoder.add_adapter(clip, adapter_name="style")
            pipe.text_encoder_2.add_adapter(t5, adapter_name="style")
        expected = run_prompt(here)
        assert same(run_prompt(there), expected)
        assert not same(expected, plain)
        assert [each.label for each in lent] == ["text_encoder adapter style", "text_encoder_2 adapter style"]


NO_BRANCHES = {
    "DoRA": LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False),
    "bias": LoraConfig(r=2, target_modules=["to_q"], lora_bias=True, init_lora_weights=False),
    "LoHa": LoHaConfig(r=2, target_modules=["to_q"], init_weights=False),
    "LoKr": LoKrConfig(r=2, target_modules=["to_q"], init_weights=False),
    "OFT": OFTConfig(oft_block_size=8, target_modules=["to_q"], init_weights=False),
    "saved module": LoraConfig(
        r=2, target_modules=["to_q"], modules_to_save=["proj_out"], init_lora_weights=False, lora_alpha=4
    ),
}


@pytest.mark.parametrize("config", NO_BRANCHES.values(), ids=NO_BRANCHES)
def test_what_is_no_branch_is_lent_as_it_is(client: Client, lent: list[Loan], config: Any) -> None:
    here, there = flux(), flux()
    with accelerate(there, client=client):
        plain = run_plain(there)
        for pipe in (here, there):
            torch.manual_seed(1)
            inject_adapter_in_model(config, pipe.transformer)
            pipe.transformer.eval().requires_grad_(False)
        expected = run_plain(here)
        assert same(run_plain(there), expected)
        assert not same(expected, plain)
        assert [each.label for each in lent] == ["transformer", "transformer"]


@pytest.mark.parametrize(
    "name",
    [
        "QwenImageTransformer2DModel",
        "WanTransformer3DModel",
        "SD3Transformer2DModel",
        "Flux2Transformer2DModel",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_every_family_has_the_bits_of_peft(client: Client, lent: list[Loan], name: str, dtype: torch.dtype) -> None:
    entry = ENTRIES[name]
    here, there = entry.build(), entry.build()
    with accelerate(there, client=client):
        results = []
        for seed, adapter in enumerate(("first", "second")):
            for model in (here, there):
                torch.manual_seed(seed)
                targets = ["to_q", "to_k", "to_v", "to_out.0"]
                config = LoraConfig(r=3 + seed, lora_alpha=2, target_modules=targets, init_lora_weights=False)
                model.add_adapter(config, adapter_name=adapter)
                model.to(dtype)
                model.set_adapters(["first", "second"][: seed + 1], [0.7, -0.4][: seed + 1])
            results.append(_forward(here, entry, dtype))
            assert torch.equal(_forward(there, entry, dtype), results[-1])
        assert not torch.equal(*results)
        assert any("adapter second" in each.label for each in lent)


def _forward(model: Any, entry: Any, dtype: torch.dtype) -> torch.Tensor:
    def cast(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(cast, value))
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value

    given = {name: cast(value) for name, value in entry.arguments(Random(1)).items()}
    found = model(**given, return_dict=False)[0]
    return found[0] if isinstance(found, list) else found


@torch.no_grad()
def test_autocast(client: Client) -> None:
    here, there = build_lora().transformer, build_lora().transformer
    with accelerate(there, client=client), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(there(**embedded_call())[0], here(**embedded_call())[0])


def test_a_revoked_adapter_is_lent_again(client: Client, one_worker: RunningDaemon) -> None:
    pipe = build_lora()
    expected = run_plain(build_lora())
    with accelerate(pipe, client=client), one_worker.connect() as other:
        for label in ("transformer adapter style", "transformer"):
            assert same(run_plain(pipe), expected)
            (found,) = [each for each in client.status().components if each.label == label]
            other.revoke(found.component_id)
            assert same(run_plain(pipe), expected)
    assert not client.status().components
