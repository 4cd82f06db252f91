"""Checkpoints that cannot be lent are named by names, shapes and dtypes; lendable ones are never refused."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from xditd.ipc.errors import Unsupported, UnsupportedDtype
from xditd.ipc.known_models import MODELS
from xditd.ipc.recognition import form_error, one_of, unsupported_error

MESSAGE_CHARS = 1_000


class Tensor(NamedTuple):
    dtype: str = "bfloat16"
    shape: tuple[int, ...] = (64, 64)


Tensors = dict[str, Tensor]


def tensors(*names: str, dtype: str = "bfloat16", prefix: str = "") -> Tensors:
    return {prefix + name: Tensor(dtype) for name in names}


FLUX = tensors(
    *(f"double_blocks.{number}.img_attn.qkv.weight" for number in range(19)),
    *(f"single_blocks.{number}.linear1.weight" for number in range(38)),
    "img_in.weight",
)
T5 = tensors("shared.weight", *(f"encoder.block.{number}.layer.0.SelfAttention.q.weight" for number in range(24)))
CLIP = tensors("text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight")
VAE = {**tensors("decoder.mid.block_1.conv1.weight"), "decoder.conv_in.weight": Tensor(shape=(512, 16, 3, 3))}
UNET = tensors("input_blocks.0.0.weight", "output_blocks.0.0.weight", "middle_block.0.weight")
CAN_RUN = ("one model (a.safetensors)", "another", "a third")
TO_KEYS = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def prefixed(prefix: str, found: Tensors) -> Tensors:
    return {prefix + name: each for name, each in found.items()}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.diffusion_model.", "text_encoders.clip_l.transformer.", "vae."]
)
@pytest.mark.parametrize("found", [FLUX, T5, CLIP, VAE], ids=["flux", "t5", "clip", "vae"])
def test_what_has_no_fault_of_form_is_not_refused(found: Tensors, prefix: str) -> None:
    extras = {
        f"{prefix}scaled_fp8": Tensor("float8_e4m3fn", (2,)),
        f"{prefix}spiece_model": Tensor("uint8", (9,)),
        f"{prefix}embeddings.position_ids": Tensor("int64", (1, 77)),
    }
    assert form_error(prefixed(prefix, found)) is None
    assert form_error({**prefixed(prefix, found), **extras}) is None


MODEL_CASES: list[tuple[str, Tensors]] = [
    ("Stable Diffusion 1.5", {**UNET, TO_KEYS: Tensor(shape=(320, 768))}),
    ("Stable Diffusion 2", {**UNET, TO_KEYS: Tensor(shape=(320, 1024))}),
    ("Stable Diffusion XL", {**UNET, **tensors("label_emb.0.0.weight")}),
    ("Stable Diffusion 3", tensors("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight")),
    ("Wan", tensors("head.modulation", "blocks.0.self_attn.q.weight", "patch_embedding.weight")),
    ("Qwen-Image", tensors("transformer_blocks.0.img_mlp.net.0.proj.weight", "txt_norm.weight", "img_in.weight",
                           "transformer_blocks.0.attn.add_q_proj.weight")),
    ("Z-Image", tensors("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight", "noise_refiner.0.x")),
    ("FLUX.2", {**FLUX, **tensors("double_stream_modulation_img.lin.weight")}),
    ("Chroma", {**FLUX, **tensors("distilled_guidance_layer.in_proj.weight")}),
    ("HunyuanVideo", {**FLUX, **tensors("txt_in.individual_token_refiner.blocks.0.norm1.weight")}),
    ("LTX-Video", tensors("patchify_proj.weight", "transformer_blocks.27.scale_shift_table")),
    ("FLUX.1 in diffusers' names", tensors("transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight",
                                           "single_transformer_blocks.0.attn.to_q.weight")),
    ("a VAE in diffusers' names", tensors("decoder.mid_block.resnets.0.conv1.weight", "decoder.conv_in.weight")),
    ("a Stable Diffusion 1, 2 or XL VAE", {**VAE, "decoder.conv_in.weight": Tensor(shape=(512, 4, 3, 3))}),
    ("a ControlNet", {**FLUX, **tensors("controlnet_blocks.0.weight")}),
    ("a language model", tensors("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "found"), MODEL_CASES, ids=[name for name, _ in MODEL_CASES])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
def test_other_models_are_named(name: str, found: Tensors, prefix: str) -> None:
    error = unsupported_error(prefixed(prefix, found), CAN_RUN)
    assert isinstance(error, Unsupported)
    assert error.detail.startswith(f"{name} cannot be run: lend one model (a.safetensors), another or a third; ")
    assert form_error(prefixed(prefix, found), CAN_RUN) is None
    assert f"{len(found)} of {len(found)} tensors" in error.detail
    assert len(error.names) == len(found)
    assert len(error.detail) < MESSAGE_CHARS


FP8 = {name: Tensor("float8_e4m3fn") if "blocks" in name else each for name, each in FLUX.items()}
INT8 = {name: Tensor("int8") if "blocks" in name else each for name, each in FLUX.items()}
PACKED = {name: Tensor("uint8", (2048, 1)) if "blocks" in name else each for name, each in FLUX.items()}
BLOCK = "double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("fp8 (float8_e4m3fn)", FP8),
        ("scaled fp8 (float8_e4m3fn)", {**FP8, f"{BLOCK}.scale_weight": Tensor("float32", ())}),
        ("scaled fp8 (float8_e4m3fn)", {**FP8, f"{BLOCK}.comfy_quant": Tensor("uint8", (40,))}),
        ("scaled int8", {**INT8, f"{BLOCK}.weight_scale": Tensor("float32", (64, 1))}),
        ("NF4 (bitsandbytes)", {**PACKED, f"{BLOCK}.weight.quant_state.bitsandbytes__nf4": Tensor("uint8", (90,))}),
        ("FP4 (bitsandbytes)", {**PACKED, f"{BLOCK}.weight.quant_state.bitsandbytes__fp4": Tensor("uint8", (90,))}),
        ("NVFP4", {**PACKED, f"{BLOCK}.weight_scale_2": Tensor("float32", ())}),
        ("SVDQuant (nunchaku)", {**INT8, f"{BLOCK}.wscales": Tensor()}),
        ("INT8 (bitsandbytes)", {**INT8, f"{BLOCK}.SCB": Tensor("float32")}),
    ],
)
def test_packed_weights_are_named_with_their_model_and_counted(kind: str, found: Tensors) -> None:
    error = form_error(prefixed("model.diffusion_model.", found))
    assert isinstance(error, UnsupportedDtype)
    assert error.detail.startswith(f"FLUX.1 with {kind} weights cannot be run: lend its bfloat16")
    assert len(error.detail) < MESSAGE_CHARS
    assert " more" in error.detail
    assert 57 <= len(error.names) <= len(found)


def test_packed_weights_of_another_model_are_named_as_both() -> None:
    wan = tensors("head.modulation", "blocks.0.self_attn.q.weight", dtype="float8_e4m3fn")
    error = unsupported_error(wan, CAN_RUN)
    assert isinstance(error, Unsupported)
    assert error.detail.startswith("Wan with fp8 (float8_e4m3fn) weights cannot be run: lend one model (a.safetensors)")
    unnamed = unsupported_error(tensors("a.weight", dtype="float8_e4m3fn"), CAN_RUN)
    assert isinstance(unnamed, UnsupportedDtype)
    assert unnamed.detail.startswith("a checkpoint with fp8 (float8_e4m3fn) weights cannot be run: lend its bfloat16")
    encoder = form_error({name: Tensor("float8_e4m3fn") for name in T5})
    assert isinstance(encoder, UnsupportedDtype)
    assert encoder.detail.startswith("T5 with fp8 (float8_e4m3fn) weights cannot be run: lend its bfloat16 or float16")


@pytest.mark.parametrize(
    ("whose", "found"),
    [
        ("kohya's", tensors(*(f"lora_unet_double_blocks_{n}_img_attn_qkv.lora_up.weight" for n in range(19)))),
        ("kohya's", tensors("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_unet_x.hada_w1_a")),
        ("diffusers'", tensors(*(f"transformer.transformer_blocks.{n}.ff.lora_A.weight" for n in range(38)))),
        ("diffusers'", tensors("base_model.model.double_blocks.0.img_attn.qkv.lora_B.default.weight")),
        ("diffusers'", tensors("unet.down_blocks.0.attentions.0.to_q.lora.up.weight")),
        ("diffusers'", tensors("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight")),
        ("diffusers'", tensors("base_model.model.double_blocks.0.img_attn.qkv.lora_A.style.weight")),
        ("diffusers'", tensors("double_blocks.0.img_attn.qkv.lora_A", "double_blocks.0.img_attn.qkv.lora_B")),
        ("diffusers'", tensors("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight")),
        ("diffusers'", tensors("transformer.x.hada_w2_a", "transformer.x.lokr_w2")),
    ],
)  # fmt: skip
def test_adapters_are_named(whose: str, found: Tensors) -> None:
    error = form_error(found)
    assert isinstance(error, Unsupported)
    assert str(unsupported_error(found)) == str(error)
    assert error.detail.startswith(f"a LoRA in {whose} names is no model: lend it by lend_lora()")
    assert len(error.detail) < MESSAGE_CHARS


def test_all_in_one_checkpoints_are_named_by_model_and_parts() -> None:
    flux = prefixed("model.diffusion_model.", FLUX) | prefixed("vae.", VAE)
    flux |= prefixed("text_encoders.clip_l.transformer.", CLIP) | prefixed("text_encoders.t5xxl.transformer.", T5)
    error = form_error(flux)
    assert isinstance(error, Unsupported)
    assert error.detail.startswith(
        "an all-in-one checkpoint of FLUX.1 cannot be lent as a whole: lend one part at a time"
    )
    assert set(error.names) == {
        f"transformer or UNet ({len(FLUX)} tensors)", f"VAE ({len(VAE)} tensors)",
        f"CLIP-L ({len(CLIP)} tensors)", f"T5 ({len(T5)} tensors)",
    }  # fmt: skip
    fp8 = form_error(flux | prefixed("model.diffusion_model.", FP8))
    assert fp8 is not None
    assert "of FLUX.1 with fp8 (float8_e4m3fn) weights" in fp8.detail
    sdxl = prefixed("model.diffusion_model.", UNET | tensors("label_emb.0.0.weight"))
    sdxl |= prefixed("first_stage_model.", VAE) | prefixed("conditioner.embedders.0.transformer.", CLIP)
    error = form_error(sdxl, CAN_RUN)
    assert error is not None
    assert error.detail.startswith(
        "an all-in-one checkpoint of Stable Diffusion XL cannot be lent as a whole: lend one part at a time, by kind= "
        "or from a file or a state dict that holds nothing else (one model (a.safetensors), another or a third); "
        "it holds "
    )
    for found in (flux, sdxl):
        assert len(str(form_error(found, CAN_RUN))) < MESSAGE_CHARS


def test_two_text_encoders_in_one_file_are_two_parts() -> None:
    pair = prefixed("text_encoders.clip_l.transformer.", CLIP) | prefixed("text_encoders.t5xxl.transformer.", T5)
    error = form_error(pair)
    assert error is not None
    assert "CLIP-L (2 tensors), T5 (25 tensors)" in error.detail


@pytest.mark.parametrize("found", [{}, tensors("a.weight", "b.weight"), tensors("x")], ids=["none", "two", "one"])
def test_what_nobody_knows_is_not_named(found: Tensors) -> None:
    assert unsupported_error(found) is None


def test_every_mark_can_be_reached() -> None:
    """A model whose marks are those of an earlier one would never be named."""
    for model in MODELS:
        found = tensors(*model.marks)
        if model.side is not None:
            name, dimension, size = model.side
            found[name] = Tensor(shape=(1,) * dimension + (size, 3))
        error = unsupported_error(found)
        assert error is not None, model
        assert error.detail.startswith(f"{model.name} cannot be run: use a whole checkpoint of a model"), model


def test_every_model_that_diffusers_tells_by_one_name_is_named() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    unnamed = set()
    for kind, keys in utils.CHECKPOINT_KEY_NAMES.items():
        if all(unsupported_error(tensors(key)) is None for key in ([keys] if isinstance(keys, str) else keys)):
            unnamed.add(kind)
    parts_of_others = {"open_clip", "animatediff", "animatediff_v2", "animatediff_sdxl_beta", "stable_cascade_stage_b"}
    told_with_others = {"flux", "clip", "clip_sdxl", "clip_sd3", "open_clip_sd3"}
    told_by_two = {"controlnet_xl", "controlnet_xl_large", "controlnet_xl_mid", "playground-v2-5"}
    controlnets = {"z-image-turbo-controlnet", "z-image-turbo-controlnet-2.x"}
    assert unnamed <= told_with_others | parts_of_others | told_by_two | controlnets


@pytest.mark.parametrize(
    ("models", "joined"), [((), ""), (("a",), "a"), (("a", "b"), "a or b"), (("a", "b", "c"), "a, b or c")]
)
def test_alternatives_are_joined(models: tuple[str, ...], joined: str) -> None:
    assert one_of(models) == joined
