"""Load Dual CLIP (xDiT) gives the conditioning that ComfyUI's own encoders give, through ComfyUI's own nodes."""

from __future__ import annotations

from typing import Any

import pytest
import text_checkpoints
import torch
from safetensors.torch import load_file, save_file

from xditd.client import BadRequest, Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6
LONG = "a lighthouse on a cliff at dusk, long exposure, " * 30


@pytest.fixture(autouse=True)
def in_float32(comfy, monkeypatch) -> None:
    """Hold encoders in the dtype of these files; without the flag ComfyUI casts them to float16."""
    monkeypatch.setattr(comfy.comfy.cli_args.args, "fp32_text_enc", True)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    text_checkpoints.write_clip_l(folder / "clip_l.safetensors", seed=5)
    text_checkpoints.write_t5(folder / "t5xxl.safetensors", seed=6)
    return [str(folder / "t5xxl.safetensors"), str(folder / "clip_l.safetensors")]


@pytest.fixture
def clip(connected, text_files) -> Any:
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    return load_clip(*text_files)


@pytest.fixture(scope="session")
def stock_clip(comfy, text_files) -> Any:
    """ComfyUI's encoders at the size of the small files, which its loader nodes do not recognise."""
    from comfy.text_encoders import flux

    t5, clip = (load_file(path) for path in text_files)
    layer = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    sizes = {
        "clip_l_model_config": {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": clip["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        },
        "t5xxl_model_config": {
            "d_model": 128,
            "d_ff": t5[layer].shape[0],
            "d_kv": 64,
            "num_heads": 2,
            "num_layers": 2,
        },
    }
    target = comfy.comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip(torch.float32))
    options = sizes | {"dtype": torch.float32}
    return comfy.comfy.sd.CLIP(target, state_dict=[clip, t5], model_options=options)


@pytest.mark.parametrize("text", ["", "a lighthouse", "a (lighthouse:1.4) on a [cliff] (at dusk:0.6)", LONG])
def test_clip_text_encode(text, comfy, clip, stock_clip, relative_error):
    found = [comfy.nodes.CLIPTextEncode().encode(each, text)[0][0] for each in (clip, stock_clip)]
    (actual, extras), (expected, stock_extras) = found
    assert actual.shape == expected.shape
    assert actual.shape[1] >= 256
    assert relative_error(actual, expected) <= TOLERANCE
    assert relative_error(extras["pooled_output"], stock_extras["pooled_output"]) <= TOLERANCE


def test_a_tokenizer_in_a_file_is_not_used_where_stock_uses_its_own(comfy, connected, text_files, stock_clip, tmp_path):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    paths = []
    for path in text_files:
        paths.append(str(tmp_path / path.rsplit("/", 1)[1]))
        save_file(load_file(path) | {"tokenizer_json": torch.zeros(4, dtype=torch.uint8)}, paths[-1])
    text = "a (lighthouse:1.4) on a cliff"
    assert load_clip(*paths).tokenize(text) == stock_clip.tokenize(text)


def test_clip_text_encode_flux(comfy, clip, stock_clip, relative_error):
    found = [
        comfy.flux.CLIPTextEncodeFlux.execute(each, "a cliff", "a lighthouse at dusk", 2.5).result[0][0]
        for each in (clip, stock_clip)
    ]
    assert relative_error(found[0][0], found[1][0]) <= TOLERANCE
    assert relative_error(found[0][1]["pooled_output"], found[1][1]["pooled_output"]) <= TOLERANCE
    assert found[0][1]["guidance"] == 2.5


@pytest.mark.parametrize(
    "name", ["text_model.encoder.layers.1.mlp.fc1.weight", "encoder.block.1.layer.0.SelfAttention.v.weight"]
)
def test_a_zeroed_tensor_shows(name, comfy, connected, text_files, stock_clip, tmp_path, relative_error):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    paths = []
    for path in text_files:
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = torch.zeros_like(tensors[name])
        paths.append(str(tmp_path / path.rsplit("/", 1)[1]))
        save_file(tensors, paths[-1])
    found = [comfy.nodes.CLIPTextEncode().encode(each, "a cliff")[0][0] for each in (load_clip(*paths), stock_clip)]
    (actual, extras), (expected, stock_extras) = found
    errors = relative_error(actual, expected), relative_error(extras["pooled_output"], stock_extras["pooled_output"])
    assert max(errors) > 10 * TOLERANCE


