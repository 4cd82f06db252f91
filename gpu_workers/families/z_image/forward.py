"""Z-Image's transformer with sequence parallelism.

On one rank diffusers' own forward runs. On several, each computes an even part of the image tokens and of the text
tokens, and attends to those of all ranks. Every rank refines the whole text: for two blocks over a few hundred tokens
that takes less time than collectives. Rows of different lengths run one after the other; diffusers' class pads and
masks them, which is equivalent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    ZImageTransformer2DModel,
    ZSingleStreamAttnProcessor,
)
from xfuser.core.distributed import get_sequence_parallel_rank, get_sequence_parallel_world_size

from xditd.gpu_workers.families.z_image.config import NORM_EPSILON, PATCH, padded
from xditd.gpu_workers.families.z_image.facts import COMFYUI
from xditd.gpu_workers.packed.linear import PackedLinear
from xditd.gpu_workers.packed.shared_inputs import WithProjections, project_all
from xditd.gpu_workers.parallel.sequence_attention import attend
from xditd.gpu_workers.parallel.token_partition import RankRange, gather_evenly, pad_end, partition_evenly

EMBEDDER = f"{PATCH}-1"


class SharedKeys(NamedTuple):
    """Given as the attention mask: keys are on all ranks, and the first ``valid`` of them count."""

    valid: int


class _Sequence(NamedTuple):
    """Part of a sequence: features (rows, tokens, hidden) and their rotary embedding."""

    features: torch.Tensor
    rotation: torch.Tensor

    def padded(self, tokens: int) -> _Sequence:
        return _Sequence(pad_end(self.features, tokens, dim=1), pad_end(self.rotation, tokens, dim=1))


def _clamped(x: torch.Tensor) -> torch.Tensor:
    """Keep what overflows float16 at its largest numbers, as ComfyUI does."""
    return x.nan_to_num(0.0) if x.dtype == torch.float16 else x


class ClampingFeedForward(FeedForward):
    """The class's; as ComfyUI's, with ``clamps``, of float16."""

    clamps = False
    clamps_result = False
    """Whether the result is clamped, too: in blocks that are modulated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.clamps:
            return cast(torch.Tensor, super().forward(x))
        found = self.w2(_clamped(self._forward_silu_gating(self.w1(x), self.w3(x))))
        return _clamped(found) if self.clamps_result else found


class SplitAttnProcessor(ZSingleStreamAttnProcessor):
    """The class's attention; with :class:`SharedKeys` as the mask, attention over the tokens of all ranks."""

    clamps = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | SharedKeys | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> Any:
        if isinstance(attention_mask, SharedKeys):
            assert freqs_cis is not None
            found = _attend_shared(attn, hidden_states, attention_mask, freqs_cis)
        else:
            if isinstance(attn.to_q, PackedLinear):
                attn = cast(Attention, WithProjections(attn, ("to_q", "to_k", "to_v"), hidden_states))
            found = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        return _clamped(found) if self.clamps else found


def _attend_shared(
    attn: Attention, hidden_states: torch.Tensor, keys: SharedKeys, rotation: torch.Tensor
) -> torch.Tensor:
    query, key, value = (
        part.unflatten(-1, (attn.heads, -1)) for part in project_all((attn.to_q, attn.to_k, attn.to_v), hidden_states)
    )
    query, key = _rotate(attn.norm_q(query), rotation), _rotate(attn.norm_k(key), rotation)
    attended = attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        valid=keys.valid,
        layer=attn,
    )
    joined = attended.transpose(1, 2).flatten(2, 3).to(query.dtype)
    return cast(torch.Tensor, attn.to_out[1](attn.to_out[0](joined)))


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding as the class does: in float32, as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(3).type_as(x)


