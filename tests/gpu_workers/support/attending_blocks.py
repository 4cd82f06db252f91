"""For tests of compiled blocks: a model of blocks that attend to a text, its plan, and its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

SIZE = 16
HEADS = 2


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_query = torch.nn.Linear(SIZE, SIZE)
        self.processor = None

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query, key = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.to_query(x), context))
        return functional.scaled_dot_product_attention(query, key, key, mask).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    """``extra`` is more that its forward does."""

    def __init__(self, extra: Callable[[Block, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.attn = Attending()
        self.out = torch.nn.Linear(SIZE, SIZE)
        self.other = torch.nn.Linear(SIZE, SIZE)
        self.dropout = torch.nn.Dropout(0.5)
        self.table = torch.ones(SIZE)
        self.extra = extra

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None, options: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.extra is not None:
            self.extra(self, x)
        x = x + self.attn(x, context, mask)
        return x + self.table * self.dropout(functional.silu((self.other if options else self.out)(x))), context


class Model(torch.nn.Module):
    """Blocks with the tokens of an image, which attend to a text."""

    def __init__(self, blocks: int = 3, extra: Callable[[Block, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(extra) for _ in range(blocks)])
        self.eval().requires_grad_(False)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None, options: Any = None
    ) -> torch.Tensor:
        for block in self.blocks:
            image, text = block(image, text, mask, options=options)
        return image


PLAN = TokenPlan(
    splits={"": {"image": Split("image")}},
    gathers={},
    attentions={"blocks.*.attn": Attention(queries=("image",), keys=())},
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(tokens: int = 5, rows: int = 1) -> dict[str, torch.Tensor]:
    return {"image": numbers(rows, tokens, SIZE), "text": numbers(rows, 3, SIZE, seed=1)}


def swap(model: torch.nn.Module, seed: int) -> None:
    """Give a model other weights, as a plug does: other tensors in place of its own."""
    for module in model.modules():
        for name, each in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(numbers(*each.shape, seed=seed) * 0.2, requires_grad=False)


def made(model: torch.nn.Module, graphs: Any, planned: PlannedModule | str | None = None) -> CompiledBlocks:
    found = CompiledBlocks.of(model, planned, graphs)
    assert isinstance(found, CompiledBlocks), found
    return found
