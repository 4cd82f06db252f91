from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from class_entries import ENTRIES
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from flux_pipelines import flux_transformer

from xditd.client import Unsupported
from xditd.client.diffusers.code_origin import CodeRecord, check_code, namespaces_of

_first_of_each_class = {entry.name: entry for entry in reversed(ENTRIES.values())}


@pytest.mark.parametrize("entry", _first_of_each_class.values(), ids=_first_of_each_class)
def test_classes_as_installed_are_accepted(entry: Any) -> None:
    check_code(namespaces_of(entry.build()), entry.name)


def own(*_: Any, **__: Any) -> None:
    """A function of the test's."""


class OwnCallable:
    def __call__(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "text"),
    [
        (FluxTransformerBlock, "forward", own, "FluxTransformerBlock.forward was replaced by .*own"),
        (FluxAttnProcessor, "__call__", own, "FluxAttnProcessor.__call__ was replaced"),
        (torch.nn.Linear, "forward", own, "Linear.forward was replaced"),
        (torch.nn.Module, "_call_impl", own, "Module._call_impl was replaced"),
        (FluxTransformerBlock, "forward", torch.nn.ReLU.forward, "forward was replaced by .*ReLU.forward"),
        (FluxTransformerBlock, "forward", torch.no_grad()(own), "forward was replaced by .*own"),
        (FluxSingleTransformerBlock, "more", property(own), "more was replaced"),
        (transformer_flux, "_get_qkv_projections", own, "_get_qkv_projections was replaced"),
        (torch.nn.functional, "layer_norm", own, "layer_norm was replaced"),
        (torch, "cat", own, "torch.cat was replaced by .*own"),
        (torch.Tensor, "chunk", own, "Tensor.chunk was replaced by .*own"),
        (transformer_flux, "apply_rotary_emb", OwnCallable(), "apply_rotary_emb was replaced by .*OwnCallable"),
        (transformer_flux, "apply_rotary_emb", partial(own, 1), "apply_rotary_emb was replaced by .*own"),
        (
            transformer_flux,
            "apply_rotary_emb",
            partial(apply_rotary_emb, use_real=False),
            "replaced by functools.partial",
        ),
        (transformer_flux, "Transformer2DModelOutput", OwnCallable, "Output was replaced by .*OwnCallable"),
        (torch.nn.functional, "scaled_dot_product_attention", own, "scaled_dot_product_attention was replaced"),
        (torch.nn.functional, "scaled_dot_product_attention", type("Own", (), {})(), "replaced by a Own"),
    ],
)
def test_replaced_function_is_named(
    owner: Any, name: str, replacement: Callable[..., Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flux_transformer()
    check_code(namespaces_of(model), "transformer")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement, raising=False)
        with pytest.raises(Unsupported, match=f"^transformer: .*{text}"):
            check_code(namespaces_of(model), "transformer")
    check_code(namespaces_of(model), "transformer")


OF_THE_SAME_FILE = pytest.param(
    FluxSingleTransformerBlock.forward.__code__,
    marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified names"),
)


@pytest.mark.parametrize("code", [own.__code__, apply_rotary_emb.__code__, OF_THE_SAME_FILE])
def test_replaced_code_is_named(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    namespaces = namespaces_of(flux_transformer())
    monkeypatch.setattr(FluxTransformerBlock.forward, "__code__", code)
    with pytest.raises(Unsupported, match=f"^transformer: the code of .*FluxTransformerBlock.*{code.co_name} in "):
        check_code(namespaces, "transformer")


@pytest.mark.parametrize(
    ("part", "value"), [("__code__", own.__code__), ("__defaults__", (1,)), ("__kwdefaults__", {"a": 1})]
)
def test_code_replaced_within_a_block_is_named(part: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = CodeRecord(namespaces_of(flux_transformer()))
    assert record.is_same()
    record.check()
    with monkeypatch.context() as patch:
        patch.setattr(FluxTransformerBlock.forward, part, value)
        assert not record.is_same()
        with pytest.raises(Unsupported, match=f"FluxTransformerBlock.forward: its {part} was replaced within"):
            record.check()
    assert record.is_same()
