"""Read checkpoint files with ComfyUI's reader, and name the kind of those that it cannot read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.utils

from xditd.ipc.errors import Unsupported
from xditd.ipc.file_kinds import kind_of_file, shard_of

if TYPE_CHECKING:
    import torch


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a file with ComfyUI's own reader; see :func:`read_with_metadata`."""
    return read_with_metadata(path)[0]


def read_with_metadata(path: str) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Read the tensors and the metadata of a file with ComfyUI's own reader, which unpickles only tensors.

    Raises:
        Unsupported: one shard of a checkpoint, GGUF, a web page, or another file that ComfyUI does not read.
    """
    shard = shard_of(path)
    if shard is not None:
        raise Unsupported(f"{Path(path).stem}: this is {shard}")
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:  # the reader's libraries raise errors of any class
        found = kind_of_file(path)
        if found is None:
            raise
        raise Unsupported(f"{Path(path).stem}: this is {found}") from error
    return tensors, metadata or {}
