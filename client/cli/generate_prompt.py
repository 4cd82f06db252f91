"""``xditd generate`` with a whole model: words and pictures in, pictures and videos out."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from xditd.client.cli import control_flags, exits
from xditd.client.cli.generation_reports import GenerationReport, describe_loan
from xditd.client.cli.generations import Outputs, set_text_tokens
from xditd.client.pipeline.sources import SECOND, TRANSFORMER
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    from xditd.client.loans import Loan
    from xditd.client.pipeline.pipeline import Pipeline
    from xditd.client.pipeline.results import PipelineResult

_OF_WORDS: Final = (
    "prompt",
    "model",
    "text_encoders",
    "tokenizers",
    "image_encoder",
    "scheduler",
    "variant",
    "prompt_2",
    "negative_prompt",
    "max_sequence_length",
    "num_images",
    "image",
    "mask",
    "last_image",
    "references",
    "control_images",
    "strength",
)
"""Arguments that single files with text embeddings do not have."""

ARGUMENTS: Final = {
    "prompt_2": "prompt_2",
    "negative_prompt": "negative_prompt",
    "max_sequence_length": "max_sequence_length",
    "image": "image",
    "mask": "mask",
    "last_image": "last_image",
    "references": "references",
    "strength": "strength",
    "frames": "frames",
    "steps": "steps",
    "guidance": "guidance",
    "seed": "seed",
    "num_images": "num_images",
    "option": "options",
    "step_cache": "step_cache",
}
"""Flags that are arguments of a call as they are, by their names in the library."""


def is_meant(parsed: argparse.Namespace) -> bool:
    """Return whether the flags are of words and pictures."""
    return any(getattr(parsed, name) is not None for name in _OF_WORDS)


def check(parsed: argparse.Namespace) -> None:
    """Refuse flags that miss one another."""
    has_embeds = parsed.embeds is not None or parsed.random_embeds is not None
    if parsed.model is None and parsed.transformer is None:
        parsed.refuse("--model NAME is needed, or --transformer FILE with the other parts")
    if parsed.prompt is None and not has_embeds:
        parsed.refuse('a prompt is needed, such as "a cat"')
    if parsed.prompt is not None and has_embeds:
        parsed.refuse("a prompt and --embeds or --random-embeds are both given; leave one out")
    if parsed.embeds is not None and parsed.random_embeds is not None:
        parsed.refuse("--embeds FILE and --random-embeds SEED are both given; leave one out")
    if has_embeds and parsed.prompt_2 is not None:
        parsed.refuse("--prompt-2 is of a prompt; the file of --embeds stands for both")
    if has_embeds and parsed.negative_prompt is not None:
        parsed.refuse("--negative-prompt is of a prompt; the file of --embeds has the negative one, too")
    if parsed.control and parsed.control_images is not None:
        parsed.refuse("--control and --control-image are both given; leave one out")
    if parsed.mask is not None and parsed.image is None:
        parsed.refuse("--mask is of a picture; give --image FILE")
    if parsed.model is None and parsed.vae is None and parsed.save_latents is None:
        parsed.refuse("--vae FILE or --save-latents FILE is needed: without both nothing is written")
    set_text_tokens(parsed)


def run(parsed: argparse.Namespace) -> int:
    """Open the model, generate, and write the results."""
    check(parsed)
    exits.configure_logging(parsed.log_level, parsed.verbose)

    from xditd.client.cli.progress import watch
    from xditd.client.pipeline.pipeline import Pipeline
    from xditd.client.tensor_files import require_torch

    pictures = (parsed.image, parsed.mask, parsed.last_image, *(parsed.references or ()))
    outputs = Outputs(parsed, (*pictures, *(parsed.control_images or ()), *control_flags.paths_of(parsed)))
    require_torch()
    started = time.perf_counter()
    with Pipeline.open(**opening(parsed)) as pipe:
        lend_s = time.perf_counter() - started
        if "vae" not in pipe.loans:
            if outputs.latents is None:
                raise BadRequest(
                    f"model {pipe.name}: has no VAE, so nothing is written; give --vae FILE or --save-latents"
                )
            outputs.images = []
        if parsed.fps is not None and (parsed.frames or pipe.defaults["frames"]) == 1:
            raise BadRequest(f"--fps {parsed.fps}: is of a video, and {pipe.name} makes a picture; leave it out")
        repeated = getattr(parsed, "repeated", None)
        outputs.spare(pipe.files.values())
        arguments = arguments_of(parsed, pipe)
        with pipe.start(parsed.prompt, **arguments) as job:
            made = job.settings
            if repeated is not None:
                repeated.check_model(made)
            outputs.resize(made.width, made.height, made.frames, parsed.fps or made.fps)
            index = None if repeated is None else repeated.index
            if index is None:
                outputs.name_images(made.batch)
            outputs.check_latents(pipe.facts, made.batch)
            result = watch(job, "denoising", is_quiet=parsed.json)
        outputs.write(result.generation, lambda number: _record(parsed, result, number), index or 0)
        report = _report(parsed, pipe, result, outputs, lend_s)
    print(report)  # when nothing can fail any more: with --json, an error would be a second document
    return exits.DONE


def opening(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``Pipeline.open``."""
    return {
        "source": parsed.model,
        "transformer": parsed.transformer,
        "transformer_2": parsed.transformer_2,
        "vae": parsed.vae,
        "text_encoders": tuple(parsed.text_encoders or ()),
        "tokenizers": parsed.tokenizers,
        "image_encoder": parsed.image_encoder,
        "scheduler": parsed.scheduler,
        "variant": parsed.variant,
        "compute_dtype": parsed.compute_dtype,
        "device": parsed.device,
        "runtime_dir": parsed.runtime_dir,
    }


