"""Match the tensors of a checkpoint to a family: check every name and shape, and make the key map."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xditd.gpu_workers.models.entries import (
    TORCH_DTYPES,
    Entry,
    Shape,
    Slice,
    TensorInfo,
    dtype_of_most,
    half_precision,
)
from xditd.gpu_workers.models.family import Family
from xditd.gpu_workers.models.pretrained import LoadDtypes
from xditd.gpu_workers.packed.dequantise import can_dequantise
from xditd.ipc.errors import BadCheckpoint, Internal, Unsupported, UnsupportedDtype
from xditd.ipc.name_lists import listed
from xditd.ipc.packed import TILE_ROWS, PackedWeight
from xditd.ipc.tensor_names import by_prefix, tells_nothing


@dataclass(frozen=True, slots=True)
class Resolution:
    """The result of a match: family, configuration, dtype, and key map by the checkpoint's own names.

    ``dtype`` is that of most elements; ``exceptions`` are the parameters of another one. ``sources`` are the
    checkpoint's names by canonical name, and ``skipped`` its names that no job reads. ``packed`` are the packed weights
    by the checkpoint's names, which count as tensors of ``compute_dtype``. ``dtypes`` has the dtype that each tensor is
    computed with; ``converted`` are the plain tensors that have another dtype in the checkpoint.
    """

    family: Family[Any]
    config: Hashable
    dtype: torch.dtype
    exceptions: Mapping[str, torch.dtype]
    key_map: Mapping[str, Slice]
    sources: Mapping[str, str]
    skipped: tuple[str, ...]
    packed: Mapping[str, PackedWeight]
    compute_dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    converted: frozenset[str]

    @property
    def formats(self) -> frozenset[tuple[str, str]]:
        """The parameters that packed weights fill, with the format of each."""
        return frozenset(
            (target, self.packed[part.source].format)
            for target, part in self.key_map.items()
            if part.source in self.packed
        )


def dtypes_of(
    family: Family[Any], tensors: Mapping[str, TensorInfo], compute_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the dtype that each tensor is computed with: its own, or of packed weights the compute dtype.

    That is ``compute_dtype``; else float32 in text encoders, which compute in it; else the half precision of most
    elements of plain tensors; else bfloat16.

    Raises:
        UnsupportedDtype: some plain tensor has a dtype that cannot be run.
        Unsupported: some packed weight has a format that cannot be dequantised.
    """
    plain = {name: info for name, info in tensors.items() if info.packed is None}
    refused = [f"{name} is {info.dtype}" for name, info in sorted(plain.items()) if info.dtype not in TORCH_DTYPES]
    if refused:
        raise UnsupportedDtype(
            f"{family.name}: weights cannot be run in these dtypes: lend them as {', '.join(TORCH_DTYPES)}; "
            f"{len(refused)} of {len(tensors)} tensors: {listed(refused)}",
            names=refused,
        )
    unknown = [
        f"{name} is {info.packed.format}"
        for name, info in sorted(tensors.items())
        if info.packed is not None and not can_dequantise(info.packed.format)
    ]
    if unknown:
        raise Unsupported(
            f"{family.name}: these formats of packed weights cannot be run: {listed(unknown)}", names=unknown
        )
    found = {name: TORCH_DTYPES[info.dtype] for name, info in plain.items()}
    if len(plain) < len(tensors):
        own = torch.float32 if family.kind == "text_encoder" else half_precision(plain.values())
        compute = compute_dtype or own or torch.bfloat16
        found.update({name: compute for name in tensors if name not in plain})
    return found


