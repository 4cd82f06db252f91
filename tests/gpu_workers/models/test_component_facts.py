"""The facts of a component: those of its kind, the class, and the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from text_checkpoints import clip_l_state_dict, t5_state_dict

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.gpu_workers.models.checkpoint_match import class_of
from xditd.ipc.facts import ComponentFacts, TextEncoderFacts

if TYPE_CHECKING:
    from one_rank import OneRank

State = dict[str, torch.Tensor]


@pytest.fixture
def told(rank: OneRank) -> Callable[[State], ComponentFacts]:
    """Lend a checkpoint, and return what is told of it, as it crosses the wire."""

    def lend(state: State) -> ComponentFacts:
        rank.lend("c", state)
        facts = rank.components._plugged["c"].facts
        crossed = msgspec.convert(msgspec.to_builtins(facts), ComponentFacts)
        assert crossed == facts
        return crossed

    return lend


def bytes_of(state: State) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in state.values():
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return sizes


@pytest.mark.parametrize("has_guidance", [True, False], ids=["dev", "schnell"])
def test_a_transformer(told: Callable[[State], ComponentFacts], has_guidance: bool) -> None:
    state = flux1_state_dict(0, guidance=has_guidance, dtype=torch.bfloat16, double_blocks=1, single_blocks=1)
    facts = told(state)
    assert (facts.family, facts.class_name, facts.kind.value) == ("flux1", "FluxTransformer2DModel", "transformer")
    assert (facts.dtype, facts.bytes_by_dtype) == ("bfloat16", bytes_of(state))
    assert facts.vae is None
    assert facts.text_encoder is None
    found = facts.transformer
    assert found is not None
    assert (found.heads, found.ulysses, found.ring) == (2, 1, 1)
    assert found.latents.shape(2, 64, 96) == (2, 16, 8, 12)
    assert found.latents.pixels * found.latents.multiple == 16
    assert found.variants == ("class", "float32_time")
    assert found.float32_latents == ("float32_time",)
    assert found.guidance == ("embedded" if has_guidance else "none")
    assert found.has_step_cache
    needed = [each.name for each in found.conditioning if each.is_needed]
    assert needed == ["prompt_embeds", "pooled_prompt_embeds"]
    assert found.conditioning[0].shape == ("batch", "tokens", 4096)
    assert {each.name for each in found.arguments if not each.is_needed} == (set() if has_guidance else {"guidance"})


def test_a_transformers_arguments_are_those_of_its_classs_forward(transformer: Any) -> None:
    import inspect

    from diffusers import FluxTransformer2DModel

    facts = transformer.operations.facts(transformer.config, transformer.layout)
    taken = set(inspect.signature(FluxTransformer2DModel.forward).parameters)
    assert {each.name for each in facts.arguments} <= taken
    assert "return_dict" not in {each.name for each in facts.arguments}


def test_weights_of_several_dtypes_are_counted_by_dtype(told: Callable[[State], ComponentFacts]) -> None:
    state = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in flux1_state_dict(0, double_blocks=1, single_blocks=1).items()
    }
    facts = told(state)
    assert facts.dtype == "bfloat16"
    assert facts.bytes_by_dtype == bytes_of(state)
    assert set(facts.bytes_by_dtype) == {"bfloat16", "float32"}


def test_a_vae(told: Callable[[State], ComponentFacts], demo_vae: State) -> None:
    facts = told(demo_vae)
    assert (facts.family, facts.class_name, facts.kind.value) == ("flux_vae", "AutoencoderKL", "vae")
    assert facts.transformer is None
    assert facts.text_encoder is None
    assert facts.vae is not None
    assert facts.vae.has_encoder


def test_text_encoders(told: Callable[[State], ComponentFacts]) -> None:
    clip = told(clip_l_state_dict(0, vocabulary=300))
    assert (clip.family, clip.class_name, clip.kind.value) == ("clip_l", clip.class_name, "text_encoder")
    assert clip.class_name in ("CLIPTextModel", "CLIPTextTransformer")
    assert clip.text_encoder == TextEncoderFacts(width=128, max_tokens=77, has_pooled=True)


def test_an_encoder_without_a_pooled_state(told: Callable[[State], ComponentFacts]) -> None:
    t5 = told(t5_state_dict(0, vocabulary=300))
    assert (t5.family, t5.class_name) == ("t5", "T5EncoderModel")
    assert t5.text_encoder == TextEncoderFacts(width=128, max_tokens=4096, has_pooled=False)


def test_a_class_of_another_package_is_named_as_it_is() -> None:
    class Own:
        pass

    assert class_of(Own()) == "Own"
    assert class_of(torch.nn.Linear(1, 1)) == "Linear"
