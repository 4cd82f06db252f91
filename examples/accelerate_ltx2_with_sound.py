"""Run diffusers' LTX-2 pipeline, a video with sound, with all of its models but the text encoder on the workers.

    xditd serve                                                     # in another terminal; then: xditd wait
    python examples/accelerate_ltx2_with_sound.py --model FOLDER    # a folder with model_index.json
    python examples/accelerate_ltx2_with_sound.py --tiny            # tiny random weights, to see that it runs

The transformer returns two tensors, for the frames and for the sound, as its class does. The two decoders and the
vocoder run in the workers too.
"""

from __future__ import annotations

import argparse
import time
import wave
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

from xditd.client import XditdError, accelerate

COMPONENTS = ("transformer", "connectors", "vae", "audio_vae", "vocoder")


def load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline and the arguments of a call."""
    if options.tiny:
        from tiny_pipelines import ltx2

        return ltx2()
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16, local_files_only=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"height": 512, "width": 768, "num_frames": 121, "frame_rate": 24.0, "num_inference_steps": 40}
    return pipe, {"prompt": options.prompt, "negative_prompt": options.negative_prompt, **sizes}


def write_sound(path: Path, sound: torch.Tensor, rate: int) -> None:
    """Write (channels, samples) from -1 to 1 as 16-bit samples."""
    samples = (sound.float().clamp(-1, 1) * 32767).short().T.contiguous().cpu()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="the folder of the pipeline")
    source.add_argument("--tiny", action="store_true", help="use tiny random weights")
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--prompt", default="a red bird flies over a lake and sings")
    parser.add_argument("--negative-prompt", default="blurred, static, noise")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/ltx2.gif"), help="the sound goes beside it, as .wav")
    options = parser.parse_args()

    pipe, arguments = load(options)
    with accelerate(pipe, components=COMPONENTS, runtime_dir=options.runtime_dir) as fast:
        workers = fast.client.status().workers
        print(", ".join(fast.components), "on", ", ".join(f"worker {each.rank} ({each.device})" for each in workers))
        started = time.perf_counter()
        result = pipe(generator=torch.Generator().manual_seed(options.seed), output_type="pil", **arguments)
        print(f"{len(result.frames[0])} frames: {time.perf_counter() - started:.2f} s")
        print("calls in the workers:", ", ".join(f"{count} of {name}" for name, count in fast.calls.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print("wrote", export_to_gif(result.frames[0], str(options.out), fps=round(arguments["frame_rate"])))
    sound = options.out.with_suffix(".wav")
    write_sound(sound, result.audio[0], pipe.vocoder.config.output_sampling_rate)
    print("wrote", sound)


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        raise SystemExit(f"{error.code}: {error.detail}") from None
