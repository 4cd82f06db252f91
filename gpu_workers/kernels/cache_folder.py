"""What workers keep on disk for their next start: a folder of this user alone, since code is loaded from it."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path

from xditd.ipc.errors import Unsupported


def cache_folder(name: str) -> Path:
    """Return the path of one of xditd's folders in the user's folder for caches; it may not exist yet.

    For a user without a home it is below the root, where making it is refused.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache", "xditd", name)


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # the user of a container, who is in no list of users
        return Path("/")


def own_folder(folder: Path, why: str) -> Path:
    """Make a folder of this user alone, if there is none.

    Raises:
        Unsupported: others can write to the folder; ``why`` is what they could do then.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise Unsupported(f"{folder} has to be a folder of this user alone (mode 0700): {why}")
    return folder


def remove_unused(folder: Path, but: str, days: float) -> None:
    """Remove the folders in ``folder``, but the one of that name, in which nothing was used for some days.

    Each is of other versions; a file counts as used when it, or its folder, was changed. Faults are ignored: another
    process may remove the same ones.
    """
    for each in folder.iterdir():
        if each.name != but and each.is_dir() and not each.is_symlink():
            changed = [path.lstat().st_mtime for path in (each, *each.iterdir())]
            if max(changed) < time.time() - days * 86_400:
                shutil.rmtree(each, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as a whole: another rank may read it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
