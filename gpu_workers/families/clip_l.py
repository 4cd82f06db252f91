"""CLIP-L's text model (``clip_l.safetensors``), in the names of transformers and ComfyUI.

Names begin with ``text_model.``, or do not: transformers has left it out since 5.6. Everything but the activation is
read from shapes; OpenCLIP's larger models have another one, so they are refused by their widths.

``text_projection`` and the vision tower compare texts with images. FLUX.1 takes the pooled state as it is, so they are
skipped.

Source: transformers, ``CLIPTextModel``; openai/clip-vit-large-patch14, ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch

from xditd.gpu_workers.models.family import Entry, Kind, Model, Shape
from xditd.gpu_workers.models.full_precision import compute_in_float32
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.facts import TextEncoderFacts

HEAD_SIZE = 64
MAX_LAYERS = 64
VOCABULARY = 49_408
OPEN_CLIP = {1024: "CLIP-H", 1280: "CLIP-G"}

_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.")
_OLD_LAYER = re.compile(r"^text_model\.encoder\.layers\.\d+\.")
_TOKENS = "embeddings.token_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"


@dataclass(frozen=True, slots=True)
class ClipLConfig:
    """The shape of a CLIP text model; ``max_tokens`` is how many positions it knows."""

    vocabulary: int
    max_tokens: int
    width: int
    layers: int
    inner: int

    @property
    def end_of_text(self) -> int:
        """The token whose state is the pooled one. Files with more tokens than CLIP's have theirs after it."""
        return min(self.vocabulary, VOCABULARY) - 1


class ClipL:
    """CLIP-L: see the module's docstring."""

    name = "clip_l"
    title = "CLIP-L (clip_l.safetensors)"
    kind: Kind = "text_encoder"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = re.compile(r"^(?:vision_model|visual_projection|text_projection)(?:\.|$)")

    def claims(self, names: Collection[str]) -> bool:
        # Other encoders have layers of the same names without the old prefix; those of texts alone embed tokens.
        return any(map(_OLD_LAYER.match, names)) or (_TOKENS in names and any(map(_LAYER.match, names)))

    def canonical(self, name: str) -> str:
        return name.removeprefix("text_model.")

    def configure(self, shapes: Mapping[str, Shape]) -> ClipLConfig:
        vocabulary, width = _sides(shapes, _TOKENS)
        if width in OPEN_CLIP:
            raise Unsupported(
                f"clip_l: a text model of width {width} is {OPEN_CLIP[width]}, which FLUX.1 does not use; lend clip_l"
            )
        if width % HEAD_SIZE:
            raise BadCheckpoint(f"clip_l: width {width} is not a multiple of the head size {HEAD_SIZE}")
        layers = 1 + max((int(found[1]) for found in map(_LAYER.match, shapes) if found), default=-1)
        if layers > MAX_LAYERS:
            raise BadCheckpoint(f"clip_l: layer {layers - 1} exceeds the limit of {MAX_LAYERS} layers")
        return ClipLConfig(
            vocabulary=vocabulary,
            max_tokens=_sides(shapes, _POSITIONS)[0],
            width=width,
            layers=layers,
            inner=_sides(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        )

    def entries(self, config: ClipLConfig, names: Collection[str]) -> Iterator[Entry]:
        width = config.width
        yield _same(_TOKENS, (config.vocabulary, width))
        yield _same(_POSITIONS, (config.max_tokens, width))
        for number in range(config.layers):
            layer = f"encoder.layers.{number}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield _same(f"{layer}.self_attn.{part}.weight", (width, width))
                yield _same(f"{layer}.self_attn.{part}.bias", (width,))
            for norm in ("layer_norm1", "layer_norm2"):
                yield _same(f"{layer}.{norm}.weight", (width,))
                yield _same(f"{layer}.{norm}.bias", (width,))
            yield _same(f"{layer}.mlp.fc1.weight", (config.inner, width))
            yield _same(f"{layer}.mlp.fc1.bias", (config.inner,))
            yield _same(f"{layer}.mlp.fc2.weight", (width, config.inner))
            yield _same(f"{layer}.mlp.fc2.bias", (width,))
        yield _same("final_layer_norm.weight", (width,))
        yield _same("final_layer_norm.bias", (width,))

    def heads(self, config: ClipLConfig) -> int:
        return 0

    @property
    def operations(self) -> ClipLOperations:
        return ClipLOperations()


class ClipLOperations:
    """See :class:`~xditd.gpu_workers.models.family.TextEncoderOperations`."""

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
        model = getattr(model, "text_model", model)  # transformers 4 keeps it one level deeper
        # A buffer that is in no file: it was made on the meta device, and a job would read nothing from it.
        model.embeddings.position_ids = torch.arange(config.max_tokens, device="cpu").expand((1, -1))
        compute_in_float32([*model.encoder.layers, model.final_layer_norm], model.embeddings)
        return cast(torch.nn.Module, model)

    def fuse(self, *_: object) -> None:
        """There is no faster forward."""

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


def _sides(shapes: Mapping[str, Shape], name: str) -> tuple[int, int]:
    shape = shapes.get(name, ())
    if len(shape) != 2 or 0 in shape:
        found = f"is {list(shape)}, not a matrix" if shape else "is missing"
        raise BadCheckpoint(f"clip_l: {name} {found}: the size of the model cannot be read")
    return shape[0], shape[1]


def _same(source: str, shape: Shape) -> Entry:
    return Entry(source, shape, ((source, shape[0]),))
