"""Format a daemon's status for people: a few lines, and a table for each thing that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from xditd.client.cli.tables import copied_text, size_text, span_text, table
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.status import ComponentStatus, DaemonStatus, MemoryParts, PackedProducts

LOSSLESS: Final = "bf16"

_DETAIL_CHARS: Final = 100
_MEMORY_PARTS: Final = tuple(name.removesuffix("_bytes") for name in MemoryParts.__struct_fields__)


def describe(found: DaemonStatus) -> str:
    """Format the state as text: what there is nothing of has no part."""
    parts = [part for describe_part in _PARTS if (part := describe_part(found))]
    return "\n\n".join(parts)


def _processes(found: DaemonStatus) -> str:
    parallel = ", ".join(f"{name} {degree}" for name, degree in found.parallel.items() if degree > 1) or "none"
    lines = [
        f"daemon    {found.package_version}, pid {found.pid}, up {span_text(found.uptime_s)}, {found.runtime_dir}",
        f"workers   {found.group_state.value}: {found.world_size or '?'} on {found.device_kind or '?'}, "
        f"parallel: {parallel}, attention: {found.attention_backend or '?'}",
    ]
    if found.precision not in ("", LOSSLESS):
        lines.append(f"          products in {found.precision} instead of {LOSSLESS}")
    if found.layout is not None:
        lines.append(f"layout    {found.layout.reason} (asked for: {found.layout.asked}; others: xditd doctor)")
    if found.group_detail:
        lines.append(f"          {found.group_detail}")
    return "\n".join(lines)


def _fused_checks(found: DaemonStatus) -> str:
    rows = [
        (each.kernels, each.case, "not finite" if each.error is None else f"{each.error:.2e}",
         f"{each.tolerance:g}", "in use" if each.is_used else "refused, plain modules run")
        for each in found.fused_checks
    ]  # fmt: skip
    return _table_of(("FUSED KERNELS", "TOKENS", "ERROR", "AT MOST", "VERDICT"), rows)


def _split_checks(found: DaemonStatus) -> str:
    rows = [
        (each.class_name, each.method, each.split, each.batch, "-" if each.error is None else f"{each.error:.2e}",
         f"{each.tolerance:g}", "in use" if each.is_used else f"refused: {_shortened(each.detail)}")
        for each in found.split_checks
    ]  # fmt: skip
    return _table_of(("SPLIT OF", "METHOD", "BY", "BATCH", "ERROR", "AT MOST", "VERDICT"), rows)


def _forward_paths(found: DaemonStatus) -> str:
    rows = [
        (each.class_name, each.split, each.path, "-" if each.error is None else f"{each.error:.2e}",
         f"{each.took_s:.2f} s", size_text(each.memory_bytes) if each.memory_bytes else "-",
         _shortened(each.shapes), _shortened(each.detail) or "-")
        for each in found.forward_paths
    ]  # fmt: skip
    headers = ("FORWARDS OF", "SPLIT", "PATH", "ERROR", "CHOSEN IN", "MEMORY", "SHAPES", "WHY NOT MORE")
    return _table_of(headers, rows)


def _packed_products(found: DaemonStatus) -> str:
    rows = [row for each in found.packed_products for row in _product_rows(each)]
    return _table_of(("PACKED AS", "DEQUANTISED", "NATIVE", "WHY NOT NATIVE"), rows)


def _loras(found: DaemonStatus) -> str:
    loras = found.loras
    if not loras.jobs:
        return ""
    switched = f"{loras.switches} switches, the last in {loras.last_switch_ms:.2f} ms"
    why = f"; {_shortened(loras.detail)}" if loras.detail else ""
    lines = [f"loras     {loras.jobs} jobs, {switched}, the slowest {loras.slowest_switch_ms:.2f} ms{why}"]
    if loras.forwards:
        copies = f"; copies of factors take {size_text(loras.memory_bytes)}" if loras.memory_bytes else ""
        lines.append(f"          {loras.launched} of {loras.forwards} forwards were captured ones{copies}")
    return "\n".join(lines)


def _scratch(found: DaemonStatus) -> str:
    scratch_bytes = max((each.facts.scratch_bytes for each in found.components if each.facts is not None), default=0)
    if not scratch_bytes:
        return ""
    return f"scratch   {size_text(scratch_bytes)} of each worker, into which packed weights are dequantised"


def _workers(found: DaemonStatus) -> str:
    rows = [
        (worker.rank, worker.pid, worker.device, size_text(worker.memory_bytes) if worker.memory_bytes else "-",
         worker.loaded, worker.device_uuid or "-")
        for worker in found.workers
    ]  # fmt: skip
    return _table_of(("RANK", "PID", "DEVICE", "IN USE", "LOADED", "UUID"), rows)


def _memory(found: DaemonStatus) -> str:
    if found.device_kind != "cuda":
        return ""
    rows = [
        (worker.rank, *(size_text(memory.by_part[part]) if part in memory.by_part else "-" for part in _MEMORY_PARTS),
         size_text(memory.beyond_weights_bytes))
        for worker in found.workers if (memory := worker.memory) is not None
    ]  # fmt: skip
    return _table_of(("RANK", *(part.upper() for part in _MEMORY_PARTS), "BEYOND WEIGHTS"), rows)


def _components(found: DaemonStatus) -> str:
    rows = [
        (each.component_id, each.label, "-" if each.kind is None else each.kind.value,
         "-" if each.facts is None else each.facts.family, each.state.value,
         "+".join(tier.value for tier in each.tiers), size_text(each.lent_bytes), _packed_text(each),
         copied_text(each.copied), _layout_text(each.facts), each.owner_pid)
        for each in found.components
    ]  # fmt: skip
    headers = (
        "COMPONENT", "LABEL", "KIND", "FAMILY", "STATE", "TIER", "BYTES", "PACKED", "COPIED", "LAYOUT", "OWNER",
    )  # fmt: skip
    return _table_of(headers, rows) or "no component is lent"


def _jobs(found: DaemonStatus) -> str:
    rows = [
        (job.op, job.state.value, f"{job.step}/{job.total_steps}" if job.total_steps else "-",
         span_text(job.waited_s), span_text(job.ran_s), job.owner_pid)
        for job in found.jobs
    ]  # fmt: skip
    return _table_of(("JOB", "STATE", "STEP", "WAITED", "RAN", "OWNER"), rows)


def _counters(found: DaemonStatus) -> str:
    counters = found.counters
    lines = [
        f"queue     {len(found.jobs)} of at most {found.queue_limit}, {found.clients} clients",
        f"on loan   {_by_tier(found)}",
        f"jobs      {counters.jobs_done} done, {counters.jobs_failed} failed, {counters.jobs_cancelled} cancelled",
        f"models    {counters.models_built} built, {counters.models_reused} reused, {counters.plugs} plugs",
        f"restarts  {max(0, counters.group_starts - 1)} of the worker group",
        f"network   {counters.outside_connections} connections to other hosts attempted by workers",
    ]
    if found.last_job_ms:
        timings = ", ".join(f"{name} {value:.1f} ms" for name, value in found.last_job_ms.items())
        lines.append(f"last job  {timings}")
    return "\n".join(lines)


def _last_errors(found: DaemonStatus) -> str:
    rows = [(span_text(error.age_s), error.where, error.code, _shortened(error.detail)) for error in found.last_errors]
    return _table_of(("AGO", "LAST ERRORS", "CODE", "DETAIL"), rows)


_PARTS: Final[tuple[Callable[[DaemonStatus], str], ...]] = (
    _processes,
    _fused_checks,
    _split_checks,
    _forward_paths,
    _packed_products,
    _loras,
    _scratch,
    _workers,
    _memory,
    _components,
    _jobs,
    _counters,
    _last_errors,
)


def _table_of(headers: tuple[str, ...], rows: Sequence[Sequence[object]]) -> str:
    """Format a table; without rows there is none."""
    return table(headers, rows) if rows else ""


def _packed_text(component: ComponentStatus) -> str:
    """Format the bytes of packed weights by format."""
    formats = {} if component.facts is None else component.facts.bytes_by_format
    return ", ".join(f"{name} {size_text(size)}" for name, size in formats.items()) or "-"


def _layout_text(facts: ComponentFacts | None) -> str:
    """Format how several ranks run a component; what has no layout of its own runs in the group's."""
    if facts is None:
        return "-"
    if facts.module is not None:
        return facts.module.layout
    split = facts.transformer or facts.controlnet
    if split is not None:
        return f"ulysses={split.ulysses},ring={split.ring}"
    return "-"


def _by_tier(found: DaemonStatus) -> str:
    """Format the lent bytes by tier."""
    return ", ".join(f"{size_text(size)} {tier}" for tier, size in found.lent_bytes.items()) or "nothing"


def _product_rows(products: PackedProducts) -> list[tuple[object, ...]]:
    """Return the row of a format; with several reasons these have rows of their own, with their products."""
    reasons = [(count, _shortened(reason)) for reason, count in products.why_not_native.items()]
    if len(reasons) < 2:
        return [(products.format, products.reference, products.native, reasons[0][1] if reasons else "-")]
    whole = (products.format, products.reference, products.native, "several reasons:")
    return [whole, *(("", count, "", reason) for count, reason in reasons)]


def _shortened(detail: str) -> str:
    """Shorten an error's detail to one line of a table; --json has all of it."""
    text = " ".join(detail.split())
    return text if len(text) <= _DETAIL_CHARS else text[: _DETAIL_CHARS - 3] + "..."
