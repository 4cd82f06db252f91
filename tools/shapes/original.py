"""Write the models of ``shapes`` as published files of FLUX.1 have them: one file each, in their original names.

    PYTHONPATH=tools:.pkg python -m shapes.original models/shapes out/shapes

writes ``flux1-shapes.safetensors``, ``ae-shapes.safetensors``, ``clip_l-shapes.safetensors`` and
``t5-shapes.safetensors``. With ``--comfyui`` the folder is ComfyUI's ``models``: each file goes where its loader looks,
and those of the text encoders have their tokenizers, as ComfyUI's files of models whose tokenizers it does not ship.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from shapes.arguments import pipeline_folder
from shapes.models import weights_file
from xditd.client.demo.original_names import transformer_tensors, vae_tensors

FILES: Final = {
    "transformer": "flux1-shapes.safetensors",
    "vae": "ae-shapes.safetensors",
    "text_encoder": "clip_l-shapes.safetensors",
    "text_encoder_2": "t5-shapes.safetensors",
}
COMFYUI_FOLDERS: Final = {
    "transformer": "diffusion_models",
    "vae": "vae",
    "text_encoder": "text_encoders",
    "text_encoder_2": "text_encoders",
}
TOKENIZERS: Final = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_TENSOR: Final = "tokenizer_json"
"""ComfyUI's name for the bytes of a ``tokenizer.json`` in a file of weights."""


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


def write_for_comfyui(folder: Path, models: Path, dtype: torch.dtype | None = None) -> dict[str, Path]:
    """Write the single files into ComfyUI's ``models``; return their paths by the names of the pipeline's parts."""
    placed = {}
    with tempfile.TemporaryDirectory(dir=_made(models)) as scratch:
        for part, path in write_originals(folder, Path(scratch), dtype).items():
            if part in TOKENIZERS:
                save_file(load_file(path) | {TOKENIZER_TENSOR: _tokenizer(folder / TOKENIZERS[part])}, path)
                path.chmod(0o644)
            placed[part] = path.replace(_made(models / COMFYUI_FOLDERS[part]) / path.name)
    return placed


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tokenizer(folder: Path) -> torch.Tensor:
    """Return the bytes of a tokenizer's ``tokenizer.json``, which a folder of CLIP's has in other files."""
    text: str = AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the models of shapes as the published files of FLUX.1.")
    parser.add_argument("folder", type=pipeline_folder, help="the pipeline's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="the folder's unless given")
    parser.add_argument("--comfyui", action="store_true", help="OUT is ComfyUI's folder models")
    given = parser.parse_args(arguments)
    write = write_for_comfyui if given.comfyui else write_originals
    for path in write(given.folder, given.out, given.dtype and getattr(torch, given.dtype)).values():
        print(path)


if __name__ == "__main__":
    main()
