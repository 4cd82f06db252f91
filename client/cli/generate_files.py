"""``xditd generate`` from single files: lend a transformer and a VAE, and generate from text embeddings."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING

from msgspec.structs import replace

from xditd.client.cli import control_flags, exits
from xditd.client.cli.generations import Outputs, sampling_of, size_of
from xditd.client.cli.printing import json_text
from xditd.client.cli.tables import copied_by_kind, copied_text, size_text, span_text
from xditd.client.loans import Loan

if TYPE_CHECKING:
    import torch

    from xditd.client.metadata.record import Record


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
        transformer = client.lend(
            parsed.transformer, kind="transformer", device=parsed.device, compute_dtype=parsed.compute_dtype
        )
        second = parsed.transformer_2 and client.lend(
            parsed.transformer_2, kind="transformer", device=parsed.device, compute_dtype=parsed.compute_dtype
        )
        vae = None if parsed.vae is None else client.lend(parsed.vae, kind="vae", device=parsed.device)
        strengths = {"transformer": parsed.lora or {}, "transformer_2": parsed.lora_2 or {}}
        paths = dict.fromkeys(path for each in strengths.values() for path in each)
        loras = {path: client.lend_lora(path, device=parsed.device) for path in paths}
        uses = {role: [(loras[path], number) for path, number in each.items()] for role, each in strengths.items()}
        controls = control_flags.lend_controls(client, parsed, pictures)
        lend_s = time.perf_counter() - started
        if stored is None:
            conditioning = random_conditioning(transformer.facts, parsed.random_embeds, parsed.text_tokens)
        else:
            conditioning = conditioning_of(stored, transformer.facts, str(parsed.embeds))
        repeated = getattr(parsed, "repeated", None)
        index = None if repeated is None else repeated.index
        if repeated is not None and index is not None:
            repeated.check_rows(conditioning, transformer.facts)
        outputs.prepare(transformer.facts, conditioning, is_one=index is not None)
        job = client.generate(
            transformer.with_loras(uses["transformer"]),
            conditioning,
            vae=vae,
            transformer_2=second.with_loras(uses["transformer_2"]) if second else None,
            frames=parsed.frames or 1,
            controls=controls,
            **sampling_of(parsed),
        )
        result = watch(job, "denoising", is_quiet=parsed.json)
        outputs.write(
            dataclasses.replace(result, record=record_of_files(parsed, result.record, transformer.lent_ns)),
            first=index or 0,
        )
        lent = (transformer, second, vae, *loras.values(), *control_flags.loans_of(controls))
        loans = [loan for loan in lent if isinstance(loan, Loan)]
        seconds = {"lend": lend_s, "generate": result.timings_ms["round_trip"] / 1e3}
        if parsed.json:
            assert transformer.facts.transformer is not None
            default_guidance = transformer.facts.transformer.default_guidance_scale
            report = {
                "videos" if outputs.is_video else "images": [str(path) for path in outputs.images],
                "latents": None if outputs.latents is None else str(outputs.latents),
                "seed": result.seed,
                "sampling": {
                    "width": size_of(parsed)[0],
                    "height": size_of(parsed)[1],
                    "frames": parsed.frames or 1,
                    "steps": job.total_steps,
                    "guidance_scale": default_guidance if parsed.guidance is None else parsed.guidance,
                    "step_cache": parsed.step_cache or 0.0,
                    "options": parsed.option or {},
                },
                "loras": [
                    {"file": path, "strength": strength, "roles": [role]}
                    for role, each in strengths.items()
                    for path, strength in each.items()
                ],
                "conditioning": {name: _shape(value) for name, value in conditioning.items()},
                "seconds": seconds,
                "timings_ms": result.timings_ms,
                "reused_steps": result.reused_steps,
                "components": [describe_loan(loan) for loan in loans],
            }
            print(json_text(report, indent=2))
        else:
            for loan in loans:
                tiers = "+".join(tier.value for tier in loan.tiers)
                print(f"{loan.kind.value}: {loan.label}, {size_text(loan.lent_bytes)} by {tiers}, "
                      f"copied: {copied_text(loan.copied)}")  # fmt: skip
            written = ", ".join(str(path) for path in (*outputs.images, outputs.latents) if path is not None)
            reused = f", {result.reused_steps} of {job.total_steps} steps reused" if parsed.step_cache else ""
            print(f"{written}: seed {result.seed}, lent in {span_text(lend_s)}, "
                  f"generated in {span_text(seconds['generate'])}{reused}")  # fmt: skip
    return exits.DONE


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


def _shape(value: torch.Tensor | list[torch.Tensor]) -> list[object]:
    """Describe a shape for JSON: for a list, the shape of each tensor."""
    return [list(each.shape) for each in value] if isinstance(value, list) else list(value.shape)


def describe_loan(loan: Loan) -> dict[str, object]:
    """Describe a loan for JSON."""
    return {
        "name": loan.label,
        "kind": loan.kind.value,
        "family": loan.family,
        "dtype": loan.facts.dtype,
        "tier": "+".join(tier.value for tier in loan.tiers),
        "bytes": loan.lent_bytes,
        "bytes_by_format": loan.facts.bytes_by_format,
        "bytes_copied": copied_by_kind(loan.copied),
        "is_reused": loan.is_reused,
        "is_model_reused": loan.is_model_reused,
        "timings_ms": loan.timings_ms,
    }
