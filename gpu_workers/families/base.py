"""What a model family has to say, and the check that a checkpoint fits it exactly.

A family describes a checkpoint as a list of :class:`Entry`: one source tensor, its shape, and the
module parameters that it fills, one below the other along its first dimension. From that list follow
the key map (:class:`Slice`: every parameter is a *view* of one source) and the proof that it is a
bijection: each source element used once, each parameter filled once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch

from xditd.ipc.errors import BadCheckpoint, Internal, UnsupportedDtype

if TYPE_CHECKING:
    from xditd.gpu_workers.layouts import ParallelLayout
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
    def unused(self) -> Collection[str]:
        """Canonical names of tensors that files hold and no job reads, of any dtype."""

    def claims(self, names: Collection[str]) -> bool:
        """Say whether these tensor names are a checkpoint of this family, complete or not."""

    def canonical(self, name: str) -> str:
        """Return the one spelling of a tensor name: no prefix, no alias."""

    def configure(self, shapes: Mapping[str, Shape]) -> ConfigT:
        """Infer the configuration, a frozen dataclass, from canonical names and shapes alone.

        Raises:
            BadCheckpoint: a dimension can be read nowhere, or has an impossible value.
            Unsupported: a known variant of the family that is not implemented.
        """

    def entries(self, config: ConfigT) -> Iterator[Entry]:
        """List every tensor that a checkpoint of this configuration holds."""

    def check_layout(self, config: ConfigT, layout: ParallelLayout) -> None:
        """Raise ``Unsupported`` if this configuration cannot be split as ``layout`` says."""

    def build(self, config: ConfigT) -> torch.nn.Module:
        """Build the module. The caller makes it a meta module and sets the dtype."""

    def fuse(
        self, config: ConfigT, module: torch.nn.Module, layout: ParallelLayout, dtype: torch.dtype
    ) -> FastPath | None:
        """Give ``module`` a faster forward on the checkpoint's own tensors, or return ``None`` where there is none.

        Raises:
            Unsupported: the layout's precision cannot be had from weights of this dtype.
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

    ``sources`` are the given names by canonical name.
    """

    family: Family[Any]
    config: Hashable
    dtype: torch.dtype
    key_map: Mapping[str, Slice]
    sources: Mapping[str, str]


def check_dtype(family: Family[Any], tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the one dtype of all tensors.

    Raises:
        UnsupportedDtype: some tensor has a dtype that cannot be run, or dtypes are mixed; all such tensors are named.
    """
    refused = sorted(name for name, info in tensors.items() if info.dtype not in TORCH_DTYPES)
    if refused:
        named = ", ".join(f"{name} is {tensors[name].dtype}" for name in refused)
        raise UnsupportedDtype(
            f"{family.name}: {len(refused)} of {len(tensors)} tensors have a dtype that cannot be run: {named}; "
            f"lend them as {', '.join(TORCH_DTYPES)}"
        )
    ranking = Counter(info.dtype for info in tensors.values()).most_common()
    main = ranking[0][0]
    if len(ranking) > 1:
        named = ", ".join(f"{name} is {info.dtype}" for name, info in sorted(tensors.items()) if info.dtype != main)
        raise UnsupportedDtype(f"{family.name}: dtypes are mixed: most tensors are {main}, but {named}; lend one dtype")
    return TORCH_DTYPES[main]


def resolve(family: Family[Any], tensors: Mapping[str, TensorInfo]) -> Resolution:
    """Fit a checkpoint to a family: configuration, key map, and the check of every name and shape.

    Raises:
        BadCheckpoint: names every missing, unexpected and wrongly shaped tensor.
        Unsupported: a variant of the family that is not implemented.
        UnsupportedDtype: see :func:`check_dtype`.
    """
    given: dict[str, str] = {}
    unexpected: list[str] = []
    for name in tensors:
        canonical = family.canonical(name)
        if canonical in given:
            unexpected.append(f"{name} (the same tensor as {given[canonical]})")
        else:
            given[canonical] = name
    idle = {given.pop(name) for name in family.unused if name in given}
    for copy, original in family.tied.items():
        if copy in given:
            name = given.pop(copy)
            if tensors[name].shape == tensors[given.setdefault(original, name)].shape:
                idle.update({name} - {given[original]})
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
        if shape != entry.shape:
            misshapen.append(f"{found} is {list(shape)}, expected {list(entry.shape)}")
            continue
        key_map.update(_slices(entry, found))
        sources[entry.source] = found
    unexpected += given.values()
    if missing or unexpected or misshapen:
        raise BadCheckpoint(_mismatch(family, config, missing, unexpected, misshapen))
    used = {name: info for name, info in tensors.items() if name not in idle}
    return Resolution(family, config, check_dtype(family, used), key_map, sources)


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
        raise Internal(f"the key map of {family.name} does not fit its module: {'; '.join(faults)}")


def _slices(entry: Entry, source: str) -> Iterator[tuple[str, Slice]]:
    start = 0
    tail = entry.shape[1 : len(entry.shape) - entry.drop]
    for target, rows in entry.targets:
        yield target, Slice(source, start, start + rows, (rows, *tail) if entry.drop else None)
        start += rows


def _common_prefix(given: Mapping[str, str]) -> str:
    """The prefix that most given names carry, to spell missing names as this file would."""
    prefixes = Counter(name[: -len(canonical)] for canonical, name in given.items() if name.endswith(canonical))
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _mismatch(
    family: Family[Any], config: Hashable, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> str:
    parts = [
        f"{len(names)} {label}: {', '.join(sorted(names))}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
        if names
    ]
    return f"checkpoint does not fit {family.name} with {config}: {'; '.join(parts)}"
