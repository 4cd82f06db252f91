"""Words with the tokenizers that ComfyUI ships: token ids as transformers' own classes make them of these folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux2_models
import pytest
import qwen_image_models
import z_image_models
from tokenizer_folders import PROMPTS

from xditd.client import BadRequest, Client
from xditd.client.demo import checkpoints

pytestmark = pytest.mark.comfyui


@pytest.fixture
def folder() -> Callable[[str], Path]:
    root = os.environ.get("COMFYUI_PATH")
    if not root:
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    return lambda name: Path(root) / "comfy" / name


def lend(client: Client, tmp_path: Path, state: Any) -> Any:
    checkpoints.save_aligned(state, tmp_path / "transformer.safetensors")
    return client.lend(tmp_path / "transformer.safetensors")


def ids(tokenizer: Any, texts: list[str], length: int) -> Any:
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def test_flux1_with_clips_and_t5s_tokenizers(client: Client, folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip, t5 = folder("sd1_tokenizer"), folder("text_encoders/t5_tokenizer")
    flux = lend(client, tmp_path, checkpoints.flux1_state_dict(1, context_dim=128, pooled_dim=128))
    lent = {"tokenizer": client.lend_tokenizer(clip), "tokenizer_2": client.lend(t5, kind="tokenizer")}
    assert [each.facts.tokenizer.vocabulary for each in lent.values()] == [49_408, 32_100]
    found = client.tokenize(flux, PROMPTS, tokenizers=lent)
    for role, tokenizer, length in (
        ("text_encoder", CLIPTokenizer.from_pretrained(clip), 77),
        ("text_encoder_2", T5TokenizerFast.from_pretrained(t5), 512),
    ):
        assert (found[role]["token_ids"] == ids(tokenizer, list(PROMPTS), length)).all()


def test_families_of_qwen_with_its_tokenizer(client: Client, folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    where = folder("text_encoders/qwen25_tokenizer")
    own, lent = Qwen2Tokenizer.from_pretrained(where), {"tokenizer": client.lend_tokenizer(where)}
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for state, end in (
        (z_image_models.state_dict(1), ""),
        (flux2_models.state_dict(1, flux2_models.KLEIN), "<think>\n\n</think>\n\n"),
    ):
        transformer = lend(client, tmp_path, state)
        with pytest.raises(BadRequest, match=r"chat template makes another text .*You are a helpful"):
            client.tokenize(transformer, "a cat", tokenizers=lent)  # Qwen2.5's, with a system message
        found = client.tokenize(transformer, PROMPTS, tokenizers=lent, options={"own_template": True})
        texts = [chat.replace("{}", each) + end for each in PROMPTS]
        assert (found["text_encoder"]["token_ids"] == ids(own, texts, 512)).all()
    qwen = lend(client, tmp_path, qwen_image_models.state_dict(1))
    found = client.tokenize(qwen, PROMPTS, tokenizers=lent)
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=None, tokenizer=own
    )  # fmt: skip
    texts = [pipe.prompt_template_encode.format(each) for each in PROMPTS]
    right = own(texts, max_length=1024 + 34, padding=True, truncation=True, return_tensors="pt")
    assert (found["text_encoder"]["token_ids"] == right.input_ids).all()
    assert (found["text_encoder"]["mask"] == right.attention_mask).all()
