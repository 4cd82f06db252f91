"""Qwen3 4B and 8B and Mistral Small 3 24B, in the naming of transformers, with or without its wrappers' prefixes.

ComfyUI's files have the same names; those of Mistral Small 3 for FLUX.2 hold its first 30 layers alone, which are all
that FLUX.2 reads, and may lack the norm behind the last. Language heads, vision towers and their projectors are not
read. The base of the rotary embedding and the epsilon of norms are those of the released models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

from xditd.gpu_workers.families.language_models.config import HEAD_SIZE, LanguageModelConfig
from xditd.gpu_workers.models.entries import Entry, Shape, tensor_entry
from xditd.gpu_workers.models.family import Kind
from xditd.gpu_workers.models.shapes import count_blocks, matrix, vote
from xditd.ipc.errors import BadCheckpoint, Unsupported

if TYPE_CHECKING:
    from xditd.gpu_workers.families.language_models.operations import LanguageModelOperations

MAX_LAYERS: Final = 256

_WRAPPERS: Final = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?=layers\.|embed_tokens\.|norm\.)")
_OTHERS: Final = re.compile(
    r"^(?:lm_head\.|language_model\.lm_head\.|(?:model\.)?(?:vision_tower|multi_modal_projector)\."
    r"|.*\.rotary_emb\.inv_freq$|tekken_model$|spiece_model$)"
)
_TOKENS: Final = "embed_tokens.weight"
_QUERY: Final = "layers.0.self_attn.q_proj.weight"
_HEAD_NORM: Final = "layers.0.self_attn.q_norm.weight"
_BIAS: Final = "layers.0.self_attn.q_proj.bias"
_GEMMA: Final = "layers.0.pre_feedforward_layernorm.weight"
_GATE: Final = "layers.0.mlp.gate_proj.weight"
_FINAL_NORM: Final = "norm.weight"
MINISTRAL_WIDTH: Final = 3072


class _LanguageModel:
    """What both families have in common."""

    name: str
    kind: Kind = "text_encoder"
    tied: Mapping[str, str] = {}
    ignored: re.Pattern[str] | None = _OTHERS
    fused_widths: tuple[int, ...] = ()
    swapped_halves: frozenset[str] = frozenset()
    has_head_norms: bool
    layers_with_norm = 0
    """Files of at least so many layers have the norm behind the last."""
    rope_theta: float
    epsilon: float

    def claims(self, names: Collection[str]) -> bool:
        bare = {self.canonical(name) for name in names}
        is_decoder = {_TOKENS, _QUERY, _GATE} <= bare and bare.isdisjoint((_BIAS, _GEMMA))
        # Qwen3-VL is a relative with other positions.
        has_vision = any(name.removeprefix("model.").startswith("visual.") for name in bare)
        return is_decoder and not has_vision and (_HEAD_NORM in bare) == self.has_head_norms

    def canonical(self, name: str) -> str:
        return _WRAPPERS.sub("", name)

    def configure(self, shapes: Mapping[str, Shape]) -> LanguageModelConfig:
        vocabulary, width = matrix(self.name, shapes, _TOKENS)
        layers = count_blocks(self.name, shapes, "layers", MAX_LAYERS)
        rows = {
            part: vote(self.name, f"rows of {part}", shapes, [(f"layers.{i}.{part}.weight", 0) for i in range(layers)])
            for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
        }
        queries, keys, inner = rows.values()
        if queries % HEAD_SIZE or keys % HEAD_SIZE or queries % keys:
            raise BadCheckpoint(
                f"{self.name}: {queries} rows of queries and {keys} of keys are not of heads of {HEAD_SIZE}"
            )
        self._check(width, queries)
        return LanguageModelConfig(
            vocabulary=vocabulary,
            width=width,
            layers=layers,
            heads=queries // HEAD_SIZE,
            key_heads=keys // HEAD_SIZE,
            inner=inner,
            has_head_norms=self.has_head_norms,
            rope_theta=self.rope_theta,
            epsilon=self.epsilon,
            has_final_norm=_FINAL_NORM in shapes or layers >= self.layers_with_norm,
        )

    def _check(self, width: int, queries: int) -> None:
        """Raise ``Unsupported`` for a relative with the same names."""

    def entries(self, config: LanguageModelConfig, names: Collection[str]) -> Iterator[Entry]:
        width, queries, keys = config.width, config.heads * HEAD_SIZE, config.key_heads * HEAD_SIZE
        yield tensor_entry(_TOKENS, (config.vocabulary, width))
        for number in range(config.layers):
            layer = f"layers.{number}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield tensor_entry(f"{layer}.{norm}.weight", (width,))
            for part, shape in (
                ("self_attn.q_proj", (queries, width)),
                ("self_attn.k_proj", (keys, width)),
                ("self_attn.v_proj", (keys, width)),
                ("self_attn.o_proj", (width, queries)),
                ("mlp.gate_proj", (config.inner, width)),
                ("mlp.up_proj", (config.inner, width)),
                ("mlp.down_proj", (width, config.inner)),
            ):
                yield tensor_entry(f"{layer}.{part}.weight", shape)
            if config.has_head_norms:
                for norm in ("q_norm", "k_norm"):
                    yield tensor_entry(f"{layer}.self_attn.{norm}.weight", (HEAD_SIZE,))
        if config.has_final_norm:
            yield tensor_entry(_FINAL_NORM, (width,))

    def heads(self, config: LanguageModelConfig) -> int:
        return 0

    @cached_property
    def operations(self) -> LanguageModelOperations:
        from xditd.gpu_workers.families.language_models.operations import LanguageModelOperations

        return LanguageModelOperations()


class Qwen3(_LanguageModel):
    """The family of Qwen3: see the module's docstring."""

    name = "qwen3"
    title = "Qwen3 4B or 8B (qwen_3_4b.safetensors)"
    has_head_norms = True
    rope_theta = 1e6
    epsilon = 1e-6


class Mistral3(_LanguageModel):
    """The family of Mistral Small 3's language model: see the module's docstring."""

    name = "mistral3"
    title = "Mistral Small 3 24B (mistral_3_small_flux2_bf16.safetensors)"
    has_head_norms = False
    layers_with_norm = 40
    rope_theta = 1e9
    epsilon = 1e-5

    def _check(self, width: int, queries: int) -> None:
        known = "lend the language model of Mistral Small 3 24B"
        if queries == width:
            raise Unsupported(
                f"mistral3: {queries} rows of queries for {width} channels: Llama or an older Mistral, whose rotary "
                f"embeddings differ; {known}"
            )
        if width == MINISTRAL_WIDTH:
            raise Unsupported(f"mistral3: {width} channels: Ministral 3, whose rotary embedding differs; {known}")
