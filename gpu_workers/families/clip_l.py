"""CLIP-L's text model (``clip_l.safetensors``), in the names of transformers and ComfyUI.

The prefix ``text_model.`` is optional: transformers has no such prefix since 5.6. Everything but the activation is read
from shapes; OpenCLIP's larger models have another activation, so their widths are refused.

``text_projection`` and the vision tower are skipped: FLUX.1 takes the pooled state without a projection.

Source: transformers, ``CLIPTextModel``; openai/clip-vit-large-patch14, ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch

from xditd.gpu_workers.models.entries import Entry, Shape, layer_entries, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.full_precision import compute_in_float32
from xditd.gpu_workers.models.operations import Model
from xditd.gpu_workers.models.shapes import count_blocks, matrix
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.facts import TextEncoderFacts

HEAD_SIZE = 64
MAX_LAYERS = 64
VOCABULARY = 49_408
OPEN_CLIP = {1024: "CLIP-H", 1280: "CLIP-G"}

_LAYER = re.compile(r"^encoder\.layers\.\d+\.")
_OLD_LAYER = re.compile(r"^text_model\.encoder\.layers\.\d+\.")
_TOKENS = "embeddings.token_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"


@dataclass(frozen=True, slots=True)
class ClipLConfig:
    """The sizes of a CLIP text model; ``max_tokens`` is the number of its positions."""

    vocabulary: int
    max_tokens: int
    width: int
    layers: int
    inner: int

    @property
    def end_of_text(self) -> int:
        """The token whose state is the pooled one. Files with a larger vocabulary add tokens after it."""
        return min(self.vocabulary, VOCABULARY) - 1


class ClipL:
    """The family of CLIP-L: see the module's docstring."""

    name = "clip_l"
    title = "CLIP-L (clip_l.safetensors)"
    kind: Kind = "text_encoder"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = re.compile(r"^(?:vision_model|visual_projection|text_projection)(?:\.|$)")
    fused_widths: tuple[int, ...] = ()
    swapped_halves: frozenset[str] = frozenset()

    def claims(self, names: Collection[str]) -> bool:
        # Image encoders have layers of the same names without the prefix, but no token embedding.
        return any(map(_OLD_LAYER.match, names)) or (_TOKENS in names and any(map(_LAYER.match, names)))

    def canonical(self, name: str) -> str:
        return name.removeprefix("text_model.")

    def configure(self, shapes: Mapping[str, Shape]) -> ClipLConfig:
        vocabulary, width = matrix("clip_l", shapes, _TOKENS)
        if width in OPEN_CLIP:
            raise Unsupported(
                f"clip_l: a text model of width {width} is {OPEN_CLIP[width]}, which FLUX.1 does not use; lend clip_l"
            )
        if width % HEAD_SIZE:
            raise BadCheckpoint(f"clip_l: width {width} is not a multiple of the head size {HEAD_SIZE}")
        return ClipLConfig(
            vocabulary=vocabulary,
            max_tokens=matrix("clip_l", shapes, _POSITIONS)[0],
            width=width,
            layers=count_blocks("clip_l", shapes, "encoder.layers", MAX_LAYERS),
            inner=matrix("clip_l", shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        )

    def entries(self, config: ClipLConfig, names: Collection[str]) -> Iterator[Entry]:
        width = config.width
        yield tensor_entry(_TOKENS, (config.vocabulary, width))
        yield tensor_entry(_POSITIONS, (config.max_tokens, width))
        for number in range(config.layers):
            layer = f"encoder.layers.{number}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from layer_entries(f"{layer}.self_attn.{part}", (width, width))
            for norm in ("layer_norm1", "layer_norm2"):
                yield from layer_entries(f"{layer}.{norm}", (width,))
            yield from layer_entries(f"{layer}.mlp.fc1", (config.inner, width))
            yield from layer_entries(f"{layer}.mlp.fc2", (width, config.inner))
        yield from layer_entries("final_layer_norm", (width,))

    @property
    def smallest(self) -> ClipLConfig:
        return ClipLConfig(vocabulary=VOCABULARY, max_tokens=77, width=HEAD_SIZE, layers=1, inner=HEAD_SIZE)

    def lora_entries(self, config: ClipLConfig) -> Iterator[Entry]:
        for entry in self.entries(config, ()):
            yield entry
            yield replace(entry, source=f"text_model.{entry.source}")

    def heads(self, config: ClipLConfig) -> int:
        return 0

    @property
    def operations(self) -> ClipLOperations:
        return ClipLOperations()


class ClipLOperations:
    """See :class:`~xditd.gpu_workers.models.operations.TextEncoderOperations`."""

    def build(self, config: ClipLConfig) -> torch.nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=config.inner,
                projection_dim=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.width // HEAD_SIZE,
                max_position_embeddings=config.max_tokens,
                hidden_act="quick_gelu",
                bos_token_id=config.end_of_text - 1,
                eos_token_id=config.end_of_text,
                pad_token_id=config.end_of_text,
            )
        )
        model = getattr(model, "text_model", model)  # one level deeper in transformers 4
        # No file has this buffer, and on the meta device it has no values.
        model.embeddings.position_ids = torch.arange(config.max_tokens, device="cpu").expand((1, -1))
        compute_in_float32([*model.encoder.layers, model.final_layer_norm], model.embeddings)
        return cast(torch.nn.Module, model)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: ClipLConfig) -> TextEncoderFacts:
        return TextEncoderFacts(width=config.width, max_tokens=config.max_tokens, has_pooled=True)

    def vocabulary(self, config: ClipLConfig) -> int:
        return config.vocabulary

    @torch.inference_mode()
    def encode(
        self, model: Model[ClipLConfig], token_ids: torch.Tensor, *, pooled: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoded = model.module(input_ids=token_ids.to(model.device))
        hidden = cast(torch.Tensor, encoded.last_hidden_state)
        return hidden, cast(torch.Tensor, encoded.pooler_output) if pooled else None
