"""Read and write small safetensors files (embeddings, latents) without another dependency. Weights are lent instead."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from xditd.client.interrupts import interrupts_wait
from xditd.client.output_files import write_file
from xditd.ipc.addresses import check_is_there, expand_home
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.safetensors_header import read_header
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype
from xditd.ipc.transports.uploads import read_into

if TYPE_CHECKING:
    import torch

_CODES: Final = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def require_torch() -> None:
    """Import torch for the shell.

    An interrupt (Ctrl-C) waits until torch is there, a second one does not: torch imports numpy in C++, where the
    exception is dropped, and the program goes on without numpy.

    Raises:
        Unsupported: torch is not installed: the base install does not contain it.
    """
    try:
        with interrupts_wait():
            import torch  # noqa: F401
    except ImportError:
        raise Unsupported("torch: not installed here; pip install torch, or pip install 'xditd[workers]'") from None


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a file into CPU tensors that the caller owns.

    Raises:
        BadRequest: there is no such file.
        BadCheckpoint: not a valid safetensors file.
        StaleSource: the file changed while it was read.
    """
    import torch

    found_path = expand_home(os.fspath(path))
    check_is_there(found_path)
    file = LentFile(found_path)
    try:
        found: dict[str, torch.Tensor] = {}
        for stored in read_header(file.fd, file.path).tensors:
            data = bytearray(stored.size_bytes)
            read_into(memoryview(data), file.fd, stored.offset_bytes, file.path)
            dtype = torch_dtype(stored.dtype)
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            found[stored.name] = flat.view(stored.shape)
        file.check_unchanged()
        return found
    except OSError as error:
        raise file.unreadable(error) from error
    finally:
        file.close()


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write floating-point tensors to a safetensors file atomically, in the order given.

    Raises:
        BadRequest: a tensor of another dtype.
        OutputFailed: the path cannot be written, or the disk has no room.
    """
    write_file(path, *encode_tensors(tensors))


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> list[bytes]:
    """Encode floating-point tensors as the parts of a safetensors file, in the order given.

    Source: safetensors, README, "Format".

    Raises:
        BadRequest: a tensor of another dtype.
    """
    header: dict[str, object] = {}
    bodies: list[bytes] = []
    end = 0
    for name, tensor in tensors.items():
        code = _CODES.get(dtype_name(tensor.dtype))
        if code is None:
            raise BadRequest(f"{name}: dtype {dtype_name(tensor.dtype)} is not supported; use {', '.join(_CODES)}")
        plain = tensor.detach().cpu().contiguous()
        bodies.append(ctypes.string_at(plain.data_ptr(), plain.nbytes))
        header[name] = {"dtype": code, "shape": list(plain.shape), "data_offsets": [end, end + plain.nbytes]}
        end += plain.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format requires the data to start at a multiple of 8
    return [len(text).to_bytes(8, "little"), text, *bodies]
