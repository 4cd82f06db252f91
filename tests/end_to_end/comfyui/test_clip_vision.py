"""Load CLIP Vision (xDiT) gives what ComfyUI's own vision model gives, through its own nodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xditd.client import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-5
SIZES: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 4, "num_channels": 3, "hidden_act": "gelu",
    "projection_dim": 24,
}  # fmt: skip
PROJECTION = "visual_projection.weight"
EMBEDDINGS = "vision_model.embeddings"
KINDS = ("weight", "bias")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    width, inner, patch = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{EMBEDDINGS}.class_embedding": (width,),
        f"{EMBEDDINGS}.patch_embedding.weight": (width, 3, patch, patch),
        f"{EMBEDDINGS}.position_embedding.weight": ((SIZES["image_size"] // patch) ** 2 + 1, width),
        PROJECTION: (SIZES["projection_dim"], width),
    }
    layers = [f"vision_model.encoder.layers.{number}" for number in range(SIZES["num_hidden_layers"])]
    attention = [f"{layer}.self_attn.{part}_proj" for layer in layers for part in ("q", "k", "v", "out")]
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    norms += [f"{layer}.layer_norm{number}" for layer in layers for number in (1, 2)]
    for names, rows, columns in (
        (attention, width, width),
        ([f"{layer}.mlp.fc1" for layer in layers], inner, width),
        ([f"{layer}.mlp.fc2" for layer in layers], width, inner),
        (norms, width, None),
    ):
        shapes |= {f"{name}.weight": (rows,) if columns is None else (rows, columns) for name in names}
        shapes |= {f"{name}.bias": (rows,) for name in names}
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        name: 1.0 + 0.2 * each
        if each.ndim == 1 and name.endswith("weight")
        else 0.2 * each
        if each.ndim == 1
        else each / math.sqrt(math.prod(each.shape[1:]))
        for name, each in made.items()
    }


def remote(state: dict[str, torch.Tensor], path: Any) -> Any:
    from xditd.client.comfyui.nodes.clip_vision_loader import load_clip_vision

    save_file(state, path)
    return load_clip_vision(str(path))


def stock(comfy: Any, state: dict[str, torch.Tensor]) -> Any:
    """As ComfyUI's loader makes it, which knows no file of this size."""
    import comfy.clip_vision

    made = comfy.clip_vision.ClipVisionModel(dict(SIZES))
    missing, _ = made.load_sd(dict(state))
    assert not [name for name in missing if name != PROJECTION]
    return made


def image(rows: int = 1) -> torch.Tensor:
    return torch.rand(rows, 40, 60, 3, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("has_projection", [True, False], ids=["projected", "alone"])
def test_clip_vision_encode(dtype, has_projection, comfy, connected, state, tmp_path, relative_error):
    given = {name: each.to(dtype) for name, each in state.items() if has_projection or name != PROJECTION}
    ours, theirs = remote(given, tmp_path / "clip_vision_h.safetensors"), stock(comfy, given)
    for rows, crop in ((1, "center"), (2, "none")):
        node = comfy.nodes.CLIPVisionEncode()
        with torch.no_grad():
            actual, expected = (node.encode(each, image(rows), crop)[0] for each in (ours, theirs))
        for name in ("last_hidden_state", "penultimate_hidden_states", "image_embeds"):
            assert actual[name].shape == expected[name].shape
            assert actual[name].dtype == expected[name].dtype
            assert relative_error(actual[name], expected[name]) <= TOLERANCE
        assert relative_error(expected["last_hidden_state"], expected["penultimate_hidden_states"]) > 1e-2
        assert actual["image_sizes"] == expected["image_sizes"]
        assert actual["mm_projected"] is expected["mm_projected"] is None


def test_every_layer_shows_in_wans_image_node(comfy, connected, state, tmp_path, relative_error):
    from comfy_extras.nodes_wan import WanImageToVideo

    class Vae:
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 16, 2, 4, 4)

    def states(vision: Any) -> torch.Tensor:
        seen = comfy.nodes.CLIPVisionEncode().encode(vision, image(), "center")[0]
        positive = [[torch.zeros(1, 4, 8), {}]]
        found = WanImageToVideo.execute(positive, positive, Vae(), 32, 32, 5, 1, image(), seen).result[0]
        kept: torch.Tensor = found[0][1]["clip_vision_output"].penultimate_hidden_states
        return kept

    right = states(stock(comfy, state))
    assert relative_error(states(remote(state, tmp_path / "whole.safetensors")), right) <= TOLERANCE
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    changed = {**state, name: torch.zeros_like(state[name])}
    assert relative_error(states(remote(changed, tmp_path / "changed.safetensors")), right) > 100 * TOLERANCE


def in_open_clips_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Spell a model as OpenCLIP does, with one matrix of queries, keys and values."""
    spelled = {
        f"{EMBEDDINGS}.class_embedding": "class_embedding",
        f"{EMBEDDINGS}.patch_embedding.weight": "conv1.weight",
        f"{EMBEDDINGS}.position_embedding.weight": "positional_embedding",
        **{f"vision_model.pre_layrnorm.{kind}": f"ln_pre.{kind}" for kind in KINDS},
        **{f"vision_model.post_layernorm.{kind}": f"ln_post.{kind}" for kind in KINDS},
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts["self_attn.out_proj"] = "attn.out_proj"
    found = {f"visual.{theirs}": state[name] for name, theirs in spelled.items()}
    for number in range(SIZES["num_hidden_layers"]):
        layer, block = f"vision_model.encoder.layers.{number}", f"visual.transformer.resblocks.{number}"
        for kind in KINDS:
            found |= {f"{block}.{theirs}.{kind}": state[f"{layer}.{name}.{kind}"] for name, theirs in parts.items()}
            joined = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(joined)
    return found | {"visual.proj": state[PROJECTION].T.contiguous()}


def test_open_clips_names(comfy, connected, state, tmp_path, relative_error):
    spelled = remote(in_open_clips_names(state), tmp_path / "open_clip.safetensors")
    with torch.no_grad():
        actual, expected = (
            comfy.nodes.CLIPVisionEncode().encode(each, image(), "center")[0] for each in (spelled, stock(comfy, state))
        )
    for name in ("penultimate_hidden_states", "image_embeds"):
        assert relative_error(actual[name], expected[name]) <= TOLERANCE


def test_what_is_refused(comfy, connected, state, tmp_path):
    vision = remote(state, tmp_path / "clip_vision_h.safetensors")
    with pytest.raises(Unsupported, match="cannot be saved"):
        vision.get_sd()
    for name, changed, said in (
        ("large", {each: tensor[..., :128] if tensor.ndim == 2 else tensor for each, tensor in state.items()}, "128"),
        ("packed", {each: tensor.to(torch.float8_e4m3fn) for each, tensor in state.items()}, "is float8_e4m3fn"),
        ("other", {"a.weight": torch.zeros(1)}, "no CLIP vision model with ComfyUI's names"),
    ):
        with pytest.raises(Unsupported, match=f"{name}: .*{said}"):
            remote({each: tensor.contiguous() for each, tensor in changed.items()}, tmp_path / f"{name}.safetensors")
    vision.model.register_forward_hook(print)
    with pytest.raises(Unsupported, match="forward hook"):
        comfy.nodes.CLIPVisionEncode().encode(vision, image(), "center")
