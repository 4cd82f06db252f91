"""Write the models of ``shapes`` as published files of FLUX.1 have them: one file each, in their original names.

    PYTHONPATH=tools python -m shapes.original models/shapes out/shapes

writes ``flux1-shapes.safetensors``, ``ae-shapes.safetensors``, ``clip_l-shapes.safetensors`` and
``t5-shapes.safetensors``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from shapes.models import weights_file
from xditd.client.demo.original_names import transformer_tensors, vae_tensors

FILES: Final = {
    "transformer": "flux1-shapes.safetensors",
    "vae": "ae-shapes.safetensors",
    "text_encoder": "clip_l-shapes.safetensors",
    "text_encoder_2": "t5-shapes.safetensors",
}


def write_originals(folder: Path, out: Path, dtype: torch.dtype | None = None) -> dict[str, Path]:
    """Write the single files of a pipeline's folder; return their paths by the names of its parts.

    ``dtype`` is that of the folder unless given.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, name in FILES.items():
        source, written[part] = folder / part / weights_file(part), out / name
        if part.startswith("text_encoder") and dtype is None:
            shutil.copyfile(source, written[part])  # transformers' names are the original ones
            continue
        tensors = load_file(source)
        if part == "transformer":
            tensors = transformer_tensors(tensors)
        elif part == "vae":
            tensors = vae_tensors(tensors)
        save_file({name: each.to(dtype or each.dtype) for name, each in tensors.items()}, written[part])
        written[part].chmod(0o644)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the models of shapes as the published files of FLUX.1.")
    parser.add_argument("folder", type=Path, help="the pipeline's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="the folder's unless given")
    given = parser.parse_args()
    for path in write_originals(given.folder, given.out, given.dtype and getattr(torch, given.dtype)).values():
        print(path)


if __name__ == "__main__":
    main()
