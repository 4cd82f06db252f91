"""Tensor names of known models and formats, with which error messages name a checkpoint that cannot be lent.

Only for error messages: which models can be run, the workers' families decide from every name and shape. Names are
without prefixes (``tensor_names``); a mark matches every name that begins with it.

Sources: diffusers, ``single_file_utils.CHECKPOINT_KEY_NAMES``; ComfyUI, ``model_detection.py``; the packages that
write quantised files (bitsandbytes, nunchaku, comfy-kitchen).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that is recognized if tensor names begin with all its ``marks``.

    ``side`` distinguishes models with the same names: a tensor, a dimension and its size.
    """

    name: str
    marks: tuple[str, ...]
    side: tuple[str, int, int] | None = None


_TO_KEYS: Final = "input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"

MODELS: Final = (
    # Models that share names with FLUX.1, before FLUX.1 itself.
    KnownModel("Chroma", ("distilled_guidance_layer.",)),
    KnownModel("FLUX.2", ("double_stream_modulation_img.",)),
    KnownModel("FLUX.2", ("single_stream_modulation.",)),
    KnownModel("FLUX.3", ("early_stream_modulations.",)),
    KnownModel("FLUX.3", ("ref_time_in.in_layer.",)),
    KnownModel("HunyuanVideo 1.5", ("txt_in.individual_token_refiner.", "vision_in.")),
    KnownModel("HunyuanVideo", ("txt_in.individual_token_refiner.",)),
    KnownModel("a ControlNet", ("controlnet_blocks.",)),
    KnownModel("a ControlNet", ("control_model.",)),
    KnownModel("a ControlNet", ("controlnet_cond_embedding.",)),
    KnownModel("a ControlNet", ("input_hint_block.",)),
    KnownModel("an IP-Adapter", ("ip_adapter.",)),
    KnownModel("FLUX.1", ("double_blocks.0.", "single_blocks.0.")),
    KnownModel("Qwen-Image 2.1", ("txt_in.text_norm.",)),
    KnownModel("Qwen-Image", ("transformer_blocks.0.img_mlp.", "txt_norm.weight")),
    KnownModel("Stable Diffusion 3 in diffusers' names", ("transformer_blocks.0.attn.add_q_proj.", "pos_embed.proj.")),
    KnownModel(
        "FLUX.1 in diffusers' names",
        ("transformer_blocks.0.attn.add_q_proj.", "single_transformer_blocks.0.", "context_embedder."),
    ),
    # Other transformers.
    KnownModel("Stable Diffusion 3", ("joint_blocks.",)),
    KnownModel("Wan VACE", ("vace_blocks.0.",)),
    KnownModel("Wan Animate", ("motion_encoder.",)),
    KnownModel("Wan Animate", ("face_adapter.",)),
    KnownModel("Wan", ("head.modulation",)),
    KnownModel("Wan in diffusers' names", ("condition_embedder.time_embedder.", "blocks.0.attn1.")),
    KnownModel("Z-Image", ("noise_refiner.0.", "cap_pad_token")),
    KnownModel("Z-Image", ("layers.0.adaLN_modulation.0.",)),
    KnownModel("Lumina 2", ("cap_embedder.0.",)),
    KnownModel("Krea 2", ("txtfusion.",)),
    KnownModel("MiniMax-H3", ("token_refiner.blocks.0.attn.qkv_proj.",)),
    KnownModel("MiniMax-H3", ("video_patch_proj.", "audio_patch_proj.")),
    KnownModel("LTX-2", ("audio_adaln_single.",)),
    KnownModel("LTX-2", ("av_ca_a2v_gate_adaln_single.",)),
    KnownModel("PixArt", ("adaln_single.", "pos_embed.proj.")),
    KnownModel("LTX-Video", ("patchify_proj.",)),
    KnownModel("LTX-Video", ("adaln_single.emb.",)),
    KnownModel("HiDream", ("double_stream_blocks.0.",)),
    KnownModel("Sana", ("blocks.0.cross_attn.kv_linear.",)),
    KnownModel("Cosmos or Anima", ("net.x_embedder.",)),
    KnownModel("Mochi", ("t5_yproj.",)),
    KnownModel("Mochi", ("blocks.0.attn.qkv_x.",)),
    KnownModel("AuraFlow", ("double_layers.0.attn.w1q.",)),
    KnownModel("HunyuanDiT", ("mlp_t5.0.",)),
    KnownModel("CogVideoX", ("blocks.0.norm1.linear.",)),
    KnownModel("Stable Cascade", ("clip_txt_mapper.",)),
    KnownModel("Stable Cascade", ("clip_mapper.",)),
    # UNets.
    KnownModel("Stable Diffusion XL", ("input_blocks.", "label_emb.")),
    KnownModel("Stable Diffusion 1.5", ("input_blocks.",), (_TO_KEYS.format(1), 1, 768)),
    KnownModel("Stable Diffusion 2", ("input_blocks.",), (_TO_KEYS.format(1), 1, 1024)),
    KnownModel("a Stable Diffusion UNet", ("input_blocks.",)),
    KnownModel("a Stable Diffusion UNet", ("output_blocks.",)),
    KnownModel("Stable Diffusion XL in diffusers' names", ("down_blocks.0.resnets.", "add_embedding.")),
    KnownModel("a Stable Diffusion UNet in diffusers' names", ("down_blocks.0.resnets.", "time_embedding.")),
    # VAEs.
    KnownModel("Wan's or Qwen-Image's VAE", ("decoder.middle.0.residual.0.gamma",)),
    KnownModel("Wan's or Qwen-Image's VAE in diffusers' names", ("decoder.mid_block.resnets.0.norm1.gamma",)),
    KnownModel("LTX's VAE", ("per_channel_statistics.",)),
    KnownModel("HunyuanVideo's VAE", ("decoder.conv_in.conv.",)),
    KnownModel("Sana's VAE", ("decoder.stages.",)),
    KnownModel("Sana's VAE", ("encoder.project_in.",)),
    KnownModel("a VAE in diffusers' names", ("decoder.mid_block.",)),
    KnownModel("a Stable Diffusion 1, 2 or XL VAE", ("decoder.mid.block_1.",), ("decoder.conv_in.weight", 1, 4)),
    KnownModel("FLUX.2's VAE", ("decoder.mid.block_1.",), ("decoder.conv_in.weight", 1, 32)),
    KnownModel("a VAE", ("decoder.mid.block_1.",)),
    # Text encoders.
    KnownModel("UMT5", ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.",)),
    KnownModel("T5", ("encoder.block.0.layer.0.",)),
    KnownModel("CLIP", ("text_model.encoder.layers.",)),
    KnownModel("CLIP", ("embeddings.token_embedding.", "encoder.layers.")),
    KnownModel("CLIP in OpenCLIP's names", ("resblocks.",)),
    KnownModel("CLIP's vision tower", ("vision_model.",)),
    KnownModel("a language model", ("layers.0.self_attn.q_proj.", "embed_tokens.")),
    KnownModel("a language model", ("language_model.",)),
    KnownModel("text encoders of Stable Diffusion XL", ("conditioner.embedders.",)),
    # Other files.
    KnownModel("an upscaler", ("body.0.rdb1.",)),
    KnownModel("an upscaler", ("conv_first.", "upsample.")),
    KnownModel("a textual inversion", ("emb_params",)),
    KnownModel("a textual inversion for SDXL", ("clip_g", "clip_l")),
)

LORA_KOHYA: Final = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_")
"""How names of adapters begin, in the format of kohya's scripts."""

LORA_PARTS: Final = re.compile(
    r"(?:[._]lora[._](?:A|B|up|down)(?:\.\w+)?"  # peft names the adapter: lora_A.default.weight
    r"|\.lora_linear_layer\.(?:up|down)\.weight"
    r"|\.(?:lokr|hada)_w[12](?:_[ab])?|\.(?:oft_blocks|dora_scale|diff_b))(?:\.weight)?$"
)
"""How names of adapters end, in the formats of peft, diffusers and others."""

PACKED_MARKS: Final = (
    (".quant_state.bitsandbytes__nf4", "NF4 (bitsandbytes)"),
    (".quant_state.bitsandbytes__fp4", "FP4 (bitsandbytes)"),
    (".SCB", "INT8 (bitsandbytes)"),
    (".smooth_factor", "SVDQuant (nunchaku)"),
    (".wscales", "SVDQuant (nunchaku)"),
    (".qzeros", "GPTQ or AWQ"),
    (".weight_scale_2", "NVFP4"),
)
"""Name endings beside packed weights that show the format, whatever the dtype."""

SCALES: Final = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant")
"""Name endings beside packed weights whose dtype shows the format."""

PACKED_DTYPES: Final = {
    "float8_e4m3fn": "fp8 (float8_e4m3fn)",
    "float8_e5m2": "fp8 (float8_e5m2)",
    "int8": "int8",
    "uint8": "packed (uint8)",
}
