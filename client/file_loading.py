"""Load checkpoint files into an arena from the page cache, without a copy of the whole files on the host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xditd.client.arenas import Arena
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.stored_tensors import Header
from xditd.ipc.transports.tensor_views import torch_dtype

if TYPE_CHECKING:
    import torch


def load_into_arena(files: Sequence[LentFile], headers: Sequence[Header], device: str) -> Arena:
    """Copy every tensor of open files to one arena on ``device``; the caller closes the arena.

    Raises:
        OutOfMemory: the device has too little free memory.
        StaleSource: a file changed while it was read.
    """
    from xditd.ipc.transports.host_shm import HostMapping

    mappings = [HostMapping(lent.fd, os.fstat(lent.fd).st_size, is_writable=False) for lent in files]
    stored: dict[str, torch.Tensor] = {}
    for mapping, header in zip(mappings, headers, strict=True):
        stored.update(_stored_tensors(mapping.bytes_tensor(), header))
    arena = Arena.copy_of(stored, device)
    stored.clear()  # a mapping with views cannot be closed
    try:
        for lent in files:
            lent.check_unchanged()
    except BaseException:
        arena.close()
        raise
    for mapping in mappings:
        mapping.close()
    return arena


def _stored_tensors(whole: torch.Tensor, header: Header) -> dict[str, torch.Tensor]:
    stored = {}
    for entry in header.tensors:
        flat = whole.narrow(0, entry.offset_bytes, entry.size_bytes)
        dtype = torch_dtype(entry.dtype)
        aligned = flat if entry.offset_bytes % dtype.itemsize == 0 else flat.clone()
        stored[entry.name] = aligned.view(dtype).view(entry.shape)
    return stored
