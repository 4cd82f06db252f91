"""Load CLIP (xDiT) gives the conditioning of ComfyUI's own encoders: Wan, Qwen-Image, FLUX.2 and Z-Image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import comfyui_text
import gguf_files
import packed_checkpoints
import pytest
import torch
from safetensors.torch import save_file

from xditd.client import BadRequest, Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-5
NAMES = list(comfyui_text.ENCODERS)
LONG = "a lighthouse on a cliff at dusk, long exposure, " * 30
TEXTS = ["", "a lighthouse", "a (lighthouse:1.4) on a [cliff] (at dusk:0.6)", LONG]
DEEP = {
    "klein_4b": ["", TEXTS[2], LONG * 2],
    "klein_8b": TEXTS[2:3],  # it differs from the other in names alone
    "flux2_dev": ["", TEXTS[2], LONG[:400]],
}
"""Texts for encoders of some 30 layers."""


@pytest.fixture(autouse=True)
def small(comfy, monkeypatch) -> None:
    comfyui_text.accept_small_encoders(monkeypatch)


@pytest.fixture(scope="module")
def state() -> Callable[[str], dict[str, torch.Tensor]]:
    return cache(lambda name: comfyui_text.ENCODERS[name].state())


@pytest.fixture(scope="module")
def file_of(state, tmp_path_factory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("text_families")

    def write(name: str) -> str:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_file(state(name), path)
        return str(path)

    return write


@pytest.fixture(scope="module")
def stock(comfy, file_of) -> Callable[[str], Any]:
    return cache(lambda name: comfyui_text.stock_clip(comfy, comfyui_text.ENCODERS[name], file_of(name)))


@pytest.fixture
def clip_of(connected, file_of) -> Callable[[str], Any]:
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    return lambda name: load_clip(file_of(name), type=comfyui_text.ENCODERS[name].type)


def compare(actual: Any, expected: Any, relative_error: Callable[..., float]) -> None:
    """Compare two CONDITIONINGs: states, masks and everything else."""
    assert len(actual) == len(expected)
    for (states, extras), (stock_states, stock_extras) in zip(actual, expected, strict=True):
        assert states.shape == stock_states.shape
        assert states.dtype == stock_states.dtype
        assert relative_error(states, stock_states) <= TOLERANCE
        assert extras.keys() == stock_extras.keys()
        assert extras["pooled_output"] is stock_extras["pooled_output"] is None
        mask, stock_mask = extras.get("attention_mask"), stock_extras.get("attention_mask")
        assert (mask is None) == (stock_mask is None)
        if mask is not None:
            assert torch.equal(mask, stock_mask)


@pytest.mark.parametrize("name", NAMES)
def test_clip_text_encode(name, comfy, clip_of, stock, relative_error):
    ours, theirs = clip_of(name), stock(name)
    texts, found = DEEP.get(name, TEXTS), []
    for text in texts:
        expected = comfy.nodes.CLIPTextEncode().encode(theirs, text)[0]
        compare(comfy.nodes.CLIPTextEncode().encode(ours, text)[0], expected, relative_error)
        found.append(expected[0][0])
    assert len({states.double().sum().item() for states in found}) == len(found)
    assert name == "klein_8b" or found[-1].shape[1] > 300
    if name == "wan":  # the others' tokenizers read brackets as text
        plain = comfy.nodes.CLIPTextEncode().encode(theirs, "a lighthouse on a [cliff] at dusk")[0][0][0]
        assert relative_error(found[2], plain) > 1e-2


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(height)) for height, width in sizes]


def test_pictures_in_prompts(comfy, clip_of, stock, relative_error, monkeypatch):
    from comfy_extras import nodes_qwen
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus

    monkeypatch.setattr(nodes_qwen, "int", lambda pixels: pixels // 48, raising=False)  # the nodes' areas: smaller
    ours, theirs = clip_of("qwen_image"), stock("qwen_image")
    first, second = pictures((96, 140), (70, 64))

    def plus(clip: Any, *images: Any) -> Any:
        return TextEncodeQwenImageEditPlus.execute(clip, "make it (red:1.3)", None, *images).result[0]

    one = plus(theirs, first)
    compare(plus(ours, first), one, relative_error)
    both = plus(theirs, first, None, second)
    compare(plus(ours, first, None, second), both, relative_error)
    assert both[0][0].shape[1] > one[0][0].shape[1]
    changed = plus(ours, first.flip(1))
    assert relative_error(changed[0][0], one[0][0]) > 100 * TOLERANCE
    for image in (None, first):
        expected = TextEncodeQwenImageEdit.execute(theirs, "make it red", None, image).result[0]
        compare(TextEncodeQwenImageEdit.execute(ours, "make it red", None, image).result[0], expected, relative_error)


def test_a_picture_needs_the_vision_tower(comfy, connected, state, tmp_path):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    texts = {name: each for name, each in state("qwen_image").items() if not name.startswith("visual.")}
    save_file(texts, tmp_path / "texts.safetensors")
    clip = load_clip(str(tmp_path / "texts.safetensors"), type="qwen_image")
    assert comfy.nodes.CLIPTextEncode().encode(clip, "a cliff")[0]
    with pytest.raises(Unsupported, match="texts: the prompt has a picture, but the file has no vision tower"):
        clip.encode_from_tokens(clip.tokenize("a cliff", images=pictures((56, 56))))


def test_last_layers(comfy, clip_of, stock, relative_error):
    """Set Last Layer changes one layer that ComfyUI takes, not several (klein); of Wan the last alone is given."""

    def encode(clip: Any, layer: int) -> Any:
        changed = comfy.nodes.CLIPSetLastLayer().set_last_layer(clip, layer)[0]
        return comfy.nodes.CLIPTextEncode().encode(changed, "a cliff")[0]

    for name, layers in (("z_image", (-1, -2, -3)), ("qwen_image", (-1, -2)), ("wan", (-1,))):
        ours, theirs = clip_of(name), stock(name)
        found = []
        for layer in layers:
            found.append(encode(theirs, layer))
            compare(encode(ours, layer), found[-1], relative_error)
        assert all(relative_error(each[0][0], found[0][0][0]) > 1e-2 for each in found[1:])
    with pytest.raises(Unsupported, match=r"CLIP Set Last Layer: -2, but XDiT's CLIP gives the last layer only"):
        encode(clip_of("wan"), -2)


@pytest.mark.parametrize("name", ["wan", "z_image"])
def test_loras_of_the_clip(name, comfy, clip_of, stock, daemon, relative_error):
    lora = {}
    layer, rows = {
        "wan": ("umt5xxl.transformer.encoder.block.1.layer.0.SelfAttention.v", 128),
        "z_image": ("qwen3_4b.transformer.model.layers.1.mlp.up_proj", 160),
    }[name]
    generator = torch.Generator().manual_seed(0)
    lora[f"text_encoders.{layer}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
    lora[f"text_encoders.{layer}.lora_down.weight"] = torch.randn(4, 128, generator=generator) / 8

    def encode(clip: Any, strength: float) -> Any:
        changed = comfy.comfy.sd.load_lora_for_models(None, clip, lora, 0.0, strength)[1]
        return comfy.nodes.CLIPTextEncode().encode(changed, "a cliff")[0]

    ours, theirs = clip_of(name), stock(name)
    plain = encode(theirs, 0.0)
    for strength in (0.3, -0.2, 0.0):
        expected = encode(theirs, strength)
        compare(encode(ours, strength), expected, relative_error)
        if strength:
            assert relative_error(expected[0][0], plain[0][0]) > 1e-2
    comfy.comfy.model_management.unload_all_models()


@pytest.mark.parametrize("name", NAMES)
def test_loras_find_the_layers_that_they_find_in_stock(name, comfy, clip_of, stock):
    """Else a LoRA's keys would be left out in silence, or reported as of no layer."""
    keys = comfy.comfy.lora.model_lora_keys_clip
    ours, theirs = (keys(clip.cond_stage_model, {}) for clip in (clip_of(name), stock(name)))
    missing = {each for key, each in theirs.items() if key not in ours}
    assert not {each for each in missing if not each.endswith("lm_head.weight")}  # no text is generated
    assert {key: each for key, each in ours.items() if theirs.get(key) != each} == {}


