"""Lend two checkpoint files to a running daemon and generate an image from random text embeddings.

    xditd demo --out out --keep       # writes small checkpoints, and prints the folder of its daemon
    python examples/lend_and_generate.py --runtime-dir THAT_FOLDER

With real checkpoints, give real embeddings (see xditd generate --help) in place of the random ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xditd.client import Client, XditdError
from xditd.client.conditioning import random_conditioning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--transformer", type=Path, default=Path("out/checkpoints/flux1-demo.safetensors"))
    parser.add_argument("--vae", type=Path, default=Path("out/checkpoints/ae-demo.safetensors"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/example.png"))
    options = parser.parse_args()

    with Client(options.runtime_dir, name="lend_and_generate") as client:
        # The loans live until the client is closed. Any number of jobs can use them meanwhile.
        transformer = client.lend(options.transformer)
        vae = client.lend(options.vae)
        for loan in (transformer, vae):
            tiers = "+".join(tier.value for tier in loan.tiers)
            print(f"{loan.label}: {loan.lent_bytes} bytes by {tiers}, {loan.copied.total} bytes copied")

        job = client.generate(
            transformer,
            random_conditioning(transformer.facts, seed=1, text_tokens=64),
            vae=vae,
            height=256,
            width=256,
            steps=options.steps,
            seed=7,
        )
        # Leaving this loop early, by Ctrl-C too, would stop the job in the workers.
        for event in job:
            print(f"step {event.step} of {event.total_steps}, {event.elapsed_s:.2f} s")
        print("wrote", job.result().save(options.out))


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        raise SystemExit(f"{error.code}: {error.detail}") from None
