"""For tests in ComfyUI: small files of single text encoders with its tokenizers, and its own classes at these sizes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import language_models
import pytest
import qwen2_5_vl_models
import text_checkpoints
import torch

State = dict[str, torch.Tensor]

QWEN_VOCABULARY = 151_680
SPECIAL_TOKENS = 20


@dataclass(frozen=True)
class Encoder:
    """``type`` of the loader, the text model and tokenizer of stock, its name for the encoder, and its sizes."""

    type: str
    state: Callable[[], State]
    stock: Callable[[State], tuple[type, type]]
    name: str
    sizes: Mapping[str, int]
    tokenizer: str = ""
    """The tensor that is the tokenizer."""


def _decoder(family: str, *, layers: int, vocabulary: int, width: int, heads: int = 1) -> State:
    config = replace(
        language_models.CONFIGS[family], layers=layers, vocabulary=vocabulary, width=width, heads=heads, inner=160
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(language_models.CONFIGS, family, config)
        return language_models.state_dict(family, 3)


def _decoder_sizes(layers: int, vocabulary: int, width: int, heads: int = 1) -> dict[str, int]:
    return {
        "num_hidden_layers": layers, "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 160,
        "num_attention_heads": heads, "num_key_value_heads": 1,
    }  # fmt: skip


def tekken_model() -> torch.Tensor:
    """Make a tokenizer of bytes in the format of Mistral's files."""
    tokens = [bytes([each]) for each in range(256)] + [b"li", b"gh", b"ligh", b"lig", b"ht", b"light"]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<{each}>" for each in range(5, 11)), "<pad>"]
    names += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", *(f"<{each}>" for each in range(14, SPECIAL_TOKENS))]
    made = {
        "config": {"default_num_special_tokens": SPECIAL_TOKENS, "default_vocab_size": SPECIAL_TOKENS + len(tokens)},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(each).decode()} for rank, each in enumerate(tokens)],
        "special_tokens": [{"rank": rank, "token_str": name} for rank, name in enumerate(names)],
    }
    return torch.frombuffer(bytearray(json.dumps(made).encode()), dtype=torch.uint8)


def spiece_model() -> torch.Tensor:
    """Train a small SentencePiece tokenizer whose end and padding have the numbers of UMT5's."""
    import sentencepiece

    made = io.BytesIO()
    texts = ["a lighthouse on a cliff at dusk, long exposure", "the sea below (the cliff) is calm: a boat", "1.2 0.8"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=made, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)


def _wan(state: State) -> tuple[type, type]:
    from comfy.text_encoders import sd3_clip, wan

    return wan.te(**sd3_clip.t5_xxl_detect(state)), wan.WanT5Tokenizer


def _z_image(state: State) -> tuple[type, type]:
    from comfy.text_encoders import hunyuan_video, z_image

    return z_image.te(**hunyuan_video.llama_detect(state)), z_image.ZImageTokenizer


def _qwen_image(state: State) -> tuple[type, type]:
    from comfy.text_encoders import hunyuan_video, qwen_image

    return qwen_image.te(**hunyuan_video.llama_detect(state)), qwen_image.QwenImageTokenizer


def _klein(name: str) -> Callable[[State], tuple[type, type]]:
    def made(state: State) -> tuple[type, type]:
        from comfy.text_encoders import flux, hunyuan_video

        tokenizers = {"qwen3_4b": flux.KleinTokenizer, "qwen3_8b": flux.KleinTokenizer8B}
        return flux.klein_te(**hunyuan_video.llama_detect(state), model_type=name), tokenizers[name]

    return made


def _flux2(state: State) -> tuple[type, type]:
    from comfy.text_encoders import flux, hunyuan_video

    return flux.flux2_te(**hunyuan_video.llama_detect(state), pruned=True), flux.Flux2Tokenizer


MISTRAL_WIDTH, QWEN_4B_WIDTH, QWEN_8B_WIDTH = 192, 128, 160

