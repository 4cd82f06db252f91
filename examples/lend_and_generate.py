"""Lend the parts of a model to a running daemon one by one, and draw a sentence.

    xditd serve                               # in another terminal; then: xditd wait
    python examples/lend_and_generate.py      # with models/shapes of the checkout

Each part may be a folder, as here, or a single file (``flux1-dev.safetensors``), and serves any number of jobs.
``Pipeline`` does all of this in one call: examples/folder_to_picture.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xditd.client import Client, XditdError

TEXT_TOKENS = 64
"""To which shapes was trained; FLUX.1 has 512."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime-dir", help="the daemon's folder; default: $XDG_RUNTIME_DIR/xditd")
    parser.add_argument("--model", type=Path, default=Path("models/shapes"), help="the folder of a FLUX.1")
    parser.add_argument("--prompt", default="a large purple heart to the left of a small blue star")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/example.png"))
    options = parser.parse_args()

    with Client(options.runtime_dir, name="lend_and_generate") as client:
        # The loans live until the client is closed. Any number of jobs can use them meanwhile.
        transformer = client.lend(options.model / "transformer")
        vae = client.lend(options.model / "vae")
        encoders = {name: client.lend(options.model / name) for name in ("text_encoder", "text_encoder_2")}
        tokenizers = {name: client.lend_tokenizer(options.model / name) for name in ("tokenizer", "tokenizer_2")}
        for loan in (transformer, vae, *encoders.values()):
            tiers = "+".join(tier.value for tier in loan.tiers)
            print(f"{loan.label}: {loan.lent_bytes} bytes by {tiers}, {loan.copied.total} bytes copied")

        words = client.encode_prompt(
            transformer,
            options.prompt,
            encoders=encoders,
            tokenizers=tokenizers,
            options={"max_sequence_length": TEXT_TOKENS},
        )
        job = client.generate(
            transformer,
            words,
            vae=vae,
            height=256,
            width=256,
            steps=options.steps,
            seed=7,
        )
        # Leaving this loop early, by Ctrl-C too, would stop the job in the workers.
        for event in job:
            print(f"step {event.step} of {event.total_steps}, {event.elapsed_s:.2f} s")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        print("wrote", job.result().save(options.out))


if __name__ == "__main__":
    try:
        main()
    except XditdError as error:
        raise SystemExit(f"{error.code}: {error.detail}") from None
