"""``xditd generate`` from single files: lend a transformer and a VAE, and generate from text embeddings."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from xditd.client.cli import control_flags, exits
from xditd.client.cli.generation_reports import GenerationReport, describe_loan
from xditd.client.cli.generations import Outputs, sampling_of, set_text_tokens, size_of
from xditd.client.loans import Loan

if TYPE_CHECKING:
    import torch

    from xditd.client.client import Client
    from xditd.client.conditioning import Conditioning
    from xditd.client.metadata.record import Record
    from xditd.ipc.facts import ComponentFacts


def check(parsed: argparse.Namespace) -> None:
    """Refuse flags that miss one another, or that have no effect without a prompt."""
    if parsed.transformer is None:
        parsed.refuse(
            "--transformer FILE is needed, with --embeds FILE; or a prompt, with --model NAME, or with its parts"
        )
    if parsed.embeds is not None and parsed.random_embeds is not None:
        parsed.refuse("--embeds FILE and --random-embeds SEED are both given; leave one out")
    if parsed.embeds is None and parsed.random_embeds is None:
        parsed.refuse('one of --embeds FILE and --random-embeds SEED is needed, or a prompt ("a cat")')
    if parsed.vae is None and parsed.save_latents is None:
        parsed.refuse("--vae FILE or --save-latents FILE is needed: without both nothing is written")
    if parsed.lora_2 and parsed.transformer_2 is None:
        parsed.refuse("--lora-2 is of a second transformer; give --transformer-2 FILE, or --lora")
    if parsed.fps is not None and (parsed.frames or 1) == 1:
        parsed.refuse("--fps is of a video; give --frames COUNT, or leave it out")
    set_text_tokens(parsed)


def run(parsed: argparse.Namespace) -> int:
    """Lend the files, generate, and write the results."""
    check(parsed)
    exits.configure_logging(parsed.log_level, parsed.verbose)

    from xditd.client.cli.progress import watch
    from xditd.client.client import Client
    from xditd.client.conditioning import conditioning_of, random_conditioning
    from xditd.client.tensor_files import read_tensors, require_torch

    outputs = Outputs(parsed, control_flags.paths_of(parsed))
    pictures = control_flags.read_pictures(parsed)

    with Client(parsed.runtime_dir, name="xditd generate") as client:
        require_torch()
        stored = None if parsed.embeds is None else read_tensors(parsed.embeds)
        started = time.perf_counter()
        lent = _lend(client, parsed)
        facts = lent.transformer.facts
        controls = control_flags.lend_controls(client, parsed, pictures)
        lend_s = time.perf_counter() - started
        if stored is None:
            conditioning = random_conditioning(facts, parsed.random_embeds, parsed.text_tokens)
        else:
            conditioning = conditioning_of(stored, facts, str(parsed.embeds))
        repeated = getattr(parsed, "repeated", None)
        index = None if repeated is None else repeated.index
        if repeated is not None and index is not None:
            repeated.check_rows(conditioning, facts)
        outputs.prepare(facts, conditioning, is_one=index is not None)
        job = client.generate(
            lent.transformer.with_loras(lent.uses_of(parsed.lora)),
            conditioning,
            vae=lent.vae,
            transformer_2=lent.second and lent.second.with_loras(lent.uses_of(parsed.lora_2)),
            frames=parsed.frames or 1,
            controls=controls,
            **sampling_of(parsed),
        )
        result = watch(job, "denoising", is_quiet=parsed.json)
        outputs.write(
            dataclasses.replace(result, record=record_of_files(parsed, result.record, lent.transformer.lent_ns)),
            first=index or 0,
        )
        report = GenerationReport(outputs=outputs, generation=result, seed=result.seed, lend_s=lend_s)
        loans = [*lent.loans, *(each for each in control_flags.loans_of(controls) if isinstance(each, Loan))]
        if parsed.json:
            print(_json(parsed, report, facts, conditioning, loans, steps=job.total_steps))
        else:
            named = [(f"{loan.kind.value}: {loan.label}, ", loan) for loan in loans]
            print(report.text(named, steps=job.total_steps, has_step_cache=bool(parsed.step_cache)))
    return exits.DONE


class _Lent(NamedTuple):
    """The loans of the files; ``loras`` by path."""

    transformer: Loan
    second: Loan | None
    vae: Loan | None
    loras: dict[str, Loan]

    @property
    def loans(self) -> list[Loan]:
        return [each for each in (self.transformer, self.second, self.vae, *self.loras.values()) if each is not None]

    def uses_of(self, given: Mapping[str, float] | None) -> list[tuple[Loan, float]]:
        """Return the LoRAs of one transformer, from their strengths by path."""
        return [(self.loras[path], strength) for path, strength in (given or {}).items()]


def _lend(client: Client, parsed: argparse.Namespace) -> _Lent:
    def transformer(path: str) -> Loan:
        return client.lend(path, kind="transformer", device=parsed.device, compute_dtype=parsed.compute_dtype)

    paths = dict.fromkeys([*(parsed.lora or ()), *(parsed.lora_2 or ())])
    return _Lent(
        transformer(parsed.transformer),
        transformer(parsed.transformer_2) if parsed.transformer_2 else None,
        client.lend(parsed.vae, kind="vae", device=parsed.device) if parsed.vae is not None else None,
        {path: client.lend_lora(path, device=parsed.device) for path in paths},
    )


def record_of_files(parsed: argparse.Namespace, record: Record | None, lent_ns: int) -> Record | None:
    """Return the metadata with the files of this command, which the library knows as loans alone.

    One that has changed since ``lent_ns`` (as :func:`time.time_ns` counts) has its name alone.
    """
    if record is None or parsed.no_metadata:
        return None
    from xditd.client.metadata.file_hashes import describe
    from xditd.client.metadata.record import FileRecord, InputsRecord, LoraRecord, ModelRecord

    def described(path: str) -> FileRecord:
        return describe(path, read_ns=lent_ns)

    paths = {"transformer": parsed.transformer, "transformer_2": parsed.transformer_2, "vae": parsed.vae}
    is_random = parsed.random_embeds is not None
    return replace(
        record,
        compute_dtype=parsed.compute_dtype,
        random_embeds=parsed.random_embeds,
        text_tokens=parsed.text_tokens if is_random else None,
        model=ModelRecord(
            family=record.model.family, files={role: (described(path),) for role, path in paths.items() if path}
        ),
        loras=tuple(
            LoraRecord(file=described(path), strength=strength, roles=(role,))
            for role, given in (("transformer", parsed.lora), ("transformer_2", parsed.lora_2))
            for path, strength in (given or {}).items()
        ),
        inputs=InputsRecord(embeds=None if is_random else described(parsed.embeds), control=record.inputs.control),
    )


def _json(
    parsed: argparse.Namespace,
    report: GenerationReport,
    facts: ComponentFacts,
    conditioning: Conditioning,
    loans: Sequence[Loan],
    *,
    steps: int,
) -> str:
    assert facts.transformer is not None
    default_guidance = facts.transformer.default_guidance_scale
    width, height = size_of(parsed)
    return report.json(
        source={"conditioning": {name: _shape(value) for name, value in conditioning.items()}},
        sampling={
            "width": width,
            "height": height,
            "frames": parsed.frames or 1,
            "steps": steps,
            "guidance_scale": default_guidance if parsed.guidance is None else parsed.guidance,
            "step_cache": parsed.step_cache or 0.0,
            "options": parsed.option or {},
        },
        loras=[
            {"file": path, "strength": strength, "roles": [role]}
            for role, given in (("transformer", parsed.lora), ("transformer_2", parsed.lora_2))
            for path, strength in (given or {}).items()
        ],
        components=[describe_loan(loan) for loan in loans],
    )


def _shape(value: torch.Tensor | list[torch.Tensor]) -> list[object]:
    """Describe a shape for JSON: for a list, the shape of each tensor."""
    return [list(each.shape) for each in value] if isinstance(value, list) else list(value.shape)
