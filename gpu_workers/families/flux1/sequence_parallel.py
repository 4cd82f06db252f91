"""The FLUX.1 transformer with xDiT's Ulysses and with ring attention, exact for every number of tokens.

xfuser 0.7's own wrapper is correct only if the degree divides both text and image tokens: otherwise it calls a helper
that does not exist (image), or counts the whole text on every rank (text; an error of 2e-3 without a message). Here
each rank gets the same *total* of text and image tokens, which is all that the all-to-all needs. If the degree does not
divide the total, the last rank's image tokens are padded: they are the end of the gathered sequence, where keys and
values are trimmed before attention, so that no token attends to padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxTransformer2DModel
from xfuser.core.distributed import get_sequence_parallel_rank, get_sequence_parallel_world_size

from xditd.gpu_workers.families.flux1.cached_blocks import CachedBlocks
from xditd.gpu_workers.families.flux1.control_residuals import has_residuals, own_residuals
from xditd.gpu_workers.families.flux1.timesteps import norm_epsilon, scaled_time, time_dtype
from xditd.gpu_workers.models.checkpoint_order import CheckpointOrderNorm
from xditd.gpu_workers.models.operations import CallOptions
from xditd.gpu_workers.models.query_key_norms import QueryKeyNorms
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.gpu_workers.packed.shared_inputs import project_all
from xditd.gpu_workers.parallel.sequence_attention import attend
from xditd.gpu_workers.parallel.token_partition import gather, pad_end, partition_tokens

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux1.fused import FusedFlux1
    from xditd.gpu_workers.families.flux1.modulations import Times


class TokenCounts(NamedTuple):
    """The token counts of a forward: the case of the fast path check."""

    text: int
    image: int

    def __str__(self) -> str:
        return f"{self.text} text + {self.image} image"


class TrimmingFluxAttnProcessor(FluxAttnProcessor):
    """diffusers' attention by xfuser's Ulysses, without keys and values after ``valid_kv_len``.

    That counts tokens of the gathered sequence. The ring is our own, since xfuser's takes only parts of equal length.
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
            part.unflatten(-1, (attn.heads, -1))
            for part in project_all((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            text_query, text_key, text_value = (
                part.unflatten(-1, (attn.heads, -1))
                for part in project_all((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), encoder_hidden_states)
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
        # Contiguous as in diffusers, for the same bits with a batch; a single sample is not copied.
        image_out = attn.to_out[1](attn.to_out[0](out[:, text:].contiguous()))
        return image_out, attn.to_add_out(out[:, :text].contiguous())


class SequenceParallelFlux1(FluxTransformer2DModel):
    """FLUX.1 whose forward takes and returns whole rows on every rank, and computes this rank's tokens.

    ``fused``, if set and plugged, computes the same faster; its check compares it once for each number of tokens.
    """

    fused: FusedFlux1 | None = None

    def __init__(self, *, is_original: bool = True, **config: Any) -> None:
        super().__init__(**config)
        if is_original:
            self.norm_out = CheckpointOrderNorm(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.attn.processor = TrimmingFluxAttnProcessor()
        self._norms = QueryKeyNorms(self)

    def forward_rows(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        times: Times | None = None,
        options: CallOptions,
        **others: Any,
    ) -> torch.Tensor:
        """Predict the rows of this rank's half; each rank returns them whole, in the weights' dtype.

        Arguments are those of diffusers' class. ``times`` are the sigmas of this and later forwards, if known.
        """
        cache = options.step_cache

        def plain(cache: StepCache | None) -> torch.Tensor:
            with self._with_step_cache(cache):
                return cast(
                    torch.Tensor, self._forward_plain(hidden_states, encoder_hidden_states, options.variant, **others)
                )

        fused = self.fused
        if fused is None or not fused.is_loaded or (options.loras and not fused.takes_loras):
            return plain(cache)
        is_controlled = has_residuals(others)
        check = fused.control_check if is_controlled else fused.lora_check if options.loras else fused.check
        if check.is_refused:
            return plain(cache)
        case = TokenCounts(encoder_hidden_states.shape[1], hidden_states.shape[1])
        sample = check.run(
            case,
            lambda: fused(hidden_states, encoder_hidden_states, times=times, options=options, **others),
            lambda: plain(None),
        )
        if check.is_refused and cache is not None:
            cache.forget()  # drop residuals of the refused blocks
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

    def _forward_plain(
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
        self._norms.use(norm_epsilon(variant))
        with self._unrounded_timestep(timestep, hidden_states.dtype, variant):
            sample = FluxTransformer2DModel.forward(
                self,
                pad_end(hidden_states[:, own.image], own.padding, dim=1),
                encoder_hidden_states[:, own.text],
                timestep=timestep,
                img_ids=pad_end(img_ids[own.image], own.padding, dim=0),
                txt_ids=txt_ids[own.text],
                joint_attention_kwargs=valid,
                return_dict=False,
                **{**others, **own_residuals(others, own)},
            )[0]
        return gather(sample, shares)

    @contextmanager
    def _unrounded_timestep(self, timestep: torch.Tensor, dtype: torch.dtype, variant: str) -> Iterator[None]:
        """Keep diffusers' forward from rounding the timestep, if the variant does not round it."""
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
