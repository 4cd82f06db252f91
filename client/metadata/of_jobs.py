"""The record of a generation that was started with lent components: names and settings, without hashes of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from xditd import __version__
from xditd.client.loans import Loan, LoanWithLoras
from xditd.client.loras.strengths import Strength, strengths_by_step
from xditd.client.metadata.file_hashes import base_name
from xditd.client.metadata.record import FileRecord, InputsRecord, LoraRecord, ModelRecord, Record
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.job_parts import Sampling

AnyLoan = Loan | LoanWithLoras | str


def record_of(
    sampling: Sampling, facts: ComponentFacts, components: Mapping[str, AnyLoan | None], *, controls: int = 0
) -> Record:
    """Return the record of a generation from ``conditioning``. ``components`` are those of the job by their roles.

    Components that are named by ids, as other processes have lent them, are left out.
    """
    loans = {role: each.loan if isinstance(each, LoanWithLoras) else each for role, each in components.items()}
    files: dict[str, tuple[FileRecord, ...]] = {
        role: (_named(each),) for role, each in loans.items() if isinstance(each, Loan)
    }
    guidance = sampling.guidance_scale
    if guidance is None and facts.transformer is not None and facts.transformer.guidance != "none":
        guidance = facts.transformer.default_guidance_scale
    return Record(
        version=__version__,
        seed=sampling.seed,
        width=sampling.width,
        height=sampling.height,
        frames=sampling.frames,
        steps=sampling.steps,
        guidance=guidance,
        step_cache=sampling.step_cache_threshold,
        options=dict(sampling.options),
        variant=None if sampling.variant == "class" else sampling.variant,
        model=ModelRecord(family=facts.family, files=files),
        loras=tuple(_loras(components)),
        inputs=InputsRecord(
            conditioning=True, noise=sampling.seed is None, sigmas=sampling.sigmas is not None, control=controls
        ),
    )


def strength_of(given: Strength) -> float | tuple[tuple[int, float], ...]:
    """Return the strength of a LoRA as records have it: a number, or pairs of a step and the strength from there on."""
    first, later = strengths_by_step(given)
    return ((0, first), *((each.step, each.strength) for each in later)) if later else first


def _named(loan: Loan) -> FileRecord:
    return FileRecord(name=base_name(loan.label))


def _loras(components: Mapping[str, AnyLoan | None]) -> Iterator[LoraRecord]:
    for role, component in components.items():
        if isinstance(component, LoanWithLoras):
            for lora, given in component.loras:
                if isinstance(lora, Loan):
                    yield LoraRecord(file=_named(lora), strength=strength_of(given), roles=(role,))
