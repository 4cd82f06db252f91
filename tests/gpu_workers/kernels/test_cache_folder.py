"""What workers keep on disk: folders of other versions go when nothing in them was used for long."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from xditd.gpu_workers.kernels.cache_folder import cache_folder, remove_unused

DAY_S = 86_400.0


def make(folder: Path, age_days: float, file_age_days: float | None = None) -> Path:
    folder.mkdir()
    for path, age in ((folder / "a", age_days if file_age_days is None else file_age_days), (folder, age_days)):
        path.touch() if path is not folder else None
        os.utime(path, (time.time() - age * DAY_S,) * 2)
    return folder


def test_only_folders_of_other_versions_that_were_not_used_are_removed(tmp_path: Path) -> None:
    old, own, new = make(tmp_path / "old", 40), make(tmp_path / "own", 40), make(tmp_path / "new", 3)
    used = make(tmp_path / "used", 40, file_age_days=1)
    target = make(tmp_path / "target", 40)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").touch()
    os.utime(tmp_path / "file", (0, 0))
    remove_unused(tmp_path, "own", 30)
    assert not old.exists()
    assert not target.exists()
    assert own.exists()
    assert new.exists()
    assert used.exists()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").exists()


def test_a_user_without_a_home_has_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a container's: workers start, and whoever writes to the folder gets an error of the system."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder("products") == Path("/.cache/xditd/products")
