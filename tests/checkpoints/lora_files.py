"""For tests: LoRAs in the spellings of other programs, and what they mean, by names and formulas of its own.

Nothing here is shared with the code under test. A LoRA in a checkpoint's names is baked into the checkpoint, one in
the class's names into the parameters of diffusers' own class.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]
CHECKPOINT_SPELLINGS = ("kohya", "comfyui", "lycoris", "bare", "xlabs")
CLASS_SPELLINGS = ("diffusers", "peft", "onetrainer", "rslora", "lycoris_class")

_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "txt_attn.proj": "processor.proj_lora2",
}


@dataclass
class Lora:
    """A LoRA: its tensors and metadata as a file has them, and the difference of each layer at strength 1."""

    tensors: State = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    differences: State = field(default_factory=dict)
    """By the layer's name, of the checkpoint or of the class."""
    is_of_class: bool = False

    def save(self, path: Path) -> Path:
        from safetensors.torch import save_file

        save_file(self.tensors, path, metadata=self.metadata or None)
        return path

    def baked_into(self, state: Mapping[str, torch.Tensor], strength: float) -> State:
        """Return a checkpoint with this LoRA in its weights."""
        assert not self.is_of_class
        found = dict(state)
        for layer, difference in self.differences.items():
            name = f"{layer}.weight"
            found[name] = (found[name].double() + strength * difference).to(found[name].dtype)
        return found

    @torch.no_grad()
    def bake_into(self, module: torch.nn.Module, strength: float) -> None:
        """Write this LoRA into the weights of a module of diffusers or transformers."""
        assert self.is_of_class
        for layer, difference in self.differences.items():
            weight = module.get_submodule(layer).weight
            weight.copy_((weight.double() + strength * difference).to(weight.dtype))


def make(
    shapes: Mapping[str, Sequence[int]],
    spelling: str,
    seed: int,
    *,
    ranks: Sequence[int] = (4, 7, 1),
    dtype: torch.dtype = torch.float32,
    size: float = 0.5,
) -> Lora:
    """Make a LoRA of layers with these shapes (outputs, inputs) and names, in a spelling. Each layer has another rank.

    ``size`` is that of the differences, of weights whose activations keep their size.
    """
    found = Lora(is_of_class=spelling in CLASS_SPELLINGS)
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {}}
    for number, (layer, (outputs, inputs)) in enumerate(sorted(shapes.items())):
        rank = ranks[number % len(ranks)]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{layer}".encode()))
        alpha = float(rank) * (0.5, 1.0, 2.0)[number % 3]
        scale = alpha / rank
        if spelling == "rslora":
            scale = (3.0 if number % 2 else 8.0) / math.sqrt(rank)
            if number % 2:
                config["alpha_pattern"][layer] = 3.0
        elif spelling in ("diffusers", "comfyui", "bare"):
            scale = 1.0
        down = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
        up = size / scale / math.sqrt(rank) * torch.randn(outputs, rank, generator=generator)
        down, up = down.to(dtype), up.to(dtype)
        found.differences[layer] = scale * (up.double() @ down.double())
        base, ends = _spelled(layer, spelling)
        found.tensors[base + ends[0]], found.tensors[base + ends[1]] = down, up
        if spelling in ("kohya", "onetrainer", "lycoris", "lycoris_class", "xlabs", "peft"):
            found.tensors[f"{base}.alpha"] = torch.tensor(alpha)
    if spelling == "rslora":
        found.metadata["lora_adapter_metadata"] = json.dumps(
            {f"transformer.{key}": value for key, value in config.items()}
        )
    return found


def _spelled(layer: str, spelling: str) -> tuple[str, tuple[str, str]]:
    flat = layer.replace(".", "_")
    kohya, peft = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
    if spelling == "kohya":
        return f"lora_unet_{flat}", kohya
    if spelling == "onetrainer":
        return f"lora_transformer_{flat}", kohya
    if spelling in ("lycoris", "lycoris_class"):
        return f"lycoris_{flat}", kohya
    if spelling == "comfyui":
        return f"diffusion_model.{layer}", peft
    if spelling == "bare":
        return layer, peft
    if spelling in ("diffusers", "rslora"):
        return f"transformer.{layer}", peft
    if spelling == "peft":
        return f"base_model.model.{layer}", (".lora_A.default.weight", ".lora_B.default.weight")
    assert spelling == "xlabs", spelling
    block, number, rest = layer.split(".", 2)
    return f"{block}.{number}.{_XLABS[rest]}", (".down.weight", ".up.weight")


def matrices(state: Mapping[str, torch.Tensor], *ends: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return the shapes of the linear layers of a checkpoint or a module, by name; with ``ends`` of those alone."""
    return {
        name.removeprefix(prefix).removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim == 2 and (not ends or name.removesuffix(".weight").endswith(ends))
    }
