"""Checkpoint files as ComfyUI reads them; what it cannot read is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import comfy.utils

from xditd.ipc.errors import Unsupported
from xditd.ipc.file_kinds import kind_of_file, shard_of

if TYPE_CHECKING:
    import torch


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a file with ComfyUI's own reader, which unpickles nothing but tensors.

    Raises:
        Unsupported: one of several files of a checkpoint, GGUF, a web page, or another file that ComfyUI does not read.
    """
    shard = shard_of(path)
    if shard is not None:
        raise Unsupported(f"{Path(path).stem}: this is {shard}")
    try:
        tensors: dict[str, torch.Tensor] = comfy.utils.load_torch_file(path, safe_load=True)
    except Exception as error:  # the reader raises whatever its libraries do
        found = kind_of_file(path)
        if found is None:
            raise
        raise Unsupported(f"{Path(path).stem}: this is {found}") from error
    return tensors
