"""The measured times of products: kept on disk, and measured anew where the file is none of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xditd.gpu_workers.packed import kept_times, product_times
from xditd.gpu_workers.packed.kept_times import KeptTimes
from xditd.gpu_workers.packed.product_times import ProductKind
from xditd.ipc.errors import Unsupported

CPU = torch.device("cpu")
INT8 = ProductKind("int8_convrot", 2048, 8192, 256, torch.bfloat16)
FLOAT8 = ProductKind("float8", 2048, 2048, 0, torch.bfloat16)
TOOK = {"reference": 1.0, "native": 0.5}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ProductKind]:
    """The kinds that were measured, each of which takes ``TOOK``."""
    kinds: list[ProductKind] = []

    def measure(kind: ProductKind, device: torch.device) -> dict[str, float]:
        kinds.append(kind)
        return dict(TOOK)

    monkeypatch.setattr(product_times, "measure", measure)
    monkeypatch.setattr(kept_times, "_versions", lambda device: "versions")
    return kinds


def test_times_of_several_kinds_are_kept_for_the_next_process(tmp_path: Path, measured: list[ProductKind]) -> None:
    folder = tmp_path / "products"
    first = KeptTimes(folder, CPU)
    assert [first.of(kind) for kind in (INT8, FLOAT8, INT8)] == [TOOK, TOOK, TOOK]
    assert [KeptTimes(folder, CPU).of(kind) for kind in (INT8, FLOAT8)] == [TOOK, TOOK]
    assert measured == [INT8, FLOAT8]
    assert [path.name for path in folder.iterdir()] == ["versions.json"]


def test_other_versions_have_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for installed in ("1", "2"):
        monkeypatch.setattr(kept_times, "version", lambda package, installed=installed: installed)
        names.add(kept_times._versions(CPU))
    assert len(names) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"schema": 99, "measured": {}}',
        b'{"schema": 1, "measured": {"int8_convrot bfloat16 k 2048 n 8192 group 256": {"native": 9.0}}}',
        b'{"schema": 1, "measured": {"int8_convrot bfloat16 k 2048 n 8192 group 256": {"reference": -1, "native": 9}}}',
        b'{"schema": 1, "measured": {}, "more": ' + b"[" * 100_000,
        b'{"schema": 1, "measured": {"\xff": {}}}',
    ],
)
def test_a_file_that_is_not_ours_is_measured_anew(tmp_path: Path, measured: list[ProductKind], content: bytes) -> None:
    folder = tmp_path / "products"
    folder.mkdir(mode=0o700)
    (folder / "versions.json").write_bytes(content)
    for _ in range(2):
        assert KeptTimes(folder, CPU).of(INT8) == TOOK
    assert measured == [INT8]


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, measured: list[ProductKind]) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(Unsupported, match="0700"):
        KeptTimes(tmp_path, CPU).of(INT8)
    assert measured == []


def test_times_that_cannot_be_written_are_used(
    tmp_path: Path, measured: list[ProductKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(kept_times, "write_whole", full)
    times = KeptTimes(tmp_path / "products", CPU)
    assert times.of(INT8) == times.of(INT8) == TOOK
    assert measured == [INT8]
