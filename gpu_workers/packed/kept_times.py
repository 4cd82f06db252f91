"""The measured times of products, kept on disk for these versions and this kind of device."""

from __future__ import annotations

import hashlib
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec
import torch

from xditd.gpu_workers.kernels.cache_folder import own_folder, write_whole
from xditd.gpu_workers.packed import product_times
from xditd.gpu_workers.packed.product_times import PRODUCT_NAMES, ProductKind

logger = logging.getLogger(__name__)

_SCHEMA: Final = 1
"""The version of the file. Raise it also when kernels change so much that they have to be measured again."""
_MAX_FILE_BYTES: Final = 2**20

Times = dict[str, float]
"""Milliseconds by the name of a product."""


class KeptTimes:
    """The times of products on ``device``. They are in a file below ``folder``, which no other user can write to."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._known: dict[str, Times] | None = None
        """Times by the label of a kind, once the file was read."""

    def of(self, kind: ProductKind) -> Times | None:
        """Return the times of a kind, and measure them if they are not known; ``None`` if that fails.

        Raises:
            Unsupported: others can write to the folder.
            OSError: the folder cannot be made.
        """
        if self._known is None:
            own_folder(self._folder, "it says which products are fast")
            self._known = _read(self._path)
        found = self._known.get(kind.label)
        if found is None:
            found = self._measured(kind)
            if found is not None:
                self._known[kind.label] = found
                self._write(self._known)
        return found

    def _measured(self, kind: ProductKind) -> Times | None:
        try:
            found = product_times.measure(kind, self._device)
        except Exception as error:  # noqa: BLE001  # of torch or Triton, such as that of a GPU without free memory
            logger.warning("products are not measured kind=%r: %s", kind.label, str(error).partition("\n")[0])
            return None
        finally:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # else torch keeps the memory from other programs
        logger.info("products measured kind=%r %s", kind.label, found)
        return found

    def _write(self, times: dict[str, Times]) -> None:
        content = msgspec.json.format(msgspec.json.encode(_File(_SCHEMA, times)), indent=1)
        try:
            write_whole(self._path, content)
        except OSError as error:
            logger.warning("measured products are not kept: %s", error)

    @property
    def _path(self) -> Path:
        return self._folder / f"{_versions(self._device)}.json"


class _File(msgspec.Struct, frozen=True):
    schema: int
    measured: dict[str, Times]


def _read(path: Path) -> dict[str, Times]:
    """Return times by the label of a kind; none, if the file is missing, or is not one that this module has written."""
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
    names = set(PRODUCT_NAMES)
    return {
        label: took
        for label, took in found.measured.items()
        if took.keys() <= names and {"reference", "native"} <= took.keys() and all(ms > 0 for ms in took.values())
    }


def _versions(device: torch.device) -> str:
    """Return the name of the file for these versions and this kind of device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = " ".join([torch.__version__, *map(_version, ("triton", "comfy-kitchen", "xditd")), kind, str(_SCHEMA)])
    return hashlib.blake2b(versions.encode(), digest_size=8).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
