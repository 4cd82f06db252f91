"""How workers share a job, or would, and what speaks against every other way."""

from __future__ import annotations

from xditd.client.doctor.findings import Finding, ok
from xditd.ipc.layout_choice import choose_layout, report
from xditd.ipc.status import LayoutReport

CPU_WORKERS = 2
"""How many workers start where there is no GPU, unless the daemon is told a number."""


def plan_for(gpus: int) -> Finding:
    """Say what a daemon on this machine would choose by itself."""
    return describe_layout(f"layout for {gpus or CPU_WORKERS} workers", report(choose_layout(gpus or CPU_WORKERS), {}))


def describe_layout(check: str, found: LayoutReport) -> Finding:
    """Tell a layout with its candidates as notes."""
    (chosen,) = (each.layout for each in found.candidates if not each.why_not)
    return ok(
        check,
        f"{chosen}: {found.reason} (asked for: {found.asked})",
        tuple(f"not {each.layout}: {each.why_not}" for each in found.candidates if each.why_not),
    )
