"""From a folder of a diffusers pipeline to pictures, without torch, diffusers or transformers in this program's code.

    python examples/folder_to_picture.py models/shapes "a large purple heart" --size 256x256    # of the checkout
    python examples/folder_to_picture.py ~/models/FLUX.1-dev "a cat on a sofa" --count 4 --out cats.png
    python examples/folder_to_picture.py flux "a cat" --lora style.safetensors 0.8    # a name of models.toml

A daemon has to run: ``xditd serve``. If it is restarted meanwhile, the models are lent again, and the same seed makes
the same pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from xditd.client import Pipeline, PipelineResult, StepDone, XditdError

MOST_TRIES = 5


def show(event: object) -> None:
    if isinstance(event, StepDone):
        print(f"step {event.step} of {event.total_steps}, {event.elapsed_s:.2f} s")


def run(pipe: Pipeline, prompt: str, **arguments: Any) -> PipelineResult:
    """Run a call, again where the same one may work later: the daemon was restarted, or its queue was full."""
    for tries in range(1, MOST_TRIES + 1):
        try:
            return pipe(prompt, on_progress=show, **arguments)
        except XditdError as error:
            if not error.retryable or tries == MOST_TRIES:
                raise
            print(f"{error}; trying again", file=sys.stderr)
            time.sleep(error.retry_after_s or 2.0)
    raise AssertionError("the last try returns or raises")


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with model_index.json, a checkpoint, or a name of models.toml")
    parser.add_argument("prompt")
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--lora", nargs=2, action="append", default=[], metavar=("FILE", "STRENGTH"))
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--size", type=size, default=(None, None), metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, default=Path("out.png"))
    given = parser.parse_args()
    width, height = given.size
    loras = [(path, float(strength)) for path, strength in given.lora]
    with Pipeline.open(given.model, runtime_dir=given.runtime_dir, wait_s=60) as pipe:
        print(f"{pipe.name}: {pipe.family}, by default {dict(pipe.defaults)}")
        result = run(
            pipe, given.prompt, loras=loras, num_images=given.count, width=width, height=height, steps=given.steps,
            seed=given.seed,
        )  # fmt: skip
    for path in result.save(given.out):
        print(f"wrote {path}, seed {result.seed}")


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        sys.exit(f"error: {error}")