def resolve(
    family: Family[Any],
    tensors: Mapping[str, TensorInfo],
    others: Collection[Family[Any]] = (),
    compute_dtype: torch.dtype | None = None,
    load_dtypes: LoadDtypes | None = None,
) -> Resolution:
    """Match a checkpoint to a family: read its configuration, check every name and shape, and make the key map.

    With ``load_dtypes`` the tensors get the dtypes in which a class loads them. Without it they keep their own dtypes,
    as they do in text encoders, which compute in float32 in any case.

    All tensors that jobs read have the same prefix. Tensors under another prefix that one of ``others`` claims are of
    another component in the same file, and skipped.

    Raises:
        BadCheckpoint: missing, unexpected and wrongly shaped tensors.
        Unsupported: a variant of the family that is not implemented, or a packed weight that cannot be sliced as the
            module needs it.
        UnsupportedDtype: see :func:`dtypes_of`.
    """
    given, skipped, unexpected = _sort_names(family, tensors, others)
    _drop_tied_copies(family, tensors, given, skipped, unexpected)
    config = family.configure({canonical: tensors[name].shape for canonical, name in given.items()})
    key_map, sources = _map_entries(family, config, tensors, given, unexpected)
    read = {name: tensors[name] for name in sources.values()}
    own = dtypes_of(family, read, compute_dtype)
    if load_dtypes is None or family.kind == "text_encoder":
        main, dtypes = dtype_of_most((own[name], info.shape) for name, info in read.items()), own
    else:
        main, dtypes = load_dtypes.main, {name: load_dtypes.of_tensor(name) for name in read}
    exceptions = {target: dtypes[part.source] for target, part in key_map.items() if dtypes[part.source] != main}
    packed = {name: info.packed for name, info in read.items() if info.packed is not None}
    _check_slices(family, key_map, packed)
    compute = next((own[name] for name in packed), main)
    return Resolution(
        family=family,
        config=config,
        dtype=main,
        exceptions=exceptions,
        key_map=key_map,
        sources=sources,
        skipped=tuple(skipped),
        packed=packed,
        compute_dtype=compute,
        dtypes=dtypes,
        converted=frozenset(name for name in read if name not in packed and dtypes[name] != own[name]),
    )


def _drop_tied_copies(
    family: Family[Any],
    tensors: Mapping[str, TensorInfo],
    given: dict[str, str],
    skipped: list[str],
    unexpected: list[str],
) -> None:
    """Move names of tied tensors from ``given`` to the skipped names, or to the unexpected ones if shapes differ.

    Where only the copy is in the checkpoint, it takes the original's place.
    """
    for copy, original in family.tied.items():
        if copy in given:
            name = given.pop(copy)
            if tensors[name].shape == tensors[given.setdefault(original, name)].shape:
                skipped += [name] if name != given[original] else []
            else:
                unexpected.append(f"{name} (not of the shape of {given[original]}, of which it is a copy)")


def _map_entries(
    family: Family[Any],
    config: Hashable,
    tensors: Mapping[str, TensorInfo],
    given: Mapping[str, str],
    unexpected: list[str],
) -> tuple[dict[str, Slice], dict[str, str]]:
    """Return the key map, and the checkpoint's names by canonical name.

    Raises:
        BadCheckpoint: missing, unexpected and wrongly shaped tensors.
    """
    key_map: dict[str, Slice] = {}
    sources: dict[str, str] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    left = dict(given)
    for entry in family.entries(config, given):
        found = left.pop(entry.source, None)
        if found is None:
            missing.append(_common_prefix(given, entry.source) + entry.source)
            continue
        shape = tensors[found].shape
        if not _differ_by_ones_alone(shape, entry.shape) and not _lacks_leading_ones(shape, entry):
            misshapen.append(f"{found} is {list(shape)}, expected {list(entry.shape)}")
            continue
        key_map.update(_slices(entry, found, shape))
        sources[entry.source] = found
    unexpected = [*unexpected, *left.values()]
    if missing or unexpected or misshapen:
        raise _mismatch(family, config, missing, unexpected, misshapen)
    return key_map, sources


def _check_slices(family: Family[Any], key_map: Mapping[str, Slice], packed: Mapping[str, PackedWeight]) -> None:
    """Refuse slices of packed weights at rows where their scales cannot be sliced without a copy."""
    refused: list[str] = []
    for part in key_map.values():
        weight = packed.get(part.source)
        if weight is None:
            continue
        inside = [row for row in (part.start, part.stop) if row % weight.row_step and row != weight.rows]
        if inside:
            refused.append(f"{weight.weight} ({weight.format}) at row {inside[0]}")
    if refused:
        raise Unsupported(
            f"{family.name}: scales of packed weights lie in tiles of {TILE_ROWS} rows, and the model slices these "
            f"inside a tile: {listed(refused)}; lend the model in another format",
            names=refused,
        )


