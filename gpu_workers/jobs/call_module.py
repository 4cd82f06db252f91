"""The ``Call`` job on a module that runs as its class does: any arguments and results, also KV caches."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.module_rows import ModulePart, ModuleRows, PreparedParts
from xditd.gpu_workers.jobs.numerics import use_numerics
from xditd.gpu_workers.jobs.reading import ArgumentReader
from xditd.gpu_workers.jobs.result_describer import CACHE, ResultDescriber
from xditd.gpu_workers.jobs.writing import DeviceRoom, ResultWriter
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.lora_variants import LoraVariant
from xditd.gpu_workers.models.object_tensors import change_tensors
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.models.snapshots import Snapshot
from xditd.gpu_workers.parallel.rank_errors import is_peer_rank_failure
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.parallel.token_shares import TokenShares
from xditd.ipc.arguments import (
    Argument,
    Held,
    ObjectOf,
    holds,
)
from xditd.ipc.errors import BadRequest, OutOfMemory, Unsupported, XditdError
from xditd.ipc.job_parts import Numerics
from xditd.ipc.name_lists import listed
from xditd.ipc.requests import Call
from xditd.ipc.transports.module_walk import is_describable
from xditd.ipc.worker_messages import CallResults


def run(job: Call, context: JobContext) -> Finished:
    """Run a method of the module once for each part, on different ranks where possible; rank 0 writes the results."""
    try:
        return _run(job, context)
    except BaseException:
        if context.device.type == "cuda":
            with suppress(RuntimeError):  # the error that is raised says more
                torch.cuda.current_stream(context.device).synchronize()  # the client may write to its block again
        raise


@torch.no_grad()  # not inference_mode, whose tensors do not count the writes to them
def _run(job: Call, context: JobContext) -> Finished:
    clock = PhaseClock(context.device)
    device_io = context.open_device_io(job)
    with ExitStack() as settings:
        with raise_on_all_ranks():
            component = context.components.get(job.component_id, "module")
            clock.end_phase("plug", waits=False)
            _check_job(job, component)
            io = context.open_io()
            reader = ArgumentReader(io, context.device, context.kept, context.client, context.held, device_io)
            parts = [
                dict(reader.read(part.arguments, f"parts[{number}]." if len(job.parts) > 1 else "").arguments)
                for number, part in enumerate(job.parts)
            ]
            reader.finish()
            loras = context.components.variant(component, job.loras)
            # Nothing has to be gathered from other ranks: without another round of them.
            begun = None if context.held.shares else _begin(job, context, component, parts, loras, settings)
        if begun is None:
            for part, given in zip(parts, job.parts, strict=True):
                _gather_plain(part, given.arguments, context.held.shares)
            with raise_on_all_ranks():
                begun = _begin(job, context, component, parts, loras, settings)
        clock.end_phase("inputs", waits=False)
        describer, written, stateful = begun.describer, begun.written, begun.stateful
        if loras.changes:
            layout = component.class_model.loras.use(loras.begin_step(), len(job.parts))
            begun.rows.use_layout(layout)
            settings.enter_context(nullcontext() if layout is None else layout.switched_on())
        results = begun.rows.run_prepared(begun.prepared)
    described: CallResults | None = None
    with raise_on_all_ranks():
        written.check(stateful, f"{component.class_model.class_name}.{job.method}")
        if context.is_leader:
            finite = _note_finite(results, describer)
            room = DeviceRoom.of(job, device_io)
            writer = ResultWriter(io, job.out_offset_bytes, job.out_size_bytes, context.provide, room)
            described = writer.begin(results, describer.describe, stateful, describer.describe_state)
            clock.end_phase("forward")
            context.check_finite(finite, component, loras=job.loras)
            context.components.check_unchanged(component, job.loras)
            clock.end_phase("outputs", waits=False)
        else:
            # This holds what rank 0 holds.
            for tree in results:
                describer.describe(tree, lambda _: None)
            for value in (value for each in stateful for value in each.values()):
                describer.describe_state(value, lambda _: None)
            clock.end_phase("forward")
    return Finished(clock.marks_ms, results=described)


class _Begun(NamedTuple):
    """A call whose arguments are on the device."""

    describer: ResultDescriber
    written: _WrittenTensors
    stateful: list[dict[str, Any]]
    rows: ModuleRows
    prepared: PreparedParts


def _begin(
    job: Call,
    context: JobContext,
    component: Component,
    parts: list[dict[str, Any]],
    loras: LoraVariant,
    settings: ExitStack,
) -> _Begun:
    """Do what comes between the reading of arguments and the forwards; ``settings`` end after these."""
    describer = ResultDescriber(context.held, context.client, job, parts)
    written = _WrittenTensors(parts)
    stateful = [_stateful(job.parts[number].arguments, part) for number, part in enumerate(parts)]
    numerics = job.numerics or Numerics()
    settings.enter_context(loras.switched_on())
    run_part = partial(_run_part, component, job.method, numerics)
    rows = ModuleRows(
        component.class_model, job.method, numerics, run_part, context.held.shares, has_loras=loras.changes
    )
    of_parts = [
        {*changed, *(name for name, node in described.arguments.items() if holds(node, Held))}
        for changed, described in zip(stateful, job.parts, strict=True)
    ]
    given = [ModulePart(part, bool(names), frozenset(names)) for part, names in zip(parts, of_parts, strict=True)]
    return _Begun(describer, written, stateful, rows, rows.prepare(given))


def _check_job(job: Call, component: Component) -> None:
    """Check what the signature shows.

    Raises:
        BadRequest: a method or an argument that the class does not have; the error names what it has.
    """
    assert component.facts.module is not None
    methods, name = component.facts.module.methods, component.class_model.class_name
    if job.variant != "class" or job.foreseen:
        raise BadRequest(f"{name} runs as its class does: leave out variant and foreseen")
    method = methods.get(job.method)
    if method is None:
        raise BadRequest(f"method {job.method!r}: {name} has {', '.join(methods)}")
    for number, part in enumerate(job.parts):
        where = f"parts[{number}]: " if len(job.parts) > 1 else ""
        if missing := sorted(set(method.needed) - part.arguments.keys()):
            raise BadRequest(
                f"{where}{listed(missing)} is missing; {name}.{job.method} takes {listed(method.arguments)}"
            )
        unknown = sorted(part.arguments.keys() - set(method.arguments))
        if unknown and not method.takes_others:
            raise BadRequest(f"{where}{listed(unknown)}: {name}.{job.method} takes {', '.join(method.arguments)}")


def _note_finite(results: Sequence[Any], describer: ResultDescriber) -> FiniteCheck:
    """Begin to check that all results are finite."""
    finite = FiniteCheck()
    found: list[torch.Tensor] = []
    for result in results:
        describer.describe(result, found.append)
    for number, tensor in enumerate(found):
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            finite.note(f"result {number}", torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    finite.fetch()
    return finite


def _run_part(component: Component, method: str, numerics: Numerics, arguments: Mapping[str, Any]) -> Any:
    """Run a method of the class. The numerics are set here: a graph has them, and its replay sets none."""
    model = component.class_model
    call = model.module if method == "forward" else getattr(model.module, method)
    before = _random_states(model.device)
    try:
        with use_numerics(numerics, model.device):
            result = call(**arguments)
    except (torch.OutOfMemoryError, XditdError):
        raise
    except Exception as error:  # whatever the class raises for arguments that do not fit it
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch has no class for the host's
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            raise OutOfMemory(
                f"{component.manifest.label}: no room in the worker's memory: {str(error).splitlines()[0]:.300}; use a "
                "smaller size or batch, or free memory there"
            ) from None
        if "CUDA error" in str(error) or is_peer_rank_failure(error):
            raise  # the process cannot use its GPU any more, or another rank has ended
        traceback.clear_frames(error.__traceback__)  # they hold views of lent memory, which could not be unmapped
        what = f"{type(error).__name__}: {error!s:.1000}"
        raise BadRequest(
            f"{component.manifest.label}: {model.class_name}.{method} refused its arguments: {what}"
        ) from error
    if not all(map(torch.equal, before, _random_states(model.device))):
        raise Unsupported(
            f"{component.manifest.label}: {model.class_name}.{method} draws random numbers, and those of workers are "
            "not yours: call eval() if it trains (dropout), or run it in your own process"
        )
    return result


def _random_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of torch's own generators: a forward that draws from them gives other results in each call."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


class _WrittenTensors:
    """Finds the arguments that a forward has written to: the client's own tensors would not change."""

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        self._before = [
            {
                name: (Snapshot([value]), [(tensor, tensor._version) for tensor in _tensors(value)])
                for name, value in part.items()
            }
            for part in parts
        ]

    def check(self, stateful: Sequence[Mapping[str, Any]], what: str) -> None:
        """Raise ``Unsupported`` if an argument was written to whose state does not go back to the client."""
        for number, part in enumerate(self._before):
            for name, (contents, versions) in part.items():
                if name in stateful[number]:
                    continue
                if not contents.is_current() or any(tensor._version != version for tensor, version in versions):
                    raise Unsupported(
                        f"{what} wrote to its argument {name}, which in workers changes a copy: "
                        "run this model in your own process"
                    )


def _stateful(described: Mapping[str, Argument], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments whose state goes back to the client: objects, and caches of any type."""
    return {
        name: value
        for name, value in arguments.items()
        if value is not None
        and not isinstance(value, (bool, int, float, str))
        and (holds(described[name], ObjectOf) or (CACHE in name.lower() and not isinstance(value, torch.Tensor)))
    }


def _gather_plain(arguments: dict[str, Any], described: Mapping[str, Argument], shares: TokenShares) -> None:
    """Gather the held tensors, of which ranks have shares, that are given outside of an object. All ranks call this."""
    ranks = Ranks.all()
    for name, node in described.items():
        if shares and holds(node, Held) and not holds(node, ObjectOf):
            arguments[name] = change_tensors(arguments[name], lambda _, __, tensor: shares.whole(tensor, ranks))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in _tensors(each)]
    if isinstance(value, (list, tuple, set)):
        return [tensor for each in value for tensor in _tensors(each)]
    if is_describable(value):
        return _tensors(vars(value))
    return []
