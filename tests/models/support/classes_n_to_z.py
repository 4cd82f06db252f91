"""Entries of the classes from Nucleus to Z-Image."""

from __future__ import annotations

from class_entry import ClassEntry, Random


def _qwen_image(random: Random) -> dict[str, object]:
    return {
        "hidden_states": random.normal(1, 16, 16),
        "encoder_hidden_states": random.normal(1, 7, 16),
        "encoder_hidden_states_mask": None,
        "timestep": random.normal(1).abs(),
        "img_shapes": [[(1, 4, 4)]],
        "guidance": None,
        "attention_kwargs": None,
    }


ENTRIES = (
    ClassEntry(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "guidance_embeds": False,
            "axes_dims_rope": (8, 4, 4),
        },
        _qwen_image,
    ),
)
