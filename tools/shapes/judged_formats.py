"""Draw sentences of ``shapes`` with the workers of a running daemon: in several formats, and on several paths.

``python -m shapes.judge FOLDER --formats`` judges each, and prints one table.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from shapes import packed
from shapes.draw import PIXELS
from shapes.models import PARTS, build_parts, load_parts, save_weights, weights_file
from shapes.samplers import draw_noise
from xditd.client.demo.shapes_model import ENCODERS, TOKENIZERS, shifted_sigmas

PLAIN: Final = ("float32", "bfloat16", "float16")
FORMATS: Final = ("float32", "bfloat16", *packed.FORMATS)
"""Packed ones compute in bfloat16, as published files do."""
STEP_CACHE: Final = "step_cache"
ACCELERATIONS: Final = ("eager", "captured", "compiled")
PATHS: Final = (STEP_CACHE, *ACCELERATIONS)
"""In bfloat16: with a step cache, and diffusers' pipeline whose transformer runs in the workers as its class."""
_THRESHOLD: Final = 0.08
_PATH_DEADLINE_S: Final = 120.0
"""How long sentences of a batch size are drawn until their forwards take the path of a row."""


def write_folder_as(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """Write a pipeline's folder with its weights in ``dtype``, in which workers then compute; return ``out``."""
    parts = build_parts()
    load_parts(folder, parts)
    shutil.copytree(folder, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in PARTS:
        save_weights(parts[name], out / name / weights_file(name), dtype)
    return out


def start_drawing(
    client: Any, transformer: Any, conditioning: Any, vae: Any, *, steps: int, guidance: float, **more: Any
) -> Any:
    """Start a job that draws as diffusers' pipeline draws a folder of ``shapes``; return the job.

    ``more`` goes to :meth:`xditd.client.Client.generate`, with a seed or noise.
    """
    return client.generate(
        transformer,
        conditioning,
        vae=vae,
        height=PIXELS,
        width=PIXELS,
        steps=steps,
        sigmas=shifted_sigmas(steps),
        guidance_scale=guidance,
        **more,
    )


@contextmanager
def lent_sampler(
    client: Any,
    folder: Path,
    weights_format: str,
    scratch: Path,
    *,
    steps: int,
    guidance: float,
    text_tokens: int,
) -> Iterator[Any]:
    """Lend the models of a folder, with the transformer in a format; give a :data:`~shapes.samplers.Sampler`.

    Everything but a packed transformer is in the format's dtype. :data:`STEP_CACHE` is bfloat16 with a step cache.
    ``scratch`` gets the files, and may be removed after.
    """
    more = {"step_cache": _THRESHOLD} if weights_format == STEP_CACHE else {}
    weights_format = "bfloat16" if weights_format == STEP_CACHE else weights_format
    is_plain = weights_format in PLAIN
    dtype = getattr(torch, weights_format) if is_plain else torch.bfloat16
    models = write_folder_as(folder, scratch / str(dtype).removeprefix("torch."), dtype)
    path = models / "transformer" if is_plain else packed.write_packed(folder, scratch, weights_format, dtype)
    with ExitStack() as loans:

        def lend(source: Path, **more: Any) -> Any:
            return loans.enter_context(client.lend(source, **more))

        transformer = lend(path) if is_plain else lend(path, compute_dtype="bfloat16")
        vae = lend(models / "vae")
        words = {
            "encoders": {name: lend(models / name) for name in ENCODERS},
            "tokenizers": {name: loans.enter_context(client.lend_tokenizer(models / name)) for name in TOKENIZERS},
            "options": {"max_sequence_length": text_tokens},
        }

        def sample(texts: Sequence[str], seed: int) -> torch.Tensor:
            conditioning = client.encode_prompt(transformer, list(texts), **words)
            noise = draw_noise(len(texts), seed).to(dtype)
            job = start_drawing(
                client, transformer, conditioning, vae, steps=steps, guidance=guidance, noise=noise, **more
            )
            image: torch.Tensor = job.result().image.float().cpu()
            return image

        yield sample


@contextmanager
def accelerated_sampler(
    client: Any, pipeline: Any, acceleration: Any, sampler: Any, batches: Collection[int]
) -> Iterator[Any]:
    """Give ``sampler``, that of ``pipeline``, while its transformer runs in the workers with one of ``ACCELERATIONS``.

    The workers capture and compile between forwards. So on GPUs sentences are drawn first, for each size of
    ``batches``, until forwards of that size take the path.

    Raises:
        TimeoutError: the forwards of a batch do not take the path within :data:`_PATH_DEADLINE_S`.
    """
    from xditd.client import accelerate

    with accelerate(pipeline, components=("transformer",), client=client, acceleration=acceleration):
        if acceleration != "eager" and client.status().device_kind == "cuda":
            for batch in batches:
                _draw_until(client, acceleration, batch, sampler)
        yield sampler


def _draw_until(client: Any, acceleration: str, batch: int, sampler: Any) -> None:
    end_s = time.monotonic() + _PATH_DEADLINE_S
    while not any(
        acceleration in each.path and each.shapes.startswith(f"[{batch}, ")  # the first one is of the latents
        for each in client.status().forward_paths
    ):
        if time.monotonic() > end_s:
            raise TimeoutError(f"a batch of {batch} is not {acceleration} after {_PATH_DEADLINE_S:.0f} s")
        sampler(["a red circle"] * batch, 0)


def paths_of(client: Any) -> list[str]:
    """Return the paths of forwards that the workers have chosen, as ``xditd status`` names them."""
    return sorted({f"{each.class_name}: {each.path}" for each in client.status().forward_paths})


def print_format(name: str, row: dict[str, Any], *, is_first: bool) -> None:
    """Print a line of what :func:`compared` returns, below a head for the first one."""
    groups = [group for group in row["table"] if "object" in group or group == "all"]
    if is_first:
        print(f"{'format':>10} " + " ".join(f"{group:>10}" for group in groups) + "   same reading  relative error")
    cells = " ".join(f"{row['table'][group]['percent']:8.1f} %" for group in groups)
    print(f"{name:>10} {cells} {row['same_reading_percent']:12.1f} % {row['relative_error']:15.2g}", flush=True)


def compared(
    table: dict[str, Any],
    images: torch.Tensor,
    readings: Sequence[object],
    first: tuple[torch.Tensor, Sequence[object]],
) -> dict[str, Any]:
    """Compare pictures with those of the first row: readings that are the same, and the error of the pictures."""
    same = [one == other for one, other in zip(readings, first[1], strict=True)]
    return {
        "table": table,
        "same_reading_percent": round(100 * sum(same) / len(same), 1),
        "relative_error": float((images - first[0]).norm() / first[0].norm()),
    }
