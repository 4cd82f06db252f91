"""Run diffusers' Wan 2.2 pipeline with both of its transformers on the daemon's workers.

    xditd serve                                                           # in another terminal; then: xditd wait
    python examples/accelerate_wan22_two_transformers.py --model FOLDER   # a folder with model_index.json
    python examples/accelerate_wan22_two_transformers.py --tiny           # tiny random weights, to see that it runs

The first transformer works on the steps with much noise, the second on the others. Both are lent at the start: while
one runs, the other one's weights stay mapped, and no step waits for a load.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.utils import export_to_gif

from xditd.client import XditdError, accelerate


def load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline and the arguments of a call."""
    if options.tiny:
        from tiny_pipelines import wan22

        return wan22()
    vae = AutoencoderKLWan.from_pretrained(options.model, subfolder="vae", dtype=torch.float32, local_files_only=True)
    pipe = DiffusionPipeline.from_pretrained(options.model, vae=vae, dtype=torch.bfloat16, local_files_only=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 40}
    return pipe, {"prompt": options.prompt, "negative_prompt": options.negative_prompt, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="the folder of the pipeline")
    source.add_argument("--tiny", action="store_true", help="use tiny random weights")
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--prompt", default="a red bird flies over a lake")
    parser.add_argument("--negative-prompt", default="blurred, static")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/wan22.gif"))
    options = parser.parse_args()

    pipe, arguments = load(options)
    steps: list[float] = []  # when each step ended

    def note_step(_pipe: Any, _step: int, _timestep: Any, changed: dict[str, Any]) -> dict[str, Any]:
        steps.append(time.perf_counter())
        print(f"step {len(steps)}: {steps[-1] - (steps[-2] if len(steps) > 1 else started):.2f} s", fast.calls)
        return changed

    with accelerate(pipe, runtime_dir=options.runtime_dir) as fast:
        workers = fast.client.status().workers
        print(", ".join(fast.components), "on", ", ".join(f"worker {each.rank} ({each.device})" for each in workers))
        started = time.perf_counter()
        frames = pipe(
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            generator=torch.Generator().manual_seed(options.seed),
            callback_on_step_end=note_step,
            output_type="pil",
            **arguments,
        ).frames[0]
        print(f"{len(frames)} frames: {time.perf_counter() - started:.2f} s; calls in the workers: {fast.calls}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print("wrote", export_to_gif(frames, str(options.out), fps=16))


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        raise SystemExit(f"{error.code}: {error.detail}") from None
