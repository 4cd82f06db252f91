"""Format tables, sizes and durations as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xditd.ipc.tensors import CopiedBytes

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

COPY_KINDS = ("host_to_host", "host_to_device", "device_to_device", "peer")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format rows as columns, two spaces apart, without a frame."""
    lines = [[str(cell) for cell in headers], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def size_text(size_bytes: int) -> str:
    """Format a size with a unit."""
    value, unit = float(size_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{size_bytes} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def span_text(seconds: float) -> str:
    """Format a duration."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def copied_text(copied: CopiedBytes) -> str:
    """Format the bytes copied by kind of copy; "nothing" when all memory is shared."""
    sizes = copied_by_kind(copied)
    parts = [f"{size_text(size)} {kind.replace('_', ' ')}" for kind, size in sizes.items() if size]
    return ", ".join(parts) or "nothing"


def copied_by_kind(copied: CopiedBytes) -> dict[str, int]:
    """Return the bytes of every kind of copy, zeros too."""
    return {kind: getattr(copied, kind) for kind in COPY_KINDS}
