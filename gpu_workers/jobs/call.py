"""The ``Call`` job: a transformer's forward, once for each part."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.controls import read_part_controls
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.reading import check_names
from xditd.gpu_workers.jobs.writing import DeviceRoom, ResultWriter, describe_tree
from xditd.gpu_workers.models.calls import run_parts
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.ipc.errors import BadRequest, RequestError, named
from xditd.ipc.facts import TransformerFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.requests import Call


@torch.inference_mode()
def run(job: Call, context: JobContext) -> Finished:
    """Run the forwards; rank 0 writes the results. After the checks, only the forwards have collectives."""
    clock = PhaseClock(context.device)
    device_io = context.open_device_io(job)
    with raise_on_all_ranks():
        transformer = context.components.get(job.component_id, "transformer")
        model = transformer.model
        operations = model.operations_for("transformer")
        clock.end_phase("plug", waits=False)
        check_variant(job.variant, transformer.transformer_facts)
        _check_family(job)
        taken = {each.name for each in transformer.transformer_facts.arguments}
        if unknown := sorted(set(job.foreseen) - taken):
            raise BadRequest(f"foreseen: {listed(unknown)} is no argument; it takes {', '.join(sorted(taken))}")
        io = context.open_io()
        reader = context.reader(io, device_io)
        parts = []
        for number, part in enumerate(job.parts):
            where = f"parts[{number}]." if len(job.parts) > 1 else ""
            check_names(part.arguments, transformer.transformer_facts.arguments, f"{where}arguments")
            controls = read_part_controls(transformer, part.controls, context, reader, where)
            parts.append(replace(reader.read(part.arguments, where), controls=controls))
            try:
                operations.check(model, parts[-1])
            except RequestError as error:
                if not where:
                    raise
                raise named(f"parts[{number}]", error) from error
        reader.finish()
        loras = context.components.variant(transformer, job.loras)
    clock.end_phase("inputs", waits=False)
    with loras.switched_on():
        options = CallOptions(job.variant, job.foreseen, loras=loras.begin_step())
        results = run_parts(model, operations, parts, options)
    if not context.is_leader:
        clock.end_phase("forward")
        return Finished(clock.marks_ms)
    trees = [operations.tree(rows) for rows in results]
    finite = FiniteCheck()
    for tree, inputs in zip(trees, parts, strict=True):
        describe_tree(tree, partial(finite.note, f"result{_format_timestep(inputs)}"))
    finite.fetch()
    writer = ResultWriter(io, job.out_offset_bytes, job.out_size_bytes, context.provide, DeviceRoom.of(job, device_io))
    described = writer.begin(trees)
    clock.end_phase("forward")
    for control in (each for inputs in parts for each in inputs.controls):
        control.check()
    context.check_finite(finite, transformer, loras=job.loras)
    context.components.check_unchanged(transformer, job.loras)
    context.components.check_all_unchanged(each.component_id for part in job.parts for each in part.controls)
    clock.end_phase("outputs", waits=False)
    return Finished(clock.marks_ms, results=described)


def check_variant(variant: str, facts: TransformerFacts) -> None:
    """Raise ``BadRequest`` if the family does not have this variant."""
    if variant not in facts.variants:
        raise BadRequest(f"variant {variant!r}: use one of {', '.join(facts.variants)}")


def _format_timestep(inputs: Inputs) -> str:
    """Return the timestep of a forward for an error message, `` at timestep 0.7``, if the host knows it."""
    for name, values in inputs.known.items():
        if values:
            least, most = min(values), max(values)
            return f" at {name} {most:g}" if least == most else f" at {name} {most:g} to {least:g}"
    return ""


def _check_family(job: Call) -> None:
    """Raise ``BadRequest`` for what only a module that runs as its own class takes."""
    if job.method != "forward" or job.numerics is not None:
        raise BadRequest(
            f"method {job.method!r} and numerics are for modules that run as their class: lend the module itself"
        )
