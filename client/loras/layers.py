"""Group the tensors of a LoRA into its layers, each with two factors and a scale."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from xditd.client.loras.scales import PeftConfig, scale_of
from xditd.client.loras.spelling import LoraName, other_formats, read_name
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.loras import FACTOR_DTYPES, LoraDescription, LoraLayer, LoraPart, TensorLike, lora_faults
from xditd.ipc.name_lists import SENTENCE_CHARS, listed

logger = logging.getLogger(__name__)

BAKE = (
    "merge it into the weights (PEFT: merge_and_unload; diffusers: fuse_lora; ComfyUI: Load LoRA on the MODEL) and "
    "lend these; a branch is the product of two factors"
)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A factor as a matrix: those of 1x1 convolutions have more sides, each of length 1."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: TensorLike) -> Matrix:
        shape = tuple(tensor.shape)
        return cls(tensor.dtype, shape[:2] if math.prod(shape[2:]) == 1 else shape)


@dataclass
class _Found:
    """What a file has of one layer: names of tensors by role."""

    name: LoraName
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraLayers:
    """The layers of a LoRA, and their factors by name."""

    description: LoraDescription
    factors: Mapping[str, Matrix]


def group_layers(
    tensors: Mapping[str, TensorLike],
    label: str,
    alpha_of: Callable[[str], float],
    configs: Mapping[LoraPart, PeftConfig],
) -> LoraLayers:
    """Group the tensors of a LoRA. ``alpha_of`` reads the only element of the tensor of this name.

    Tensors that are of no layer are left out, and named in the log.

    Raises:
        Unsupported: another adapter than LoRA, no adapter, or factors of convolutions or in another dtype.
        BadCheckpoint: a factor is missing, factors do not fit together, or an alpha is not finite.
    """
    formats = other_formats(tensors)
    if formats:
        what, names = next(iter(formats.items()))
        raise Unsupported(
            f"{label}: {' and '.join(formats)} cannot be a branch of a layer: {BAKE}; {len(names)} of {len(tensors)} "
            f"tensors are {what}: {listed(names)}",
            names=[name for each in formats.values() for name in each],
        )
    found, others = _found_in(tensors, label)
    factors = {name: Matrix.of(tensors[name]) for each in found for name in (each.tensors["down"], each.tensors["up"])}
    _check_factors(factors, label)
    layers: list[LoraLayer] = []
    faults: list[str] = []
    for each in found:
        down, up = each.tensors["down"], each.tensors["up"]
        rank = max(1, factors[down].shape[0] if factors[down].shape else 1)
        alpha = alpha_of(each.tensors["alpha"]) if "alpha" in each.tensors else None
        try:
            scale = scale_of(each.name, rank, alpha, configs.get(each.name.part))
        except BadCheckpoint as error:
            faults.append(error.detail)
            continue
        layers.append(LoraLayer(each.name.target, each.name.part, down, up, scale))
    _raise_faults(label, faults + lora_faults(layers, factors))
    if others:
        logger.warning("tensors of no LoRA are left out label=%s count=%d names=%s", label, len(others), listed(others))
    return LoraLayers(LoraDescription(layers=tuple(layers)), factors)


def _found_in(tensors: Mapping[str, TensorLike], label: str) -> tuple[list[_Found], list[str]]:
    """Return the layers of a LoRA, each with both factors, and the names of tensors that are of none.

    Raises:
        Unsupported: no tensor is a factor.
        BadCheckpoint: a layer lacks a factor, or has one twice.
    """
    found: dict[tuple[LoraPart, str], _Found] = {}
    others: list[str] = []
    twice: list[str] = []
    for name in tensors:
        read = read_name(name)
        if read is None:
            others.append(name)
            continue
        layer = found.setdefault((read.part, read.target), _Found(read))
        if read.role in layer.tensors:
            twice.append(f"{name} and {layer.tensors[read.role]} are of one layer")
        layer.tensors[read.role] = name
    if not any(each.tensors.keys() & {"down", "up"} for each in found.values()):
        raise Unsupported(
            f"{label}: this is no LoRA: none of its {len(tensors)} tensors is a factor of one ({listed(others)}); lend "
            "a whole checkpoint by lend()",
            names=others,
        )
    lonely = [
        f"layer {each.name.layer} has {', '.join(each.tensors.values())} and no {role} factor"
        for each in found.values()
        for role in ("down", "up")
        if role not in each.tensors
    ]
    _raise_faults(label, twice + lonely)
    return list(found.values()), others


def _check_factors(factors: Mapping[str, Matrix], label: str) -> None:
    """Check that all factors are matrices in a dtype that branches have.

    Raises:
        Unsupported: names those that are not.
    """
    odd_dtypes = [f"{name} is {each.dtype}" for name, each in factors.items() if each.dtype not in FACTOR_DTYPES]
    if odd_dtypes:
        raise Unsupported(
            f"{label}: factors of a LoRA have to be {', '.join(FACTOR_DTYPES)}: lend its file in one of these, or a "
            f"state dict of its tensors cast to one; {len(odd_dtypes)} of {len(factors)} factors: {listed(odd_dtypes)}",
            names=odd_dtypes,
        )
    convolutions = [f"{name} {list(each.shape)}" for name, each in factors.items() if len(each.shape) > 2]
    if convolutions:
        raise Unsupported(
            f"{label}: LoRA of convolutions cannot be a branch of a linear layer: {BAKE}; {len(convolutions)} of "
            f"{len(factors)} factors: {listed(convolutions)}",
            names=convolutions,
        )


def _raise_faults(label: str, faults: list[str]) -> None:
    if faults:
        raise BadCheckpoint(
            f"{label}: not a whole LoRA: {listed(faults, joint='; ', chars=SENTENCE_CHARS)}; get the file again",
            names=faults,
        )
