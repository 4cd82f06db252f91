"""A tiny text encoder of the class Qwen3-VL, and its processor, made in code."""

from __future__ import annotations

from pipeline_parts import seeded
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, with the tokens that stand for images and turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


class ImageProcessor(Qwen3VLProcessor):
    """The processor without its part for videos, which needs torchvision.

    Transformers reads the names of a processor's parts from the signature of its constructor.
    """

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def qwen3_vl_processor() -> ImageProcessor:
    """Return a processor that gives the text encoder a token for 32 by 32 pixels: Qwen-Image 2.1 asks for that."""
    image_processor = Qwen2VLImageProcessor(
        min_pixels=1024, max_pixels=4096, patch_size=16, temporal_patch_size=2, merge_size=2
    )
    return ImageProcessor(image_processor, qwen_tokenizer(), chat_template=CHAT_TEMPLATE)


def qwen3_vl_text_encoder(hidden_size: int) -> Qwen3VLForConditionalGeneration:
    ids = dict(zip(SPECIAL, range(256, 256 + len(SPECIAL)), strict=True))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 288,
            "hidden_size": hidden_size,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return seeded(Qwen3VLForConditionalGeneration(config), seed=22)
