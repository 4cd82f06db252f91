"""Find the memory-mapped file of a tensor (``safetensors`` and ``torch`` map files), if no page was written to."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGESIZE")
# Bits of a /proc/pid/pagemap entry. Source: Linux Documentation/admin-guide/mm/pagemap.rst.
_PRESENT: Final = 1 << 63
_SWAPPED: Final = 1 << 62
_FILE_BACKED: Final = 1 << 61
_READ_ENTRIES: Final = 1 << 16


@dataclass(frozen=True)
class FileMapping:
    """An address range of this process that maps a file."""

    start: int
    end: int
    file_offset_bytes: int
    device: int
    inode: int
    path: str

    def offset_of(self, address: int) -> int:
        """Offset in the file of an address in this mapping."""
        return self.file_offset_bytes + address - self.start

    def is_current(self) -> bool:
        """Return whether the path still names the file that is mapped."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)


class AddressSpace:
    """A snapshot of this process's file mappings, without those through which it can write to the file.

    Source: proc(5), /proc/pid/maps.
    """

    def __init__(self) -> None:
        self._mappings: list[FileMapping] = []
        try:
            with open("/proc/self/maps", "rb") as maps:
                lines = maps.read().split(b"\n")  # only these end a line: names may hold any other control character
        except OSError:
            lines = []
        for line in lines:
            fields = line.split(b" ", maxsplit=5)
            name = fields[5].lstrip(b" ") if len(fields) == 6 else b""  # names are padded, and begin with a slash
            if not name.startswith(b"/"):
                continue
            if fields[1].startswith(b"rw") and fields[1].endswith(b"s"):
                continue  # what this process writes there is in the file, whose times do not show each write
            start, end = (int(number, 16) for number in fields[0].split(b"-"))
            major, minor = (int(number, 16) for number in fields[3].split(b":"))
            device, path = os.makedev(major, minor), os.fsdecode(name)
            self._mappings.append(FileMapping(start, end, int(fields[2], 16), device, int(fields[4]), path))
        self._starts = [mapping.start for mapping in self._mappings]

    def mapping_at(self, address: int) -> FileMapping | None:
        """Find the mapping that contains an address."""
        at = bisect_right(self._starts, address) - 1
        return self._mappings[at] if at >= 0 and address < self._mappings[at].end else None

    def file_behind(self, address: int, size_bytes: int) -> FileMapping | None:
        """Find the mapping that contains an address range, if the path still names the file and no page was written."""
        mapping = self.mapping_at(address)
        if mapping is None or address + size_bytes > mapping.end or not mapping.is_current():
            return None
        return mapping if _is_pristine(address, size_bytes) else None


def _is_pristine(address: int, size_bytes: int) -> bool:
    """Return whether no page of a private mapping was written to.

    A written page is anonymous: present (or swapped out) and not file-backed. A page that was never accessed is not
    present, and has the file's content.
    """
    first = address // _PAGE
    last = (address + size_bytes - 1) // _PAGE
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        for start in range(first, last + 1, _READ_ENTRIES):
            wanted = min(_READ_ENTRIES, last + 1 - start) * 8
            read = os.pread(fd, wanted, start * 8)
            if len(read) != wanted:
                return False
            entries = array("Q", read)
            if any(entry & (_PRESENT | _SWAPPED) and not entry & _FILE_BACKED for entry in entries):
                return False
    finally:
        os.close(fd)
    return True
