"""The FLUX.1 transformer for xDiT's Ulysses and for rings, exact for every number of tokens.

xfuser 0.7's own wrapper is right only when text and image tokens both divide by the degree; otherwise it calls
a helper by a name that does not exist (image), or lets every rank count the whole text in attention (2e-3 off, in
silence). Here uneven counts are dealt out so that the *totals* of all ranks are equal, which is all that the
all-to-all needs: the streams are worked per token, and attention runs over all tokens of all ranks. If even the
total does not divide, the last rank's image stream is padded at its end. That is the very end of the gathered
sequence, where keys and values are trimmed before attention, so that no token attends to padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxTransformer2DModel
from xfuser.core.distributed import get_sequence_parallel_rank, get_sequence_parallel_world_size
from xfuser.model_executor.models.transformers.transformer_flux import (
    xFuserFlux1Transformer2DWrapper,
    xFuserFluxAttnProcessor,
)

from xditd.gpu_workers.families.flux1.cached_blocks import CachedBlocks
from xditd.gpu_workers.families.flux1.timesteps import scaled_time, time_dtype
from xditd.gpu_workers.models.checkpoint_order import CheckpointOrderNorm
from xditd.gpu_workers.models.operations import CallOptions
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.gpu_workers.parallel.sequence_attention import attend
from xditd.gpu_workers.parallel.token_partition import gather, pad_rows, partition_tokens

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux1.fused import FusedFlux1
    from xditd.gpu_workers.families.flux1.modulations import Times


class TokenCounts(NamedTuple):
    """How many tokens one rank works on in a forward: what decides how its sums are split."""

    text: int
    image: int

    def __str__(self) -> str:
        return f"{self.text} text + {self.image} image"


class TrimmingFluxAttnProcessor(xFuserFluxAttnProcessor):
    """xfuser's attention, with keys and values behind ``valid_kv_len`` of the gathered sequence dropped.

    The operations are those of its base class, which has no argument for that length; a ring is ours, since xfuser's
    takes no parts of unequal lengths.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        valid_kv_len: int | None = None,
    ) -> Any:
        query, key, value = (
            part(hidden_states).unflatten(-1, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            text_query, text_key, text_value = (
                part(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
                for part in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        heads = (part.transpose(1, 2) for part in (query, key, value))
        out = attend(*heads, valid=valid_kv_len, layer=attn)
        out = out.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        # Contiguous as in diffusers, for the same bits with a batch; for a single sample it copies nothing.
        image_out = attn.to_out[1](attn.to_out[0](out[:, text:].contiguous()))
        return image_out, attn.to_add_out(out[:, :text].contiguous())


class SequenceParallelFlux1(xFuserFlux1Transformer2DWrapper):
    """FLUX.1 whose forward takes and returns whole rows on every rank, and works on this rank's tokens of them.

    ``fused``, where it is set and plugged, does the same faster. Its check compares it with the plain forward for
    each number of tokens, once.
    """

    fused: FusedFlux1 | None = None

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.norm_out = CheckpointOrderNorm(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.attn.processor = TrimmingFluxAttnProcessor()

    def forward_rows(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        times: Times | None = None,
        options: CallOptions,
        **others: Any,
    ) -> torch.Tensor:
        """Predict for rows that this rank's half works on; whole on each of its ranks, in the weights' dtype.

        Arguments are those of diffusers' class. With ``times`` the host knows when this forward is, and others are.
        """
        cache = options.step_cache

        def plain(cache: StepCache | None) -> torch.Tensor:
            with self._with_step_cache(cache):
                return cast(torch.Tensor, self._plain(hidden_states, encoder_hidden_states, options.variant, **others))

        fused = self.fused
        if fused is None or not fused.is_loaded or fused.check.is_refused:
            return plain(cache)
        case = TokenCounts(encoder_hidden_states.shape[1], hidden_states.shape[1])
        sample = fused.check.run(
            case,
            lambda: fused(hidden_states, encoder_hidden_states, times=times, options=options, **others),
            lambda: plain(None),
        )
        if fused.check.is_refused and cache is not None:
            cache.forget()  # what wrong blocks did is not used
        return sample

    @contextmanager
    def _with_step_cache(self, cache: StepCache | None) -> Iterator[None]:
        """Run the unmodified blocks with the step cache active; without one, as they are."""
        if cache is None:
            yield
            return
        module = cast(Any, self)
        double, single = module.transformer_blocks, module.single_transformer_blocks
        module.transformer_blocks = torch.nn.ModuleList([CachedBlocks(double, single, cache)])
        module.single_transformer_blocks = torch.nn.ModuleList()
        try:
            yield
        finally:
            module.transformer_blocks, module.single_transformer_blocks = double, single

    def _plain(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        variant: str,
        *,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        **others: Any,
    ) -> Any:
        text, image = encoder_hidden_states.shape[1], hidden_states.shape[1]
        shares = partition_tokens(text, image, get_sequence_parallel_world_size())
        own = shares[get_sequence_parallel_rank()]
        valid = {"valid_kv_len": text + image} if shares[-1].padding else {}
        with self._embedding(timestep, hidden_states.dtype, variant):
            sample = FluxTransformer2DModel.forward(
                self,
                pad_rows(hidden_states[:, own.image], own.padding, dim=1),
                encoder_hidden_states[:, own.text],
                timestep=timestep,
                img_ids=pad_rows(img_ids[own.image], own.padding, dim=0),
                txt_ids=txt_ids[own.text],
                joint_attention_kwargs=valid,
                return_dict=False,
                **others,
            )[0]
        return gather(sample, shares)

    @contextmanager
    def _embedding(self, timestep: torch.Tensor, dtype: torch.dtype, variant: str) -> Iterator[None]:
        """Keep diffusers' forward, which has no switch for it, from rounding the timestep if the variant does not."""
        if time_dtype(dtype, variant) == dtype:
            yield
            return
        scaled = scaled_time(timestep, dtype, variant)

        def replace_time(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (scaled, *given[1:])

        hook = self.time_text_embed.register_forward_pre_hook(replace_time)
        try:
            yield
        finally:
            hook.remove()
