"""The mapped file of a tensor: found only while the memory has the file's content."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xditd.client.file_mappings import AddressSpace

PAGE = mmap.PAGESIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * (8 * PAGE // 256))
    return path


class Mapped:
    """A private mapping of a file, like those of safetensors and torch, with its address."""

    def __init__(self, path: Path, *, shared: bool = False, offset: int = 0) -> None:
        fd = os.open(path, os.O_RDWR)
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self.memory = mmap.mmap(fd, path.stat().st_size - offset, flags=flags, offset=offset)
        os.close(fd)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()


@pytest.fixture
def mapped(path: Path) -> Mapped:
    return Mapped(path)


def test_an_unwritten_range_is_found(mapped: Mapped, path: Path) -> None:
    found = AddressSpace().file_behind(mapped.address + 300, 1000)
    assert found is not None
    assert found.path == str(path)
    assert (found.device, found.inode) == (path.stat().st_dev, path.stat().st_ino)
    assert found.offset_of(mapped.address + 300) == 300


def test_offsets_count_from_the_files_start(path: Path) -> None:
    mapped = Mapped(path, offset=2 * PAGE)
    found = AddressSpace().file_behind(mapped.address + 5, 10)
    assert found is not None
    assert found.offset_of(mapped.address + 5) == 2 * PAGE + 5


def test_reading_changes_nothing(mapped: Mapped) -> None:
    assert int(mapped.tensor.sum()) > 0
    assert AddressSpace().file_behind(mapped.address, 8 * PAGE) is not None


def test_a_written_page_is_not_found(mapped: Mapped) -> None:
    mapped.tensor[3 * PAGE + 7] = 0
    space = AddressSpace()
    assert space.file_behind(mapped.address + 3 * PAGE, 1) is None
    assert space.file_behind(mapped.address, 8 * PAGE) is None
    assert space.file_behind(mapped.address + 3 * PAGE - 1, 2) is None
    assert space.file_behind(mapped.address + 4 * PAGE - 1, 2) is None
    assert space.file_behind(mapped.address, 3 * PAGE) is not None
    assert space.file_behind(mapped.address + 4 * PAGE, 4 * PAGE) is not None


def test_writing_the_same_value_counts_as_written(mapped: Mapped) -> None:
    mapped.tensor[0] = int(mapped.tensor[0])
    assert AddressSpace().file_behind(mapped.address, 1) is None


def test_a_shared_mapping_that_can_be_written_is_not_found(path: Path) -> None:
    """A write goes to the file, and moves its times only if the page was clean."""
    mapped = Mapped(path, shared=True)
    assert AddressSpace().file_behind(mapped.address, PAGE) is None


def test_a_shared_mapping_that_can_be_read_alone_is_found(path: Path) -> None:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert AddressSpace().file_behind(address, PAGE) is not None


def test_a_range_beyond_the_mapping(mapped: Mapped) -> None:
    space = AddressSpace()
    assert space.file_behind(mapped.address, 8 * PAGE) is not None
    assert space.file_behind(mapped.address, 8 * PAGE + 1) is None
    assert space.file_behind(mapped.address + 8 * PAGE - 1, 2) is None


@pytest.mark.parametrize("address", [0, 1, 2**47 - PAGE, 2**63])
def test_addresses_of_nothing(address: int) -> None:
    assert AddressSpace().file_behind(address, 10) is None


def test_ordinary_memory_has_no_file() -> None:
    tensor = torch.ones(100_000)
    assert AddressSpace().file_behind(tensor.data_ptr(), tensor.nbytes) is None


def test_a_file_that_lost_its_name_is_not_found(mapped: Mapped, path: Path) -> None:
    path.unlink()
    assert AddressSpace().file_behind(mapped.address, 10) is None


def test_a_file_that_was_replaced_is_not_found(mapped: Mapped, path: Path) -> None:
    space = AddressSpace()
    (path.parent / "other").write_bytes(path.read_bytes())
    (path.parent / "other").replace(path)
    assert space.file_behind(mapped.address, 10) is None
    assert AddressSpace().file_behind(mapped.address, 10) is None
    deceiver = path.parent / "data (deleted)"
    deceiver.write_bytes(path.read_bytes())
    assert AddressSpace().file_behind(mapped.address, 10) is None


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        " leading",
        "trailing ",
        "two\nlines",
        "carriage\rreturn 1 2 3 4 5",
        "t\tab",
        "caf\udce9",
        "b\\134",
    ],
)
def test_odd_names_are_found_or_skipped(tmp_path: Path, name: str) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + os.fsencode(name)))
    path.write_bytes(bytes(PAGE))
    mapped = Mapped(path)
    found = AddressSpace().file_behind(mapped.address, 10)
    assert found is None or (found.path, found.inode) == (str(path), path.stat().st_ino)
    if name in ("with space", " leading", "trailing ", "caf\udce9", "t\tab"):
        assert found is not None


def test_no_descriptor_left_means_no_file(mapped: Mapped, no_free_fd: Callable[[], None]) -> None:
    space = AddressSpace()
    no_free_fd()
    assert space.file_behind(mapped.address, 10) is None
    assert AddressSpace().file_behind(mapped.address, 10) is None


def test_long_ranges_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(70_000 * PAGE)
    mapped = Mapped(path)
    assert AddressSpace().file_behind(mapped.address, 70_000 * PAGE) is not None
    mapped.tensor[69_000 * PAGE] = 1
    assert AddressSpace().file_behind(mapped.address, 70_000 * PAGE) is None
    assert AddressSpace().file_behind(mapped.address, 69_000 * PAGE) is not None