def arguments_of(parsed: argparse.Namespace, pipe: Pipeline) -> dict[str, Any]:
    """Return the arguments of a call but for its prompt: what was given, and nothing else.

    Raises:
        BadRequest: the file of text embeddings lacks some, or cannot be read.
    """
    found = {name: value for flag, name in ARGUMENTS.items() if (value := getattr(parsed, flag)) is not None}
    if parsed.prompt_2 is not None:
        found["prompt_2"] = [parsed.prompt_2]  # an empty text is what the second encoder reads
    repeated = getattr(parsed, "repeated", None)
    transformer = pipe.facts.transformer
    if repeated is not None and parsed.frames is None and transformer is not None and transformer.latents.frames:
        found["frames"] = repeated.record.frames  # one, of a model whose default is a video
    if parsed.control_images is not None:
        images = parsed.control_images
        found["control"] = images if len(images) > 1 else images[0]
    elif parsed.control:
        size = parsed.size or (pipe.defaults["width"], pipe.defaults["height"])
        found["control"] = control_flags.lend_controls(pipe.client, parsed, control_flags.read_sized(parsed, size))
    if parsed.size is not None:
        found["width"], found["height"] = parsed.size
    if parsed.lora or parsed.lora_2:
        found["loras"] = [
            (path, strength, role)
            for role, given in ((TRANSFORMER, parsed.lora), (SECOND, parsed.lora_2))
            for path, strength in (given or {}).items()
        ]
    if parsed.embeds is not None:
        from xditd.client.conditioning import conditioning_of
        from xditd.client.tensor_files import read_tensors

        found["conditioning"] = conditioning_of(read_tensors(parsed.embeds), pipe.facts, str(parsed.embeds))
        if repeated is not None and repeated.index is not None:
            found["num_images"] = repeated.of_each_row(found["conditioning"], pipe.facts)
    elif parsed.random_embeds is not None:
        from xditd.client.conditioning import random_conditioning

        found["conditioning"] = random_conditioning(pipe.facts, parsed.random_embeds, parsed.text_tokens)
    return found


def _record(parsed: argparse.Namespace, result: PipelineResult, number: int) -> str:
    """Return the metadata of a picture or video."""
    from msgspec.structs import replace

    from xditd.client.metadata.of_runs import record_of_run
    from xditd.client.metadata.record import encode

    embeds = None if parsed.embeds is None else str(parsed.embeds)
    found = record_of_run(result.settings, number, result.count, embeds=embeds)
    if parsed.fps is not None and found.frames > 1:
        found = replace(found, fps=parsed.fps)
    if parsed.random_embeds is not None:
        inputs = replace(found.inputs, conditioning=False)
        found = replace(found, random_embeds=parsed.random_embeds, text_tokens=parsed.text_tokens, inputs=inputs)
    return encode(replace(found, compute_dtype=parsed.compute_dtype))


def _report(parsed: argparse.Namespace, pipe: Pipeline, result: PipelineResult, outputs: Outputs, lend_s: float) -> str:
    """Format what was made, and of what."""
    made = result.settings
    loans: Mapping[str, Loan] = pipe.loans
    report = GenerationReport(outputs=outputs, generation=result.generation, seed=result.seed, lend_s=lend_s)
    if parsed.json:
        return report.json(
            source={"model": made.model, "family": made.family},
            sampling={
                "width": made.width,
                "height": made.height,
                "frames": made.frames,
                "steps": made.steps,
                "guidance_scale": made.guidance,
                "strength": made.strength if made.has_image else None,
                "step_cache": made.step_cache,
                "options": dict(made.options),
            },
            loras=[{"file": each.path, "strength": each.strength, "roles": each.roles} for each in made.loras],
            components=[{"role": role, **describe_loan(loan)} for role, loan in loans.items()],
        )
    named = []
    for role, loan in loans.items():
        path = os.path.basename(pipe.files[role][0])
        named.append((f"{role}: " if path == role else f"{role}: {path}, ", loan))
    return report.text(named, steps=made.steps, has_step_cache=bool(made.step_cache))
