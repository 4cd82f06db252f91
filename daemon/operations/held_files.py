"""A file of the runtime folder, remembered by its inode: is it still the one at its path?"""

from __future__ import annotations

import os
from pathlib import Path


class HeldFile:
    """The file (or folder, or socket) that lies at ``path`` now, known again by its inode.

    A descriptor holds the inode, so that its number is not given to another file while this object lives. One of the
    file that is open already may be given, and belongs to this object then.

    Raises:
        OSError: nothing lies there, or no descriptor is free.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags) if descriptor is None else descriptor

    def is_in_place(self) -> bool:
        """Whether the same file is still at the path, and no other."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file, if it is still the one at the path: what another process put there is not ours."""
        if self.is_in_place():
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)
