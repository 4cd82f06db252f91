"""What a model family has to say, and the check that a checkpoint fits it exactly.

A family describes a checkpoint as a list of :class:`Entry`: one source tensor, its shape, and the
module parameters that it fills, one below the other along its first dimension. From that list follow
the key map (:class:`Slice`: every parameter is a *view* of one source) and the proof that it is a
bijection: each source element used once, each parameter filled once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch

from xditd.ipc.errors import BadCheckpoint, Internal, UnsupportedDtype
from xditd.ipc.name_lists import listed
from xditd.ipc.tensor_names import by_prefix, tells_nothing

if TYPE_CHECKING:
    from xditd.gpu_workers.parallel.layouts import ParallelLayout
    from xditd.ipc.status import FusedCheck

Shape = tuple[int, ...]
Kind = Literal["transformer", "vae", "text_encoder"]
ConfigT = TypeVar("ConfigT", bound=Hashable)

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""What can be run as it is lent. Eight-bit weights need scales that FLUX.1 files keep in no agreed place."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its bytes; ``dtype`` is torch's own name, such as ``bfloat16``."""

    dtype: str
    shape: Shape

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class Entry:
    """One source tensor under its canonical name, and the ``(parameter, rows)`` that share its first dimension.

    ``drop`` counts trailing dimensions of size one that the parameters lack (1x1 convolution to linear).
    """

    source: str
    shape: Shape
    targets: tuple[tuple[str, int], ...]
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """A parameter as a view: rows ``start`` to ``stop`` of ``source``, seen as ``shape`` where that differs."""

    source: str
    start: int
    stop: int
    shape: Shape | None = None


class Family(Protocol[ConfigT]):
    """One model family: adding one touches one module, the registry and one test."""

    @property
    def name(self) -> str:
        """As it appears in logs, status and errors."""

    @property
    def kind(self) -> Kind:
        """What a component of this family is for."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Canonical names that files hold in place of, or as a copy beside, another one: copy to original."""

    @property
    def ignored(self) -> re.Pattern[str] | None:
        """Canonical names of tensors that no job reads, of any dtype, besides what ``tells_nothing`` in any model."""

    def claims(self, names: Collection[str]) -> bool:
        """Say whether these names, without a prefix, are a checkpoint of this family, complete or not."""

    def canonical(self, name: str) -> str:
        """Return the one spelling of a tensor name that has no prefix."""

    def configure(self, shapes: Mapping[str, Shape]) -> ConfigT:
        """Infer the configuration, a frozen dataclass, from canonical names and shapes alone.

        Raises:
            BadCheckpoint: a dimension can be read nowhere, or has an impossible value.
            Unsupported: a known variant of the family that is not implemented.
        """

    def entries(self, config: ConfigT) -> Iterator[Entry]:
        """List every tensor that a checkpoint of this configuration holds."""

    def heads(self, config: ConfigT) -> int:
        """Return how many attention heads Ulysses can split; 0 for a model whose tokens are not split over ranks."""

    def build(self, config: ConfigT) -> torch.nn.Module:
        """Build the module. The caller makes it a meta module and sets the dtype."""

    def fuse(
        self,
        config: ConfigT,
        module: torch.nn.Module,
        layout: ParallelLayout,
        dtype: torch.dtype,
        exceptions: Mapping[str, torch.dtype],
    ) -> FastPath | None:
        """Give ``module`` a faster forward on the checkpoint's own tensors, or return ``None`` where there is none.

        ``layout`` is this component's own. ``exceptions`` are the parameters of another dtype than ``dtype``.

        Raises:
            Unsupported: kernels or a precision that were asked for by name cannot be had in this layout, or from
                weights of these dtypes.
        """


class FastPath(Protocol):
    """A forward that reads the tensors of a checkpoint by canonical name, besides the module's own parameters."""

    @property
    def error(self) -> float | None:
        """The largest relative error against the plain forward that was let pass; ``None`` before the first."""

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Hand out how it compared with the plain forward, each comparison once."""

    def reserve(self) -> int:
        """Get the memory that :meth:`plug` fills with what it makes of a checkpoint; return its bytes, mostly 0."""

    def plug(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors until :meth:`unplug` or the next plug."""

    def unplug(self) -> None:
        """Hold no reference to lent memory, and nothing that was reserved."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """A checkpoint that was found to fit: its family, configuration, dtype, and key map by given names.

    ``dtype`` is that of most weights, by elements; ``exceptions`` are the parameters of another one. ``sources`` are
    the given names by canonical name, and ``skipped`` the given names of tensors that tell nothing.
    """

    family: Family[Any]
    config: Hashable
    dtype: torch.dtype
    exceptions: Mapping[str, torch.dtype]
    key_map: Mapping[str, Slice]
    sources: Mapping[str, str]
    skipped: tuple[str, ...]


def main_dtype(family: Family[Any], tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the dtype of most elements: what a model of mixed dtypes computes in between its exceptions.

    Raises:
        UnsupportedDtype: some tensor has a dtype that cannot be run.
    """
    refused = [f"{name} is {info.dtype}" for name, info in sorted(tensors.items()) if info.dtype not in TORCH_DTYPES]
    if refused:
        raise UnsupportedDtype(
            f"{family.name}: weights cannot be run in these dtypes: lend them as {', '.join(TORCH_DTYPES)}; "
            f"{len(refused)} of {len(tensors)} tensors: {listed(refused)}",
            names=refused,
        )
    elements: Counter[str] = Counter()
    for info in tensors.values():
        elements[info.dtype] += math.prod(info.shape)
    return TORCH_DTYPES[elements.most_common(1)[0][0]]


