"""Z-Image's transformer on one rank or on several, which share the tokens of its image and of its text.

On one rank the class's own forward runs, unchanged. On several, each works on an even stretch of the image and one of
the text, and attends to everybody's. Text is refined by every rank as a whole: two blocks over a few hundred tokens
take less than the exchanges would. Rows of other lengths run apart from each other, where the class pads them and masks
the padding: no row sees another one's tokens in either way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel, ZSingleStreamAttnProcessor
from xfuser.core.distributed import get_sequence_parallel_rank, get_sequence_parallel_world_size

from xditd.gpu_workers.families.z_image.config import NORM_EPSILON, PATCH, padded
from xditd.gpu_workers.families.z_image.facts import COMFYUI
from xditd.gpu_workers.parallel.sequence_attention import attend
from xditd.gpu_workers.parallel.token_partition import RankRange, gather_evenly, pad_rows, partition_evenly

EMBEDDER = f"{PATCH}-1"


class SharedKeys(NamedTuple):
    """Stands in place of an attention mask: keys are on all ranks, and the first ``valid`` of them count."""

    valid: int


class _Sequence(NamedTuple):
    """A stretch of one sequence: features (rows, tokens, hidden), and what rotates them."""

    features: torch.Tensor
    rotation: torch.Tensor

    def padded(self, tokens: int) -> _Sequence:
        return _Sequence(pad_rows(self.features, tokens, dim=1), pad_rows(self.rotation, tokens, dim=1))


class SplitAttnProcessor(ZSingleStreamAttnProcessor):
    """The class's attention, or, where its mask is :class:`SharedKeys`, attention over the tokens of all ranks."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | SharedKeys | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> Any:
        if not isinstance(attention_mask, SharedKeys):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        assert freqs_cis is not None
        query, key, value = (
            part(hidden_states).unflatten(-1, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = _rotate(attn.norm_q(query), freqs_cis), _rotate(attn.norm_k(key), freqs_cis)
        attended = attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            valid=attention_mask.valid,
            layer=attn,
        )
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2, 3).to(query.dtype)))


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels as the class does: in float32, as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(3).type_as(x)


class SequenceParallelZImage(ZImageTransformer2DModel):
    """Z-Image with a forward for ranks that share a sequence, :meth:`forward_shared`, beside the class's own."""

    _variant = "class"

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.attention.set_processor(SplitAttnProcessor())

    def follow(self, variant: str) -> None:
        """Compute as ``variant`` says from now on; it costs a comparison where nothing changes."""
        if variant == self._variant:
            return
        self._variant = variant
        epsilon = torch.finfo(torch.float32).eps if variant == COMFYUI else NORM_EPSILON
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.attention.norm_q.eps = block.attention.norm_k.eps = epsilon

    def forward_shared(
        self, x: Sequence[torch.Tensor], t: torch.Tensor, cap_feats: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Do what the class's forward does, together with the other ranks of the sequence; each returns all rows.

        Rows of equal lengths run as one batch, in an order that is the same on every rank.
        """
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, (image, text) in enumerate(zip(x, cap_feats, strict=True)):
            lengths = (*image.shape, padded(len(text)))
            alike[lengths].append(row)
        results: dict[int, torch.Tensor] = {}
        for rows in alike.values():
            # Not by a list of indices: the host would wait to copy it to a GPU.
            times = t if len(rows) == len(x) else torch.stack([t[row] for row in rows])
            done = self._forward_alike([x[row] for row in rows], times, [cap_feats[row] for row in rows])
            results.update(zip(rows, done, strict=True))
        return [results[row] for row in range(len(x))]

    def _forward_alike(
        self, x: list[torch.Tensor], t: torch.Tensor, cap_feats: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        time = self.t_embedder(t * self.t_scale).type_as(x[0])
        images, texts, sizes, image_ids, text_ids, image_fills, text_fills = self.patchify_and_embed(
            x, cap_feats, PATCH, 1
        )
        own_image, own_text = self._own(len(images[0])), self._own(len(texts[0]))

        image = self._embed(
            self.all_x_embedder[EMBEDDER],
            self.x_pad_token,
            *([each[own_image.tokens] for each in parts] for parts in (images, image_ids, image_fills)),
        )
        image = self._refine_image(image.padded(own_image.padding), len(images[0]), time, own_image)
        text = self._embed(self.cap_embedder, self.cap_pad_token, texts, text_ids, text_fills)
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
        whole = gather_evenly(pad_rows(features, own_image.padding, dim=1), len(images[0]))
        return cast(list[torch.Tensor], self.unpatchify(list(whole.unbind()), sizes, PATCH, 1))

    def _own(self, tokens: int) -> RankRange:
        return partition_evenly(tokens, get_sequence_parallel_world_size())[get_sequence_parallel_rank()]

    def _embed(
        self,
        embedder: torch.nn.Module,
        pad_token: torch.Tensor,
        features: list[torch.Tensor],
        positions: list[torch.Tensor],
        fills: list[torch.Tensor],
    ) -> _Sequence:
        """Embed equally many tokens of each row; where ``fills`` is true, put the learned padding in their place."""
        rows = len(features)
        embedded = torch.where(torch.cat(fills).unsqueeze(-1), pad_token, embedder(torch.cat(features)))
        # The class counts positions of a text's padding twice, and cuts them off.
        rotation = self.rope_embedder(
            torch.cat([ids[: len(each)] for ids, each in zip(positions, features, strict=True)])
        )
        return _Sequence(embedded.unflatten(0, (rows, -1)), rotation.unflatten(0, (rows, -1)))

    def _refine_image(self, image: _Sequence, tokens: int, time: torch.Tensor, own: RankRange) -> _Sequence:
        features = image.features
        for block in self.noise_refiner:
            features = block(features, SharedKeys(tokens), image.rotation, time)
        return _Sequence(features[:, : own.count], image.rotation[:, : own.count])
