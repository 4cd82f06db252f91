"""Files of CLIP's vision model without a configuration run as transformers' class, with its bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from xditd.client.lending import describe as offer_of
from xditd.gpu_workers.families.clip_vision import describe
from xditd.gpu_workers.models.registry import describe as described
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.tensors import ComponentKind

if TYPE_CHECKING:
    from one_rank import OneRank

State = dict[str, torch.Tensor]
POSITIONS = "vision_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def made() -> tuple[State, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tiny model as ComfyUI's files have it, an image, and what the class makes of it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=2, hidden_act="gelu", projection_dim=24)
    module = CLIPVisionModelWithProjection(config).eval()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert {name.split(".")[0] for name in state} == {"vision_model", "visual_projection"}
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(pixel_values=pixels, output_hidden_states=True)
    return state | {POSITIONS: torch.arange(257)[None]}, pixels, expected.hidden_states[-2], expected.image_embeds


@pytest.mark.parametrize("has_projection", [False, True], ids=["alone", "with a projection"])
def test_a_file_has_the_states_of_the_class(
    rank: OneRank, tmp_path: Path, made: tuple[State, torch.Tensor, torch.Tensor, torch.Tensor], has_projection: bool
) -> None:
    state, pixels, states, embeds = made
    kept = {name: each for name, each in state.items() if has_projection or not name.startswith("visual_projection")}
    save_file(kept, tmp_path / "clip_vision_h.safetensors")
    rank.lend("clip", tmp_path / "clip_vision_h.safetensors")
    component = rank.components.get("clip", "module")
    assert component.facts.kind is ComponentKind.MODULE
    with torch.inference_mode():
        found = component.match.model.module(pixel_values=pixels, output_hidden_states=True)
    assert torch.equal(found.hidden_states[-2], states)
    if has_projection:
        assert torch.equal(found.image_embeds, embeds)


def test_the_full_size_is_that_of_vit_h() -> None:
    from transformers import CLIPVisionModelWithProjection

    from xditd.gpu_workers.models.configured_classes import build_module

    width, inner = 1280, 5120
    shapes = {
        "vision_model.embeddings.position_embedding.weight": (257, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "visual_projection.weight": (1024, width),
        **{f"vision_model.encoder.layers.{number}.mlp.fc1.weight": (inner, width) for number in range(32)},
    }
    found = described(shapes)
    assert found is not None
    module = build_module(found)
    assert isinstance(module, CLIPVisionModelWithProjection)
    config = module.config
    assert (config.num_attention_heads, config.image_size, config.hidden_act) == (16, 224, "gelu")
    assert sum(each.numel() for each in module.parameters()) == 632_076_800


def test_other_files_are_not_taken_for_it(
    rank: OneRank, made: tuple[State, torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    state = made[0]
    shapes = {name: tuple(each.shape) for name, each in state.items()}
    assert describe(shapes | {"text_model.final_layer_norm.weight": (64,)}) is None
    of_l = {name: tuple(128 if side == 160 else side for side in shape) for name, shape in shapes.items()}
    assert describe(of_l) is None
    lost = "vision_model.encoder.layers.1.mlp.fc2.weight"
    with pytest.raises(BadCheckpoint, match=r"1 missing: .*encoder\.layers\.1\.mlp\.fc2\.weight"):
        rank.lend("lost", {name: each.clone() for name, each in state.items() if name != lost})
    with pytest.raises(Unsupported, match="CLIP's vision tower cannot be run"):
        rank.components.prepare("l", offer_of(_resized(state)).manifest, rank.client)


def _resized(state: State) -> State:
    """The model with heads as other CLIPs have them."""
    sides = {name: tuple(128 if side == 160 else side for side in each.shape) for name, each in state.items()}
    return {name: torch.zeros(shape, dtype=state[name].dtype) for name, shape in sides.items()}
