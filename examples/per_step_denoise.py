"""Run a sampler of one's own: the workers compute one forward a step, the loop stays here.

    xditd serve                               # in another terminal; then: xditd wait
    python examples/per_step_denoise.py       # with models/shapes of the checkout

The loop is Euler's method, as FLUX.1's own scheduler does it, so the result can be compared with ``generate``,
which runs the same loop inside the workers. Any other sampler, mask or preview goes where the loop is.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch

from xditd.client import Client, Loan, XditdError
from xditd.client.demo.flux1_calls import image_ids, text_ids
from xditd.client.demo.shapes_model import shifted_sigmas
from xditd.client.families.flux1 import pack, unpack
from xditd.client.image_files import image_to_pil

GUIDANCE = 3.5


def sample(
    client: Client,
    transformer: Loan,
    noise: torch.Tensor,
    sigmas: list[float],
    conditioning: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Go from noise to latents. The transformer predicts the velocity from the image to the noise."""
    height, width = noise.shape[2:]
    dtype = getattr(torch, transformer.facts.dtype)
    # What keep() returns is sent with the first step and kept in the workers: later steps send latents and sigma alone.
    unchanging = {
        "encoder_hidden_states": client.keep(conditioning["prompt_embeds"].to(dtype)),
        "pooled_projections": client.keep(conditioning["pooled_prompt_embeds"].to(dtype)),
        "img_ids": image_ids(height, width),
        "txt_ids": text_ids(conditioning["prompt_embeds"].shape[1]),
        "guidance": torch.tensor([GUIDANCE]),
    }
    latents = noise
    for sigma, next_sigma in pairwise([*sigmas, 0.0]):
        # The arguments of diffusers' FluxTransformer2DModel.forward, by name; the result is its tuple of one tensor.
        moving = {"hidden_states": pack(latents.to(dtype)), "timestep": torch.tensor([sigma])}
        (packed,) = client.call(transformer, {**moving, **unchanging}, foreseen={"timestep": sigmas})
        velocity = unpack(packed, height, width).to(noise.dtype)
        latents = latents + (next_sigma - sigma) * velocity
        print(f"sigma {sigma:.3f}: latents have a spread of {latents.std():.3f}")
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--model", type=Path, default=Path("models/shapes"), help="the folder of a FLUX.1")
    parser.add_argument("--prompt", default="a large purple heart to the left of a small blue star")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/per-step.png"))
    options = parser.parse_args()

    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(7))
    sigmas = [*shifted_sigmas(options.steps)]  # those of 256 x 256 pixels
    with Client(options.runtime_dir, name="per_step_denoise") as client:
        # Both stay on loan until the end: decode() takes the scale of the latents from the transformer.
        transformer, vae = client.lend(options.model / "transformer"), client.lend(options.model / "vae")
        conditioning = client.encode_prompt(
            transformer,
            options.prompt,
            encoders={name: client.lend(options.model / name) for name in ("text_encoder", "text_encoder_2")},
            tokenizers={name: client.lend_tokenizer(options.model / name) for name in ("tokenizer", "tokenizer_2")},
            options={"max_sequence_length": 64},
        )
        latents = sample(client, transformer, noise, sigmas, conditioning)
        fused = client.generate(
            transformer,
            conditioning,
            height=256,
            width=256,
            steps=options.steps,
            sigmas=sigmas,
            guidance_scale=GUIDANCE,
            noise=noise,
        ).result()
        difference = (latents - fused.latents).norm() / fused.latents.norm()
        print(f"relative difference from generate: {difference:.2g}")
        image = client.decode(vae, latents, transformer=transformer)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    image_to_pil(image[0]).save(options.out)
    print("wrote", options.out)


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        raise SystemExit(f"{error.code}: {error.detail}") from None