def check_targets(family: Family[Any], entries: Iterator[Entry], parameters: Mapping[str, Shape]) -> None:
    """Check that the entries of a family fill every parameter of its module exactly once.

    Raises:
        Internal: they leave a parameter empty, fill it twice, or give it another shape.
    """
    faults: list[str] = []
    unfilled = dict(parameters)
    for entry in entries:
        if sum(rows for _, rows in entry.targets) != entry.shape[0]:
            faults.append(f"rows of {entry.source} are not used exactly once")
        if entry.view is not None and (len(entry.targets) > 1 or math.prod(entry.view) != math.prod(entry.shape)):
            faults.append(f"{entry.source} cannot be seen as {list(entry.view)}")
        for target, rows in entry.targets:
            shape, seen = unfilled.pop(target, None), _parameter_shape(entry, rows)
            if shape is None:
                faults.append(f"{target} is filled twice or does not exist")
            elif shape != seen:
                faults.append(f"{target} is {list(shape)}, but its slice of {entry.source} is {list(seen)}")
    faults += [f"{target} is filled by nothing" for target in unfilled]
    if faults:
        raise Internal(
            f"the key map of {family.name} does not fit its module: {listed(faults, joint='; ')}", names=faults
        )


def _sort_names(
    family: Family[Any], names: Collection[str], others: Collection[Family[Any]]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Sort names into those of the model (by canonical name), those to skip, and unexpected ones."""
    groups = by_prefix(names)
    claimed = [prefix for prefix in groups if family.claims(groups[prefix])]
    own = max(claimed, key=lambda prefix: len(groups[prefix]), default="")
    beside: re.Pattern[str] | None = getattr(family, "beside", None)
    given: dict[str, str] = {}
    skipped: list[str] = []
    unexpected: list[str] = []
    for prefix, group in groups.items():
        if prefix != own and any(other.claims(group) for other in others):
            skipped += [name for spelled in group.values() for name in spelled]
            continue
        for bare, spelled in group.items():
            canonical = family.canonical(bare)
            if tells_nothing(canonical) or (family.ignored and family.ignored.search(canonical)):
                skipped += spelled
            elif prefix != own and not (beside and beside.search(canonical)):
                unexpected += spelled
            else:
                first, *again = spelled
                if canonical in given:
                    again.insert(0, first)
                kept = given.setdefault(canonical, first)
                unexpected += [f"{name} (the same tensor as {kept})" for name in again]
    return given, skipped, unexpected


def _differ_by_ones_alone(shape: Shape, expected: Shape) -> bool:
    """Return whether shapes differ by trailing ones at most, as those of linear layers and 1x1 convolutions."""
    shorter, longer = sorted((shape, expected), key=len)
    return longer[: len(shorter)] == shorter and all(side == 1 for side in longer[len(shorter) :])


def _lacks_leading_ones(shape: Shape, entry: Entry) -> bool:
    """Return whether a tensor of one parameter is without its leading ones, which ggml's tools do not write."""
    ones = len(entry.shape) - len(shape)
    return ones > 0 and bool(shape) and len(entry.targets) == 1 and entry.shape == (1,) * ones + shape


def _slices(entry: Entry, source: str, given: Shape) -> Iterator[tuple[str, Slice]]:
    if _lacks_leading_ones(given, entry):
        ((target, rows),) = entry.targets
        yield target, Slice(source, 0, given[0], _parameter_shape(entry, rows))
        return
    start = 0
    for target, rows in entry.targets:
        seen = _parameter_shape(entry, rows)
        yield target, Slice(source, start, start + rows, seen if seen != (rows, *given[1:]) else None)
        start += rows


def _parameter_shape(entry: Entry, rows: int) -> Shape:
    """Return the shape of a parameter that has this number of rows of a source tensor."""
    return (rows, *entry.shape[1:]) if entry.view is None else entry.view


def _common_prefix(given: Mapping[str, str], missing: str) -> str:
    """Return the prefix of most names, or of those in the same part of the model, to spell a missing name as this file
    does."""
    part = missing.partition(".")[0]
    own = {canonical: name for canonical, name in given.items() if canonical.partition(".")[0] == part} or given
    prefixes = Counter(name[: -len(canonical)] for canonical, name in own.items() if name.endswith(canonical))
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