def text_lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA for both text encoders, with the names that training programs write."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, rows in (
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 512),
        ("lora_te1_text_model_encoder_layers_1_self_attn_q_proj", 128),
        ("lora_te2_encoder_block_1_layer_0_SelfAttention_v", 128),
    ):
        found[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
        found[f"{name}.lora_down.weight"] = torch.randn(4, 128, generator=generator)
    return found


def lora_at(comfy: Any, clip: Any, strength: float) -> Any:
    return comfy.comfy.sd.load_lora_for_models(None, clip, text_lora(3), 0.0, strength)[1]


def multiplied(comfy: Any, clip: Any, _: float) -> Any:
    from comfy_extras.nodes_attention_multiply import CLIPAttentionMultiply

    return CLIPAttentionMultiply.execute(clip, 1.2, 0.8, 1.1, 0.9).result[0]


def last_layer(comfy: Any, clip: Any, _: float) -> Any:
    return comfy.nodes.CLIPSetLastLayer().set_last_layer(clip, -1)[0]


def longer(comfy: Any, clip: Any, _: float) -> Any:
    from comfy_extras.nodes_cond import T5TokenizerOptions

    return T5TokenizerOptions.execute(clip, 300, 310).result[0]


@pytest.mark.parametrize("change", [lora_at, multiplied, longer, last_layer], ids=lambda each: each.__name__)
def test_a_change_of_the_clip(change, comfy, clip, stock_clip, relative_error):
    def encode(each: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ((states, extras),) = comfy.nodes.CLIPTextEncode().encode(each, "a cliff at dusk")[0]
        return states, extras["pooled_output"]

    plain = encode(stock_clip)
    for strength in (1.0, 0.5):
        expected = encode(change(comfy, stock_clip, strength))
        actual = encode(change(comfy, clip, strength))
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) <= 1e-5
        if change in (lora_at, multiplied):
            assert max(relative_error(one, other) for one, other in zip(expected[1:], plain[1:], strict=True)) > 1e-3
        if change is lora_at:
            assert relative_error(expected[0], plain[0]) > 1e-3
    comfy.comfy.model_management.unload_all_models()
    for one, other in zip(encode(clip), plain, strict=True):
        assert relative_error(one, other) <= TOLERANCE


def test_clip_save_writes_what_stock_writes(comfy, clip, stock_clip, tmp_path, monkeypatch):
    from comfy_extras.nodes_model_merging import CLIPSave

    written = []
    for name, each in (("ours", clip), ("stock", stock_clip)):
        node = CLIPSave()
        node.output_dir = str(tmp_path / name)
        node.save(lora_at(comfy, each, 1.0), "clip/saved")
        written.append({path.name: load_file(path) for path in sorted((tmp_path / name).rglob("*.safetensors"))})
    ours, stock = written
    assert len(ours) == 2
    assert ours.keys() == stock.keys()
    for name, tensors in ours.items():
        assert tensors.keys() <= stock[name].keys()
        for key, tensor in tensors.items():
            assert torch.allclose(tensor, stock[name][key], atol=1e-6), key
        assert not {key for key in stock[name].keys() - tensors.keys() if "encoder" in key}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda clip, _: clip.clip_layer(-2), "CLIP Set Last Layer: -2"),
        (lambda clip, _: clip.patcher.add_object_patch("t5xxl", torch.nn.Identity()), "object patch t5xxl"),
        (lambda clip, _: clip.patcher.add_weight_wrapper("t5xxl.transformer.shared.weight", print), "weight wrappers"),
        (
            lambda clip, hooks: setattr(clip, "patcher", with_hooks(clip, hooks).patcher),
            "hooks that change weights by what is no LoRA",
        ),
        (lambda clip, _: setattr(clip.cond_stage_model, "encode_token_weights", print), "encode_token_weights"),
    ],
)
def test_a_change_of_the_clip_that_is_refused(change, said, comfy, clip):
    from comfy.hooks import create_hook_lora

    changed = clip.clone()
    difference = {"text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.v.diff": torch.ones(128, 128)}
    change(changed, create_hook_lora(difference, 1.0, 1.0))
    with pytest.raises(Unsupported, match=said):
        comfy.nodes.CLIPTextEncode().encode(changed, "a cliff")


