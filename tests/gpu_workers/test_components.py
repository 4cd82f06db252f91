"""What components do with descriptions, apart from any device."""

from __future__ import annotations

from xditd.gpu_workers.components import _stretches
from xditd.ipc.tensors import TensorSpec


def spec(name: str, block: int, offset_bytes: int, count: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="uint8", shape=(count,), block=block, offset_bytes=offset_bytes)


def test_neighbours_in_block_and_copy_travel_together() -> None:
    specs = [spec("a", 0, 8, 256), spec("b", 0, 264, 512), spec("c", 0, 776, 3), spec("d", 0, 779, 256)]
    assert _stretches(specs, [0, 256, 768, 1024]) == [(0, 8, 0, 771), (0, 779, 1024, 256)]


def test_gaps_overlaps_and_other_blocks_part_them() -> None:
    specs = [spec("a", 0, 0, 256), spec("b", 0, 255, 256), spec("c", 0, 600, 256), spec("d", 1, 856, 256)]
    assert _stretches(specs, [0, 256, 512, 768]) == [
        (0, 0, 0, 256),
        (0, 255, 256, 256),
        (0, 600, 512, 256),
        (1, 856, 768, 256),
    ]


def test_nothing_is_a_stretch_too() -> None:
    assert _stretches([spec("a", 0, 0, 0), spec("b", 0, 0, 256)], [0, 0]) == [(0, 0, 0, 256)]
    assert _stretches([], []) == []