class SequenceParallelZImage(ZImageTransformer2DModel):
    """Z-Image with sequence parallelism (:meth:`forward_shared`) besides the class's own forward."""

    _variant = "class"

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._processor = SplitAttnProcessor()
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.attention.set_processor(self._processor)
            block.feed_forward.__class__ = ClampingFeedForward
            block.feed_forward.clamps_result = block.modulation

    def set_variant(self, variant: str) -> None:
        """Switch the module to ``variant``; without a change it costs one comparison."""
        if variant == self._variant:
            return
        self._variant = variant
        self._processor.clamps = variant == COMFYUI
        epsilon = torch.finfo(torch.float32).eps if variant == COMFYUI else NORM_EPSILON
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.attention.norm_q.eps = block.attention.norm_k.eps = epsilon
            block.feed_forward.clamps = variant == COMFYUI

    def forward_shared(
        self, x: Sequence[torch.Tensor], t: torch.Tensor, cap_feats: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run the class's forward on all ranks of the sequence together; each returns all rows.

        Rows of equal lengths run as one batch, in an order that is the same on every rank.
        """
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, (image, text) in enumerate(zip(x, cap_feats, strict=True)):
            lengths = (*image.shape, padded(len(text)))
            alike[lengths].append(row)
        results: dict[int, torch.Tensor] = {}
        for rows in alike.values():
            # Not by a list of indices, which the host would copy to the GPU and wait for.
            times = t if len(rows) == len(x) else torch.stack([t[row] for row in rows])
            done = self._forward_equal_lengths([x[row] for row in rows], times, [cap_feats[row] for row in rows])
            results.update(zip(rows, done, strict=True))
        return [results[row] for row in range(len(x))]

    def _forward_equal_lengths(
        self, x: list[torch.Tensor], t: torch.Tensor, cap_feats: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        time = self.t_embedder(t * self.t_scale).type_as(x[0])
        images, texts, sizes, image_ids, text_ids, image_is_padding, text_is_padding = self.patchify_and_embed(
            x, cap_feats, PATCH, 1
        )
        own_image, own_text = self._own_range(len(images[0])), self._own_range(len(texts[0]))

        image = self._embed(
            self.all_x_embedder[EMBEDDER],
            self.x_pad_token,
            *([each[own_image.tokens] for each in parts] for parts in (images, image_ids, image_is_padding)),
        )
        image = self._refine_image(image.padded(own_image.padding), len(images[0]), time, own_image)
        text = self._embed(self.cap_embedder, self.cap_pad_token, texts, text_ids, text_is_padding)
        for block in self.context_refiner:
            text = text._replace(features=block(text.features, None, text.rotation))

        joint = _Sequence(
            *(torch.cat([one, other[:, own_text.tokens]], dim=1) for one, other in zip(image, text, strict=True))
        ).padded(own_image.padding + own_text.padding)
        keys = SharedKeys(len(images[0]) + len(texts[0]))
        features = joint.features
        for block in self.layers:
            features = block(features, keys, joint.rotation, time)

        features = self.all_final_layer[EMBEDDER](features[:, : own_image.count], c=time)
        whole = gather_evenly(pad_end(features, own_image.padding, dim=1), len(images[0]))
        return cast(list[torch.Tensor], self.unpatchify(list(whole.unbind()), sizes, PATCH, 1))

    def _own_range(self, tokens: int) -> RankRange:
        return partition_evenly(tokens, get_sequence_parallel_world_size())[get_sequence_parallel_rank()]

    def _embed(
        self,
        embedder: torch.nn.Module,
        pad_token: torch.Tensor,
        features: list[torch.Tensor],
        positions: list[torch.Tensor],
        is_padding: list[torch.Tensor],
    ) -> _Sequence:
        """Embed equally many tokens of each row; where ``is_padding`` is true, use the learned padding token."""
        rows = len(features)
        embedded = torch.where(torch.cat(is_padding).unsqueeze(-1), pad_token, embedder(torch.cat(features)))
        # patchify_and_embed gives positions of a text's padding twice; the class, too, cuts them off.
        rotation = self.rope_embedder(
            torch.cat([ids[: len(each)] for ids, each in zip(positions, features, strict=True)])
        )
        return _Sequence(embedded.unflatten(0, (rows, -1)), rotation.unflatten(0, (rows, -1)))

    def _refine_image(self, image: _Sequence, tokens: int, time: torch.Tensor, own: RankRange) -> _Sequence:
        features = image.features
        for block in self.noise_refiner:
            features = block(features, SharedKeys(tokens), image.rotation, time)
        return _Sequence(features[:, : own.count], image.rotation[:, : own.count])