def resolve(family: Family[Any], tensors: Mapping[str, TensorInfo]) -> Resolution:
    """Fit a checkpoint to a family: configuration, key map, and the check of every name and shape.

    All tensors but those that tell nothing have the same prefix.

    Raises:
        BadCheckpoint: missing, unexpected and wrongly shaped tensors.
        Unsupported: a variant of the family that is not implemented.
        UnsupportedDtype: see :func:`main_dtype`.
    """
    given, skipped, unexpected = _sort(family, tensors)
    for copy, original in family.tied.items():
        if copy in given:
            name = given.pop(copy)
            if tensors[name].shape == tensors[given.setdefault(original, name)].shape:
                skipped += [name] if name != given[original] else []
            else:
                unexpected.append(f"{name} (not of the shape of {given[original]}, of which it is a copy)")
    config = family.configure({canonical: tensors[name].shape for canonical, name in given.items()})
    prefix = _common_prefix(given)

    key_map: dict[str, Slice] = {}
    sources: dict[str, str] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in family.entries(config):
        found = given.pop(entry.source, None)
        if found is None:
            missing.append(prefix + entry.source)
            continue
        shape = tensors[found].shape
        if not _are_alike(shape, entry.shape):
            misshapen.append(f"{found} is {list(shape)}, expected {list(entry.shape)}")
            continue
        key_map.update(_slices(entry, found, shape))
        sources[entry.source] = found
    unexpected += given.values()
    if missing or unexpected or misshapen:
        raise _mismatch(family, config, missing, unexpected, misshapen)
    main = main_dtype(family, {name: tensors[name] for name in sources.values()})
    dtypes = {target: TORCH_DTYPES[tensors[part.source].dtype] for target, part in key_map.items()}
    exceptions = {target: dtype for target, dtype in dtypes.items() if dtype != main}
    return Resolution(family, config, main, exceptions, key_map, sources, tuple(skipped))


def check_targets(family: Family[Any], entries: Iterator[Entry], parameters: Mapping[str, Shape]) -> None:
    """Prove the other half of the bijection against the module that was really built.

    Raises:
        Internal: our own map leaves a parameter empty, fills it twice, or gives it another shape.
    """
    faults: list[str] = []
    unfilled = dict(parameters)
    for entry in entries:
        if sum(rows for _, rows in entry.targets) != entry.shape[0]:
            faults.append(f"rows of {entry.source} are not used exactly once")
        tail = entry.shape[1 : len(entry.shape) - entry.drop]
        for target, rows in entry.targets:
            shape = unfilled.pop(target, None)
            if shape is None:
                faults.append(f"{target} is filled twice or does not exist")
            elif shape != (rows, *tail):
                faults.append(f"{target} is {list(shape)}, but its slice of {entry.source} is {[rows, *tail]}")
    faults += [f"{target} is filled by nothing" for target in unfilled]
    if faults:
        raise Internal(
            f"the key map of {family.name} does not fit its module: {listed(faults, joint='; ')}", names=faults
        )


def _sort(family: Family[Any], names: Collection[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Sort names into those of the model, by canonical name, those that tell nothing, and those that belong nowhere."""
    groups = by_prefix(names)
    claimed = [prefix for prefix in groups if family.claims(groups[prefix])]
    own = max(claimed, key=lambda prefix: len(groups[prefix]), default="")
    given: dict[str, str] = {}
    skipped: list[str] = []
    unexpected: list[str] = []
    for prefix, group in groups.items():
        for bare, spelled in group.items():
            canonical = family.canonical(bare)
            if tells_nothing(canonical) or (family.ignored and family.ignored.search(canonical)):
                skipped += spelled
            elif prefix != own:
                unexpected += spelled
            else:
                first, *again = spelled
                if canonical in given:
                    again.insert(0, first)
                kept = given.setdefault(canonical, first)
                unexpected += [f"{name} (the same tensor as {kept})" for name in again]
    return given, skipped, unexpected


def _are_alike(shape: Shape, expected: Shape) -> bool:
    """Whether shapes differ by trailing ones at most: linear layers and convolutions of 1x1 hold the same numbers."""
    shorter, longer = sorted((shape, expected), key=len)
    return longer[: len(shorter)] == shorter and all(side == 1 for side in longer[len(shorter) :])


def _slices(entry: Entry, source: str, given: Shape) -> Iterator[tuple[str, Slice]]:
    start = 0
    tail = entry.shape[1 : len(entry.shape) - entry.drop]
    for target, rows in entry.targets:
        yield target, Slice(source, start, start + rows, (rows, *tail) if tail != given[1:] else None)
        start += rows


def _common_prefix(given: Mapping[str, str]) -> str:
    """The prefix that most given names carry, to spell missing names as this file would."""
    prefixes = Counter(name[: -len(canonical)] for canonical, name in given.items() if name.endswith(canonical))
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _mismatch(
    family: Family[Any], config: Hashable, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> BadCheckpoint:
    lists = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrongly shaped": sorted(misshapen)}
    parts = [f"{len(names)} {label}: {listed(names)}" for label, names in lists.items() if names]
    return BadCheckpoint(
        f"checkpoint does not fit {family.name}: lend all of its tensors, and nothing else; "
        f"{'; '.join(parts)} (read as {config})",
        names=[f"{label}: {name}" for label, names in lists.items() for name in names],
    )
