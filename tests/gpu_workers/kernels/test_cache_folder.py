"""Where workers keep what makes their next start faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from xditd.gpu_workers.kernels.cache_folder import cache_folder, own_folder


def test_a_user_without_a_home_has_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a container's: workers start, and whoever writes to the folder gets an error of the system."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder("products") == Path("/.cache/xditd/products")


def test_the_folder_is_in_the_user_s_folder_for_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = own_folder(cache_folder("products"), "a test")
    assert found == tmp_path / "xditd" / "products"
    assert found.stat().st_mode & 0o777 == 0o700