def test_clip_save_writes_what_stock_writes(comfy, clip_of, stock):
    for name in ("wan", "flux2_dev"):
        saved, expected = clip_of(name).state_dict_for_saving(), stock(name).state_dict_for_saving()
        encoder = {key for key in expected if ".transformer." in key}
        assert encoder <= saved.keys() <= expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in saved)
        assert comfyui_text.ENCODERS[name].tokenizer in saved


def test_a_norm_behind_the_first_layers_is_not_used(comfy, connected, state, stock, tmp_path, relative_error):
    """ComfyUI has none in a Mistral Small 3 of fewer than its 40 layers, whatever the file holds."""
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    norm = torch.full((comfyui_text.MISTRAL_WIDTH,), 3.0)
    save_file(state("flux2_dev") | {"model.norm.weight": norm}, tmp_path / "with_norm.safetensors")
    clip = load_clip(str(tmp_path / "with_norm.safetensors"), type="flux2")
    found = [comfy.nodes.CLIPTextEncode().encode(each, "a cliff")[0] for each in (clip, stock("flux2_dev"))]
    compare(*found, relative_error)


def test_what_is_refused(comfy, clip_of, connected, file_of, state, tmp_path):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    clip = clip_of("z_image")
    tokens = clip.tokenize("a cliff")
    with pytest.raises(Unsupported, match="encodes texts and generates none"):
        clip.generate(tokens)
    tokens["qwen3_4b"][0][2] = (torch.zeros(128), 1.0)
    with pytest.raises(Unsupported, match="z_image: the prompt names a textual inversion embedding"):
        clip.encode_from_tokens(tokens)
    for name, type, said in (
        ("z_image", "wan", "Wan needs UMT5"),
        ("wan", "lumina2", "Z-Image needs Qwen3 4B"),
        ("klein_8b", "lumina2", "a language model of 160 channels; Z-Image needs Qwen3 4B"),
        ("flux2_dev", "qwen_image", "a language model of 192 channels; Qwen-Image needs Qwen2.5-VL 7B"),
        ("qwen_image", "flux2", "a language model of 128 channels; FLUX.2 dev needs Mistral Small 3"),
    ):
        with pytest.raises(BadRequest, match=f"{name}: .*{said}"):
            load_clip(file_of(name), type=type)
    for name, tensor in (("wan", "spiece_model"), ("flux2_dev", "tekken_model")):
        save_file({key: each for key, each in state(name).items() if key != tensor}, tmp_path / "bare.safetensors")
        with pytest.raises(Unsupported, match=f"bare: it has no tensor {tensor}, which is the tokenizer"):
            load_clip(str(tmp_path / "bare.safetensors"), type=comfyui_text.ENCODERS[name].type)


