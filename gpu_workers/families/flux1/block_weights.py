"""The weights of fused FLUX.1 blocks: the layers of a checkpoint, and the places of the module's layers in these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from xditd.gpu_workers.kernels.branched_products import Part

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux1.config import Flux1Config

Norm = Callable[[str], torch.Tensor]


class Stream(NamedTuple):
    """The weights of text or of images in a double block. Projections are results of ``Products.linear``."""

    qkv: Any
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    out: Any
    up: Any
    down: Any


class Single(NamedTuple):
    """The weights of a single block: ``qkv`` and ``up`` are rows of ``linear1``, ``second`` is ``linear2``."""

    qkv: Any
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    up: Any
    second: Any


class Blocks(NamedTuple):
    """All blocks of a checkpoint."""

    double: list[tuple[Stream, Stream]]
    single: list[Single]


def norms_of(checkpoint: Mapping[str, Any], dtype: torch.dtype) -> Norm:
    """Return a function that gives the scale of the norm of this name."""

    def norm(name: str) -> torch.Tensor:
        scale = checkpoint[f"{name}.scale"]
        assert isinstance(scale, torch.Tensor)
        return scale.to(dtype)

    return norm


def bind_blocks(config: Flux1Config, linear: Callable[..., Any], norm: Norm) -> Blocks:
    """Return all blocks. ``linear`` gives the projection of this name, or of some of its outputs."""
    width = config.hidden

    def stream(block: str, kind: str) -> Stream:
        name = f"{block}.{kind}"
        return Stream(
            qkv=linear(f"{name}_attn.qkv"),
            query_norm=norm(f"{name}_attn.norm.query_norm"),
            key_norm=norm(f"{name}_attn.norm.key_norm"),
            out=linear(f"{name}_attn.proj"),
            up=linear(f"{name}_mlp.0"),
            down=linear(f"{name}_mlp.2"),
        )

    def single(block: str) -> Single:
        return Single(
            qkv=linear(f"{block}.linear1", slice(None, 3 * width)),
            query_norm=norm(f"{block}.norm.query_norm"),
            key_norm=norm(f"{block}.norm.key_norm"),
            up=linear(f"{block}.linear1", slice(3 * width, None)),
            second=linear(f"{block}.linear2"),
        )

    return Blocks(
        double=[(stream(block, "txt"), stream(block, "img")) for block in _doubles(config)],
        single=[single(block) for block in _singles(config)],
    )


def modulation_names(config: Flux1Config) -> tuple[list[str], list[str]]:
    """Return the layers of modulations: of double blocks for text and image in turn, and of single blocks."""
    return (
        [f"{block}.{kind}_mod.lin" for block in _doubles(config) for kind in ("txt", "img")],
        [f"{block}.modulation.lin" for block in _singles(config)],
    )


def product_shapes(config: Flux1Config) -> dict[str, tuple[int, int]]:
    """Return the shapes (out, in) of the projections of all blocks, by name.

    Without those of modulations, which have a kernel of their own, and the few outside of blocks.
    """
    width = config.hidden
    found: dict[str, tuple[int, int]] = {}
    for block in range(config.double_blocks):
        for kind in ("txt", "img"):
            name = f"double_blocks.{block}.{kind}"
            found[f"{name}_attn.qkv"] = (3 * width, width)
            found[f"{name}_attn.proj"] = (width, width)
            found[f"{name}_mlp.0"] = (4 * width, width)
            found[f"{name}_mlp.2"] = (width, 4 * width)
    for block in range(config.single_blocks):
        found[f"single_blocks.{block}.linear1"] = (7 * width, width)
        found[f"single_blocks.{block}.linear2"] = (width, 5 * width)
    return found


def parts_of(config: Flux1Config) -> Iterator[Part]:
    """List the parts of layers that blocks project with, and the layers of modulations."""
    cut = 3 * config.hidden
    for name, (outputs, _) in product_shapes(config).items():
        if name.endswith(".linear1"):
            yield Part(name, 0, cut)
            yield Part(name, cut, outputs)
        else:
            yield Part(name, 0, outputs)
    for names, rows in zip(modulation_names(config), (6 * config.hidden, 3 * config.hidden), strict=True):
        for name in names:
            yield Part(name, 0, rows)


def layer_places(config: Flux1Config) -> dict[str, tuple[str, int]]:
    """Return for each layer of the module in a block its layer in the checkpoint, and its first output there."""
    width = config.hidden
    found: dict[str, tuple[str, int]] = {}
    for number, source in enumerate(_doubles(config)):
        target = f"transformer_blocks.{number}"
        for kind, qkv, others in (
            ("img", ("to_q", "to_k", "to_v"), ("attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")),
            (
                "txt",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2", "norm1_context.linear"),
            ),
        ):
            for place, layer in enumerate(qkv):
                found[f"{target}.attn.{layer}"] = f"{source}.{kind}_attn.qkv", place * width
            for layer, name in zip(others, ("attn.proj", "mlp.0", "mlp.2", "mod.lin"), strict=True):
                found[f"{target}.{layer}"] = f"{source}.{kind}_{name}", 0
    for number, source in enumerate(_singles(config)):
        target = f"single_transformer_blocks.{number}"
        for place, layer in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            found[f"{target}.{layer}"] = f"{source}.linear1", place * width
        found[f"{target}.proj_out"] = f"{source}.linear2", 0
        found[f"{target}.norm.linear"] = f"{source}.modulation.lin", 0
    return found


def _doubles(config: Flux1Config) -> list[str]:
    return [f"double_blocks.{number}" for number in range(config.double_blocks)]


def _singles(config: Flux1Config) -> list[str]:
    return [f"single_blocks.{number}" for number in range(config.single_blocks)]
