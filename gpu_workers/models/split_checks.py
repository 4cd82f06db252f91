"""What is known of the calls of one module: which ranks may run them, and how they may be split over the ranks.

The first call of each case is run whole on every rank, then by rows and by tokens, and the results are compared. A case
is a method with the structure of its arguments; other weights do not change the verdict.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, NamedTuple

import torch

from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES
from xditd.gpu_workers.packed.linear import packed_layers
from xditd.gpu_workers.parallel.row_trees import Node, tensors_of
from xditd.ipc import limits
from xditd.ipc.status import SplitCheck
from xditd.ipc.transports.module_walk import is_describable

logger = logging.getLogger(__name__)

MAX_CASES: Final = 256
"""Cases that a module remembers; the one that was used longest ago is forgotten first."""

MAX_CHECKS: Final = 8
"""Checks of one method with the same tensors. Callers that pass a new number each time would be checked each time:
after that many, all ranks run their calls."""

TOLERANCE: Final = 1e-6
"""The tolerance of results in float32 and float64: the largest difference by the largest value. Another number of rows
in one product changes the last bits: 2e-7 to 8e-7 for tiny models of most classes."""

TOLERANCE_OF_HALVES: Final = 2e-2
"""The tolerance of results in bfloat16 and float16: the norm of the difference by that of the result. If exceeded, what
roundings change is measured (``rounding_noise``), and the tolerance is at least :data:`NOISES` times that, up to
:data:`MOST_NOISE`."""

NOISES: Final = 1.5
"""How many times the effect of roundings is allowed."""
MOST_NOISE: Final = 0.1
"""The largest tolerance, however much roundings change."""


@dataclass(frozen=True)
class Case:
    """The verdict on a case. ``result`` is the structure of its result; ``None``: every rank has to run such calls."""

    result: Node | None
    batch: int = 0
    """The number of rows that different ranks may share; 0 if one rank has to run all of them."""
    splits_tokens: bool = False
    """Whether all ranks may share the tokens of every row."""


@dataclass(frozen=True)
class CaseKey:
    """A method with the numerics of its caller, the tensors of its arguments, and their other values."""

    tensors: Hashable
    values: Hashable
    layout: int = 0
    """The serial of the layout of its LoRAs; 0 without."""

    @classmethod
    def of(cls, method: str, numerics: Hashable, arguments: Mapping[str, Any], batch: int) -> CaseKey:
        """Return the key of a call. Tensors on meta stand for tensors of caches.

        It says which tensors have equal rows: a check with such a tensor cannot show whether its dimension 0 are rows.
        """
        tensors: list[Hashable] = []
        values: list[Hashable] = []
        alike: list[torch.Tensor] = []
        _add(arguments, batch, tensors, values, alike)
        return cls((method, numerics, tuple(tensors), tuple(_read(alike))), tuple(values))

    def of_layout(self, serial: int) -> CaseKey:
        """Return the key of the same call with LoRAs of a layout (``static_branches``)."""
        return CaseKey((self.tensors, serial), self.values, serial)


def _read(flags: list[torch.Tensor]) -> Iterator[bool]:
    """Yield the flags, device by device, with one wait for each."""
    for device in sorted({each.device for each in flags}, key=str):
        yield from torch.stack([each for each in flags if each.device == device]).tolist()


def _add(value: Any, batch: int, tensors: list[Hashable], values: list[Hashable], alike: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        tensors.append((tuple(value.shape), value.dtype, value.device.type))
        values.append("tensor")
        if batch > 1 and value.ndim and value.shape[0] == batch and not value.is_meta:
            same = value.view(torch.uint8) if value.is_floating_point() and value.itemsize == 1 else value
            alike.append((same[1:] == same[:1]).all())
    elif isinstance(value, Mapping):
        values.append((type(value), len(value)))
        for key, each in value.items():
            values.append(repr(key))
            _add(each, batch, tensors, values, alike)
    elif isinstance(value, (list, tuple)):
        values.append((type(value), len(value)))
        for each in value:
            _add(each, batch, tensors, values, alike)
    elif isinstance(value, (set, frozenset)):
        values.append((type(value), tuple(sorted(map(repr, value)))))
    else:
        values.append(repr(value))


class SplitChecks:
    """The verdicts on the calls of one module. All ranks note the same ones in the same order; the one with ``reports``
    logs them and gives them to the status."""

    def __init__(self, *, reports: bool) -> None:
        self._reports = reports
        self._cases: dict[Hashable, Case] = {}
        self._checked: dict[Hashable, int] = {}
        self._new: list[SplitCheck] = []

    def find(self, key: CaseKey) -> Case | None:
        """Return the verdict on a case, ``None`` if it is to be checked."""
        case = self._cases.pop(key, None)
        if case is not None:
            self._cases[key] = case
        elif self._checked.get(key.tensors, 0) >= MAX_CHECKS:
            return Case(None)
        return case

    def count(self, key: CaseKey) -> None:
        """Count a check, whether or not it gives a verdict."""
        self._checked[key.tensors] = self._checked.pop(key.tensors, 0) + 1
        while len(self._checked) > MAX_CASES:
            del self._checked[next(iter(self._checked))]

    def note(self, key: CaseKey, case: Case, *checks: SplitCheck) -> None:
        """Note a verdict, and what is to be reported of it."""
        self._cases.pop(key, None)
        self._cases[key] = case
        while len(self._cases) > MAX_CASES:
            del self._cases[next(iter(self._cases))]
        if not self._reports:
            return
        self._new = [*self._new, *checks][-limits.MAX_SPLIT_CHECKS :]
        for each in checks:
            logger.info(
                "%s checked class=%s method=%s batch=%d error=%s tolerance=%g used=%s %s",
                each.split, each.class_name, each.method, each.batch, each.error, each.tolerance, each.is_used,
                each.detail,
            )  # fmt: skip

    def take_checks(self) -> tuple[SplitCheck, ...]:
        """Return the checks since the last call."""
        checks, self._new = self._new, []
        return tuple(checks)


class Difference(NamedTuple):
    """The relative error of a result, and the largest one that is allowed."""

    error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """The error by the tolerance."""
        return self.error / self.tolerance

    @property
    def is_allowed(self) -> bool:
        """Whether the error is at most the tolerance: NaN is not."""
        return self.error <= self.tolerance

    def with_noise(self, noise: float) -> Difference:
        """Return it with a tolerance of at least :data:`NOISES` times the ``noise``, an error that roundings make."""
        if not math.isfinite(noise):
            return self
        return Difference(self.error, max(self.tolerance, min(NOISES * noise, MOST_NOISE)))


def difference(found: torch.Tensor, expected: torch.Tensor, *, in_halves: bool) -> Difference:
    """Compare a result with the one that is expected, of the same shape.

    ``in_halves``: the forward computed in bfloat16 or float16, whatever the dtype of its result.
    """
    is_half = in_halves or expected.dtype in HALF_DTYPES
    tolerance = TOLERANCE_OF_HALVES if is_half else TOLERANCE
    if not (expected.is_floating_point() or expected.is_complex()):
        return Difference(0.0 if torch.equal(found, expected) else math.inf, tolerance)
    if expected.numel() == 0:
        return Difference(0.0, tolerance)
    # Complex numbers stay complex: abs and norm give their magnitudes.
    wide = expected.dtype if expected.itemsize >= torch.float32.itemsize else torch.float32
    by, size = found.to(wide) - expected.to(wide), expected.to(wide)
    error, size = (by.norm(), size.norm()) if is_half else (by.abs().max(), size.abs().max())
    if float(error) == 0.0:
        return Difference(0.0, tolerance)
    relative = float(error) / float(size) if float(size) else math.inf
    return Difference(relative if math.isfinite(relative) else math.inf, tolerance)


def largest_difference(found: Any, expected: Any, *, in_halves: bool) -> Difference:
    """Return the difference of two results of one structure that is largest by its tolerance."""
    pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
    each = [difference(mine, its, in_halves=in_halves) for mine, its in pairs]
    none = Difference(0.0, TOLERANCE_OF_HALVES if in_halves else TOLERANCE)
    return max(each, key=attrgetter("ratio"), default=none)


def computes_in_halves(module: torch.nn.Module) -> bool:
    """Return whether a module computes in bfloat16 or float16, at least in part, without autocast."""
    return any(
        each.dtype in HALF_DTYPES for each in (*module.parameters(), *(layer.weight for layer in packed_layers(module)))
    )


class ModuleSnapshot:
    """What a forward could change in a module: attributes, buffers, and the tensors and lists in them."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._leaves = _leaves_of(module)

    @property
    def is_same(self) -> bool:
        """Whether the module is as it was."""
        now = _leaves_of(self._module)
        return len(now) == len(self._leaves) and all(
            _is_same(before, after) for before, after in zip(self._leaves, now, strict=True)
        )


_MAX_DEPTH: Final = 6


def _leaves_of(module: torch.nn.Module) -> list[Any]:
    found: list[Any] = []
    for each in module.modules():
        _add_leaves(vars(each), found, 0)
    return found


def _add_leaves(value: Any, found: list[Any], depth: int) -> None:
    if isinstance(value, torch.Tensor):
        found += (value, None if value.is_inference() else value._version)  # those count no writes
    elif isinstance(value, torch.nn.Module) or depth > _MAX_DEPTH:
        found.append(value)  # submodules are visited by themselves
    elif isinstance(value, Mapping):
        found.append(len(value))
        for key, each in value.items():
            found.append(repr(key))
            _add_leaves(each, found, depth + 1)
    elif isinstance(value, (list, tuple)):
        found.append(len(value))
        for each in value:
            _add_leaves(each, found, depth + 1)
    elif is_describable(value):
        _add_leaves(vars(value), found, depth + 1)
    else:
        found.append(value)


def _is_same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    return type(before) is type(after) and isinstance(before, (bool, int, float, str)) and before == after