def bypassed_at(comfy: Any, clip: Any, strength: float) -> Any:
    return comfy.comfy.sd.load_bypass_lora_for_models(None, clip, text_lora(3), 0.0, strength)[1]


def test_loras_of_the_clip_are_branches(comfy, daemon, clip, stock_clip, relative_error):
    """Merged or bypassed in stock, at several strengths; no weight is written or lent again."""

    def encode(each: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ((states, extras),) = comfy.nodes.CLIPTextEncode().encode(each, "a cliff at dusk")[0]
        return states, extras["pooled_output"]

    plain = encode(stock_clip)
    held = lora_at(comfy, clip, 0.05)
    encode(held)
    before = {each.component_id for each in daemon.status().components}
    for change, strength in ((lora_at, 0.2), (lora_at, -0.1), (bypassed_at, 0.15), (lora_at, 0.0)):
        expected = encode(change(comfy, stock_clip, strength))
        for one, other in zip(encode(change(comfy, clip, strength)), expected, strict=True):
            assert relative_error(one, other) <= TOLERANCE
        if strength:
            assert relative_error(expected[0], plain[0]) > 1e-2
    components = {each.component_id: each for each in daemon.status().components}
    assert before <= components.keys()
    assert all(each.generation == 0 for each in components.values())
    assert held


def with_hooks(clip: Any, hooks: Any, *, is_scheduled: bool = False, in_conditioning: bool = False) -> Any:
    """Run Set CLIP Hooks."""
    from comfy_extras.nodes_hooks import SetClipHooks

    return SetClipHooks().apply_hooks(clip, is_scheduled, in_conditioning, hooks)[0]


def encode_scheduled(clip: Any) -> list[Any]:
    """Encode as CLIPTextEncode does; a schedule gives one conditioning for each range of steps."""
    found: list[Any] = clip.encode_from_tokens_scheduled(clip.tokenize("a cliff at dusk"), show_pbar=False)
    return found


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_hooks_of_the_clip_are_branches(is_scheduled, comfy, daemon, clip, stock_clip, relative_error):
    """Two LoRAs of hooks, one with strengths by keyframe, on a CLIP that has one, too; then the CLIP without them."""
    from comfy.hooks import HookGroup, HookKeyframe, HookKeyframeGroup, create_hook_lora

    def hooks() -> Any:
        first, second = create_hook_lora(text_lora(4), 0.0, 0.1), create_hook_lora(text_lora(5), 0.0, -0.08)
        frames = HookKeyframeGroup()
        for strength, start in ((1.0, 0.0), (-0.5, 0.4), (0.0, 0.8)):
            frames.add(HookKeyframe(strength=strength, start_percent=start))
        first.set_keyframes_on_hooks(frames)
        return HookGroup.combine_all_hooks([first, second])

    plain, expected = (
        encode_scheduled(stock_clip),
        encode_scheduled(with_hooks(lora_at(comfy, stock_clip, 0.1), hooks(), is_scheduled=is_scheduled)),
    )
    found = encode_scheduled(with_hooks(lora_at(comfy, clip, 0.1), hooks(), is_scheduled=is_scheduled))
    assert len(found) == len(expected) == (3 if is_scheduled else 1)
    for (ours, our_extras), (stock, extras) in zip(found, expected, strict=True):
        assert relative_error(ours, stock) <= TOLERANCE
        assert relative_error(our_extras["pooled_output"], extras["pooled_output"]) <= TOLERANCE
        assert relative_error(stock, plain[0][0]) > 1e-2
        assert our_extras.get("clip_start_percent") == extras.get("clip_start_percent")
    if is_scheduled:
        assert relative_error(expected[1][0], expected[0][0]) > 1e-2
    assert relative_error(encode_scheduled(clip)[0][0], plain[0][0]) <= TOLERANCE
    assert all(each.generation == 0 for each in daemon.status().components)


def test_hooks_of_the_clip_reach_the_conditioning(clip):
    from comfy.hooks import create_hook_lora

    hooks = create_hook_lora(text_lora(4), 0.0, 0.1)
    assert "hooks" not in encode_scheduled(with_hooks(clip, hooks))[0][1]
    assert encode_scheduled(with_hooks(clip, hooks, in_conditioning=True))[0][1]["hooks"] == hooks


def test_files_of_one_kind_are_refused(connected, text_files):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    with pytest.raises(BadRequest, match="one CLIP-L and one T5"):
        load_clip(text_files[0], text_files[0])
