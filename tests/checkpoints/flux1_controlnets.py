"""For tests, and programs beside them: seeded ControlNets for FLUX.1, in ComfyUI's naming and in diffusers'."""

from __future__ import annotations

from typing import Any

import torch

from xditd.client.demo.checkpoints import flux1_state_dict, normal

State = dict[str, torch.Tensor]

MODES = 4


def comfyui_state(
    seed: int,
    *,
    modes: int = 0,
    double_blocks: int = 2,
    single_blocks: int = 2,
    heads: int = 2,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> State:
    """Return a ControlNet by the names of ComfyUI's module; every tensor matters to its residuals.

    ``sizes`` are further ones of :func:`flux1_state_dict`, those of texts.
    """
    blocks = {"double_blocks": double_blocks, "single_blocks": max(single_blocks, 1)}
    whole = flux1_state_dict(seed, heads=heads, guidance=guidance, **blocks, **sizes)
    dropped = ("final_layer.", "single_blocks.") if single_blocks == 0 else ("final_layer.",)
    state = {name: each for name, each in whole.items() if not name.startswith(dropped)}
    width = state["img_in.weight"].shape[0]
    layers = {"pos_embed_input": 64}
    layers |= {f"controlnet_blocks.{number}": width for number in range(double_blocks)}
    layers |= {f"controlnet_single_blocks.{number}": width for number in range(single_blocks)}
    for name, inputs in layers.items():
        state[f"{name}.weight"] = 0.5 * normal(seed, name, (width, inputs)) / inputs**0.5
        state[f"{name}.bias"] = 0.1 * normal(seed, f"{name}.bias", (width,))
    if modes:
        state["controlnet_mode_embedder.weight"] = normal(seed, "mode", (modes, width))
    return {name: each.to(dtype) for name, each in state.items()}


def diffusers_state(state: State) -> State:
    """Return the same ControlNet by the names of diffusers' class, with diffusers' own converter of its blocks."""
    from xditd.gpu_workers.families.flux1 import reference

    own = ("pos_embed_input.", "controlnet_")
    width, dtype = state["img_in.weight"].shape[0], state["img_in.weight"].dtype
    needed = {  # what the converter asks for, and a ControlNet does not have
        "final_layer.linear.weight": torch.zeros(64, width, dtype=dtype),
        "final_layer.linear.bias": torch.zeros(64, dtype=dtype),
        "final_layer.adaLN_modulation.1.weight": torch.zeros(2 * width, width, dtype=dtype),
        "final_layer.adaLN_modulation.1.bias": torch.zeros(2 * width, dtype=dtype),
    }
    shared = {name: each for name, each in state.items() if not name.startswith(own)}
    dropped = ["norm_out.", "proj_out."]
    if not any(name.startswith("single_blocks.") for name in state):
        block = flux1_state_dict(0, heads=width // 128, double_blocks=1, single_blocks=1, dtype=dtype)
        needed |= {name: each for name, each in block.items() if name.startswith("single_blocks.")}
        dropped.append("single_transformer_blocks.")
    converted = reference.convert_transformer({**shared, **needed})
    found = {name: each for name, each in converted.items() if not name.startswith(tuple(dropped))}
    for name, each in state.items():
        if name.startswith(own):
            found[name.replace("pos_embed_input", "controlnet_x_embedder")] = each
    return found


def reference_model(state: State) -> Any:
    """Build diffusers' ``FluxControlNetModel`` of a ControlNet in ComfyUI's naming."""
    from diffusers import FluxControlNetModel

    converted = diffusers_state(state)
    modes = state.get("controlnet_mode_embedder.weight")
    with torch.device("meta"):
        model = FluxControlNetModel(
            num_layers=len({name.split(".")[1] for name in state if name.startswith("controlnet_blocks.")}),
            num_single_layers=len({name.split(".")[1] for name in state if name.startswith("controlnet_single")}),
            num_attention_heads=state["img_in.weight"].shape[0] // 128,
            guidance_embeds=any(name.startswith("guidance_in.") for name in state),
            num_mode=None if modes is None else modes.shape[0],
        )
    model.load_state_dict(converted, strict=True, assign=True)
    return model.eval().requires_grad_(False)
