"""Run diffusers' Qwen-Image-Edit pipeline with its transformer and its VAE on the daemon's workers.

    xditd serve                                           # in another terminal; then: xditd wait
    python examples/accelerate_qwen_image_edit.py --model FOLDER    # a folder with model_index.json
    python examples/accelerate_qwen_image_edit.py --tiny            # tiny random weights, to see that it runs

Only the two lines with ``accelerate`` differ from a program that uses diffusers alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from xditd.client import XditdError, accelerate


def load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline and the arguments of a call."""
    if options.tiny:
        from tiny_pipelines import qwen_image_edit

        return qwen_image_edit()
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16, local_files_only=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return pipe, {"prompt": options.prompt, "negative_prompt": " ", "num_inference_steps": 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="the folder of the pipeline")
    source.add_argument("--tiny", action="store_true", help="use tiny random weights")
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--prompt", default="make the sky red")
    parser.add_argument("--image", type=Path, action="append", help="an image to edit, or to refer to; may be repeated")
    parser.add_argument("--images", type=int, default=2, help="how many to make")
    parser.add_argument("--out", type=Path, default=Path("out/qwen-image-edit.png"))
    options = parser.parse_args()

    pipe, arguments = load(options)
    images = [Image.open(path).convert("RGB") for path in options.image or ()] or [Image.new("RGB", (64, 64), "green")]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with accelerate(pipe, components=("transformer", "vae"), runtime_dir=options.runtime_dir) as fast:
        workers = fast.client.status().workers
        print(", ".join(fast.components), "on", ", ".join(f"worker {each.rank} ({each.device})" for each in workers))
        for seed in range(options.images):
            before = fast.calls
            started = time.perf_counter()
            # Guidance runs the transformer twice a step: for the prompt and for the negative one.
            generator = torch.Generator().manual_seed(seed)
            result = pipe(image=images, true_cfg_scale=4.0, generator=generator, **arguments).images[0]
            seconds = time.perf_counter() - started
            calls = ", ".join(f"{count - before[name]} of {name}" for name, count in fast.calls.items())
            print(f"image {seed}: {seconds:.2f} s; calls in the workers: {calls}")
            path = options.out.with_stem(f"{options.out.stem}-{seed}")
            result.save(path)
            print("wrote", path)


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        raise SystemExit(f"{error.code}: {error.detail}") from None
