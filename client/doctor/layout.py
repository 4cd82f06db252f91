"""Describe the parallel layout of a worker group, and why each other layout was not chosen."""

from __future__ import annotations

from xditd.client.doctor.findings import Finding, ok
from xditd.ipc.layout_choice import choose_layout, report
from xditd.ipc.status import LayoutReport

CPU_WORKERS = 2
"""The daemon's default number of workers without a GPU."""


def describe_default_layout(gpus: int) -> Finding:
    """Describe the layout that a daemon on this machine would choose by itself."""
    return describe_layout(f"layout for {gpus or CPU_WORKERS} workers", report(choose_layout(gpus or CPU_WORKERS), {}))


def describe_layout(check: str, found: LayoutReport) -> Finding:
    """Describe a layout, with the other candidates as notes."""
    (chosen,) = (each.layout for each in found.candidates if not each.why_not)
    return ok(
        check,
        f"{chosen}: {found.reason} (asked for: {found.asked})",
        tuple(f"not {each.layout}: {each.why_not}" for each in found.candidates if each.why_not),
    )