@pytest.mark.parametrize("format", ["bfloat16", "plain", "float8", "old", "int8_convrot"])
@pytest.mark.parametrize("name", ["wan", "z_image", "qwen_image"])
def test_packed_files(name, format, comfy, connected, state, tmp_path, relative_error):
    """Each is held as stock holds it, in the dtype of its norms or packed, and computes in float32."""
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    encoder = comfyui_text.ENCODERS[name]
    weights = {key: each for key, each in state(name).items() if key != encoder.tokenizer}
    path = tmp_path / "packed.safetensors"
    apart = {key: each.to(torch.bfloat16) for key, each in weights.items() if format != "plain" and is_apart(key)}
    given = {key: each for key, each in weights.items() if key not in apart}
    if format == "bfloat16":
        made = packed_checkpoints.Packed({key: each.to(torch.bfloat16) for key, each in given.items()})
    else:
        made = packed_checkpoints.pack(given, format, torch.bfloat16)
    made.tensors |= apart | ({encoder.tokenizer: state(name)[encoder.tokenizer]} if encoder.tokenizer else {})
    for key, each in made.tensors.items():
        if key.endswith("weight_scale") and each.ndim == 1:  # with one dimension, stock fails
            made.tensors[key] = each[:, None]
    made.save(path)
    text = "a (lighthouse:1.4) on a cliff"
    found = []
    for clip in (load_clip(str(path), type=encoder.type), comfyui_text.stock_clip(comfy, encoder, path)):
        tokens = clip.tokenize(text, images=pictures((56, 84)) if name == "qwen_image" else [])
        found.append(clip.encode_from_tokens_scheduled(tokens))
    compare(*found, relative_error)


def is_apart(name: str) -> bool:
    """Tables and vision towers, which files in these formats keep in bfloat16."""
    return name.endswith(("shared.weight", "embed_tokens.weight", "bias.weight")) or name.startswith("visual.")


def test_a_gguf_has_no_tokenizer_for_comfyui(connected, state, tmp_path):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    weights = {key: each for key, each in state("wan").items() if key != "spiece_model"}
    gguf_files.write_t5(tmp_path / "umt5.gguf", weights, "q8_0")
    with pytest.raises(Unsupported, match="umt5: it has no tensor spiece_model, which is the tokenizer that ComfyUI"):
        load_clip(str(tmp_path / "umt5.gguf"), type="wan")