ENCODERS = {
    "wan": Encoder(
        "wan",
        lambda: text_checkpoints.umt5_state_dict(6) | {"spiece_model": spiece_model()},
        _wan,
        "umt5xxl",
        {"d_model": 128, "d_ff": 256, "d_kv": 64, "num_heads": 2, "num_layers": 2, "vocab_size": 32_128},
        "spiece_model",
    ),
    "z_image": Encoder(
        "lumina2",
        lambda: _decoder("qwen3", layers=3, vocabulary=QWEN_VOCABULARY, width=QWEN_4B_WIDTH),
        _z_image,
        "qwen3_4b",
        _decoder_sizes(3, QWEN_VOCABULARY, QWEN_4B_WIDTH),
    ),
    "klein_4b": Encoder(
        "flux2",
        lambda: _decoder("qwen3", layers=28, vocabulary=QWEN_VOCABULARY, width=QWEN_4B_WIDTH),
        _klein("qwen3_4b"),
        "qwen3_4b",
        _decoder_sizes(28, QWEN_VOCABULARY, QWEN_4B_WIDTH),
    ),
    "klein_8b": Encoder(
        "flux2",
        lambda: _decoder("qwen3", layers=28, vocabulary=QWEN_VOCABULARY, width=QWEN_8B_WIDTH),
        _klein("qwen3_8b"),
        "qwen3_8b",
        _decoder_sizes(28, QWEN_VOCABULARY, QWEN_8B_WIDTH),
    ),
    "flux2_dev": Encoder(
        "flux2",
        lambda: (
            {
                name: each
                for name, each in _decoder("mistral3", layers=30, vocabulary=300, width=MISTRAL_WIDTH, heads=2).items()
                if name != "model.norm.weight"
            }
            | {"tekken_model": tekken_model()}
        ),
        _flux2,
        "mistral3_24b",
        _decoder_sizes(30, 300, MISTRAL_WIDTH, 2),
        "tekken_model",
    ),
    "qwen_image": Encoder(
        "qwen_image",
        lambda: dict(qwen2_5_vl_models.state_dict()),
        _qwen_image,
        "qwen25_7b",
        _decoder_sizes(2, QWEN_VOCABULARY, 128),
    ),
}


def accept_small_encoders(patch: pytest.MonkeyPatch) -> None:
    """Let the adapters, which know released models by their widths, take the small files."""
    from xditd.client.comfyui.families import flux2_text, z_image_text

    widths = {QWEN_4B_WIDTH: "qwen3_4b", QWEN_8B_WIDTH: "qwen3_8b", MISTRAL_WIDTH: "mistral3_24b"}
    patch.setattr(flux2_text, "WIDTHS", widths)
    patch.setattr(z_image_text, "WIDTHS", frozenset({QWEN_4B_WIDTH}))


@contextmanager
def small_vision_tower() -> Iterator[None]:
    """Let ComfyUI build Qwen2.5-VL's vision tower in the size of the small file."""
    from comfy.text_encoders import qwen_vl

    made = qwen_vl.Qwen2VLVisionTransformer
    vision = qwen2_5_vl_models.SMALL.vision
    assert vision is not None

    def small(*_: Any, output_hidden_size: int, **more: Any) -> Any:
        more |= {"hidden_size": vision.width, "intermediate_size": vision.inner, "num_layers": vision.blocks}
        return made(output_hidden_size=output_hidden_size, num_heads=vision.width // 80, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_vl, "Qwen2VLVisionTransformer", small)
        yield


def stock_clip(comfy: Any, encoder: Encoder, path: Path | str) -> Any:
    """Load an encoder's file as ComfyUI's loader does, which recognises none of this size."""
    tensors, metadata = comfy.comfy.utils.load_torch_file(str(path), return_metadata=True)
    state = comfy.comfy.utils.convert_old_quants(tensors, model_prefix="", metadata=metadata)[0]
    text_model, tokenizer = encoder.stock(state)
    target = comfy.comfy.supported_models_base.ClipTarget(tokenizer, text_model)
    options = {f"{encoder.name}_model_config": dict(encoder.sizes)}
    data = {encoder.tokenizer: state[encoder.tokenizer]} if encoder.tokenizer else {}
    with small_vision_tower():
        return comfy.comfy.sd.CLIP(target, state_dict=[state], model_options=options, tokenizer_data=data)
