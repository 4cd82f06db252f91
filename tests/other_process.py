"""A second process for tests of shared memory. Does what one JSON object a line asks, and answers with one.

Run by the ``other_process`` fixtures. It imports torch only when it is asked to map or read something.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import msgspec

from xditd.ipc.errors import XditdError
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.tensors import Block, FileBlock, HostShmBlock
from xditd.ipc.transports.file import LentFile, map_file
from xditd.ipc.transports.host_shm import HostArena, map_shm


class Servant:
    """Holds at most one arena, one lent file and one mapping."""

    def __init__(self) -> None:
        self.arena: HostArena | None = None
        self.file: LentFile | None = None
        self.mapping: Any = None

    def identify(self) -> Any:
        return plain(identify(os.getpid()))

    def export(self, size_bytes: int, content: str = "") -> Any:
        self.arena = HostArena(size_bytes)
        self.poke(0, content)
        return plain(self.arena.block())

    def poke(self, offset: int, content: str) -> None:
        data = bytes.fromhex(content)
        with self.arena.view(offset, len(data)) as view:
            view[:] = data

    def peek(self, offset: int, length: int) -> str:
        with self.arena.view(offset, length) as view:
            return view.hex()

    def close_arena(self) -> None:
        self.arena.close()

    def export_file(self, path: str) -> Any:
        self.file = LentFile(path)
        return plain(self.file.block())

    def map(self, block: Any, exporter: Any, is_writable: bool = False) -> None:
        found = msgspec.convert(block, Block)
        owner = msgspec.convert(exporter, ProcessIdentity)
        if isinstance(found, FileBlock):
            self.mapping = map_file(found, owner)
        elif isinstance(found, HostShmBlock):
            self.mapping = map_shm(found, owner, is_writable=is_writable)
        else:
            from xditd.ipc.transports.cuda_ipc import CudaMapping

            self.mapping = CudaMapping(found, 0)
            self.mapping.check_size()

    def read(self, offset: int, length: int) -> str:
        return bytes(self.mapping.bytes_tensor()[offset : offset + length].tolist()).hex()

    def write(self, offset: int, content: str) -> None:
        import torch

        values = torch.tensor(list(bytes.fromhex(content)), dtype=torch.uint8)
        whole = self.mapping.bytes_tensor()
        whole[offset : offset + len(values)] = values.to(whole.device)
        if whole.is_cuda:
            torch.cuda.synchronize()

    def unmap(self) -> None:
        self.mapping.close()

    def export_gpu(self, size_bytes: int, fill: int) -> Any:
        from xditd.ipc.transports.cuda_ipc import DeviceArena

        self.arena = DeviceArena(size_bytes, 0)
        self.arena.bytes.fill_(fill)
        return plain(self.arena.block())


def plain(struct: msgspec.Struct) -> Any:
    return msgspec.to_builtins(struct)


def main() -> None:
    servant = Servant()
    for line in sys.stdin:
        wanted = json.loads(line)
        try:
            answer = {"value": getattr(servant, wanted.pop("op"))(**wanted)}
        except XditdError as error:
            answer = {"code": error.code, "detail": error.detail}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
