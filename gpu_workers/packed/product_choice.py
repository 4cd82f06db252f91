"""Which product of a packed weight runs: the reference, torch's native one, or comfy-kitchen's.

With ``auto`` each kind of product is measured once on this card, and what was found is kept on disk for these versions
and this kind of card. Rank 0 measures and all ranks follow it, so that results do not depend on the rank. The number of
activations plays no part: a share of the tokens is multiplied as all of them would be, which keeps bits under splits.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import torch

from xditd.gpu_workers.kernels.cache_folder import own_folder, write_whole
from xditd.gpu_workers.packed import product_times
from xditd.gpu_workers.packed.kitchen import kitchen_product
from xditd.gpu_workers.packed.native_products import memory_fault, native_product, qualifies
from xditd.gpu_workers.packed.product_times import ProductKind
from xditd.gpu_workers.packed.tensors import PackedTensor, Product
from xditd.ipc.errors import Unsupported
from xditd.ipc.settings.daemon import NativeProducts

logger = logging.getLogger(__name__)

ProductName = Literal["reference", "native", "kitchen"]

_NAMES: Final[tuple[ProductName, ...]] = ("reference", "native", "kitchen")
_SCHEMA: Final = 1
"""The version of the file. Raise it also when kernels change so much that they have to be measured again."""
_MAX_FILE_BYTES: Final = 2**20
_LEAST_SIDE: Final = 1024
_MOST_SIDE: Final = 8192
"""The sides of weights that are measured: smaller and larger ones count as these."""
_GAIN: Final = 0.97
"""A native product has to take at most this part of the time of the reference, which does not round the input."""


class Decision(NamedTuple):
    """Which product runs, and, if it is the reference, why no other one does."""

    product: ProductName
    reason: str = ""

    def function_for(self, packed: PackedTensor) -> Product | None:
        """Return the product for a weight of this kind, or ``None`` for the reference.

        Memory that torch does not take is left to the reference, too.
        """
        if self.product == "reference" or memory_fault(packed.values) is not None:
            return None
        return native_product if self.product == "native" else kitchen_product


class ProductChoice:
    """The choices of this process. All ranks ask for the same kinds in the same order.

    ``exchange`` gives this rank's number and returns those of all ranks, as ``rank_sync.share_value`` does.
    """

    def __init__(
        self,
        mode: NativeProducts,
        device: torch.device,
        folder: Path,
        *,
        exchange: Callable[[int], list[int]] = lambda value: [value],
        is_leader: bool = True,
    ) -> None:
        self._mode = mode
        self._device = device
        self._folder = folder
        self._exchange = exchange
        self._is_leader = is_leader
        self._known: dict[ProductKind, Decision] = {}
        self._fastest_of: dict[ProductKind, Decision] = {}
        """Rank 0's decisions by the kinds that are measured (:func:`class_of`)."""
        self._measured: dict[str, dict[str, float]] | None = None

    def choose(self, kinds: Iterable[ProductKind]) -> dict[ProductKind, Decision]:
        """Decide for each kind, whose ``k`` and ``n`` are those of whole weights; measure what is not known yet.

        If others can write to the folder of measurements, or it cannot be made, the reference runs.
        """
        return {kind: self._decide(kind) for kind in kinds}

    def _decide(self, kind: ProductKind) -> Decision:
        if self._mode == "never" or (self._mode == "auto" and self._device.type == "cpu"):
            why = "the setting native_products is never"
            if self._mode == "auto":
                why = "on the CPU the setting native_products has to be always"
            return Decision("reference", kind.refusal or qualifies(kind.format, kind.k, kind.n, self._device) or why)
        found = self._known.get(kind)  # not by its class: which kinds qualify may depend on the rank's card
        if found is None:
            found = self._known[kind] = self._agree(kind)
        return found

    def _agree(self, kind: ProductKind) -> Decision:
        """Decide on rank 0; a product that one rank does not have runs on none."""
        reason = kind.refusal or qualifies(kind.format, kind.k, kind.n, self._device)
        own = Decision("reference", reason) if reason else Decision("native")
        if self._is_leader and reason is None and self._mode == "auto":
            try:
                own = self._fastest(class_of(kind))
            except (Unsupported, OSError) as error:  # all ranks are in this exchange
                own = Decision("reference", str(error))
        theirs = self._exchange(_NAMES.index(own.product))
        agreed = _NAMES[theirs[0]]
        if agreed == "reference" or 0 in theirs:
            return Decision("reference", own.reason or "rank 0 chose the reference, or a rank has no native product")
        return Decision(agreed)

    def _fastest(self, kind: ProductKind) -> Decision:
        if kind not in self._fastest_of:
            self._fastest_of[kind] = self._compare(kind)
        return self._fastest_of[kind]

    def _compare(self, kind: ProductKind) -> Decision:
        took = self._times(kind)
        if took is None:
            return Decision("reference", "products could not be measured; the log says why")
        best = min((name for name in _NAMES[1:] if name in took), key=took.__getitem__)
        if took[best] <= _GAIN * took["reference"]:
            return Decision(best)
        return Decision(
            "reference", f"measured: {took['reference']:.2f} ms dequantised, {took[best]:.2f} ms {best} ({kind.label})"
        )

    def _times(self, kind: ProductKind) -> dict[str, float] | None:
        if self._measured is None:
            own_folder(self._folder, "it says which products are fast")
            self._measured = _read(self._path)
        found = self._measured.get(kind.label)
        if found is not None:
            return found
        try:
            found = product_times.measure(kind, self._device)
        except Exception as error:  # noqa: BLE001  # of torch or Triton, such as that of a GPU without free memory
            logger.warning("products are not measured kind=%r: %s", kind.label, str(error).partition("\n")[0])
            return None
        finally:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # else torch keeps the memory from other programs
        logger.info("products measured kind=%r %s", kind.label, found)
        self._measured[kind.label] = found
        content = msgspec.json.format(msgspec.json.encode(_File(_SCHEMA, self._measured)), indent=1)
        try:
            write_whole(self._path, content)
        except OSError as error:
            logger.warning("measured products are not kept: %s", error)
        return found

    @property
    def _path(self) -> Path:
        return self._folder / f"{_versions(self._device)}.json"


def class_of(kind: ProductKind) -> ProductKind:
    """Return the kind that is measured for this one: its sides are the powers of 2 below, from 1024 to 8192."""
    k, n = (min(_MOST_SIDE, max(_LEAST_SIDE, 1 << (side.bit_length() - 1))) for side in (kind.k, kind.n))
    return kind._replace(k=k, n=n)


class _File(msgspec.Struct, frozen=True):
    schema: int
    measured: dict[str, dict[str, float]]


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Return milliseconds by kind and product; nothing, if the file is missing, or is none of ours."""
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=_File)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        logger.warning("measured products are not read: %s: %s", path, error)
        return {}
    if found.schema != _SCHEMA:
        return {}
    return {
        label: took
        for label, took in found.measured.items()
        if took.keys() <= set(_NAMES) and {"reference", "native"} <= took.keys() and all(ms > 0 for ms in took.values())
    }


def _versions(device: torch.device) -> str:
    """Return the name of the file for these versions and this kind of device."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = " ".join([torch.__version__, *map(_version, ("triton", "comfy-kitchen", "xditd")), card, str(_SCHEMA)])
    return hashlib.blake2b(versions.encode(), digest_size=8).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
