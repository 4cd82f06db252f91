"""Run diffusers' FLUX.1 pipeline with its transformer on the daemon's workers.

    xditd serve                                           # in another terminal; then: xditd wait
    python examples/accelerate_flux1.py --model FOLDER    # a folder with model_index.json
    python examples/accelerate_flux1.py --model models/shapes --size 256 --prompt "a large purple heart"
    python examples/accelerate_flux1.py --tiny            # tiny random weights, to see that it runs

Only the two lines with ``accelerate`` differ from a program that uses diffusers alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from xditd.client import XditdError, accelerate


def load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline and the arguments of a call."""
    if options.tiny:
        from tiny_pipelines import flux1

        return flux1()
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16, local_files_only=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return pipe, {"prompt": options.prompt, "height": options.size, "width": options.size, "num_inference_steps": 28}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="the folder of the pipeline")
    source.add_argument("--tiny", action="store_true", help="use tiny random weights")
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--prompt", default="a red bird over a lake")
    parser.add_argument("--size", type=int, default=1024, help="the image's sides in pixels")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/flux1.png"))
    options = parser.parse_args()

    pipe, arguments = load(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with accelerate(pipe, runtime_dir=options.runtime_dir) as fast:
        workers = fast.client.status().workers
        print(", ".join(fast.components), "on", ", ".join(f"worker {each.rank} ({each.device})" for each in workers))
        for seed in range(options.images):
            calls = fast.calls["transformer"]
            started = time.perf_counter()
            image = pipe(**arguments, generator=torch.Generator().manual_seed(seed)).images[0]
            seconds, calls = time.perf_counter() - started, fast.calls["transformer"] - calls
            # The phases of the last job of the workers, in milliseconds.
            phases = ", ".join(f"{name} {ms:.1f}" for name, ms in fast.client.status().last_job_ms.items())
            print(f"image {seed}: {seconds:.2f} s, {calls} calls of the transformer; ms of the last one: {phases}")
            path = options.out.with_stem(f"{options.out.stem}-{seed}")
            image.save(path)
            print("wrote", path)


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        raise SystemExit(f"{error.code}: {error.detail}") from None
