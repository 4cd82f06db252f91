"""Names of tensors in LoRAs: the layer, the part and the factor, in the spellings of other programs."""

from __future__ import annotations

import pytest

from xditd.client.loras.spelling import other_formats, read_name

TEXT = "text_encoder"


@pytest.mark.parametrize(
    ("name", "part", "target", "role"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "model", "double_blocks_0_img_attn_qkv", "down"),
        ("lora_unet_single_blocks_37_linear1.alpha", "model", "single_blocks_37_linear1", "alpha"),
        ("lora_unet__layers_0_attention_qkv.lora_up.weight", "model", "layers_0_attention_qkv", "up"),
        ("lora_transformer_norm_out_linear.lora_up.weight", "model", "norm_out_linear", "up"),
        ("lycoris_transformer_blocks_0_attn_to_q.lora_up.weight", "model", "transformer_blocks_0_attn_to_q", "up"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "model", "transformer_blocks_0_attn_to_q", "down"),
        ("transformer_blocks.0.ff.net.0.proj.lora_B.weight", "model", "transformer_blocks_0_ff_net_0_proj", "up"),
        ("base_model.model.layers.3.ffn.w1.lora_A.default.weight", "model", "layers_3_ffn_w1", "down"),
        ("base_model.model.layers.3.feed_forward.w1.lora_B.weight", "model", "layers_3_feed_forward_w1", "up"),
        ("diffusion_model.double_blocks.1.txt_mlp.0.lora_B.weight", "model", "double_blocks_1_txt_mlp_0", "up"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "model", "double_blocks_0_processor_qkv_lora1", "down"),
        ("single_blocks.0.processor.qkv_lora.up.weight", "model", "single_blocks_0_processor_qkv_lora", "up"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", TEXT, "text_model_encoder_layers_0_mlp_fc1", "alpha"),
        ("lora_te2_encoder_block_0_layer_0_q.lora_down.weight", TEXT, "encoder_block_0_layer_0_q", "down"),
        ("text_encoder.text_model.layers.0.fc1.lora_A.weight", TEXT, "text_model_layers_0_fc1", "down"),
        ("text_encoder_2.encoder.block.0.layer.0.q.lora_B.weight", TEXT, "encoder_block_0_layer_0_q", "up"),
        ("text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight", TEXT, "encoder_layers_0_mlp_fc1", "up"),
        ("transformer.proj_out.lora.down.weight", "model", "proj_out", "down"),
    ],
)  # fmt: skip
def test_names_of_every_program(name: str, part: str, target: str, role: str) -> None:
    found = read_name(name)
    assert found is not None
    assert (found.part, found.target, found.role) == (part, target, role)


@pytest.mark.parametrize(
    "name", ["double_blocks.0.img_attn.qkv.weight", "bundle_emb.x", ".lora_A.weight", "lora_unet_.alpha", "alpha"]
)
def test_names_of_no_factor(name: str) -> None:
    assert read_name(name) is None


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("lycoris_a.lokr_w1", "LoKr"),
        ("transformer.a.lokr_w2_b", "LoKr"),
        ("lora_unet_a.dora_scale", "DoRA"),
        ("transformer.a.lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_unet_a.oft_blocks", "OFT or BOFT"),
        ("base_model.model.a.oft_R.default.weight", "OFT or BOFT"),
        ("lora_unet_a.a1.weight", "GLoRA"),
        ("lora_unet_a.on_input", "(IA)^3"),
        ("lora_unet_a.lora_mid.weight", "LoRA of convolutions in three factors"),
        ("transformer.a.lora_B.bias", "LoRA with biases"),
        ("diffusion_model.a.diff_b", "full differences"),
        ("diffusion_model.a.diff", "full differences"),
        ("diffusion_model.a.reshape_weight", "LoRA that reshapes weights"),
    ],
)
def test_other_adapters_are_named(name: str, what: str) -> None:
    assert other_formats([name, "a.lora_down.weight"]) == {what: [name]}


def test_factors_are_of_no_other_adapter() -> None:
    names = ["lora_unet_double_blocks_0_img_mlp_0.lora_down.weight", "a.alpha", "a.b1.lora_A.weight", "x.lora_B.weight"]
    assert other_formats(names) == {}
