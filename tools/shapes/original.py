"""Write the models of ``shapes`` as published files of FLUX.1 have them: one file each, in their original names.

    PYTHONPATH=tools python -m shapes.original models/shapes out/shapes

writes ``flux1-shapes.safetensors``, ``ae-shapes.safetensors``, ``clip_l-shapes.safetensors`` and
``t5-shapes.safetensors``. The names are those that the workers' families read, so the same tables serve here.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from shapes.models import weights_file
from xditd.gpu_workers.families.flux1.checkpoint import Flux1
from xditd.gpu_workers.families.flux1.config import Flux1Config
from xditd.gpu_workers.families.flux_vae.checkpoint import FluxVae
from xditd.gpu_workers.families.flux_vae.config import FluxVaeConfig
from xditd.gpu_workers.models.entries import Entry

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


def transformer_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn diffusers' names of a FLUX.1 transformer into those of Black Forest Labs."""
    config = Flux1Config(
        hidden=tensors["x_embedder.weight"].shape[0],
        double_blocks=_count(tensors, "transformer_blocks"),
        single_blocks=_count(tensors, "single_transformer_blocks"),
        context_channels=tensors["context_embedder.weight"].shape[1],
        pooled_channels=tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        has_guidance="time_text_embed.guidance_embedder.linear_1.weight" in tensors,
    )
    joined = _joined(Flux1().entries(config, ()), tensors)
    for name in ("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"):
        scale, shift = joined[name].chunk(2)
        joined[name] = torch.cat([shift, scale])
    return joined


def vae_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn diffusers' names of FLUX.1's VAE into those of ``ae.safetensors``."""
    levels = _count(tensors, "encoder.down_blocks")
    config = FluxVaeConfig(
        channels=tuple(tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)),
        residuals=_count(tensors, "encoder.down_blocks.0.resnets"),
        has_mid_attention=True,
        has_encoder=True,
    )
    return _joined(FluxVae().entries(config, ()), tensors)


def _count(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name[len(prefix) + 1 :].split(".")[0] for name in tensors if name.startswith(f"{prefix}.")})


def _joined(entries: Iterable[Entry], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the parameters of each entry along their rows, in its shape.

    Raises:
        ValueError: a parameter is in no entry.
    """
    left = dict(tensors)
    joined = {
        entry.source: torch.cat([left.pop(name) for name, _ in entry.targets]).reshape(entry.shape).contiguous()
        for entry in entries
    }
    if left:
        raise ValueError(f"{', '.join(sorted(left)[:3])}: not in a file of FLUX.1; is the folder one of shapes?")
    return joined


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
