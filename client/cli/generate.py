"""``xditd generate``: lend a transformer and a VAE file, and generate images."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from xditd.client.cli import control_flags, exits, flags
from xditd.client.cli.generations import Outputs, sampling_of
from xditd.client.cli.printing import json_text
from xditd.client.cli.tables import copied_by_kind, copied_text, size_text, span_text
from xditd.client.loans import Loan
from xditd.ipc.settings.client import GenerateFlags

if TYPE_CHECKING:
    import torch


SUMMARY = "lend checkpoint files and generate images and videos"
DESCRIPTION = """\
Lend a transformer and a VAE by their files, and generate images or videos from text embeddings. A transformer may also
be a GGUF file, such as flux1-dev-Q4_K_M.gguf; packed weights are multiplied in --compute-dtype.

This command takes no prompt and runs no text encoder: --embeds names a safetensors file with the embeddings of a
prompt, under the names that the transformer takes:

  FLUX.1   prompt_embeds (batch, text tokens, context) and pooled_prompt_embeds (batch, pooled)
  Z-Image  a list of one tensor for each image, (text tokens, context), of any lengths: prompt_embeds.0, prompt_embeds.1
           and so on; with --guidance above 0 also negative_prompt_embeds.0 and so on
  FLUX.2   prompt_embeds (batch, text tokens, context); for klein with --guidance above 1 also negative_prompt_embeds
  Qwen-Image  prompt_embeds (batch, text tokens, context); with --guidance above 1 also negative_prompt_embeds; for
           padded texts also prompt_embeds_mask and negative_prompt_embeds_mask, floating, 1 where a token counts
  Wan      prompt_embeds and, with --guidance above 1, negative_prompt_embeds (batch, 512, context); from images image,
           last_image (1, 3, height, width) in [-1, 1] and for Wan 2.1 image_embeds; for VACE video, mask,
           reference_images.0 and so on

For one image, the batch dimension may be left out, and so may the number of a list's only tensor. If the file lacks a
tensor, the error names it. Any program with the encoders can write such files, and the Python library runs CLIP-L and
T5 in the workers (Client.encode_text). --random-embeds draws a test pattern instead."""
EXAMPLES = """\
examples:
  xditd generate --transformer flux1-dev.safetensors --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer z_image_turbo_bf16.safetensors --vae ae.safetensors --embeds cat.safetensors \\
      --steps 8 --option shift=3 -o cat.png
  xditd generate --transformer flux2-dev.safetensors --vae flux2-vae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer qwen_image_bf16.safetensors --vae qwen_image_vae.safetensors --embeds cat.safetensors \\
      --guidance 4 -o cat.png
  xditd generate --transformer wan2.2_t2v_high_noise_14B_fp16.safetensors \\
      --transformer-2 wan2.2_t2v_low_noise_14B_fp16.safetensors --vae wan_2.1_vae.safetensors \\
      --embeds cat.safetensors --size 1280x720 --frames 81 --guidance 4 \\
      --option guidance_scale_2=3,shift=12 -o cat.mp4
  xditd generate --transformer flux1-dev-Q8_0.gguf --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer flux1-dev.safetensors --lora style.safetensors=0.8 --lora detail.safetensors=-0.3 \\
      --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer flux1-dev.safetensors --control union.safetensors=edges.png@0.6:end=0.8:mode=0 \\
      --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer t.safetensors --vae v.safetensors --random-embeds 1 --size 512x512 --steps 4

cat.safetensors for FLUX.1, made with diffusers:
  pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=None, vae=None)
  embeds, pooled, _ = pipe.encode_prompt("a cat", None)
  safetensors.torch.save_file({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, "cat.safetensors")

for Z-Image:
  pipe = ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image-Turbo", transformer=None, vae=None)
  embeds, negatives = pipe.encode_prompt(["a cat", "a grey cat"])
  lists = {"prompt_embeds": embeds, "negative_prompt_embeds": negatives}
  tensors = {f"{name}.{number}": each for name, found in lists.items() for number, each in enumerate(found)}
  safetensors.torch.save_file(tensors, "cat.safetensors")

Several images are written as cat-0.png, cat-1.png and so on, and several videos as cat-0.mp4. For a video, a path
without a suffix is a folder of PNG files; an .mp4 needs PyAV: pip install 'xditd[video]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, GenerateFlags)
    control_flags.add_arguments(parser)
    parser.set_defaults(refuse=parser.error)


def run(parsed: argparse.Namespace) -> int:
    if parsed.transformer is None:
        parsed.refuse("--transformer FILE is needed")
    if parsed.embeds is not None and parsed.random_embeds is not None:
        parsed.refuse("--embeds FILE and --random-embeds SEED are both given; leave one out")
    if parsed.embeds is None and parsed.random_embeds is None:
        parsed.refuse("one of --embeds FILE and --random-embeds SEED is needed")
    if parsed.vae is None and parsed.save_latents is None:
        parsed.refuse("--vae FILE or --save-latents FILE is needed: without both nothing is written")
    if parsed.fps is not None and (parsed.frames or 1) == 1:
        parsed.refuse("--fps is of a video; give --frames COUNT, or leave it out")
    exits.configure_logging(parsed.log_level)

    from xditd.client.cli.progress import watch
    from xditd.client.client import Client
    from xditd.client.conditioning import conditioning_of, random_conditioning
    from xditd.client.tensor_files import read_tensors, require_torch

    outputs = Outputs(parsed)
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
        loras = {path: client.lend_lora(path, device=parsed.device) for path in parsed.lora or {}}
        controls = control_flags.lend_controls(client, parsed, pictures)
        lend_s = time.perf_counter() - started
        if stored is None:
            conditioning = random_conditioning(transformer.facts, parsed.random_embeds, parsed.text_tokens)
        else:
            conditioning = conditioning_of(stored, transformer.facts, str(parsed.embeds))
        outputs.prepare(transformer.facts, conditioning)
        job = client.generate(
            transformer.with_loras([(loras[path], strength) for path, strength in (parsed.lora or {}).items()]),
            conditioning,
            vae=vae,
            transformer_2=second or None,
            frames=parsed.frames or 1,
            controls=controls,
            **sampling_of(parsed),
        )
        result = watch(job, "denoising", is_quiet=parsed.json)
        outputs.write(result)
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
                    "width": parsed.size[0],
                    "height": parsed.size[1],
                    "frames": parsed.frames or 1,
                    "steps": job.total_steps,
                    "guidance_scale": default_guidance if parsed.guidance is None else parsed.guidance,
                    "step_cache": parsed.step_cache,
                    "options": parsed.option or {},
                },
                "loras": parsed.lora or {},
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
