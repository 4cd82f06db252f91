"""Turn diffusers' names of a FLUX.1 transformer and its VAE into those of published files.

Source: diffusers, ``convert_flux_transformer_checkpoint_to_diffusers`` and ``convert_ldm_vae_checkpoint``, of which
these are the inverse; tests compare them with the tables of the workers' families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from xditd.ipc.errors import BadCheckpoint

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]

_TRANSFORMER: Final = (
    (r"x_embedder\.", "img_in."),
    (r"context_embedder\.", "txt_in."),
    (r"time_text_embed\.timestep_embedder\.", "time_in."),
    (r"time_text_embed\.text_embedder\.", "vector_in."),
    (r"time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"(?<=_in\.)linear_1\.", "in_layer."),
    (r"(?<=_in\.)linear_2\.", "out_layer."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear\.", r"single_blocks.\1.modulation.lin."),
    (r"^single_transformer_blocks\.(\d+)\.proj_out\.", r"single_blocks.\1.linear2."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"(?<=\d\.)norm1\.linear\.", "img_mod.lin."),
    (r"(?<=\d\.)norm1_context\.linear\.", "txt_mod.lin."),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"attn\.to_out\.0\.", "img_attn.proj."),
    (r"attn\.to_add_out\.", "txt_attn.proj."),
    (r"ff\.net\.0\.proj\.", "img_mlp.0."),
    (r"ff\.net\.2\.", "img_mlp.2."),
    (r"ff_context\.net\.0\.proj\.", "txt_mlp.0."),
    (r"ff_context\.net\.2\.", "txt_mlp.2."),
)
_JOINED: Final = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_q\.", ("to_q", "to_k", "to_v"), r"double_blocks.\1.img_attn.qkv."),
    (
        r"^transformer_blocks\.(\d+)\.attn\.add_q_proj\.",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        r"double_blocks.\1.txt_attn.qkv.",
    ),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_q\.", ("to_q", "to_k", "to_v"), r"single_blocks.\1.linear1."),
)
"""Queries, keys and values are one tensor in files; of single blocks, the first layer of their MLP, too."""
_VAE: Final = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)\.", r"up.\1.block.\2."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"conv_norm_out\.", "norm_out."),
)


def transformer_tensors(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Name a transformer's tensors as ``flux1-dev.safetensors`` does. Joined tensors are copies, others are shared.

    Raises:
        BadCheckpoint: a tensor that is joined to others is missing.
    """
    import torch

    left, named = dict(tensors), {}
    for pattern, parts, target in _JOINED:
        for first in [name for name in tensors if re.match(pattern, name)]:
            names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if first.startswith("single_"):
                names.append(first.replace("attn.to_q.", "proj_mlp."))
            missing = [name for name in names if name not in left]
            if missing:
                raise BadCheckpoint(f"{missing[0]}: not in the file, which has {first}; is it a FLUX.1 transformer?")
            named[re.sub(pattern, target, first)] = torch.cat([left.pop(name) for name in names])
    named |= {_renamed(name, _TRANSFORMER): tensor for name, tensor in left.items()}
    for name in [name for name in named if name.startswith("final_layer.adaLN_modulation.1.")]:
        # diffusers reads scale before shift, files have shift before scale.
        scale, shift = named[name].chunk(2)
        named[name] = torch.cat([shift, scale])
    return named


def vae_tensors(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Name a VAE's tensors as ``ae.safetensors`` does; the tensors are shared."""
    levels = len({name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks.")})
    named = {}
    for name, tensor in tensors.items():
        new = _renamed(name, _VAE)
        # Files count the decoder's levels from the full resolution down.
        new = re.sub(r"(?<=decoder\.up\.)\d+", lambda found: str(levels - 1 - int(found[0])), new)
        is_convolution = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", new) is not None
        named[new] = tensor[:, :, None, None] if is_convolution else tensor
    return named


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, target in table:
        name = re.sub(pattern, target, name)
    return name
