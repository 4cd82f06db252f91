"""The residuals of ControlNets as FLUX.1's blocks take them: for the image's first tokens, on this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch

from xditd.gpu_workers.families.flux1.controlnet_config import DOUBLE_RESIDUALS, SINGLE_RESIDUALS
from xditd.gpu_workers.parallel.token_partition import RankTokens, pad_end
from xditd.ipc.errors import BadRequest

NAMES = (DOUBLE_RESIDUALS, SINGLE_RESIDUALS)


def padded_residuals(name: str, residuals: Sequence[torch.Tensor], rows: int, tokens: int) -> list[torch.Tensor]:
    """Return residuals for all ``tokens`` of the image stream: those of references, which follow, get zeros.

    Residuals that several blocks share stay one tensor.

    Raises:
        BadRequest: they have another number of rows, or more tokens.
    """
    return _each_once(residuals, lambda each: _padded(name, each, rows, tokens))


def own_residuals(arguments: Mapping[str, Any], own: RankTokens) -> dict[str, list[torch.Tensor]]:
    """Return the residuals among a forward's arguments, with the tokens of this rank alone."""
    return {
        name: _each_once(arguments[name], lambda each: pad_end(each[:, own.image], own.padding, dim=1))
        for name in NAMES
        if arguments.get(name) is not None
    }


class ControlledBlocks(NamedTuple):
    """Which of some tensors each block gets, by its number; a kind of blocks without residuals has no numbers."""

    double: tuple[int, ...] = ()
    single: tuple[int, ...] = ()


def by_block(
    residuals: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]], blocks: tuple[int, int], own: RankTokens
) -> tuple[list[torch.Tensor], ControlledBlocks]:
    """Return the residuals of this rank's tokens, each once, and which of them ``blocks`` (double, single) get.

    ``residuals`` are those of both kinds of blocks. Fewer than blocks are each for as many blocks in a row, as in
    diffusers' class.
    """
    own_of = own_residuals({name: each or None for name, each in zip(NAMES, residuals, strict=True)}, own)
    places: dict[int, int] = {}
    tensors: list[torch.Tensor] = []
    numbers = []
    for name, count in zip(NAMES, blocks, strict=True):
        given = own_of.get(name, [])
        interval = ceil(count / len(given)) if given else 1
        of_blocks = []
        for each in (given[block // interval] for block in range(count if given else 0)):
            if id(each) not in places:
                places[id(each)] = len(tensors)
                tensors.append(each)
            of_blocks.append(places[id(each)])
        numbers.append(tuple(of_blocks))
    return tensors, ControlledBlocks(*numbers)


def has_residuals(arguments: Mapping[str, Any]) -> bool:
    """Return whether a forward's arguments have residuals."""
    return any(arguments.get(name) is not None for name in NAMES)


def _padded(name: str, residual: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
    missing = tokens - residual.shape[1]
    if residual.shape[0] != rows or missing < 0:
        raise BadRequest(
            f"{name}: residuals of {residual.shape[0]} rows of {residual.shape[1]} tokens for {rows} of {tokens}; give "
            "the ControlNet the rows and the image of the transformer"
        )
    return pad_end(residual, missing, dim=1)


def _each_once(residuals: Sequence[torch.Tensor], change: Any) -> list[torch.Tensor]:
    changed: dict[int, torch.Tensor] = {}
    for each in residuals:
        if id(each) not in changed:
            changed[id(each)] = change(each)
    return [changed[id(each)] for each in residuals]
