"""Fused FLUX.1 blocks on the checkpoint's own tensors (``qkv``, ``linear1``), with one kernel between two products.

They compute the same as ``sequence_parallel.SequenceParallelFlux1``, whose embedders and last norm they use, and with
which ``FastPathCheck`` compares them. Matrix products are in the checkpoint's dtype or in eight bits (``products``), or
of packed weights, dequantised one at a time (``packed.products``).
If several ranks share the tokens, queries, keys and values go directly to the rank of their head (``exchange``).

A step of 1024x1024 pixels takes about 500 launches instead of 5,000, so the host stays ahead of the GPU without CUDA
graphs. Nothing is compiled for a size or for another checkpoint of the same architecture.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from xfuser.core.distributed import get_sp_group

from xditd.gpu_workers.families.flux1.block_weights import (
    Blocks,
    bind_blocks,
    modulation_names,
    norms_of,
    product_shapes,
)
from xditd.gpu_workers.families.flux1.checked_products import CheckedProducts, label_of
from xditd.gpu_workers.families.flux1.control_residuals import ControlledBlocks, by_block
from xditd.gpu_workers.families.flux1.facts import WARM_UP_SIZES
from xditd.gpu_workers.families.flux1.fused_loras import ActiveLoras, FusedLoras, key_of
from xditd.gpu_workers.families.flux1.modulations import Matrices, Modulator, Times
from xditd.gpu_workers.families.flux1.rotations import Angles, Rotations
from xditd.gpu_workers.families.flux1.timesteps import norm_epsilon
from xditd.gpu_workers.kernels import branch_kernels, triton_kernels
from xditd.gpu_workers.kernels.branched_products import with_branches
from xditd.gpu_workers.kernels.branches import Branch, Branches
from xditd.gpu_workers.kernels.products import EIGHT, EightBit, Products, SixteenBit, TensorRows
from xditd.gpu_workers.models.fast_path_check import FastPathCheck
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.operations import CallOptions
from xditd.gpu_workers.models.step_cache import ImageCache
from xditd.gpu_workers.packed.linear import packed_layers, weight_of
from xditd.gpu_workers.packed.products import (
    Dequantiser,
    Float8Products,
    PackedMatrices,
    PackedWeightProducts,
    Weights,
)
from xditd.gpu_workers.parallel import attention
from xditd.gpu_workers.parallel.exchange import Exchange
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.gpu_workers.parallel.token_partition import gather, pad_end, partition_tokens
from xditd.ipc.status import FusedCheck

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux1.config import Flux1Config

logger = logging.getLogger(__name__)

PLAIN_CALL = CallOptions()


class FusedFlux1:
    """The fused forward of one model. The model calls ``plug`` and ``unplug``; callers compare results by ``check``."""

    def __init__(
        self, config: Flux1Config, module: Any, layout: ParallelLayout, attention_backend: str, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._module = module
        self._layout = layout
        self._dtype = dtype
        packed = packed_layers(module)
        self._dequantiser = Dequantiser(packed[0].memory, dtype) if packed else None
        self._float8: CheckedProducts | None = None
        products: Products[Any, Any]
        if self._dequantiser is not None:
            largest = 6 * config.hidden**2  # those of modulations
            products = PackedWeightProducts(self._dequantiser, largest)
            self._float8 = CheckedProducts.of(Float8Products(self._dequantiser, largest), module)
        elif layout.precision == EIGHT:
            products = EightBit(product_shapes(config), layout.device)
        else:
            products = SixteenBit()
        self._usual = self._current = CheckedProducts.of(products, module)
        self.warm_up_sizes = {} if layout.precision == EIGHT else WARM_UP_SIZES  # eight bits need a copy of all weights
        self._attend_with = attention.function(attention_backend)
        self._exchange = Exchange(layout, get_sp_group().cpu_group) if layout.degrees.sequence > 1 else None
        self._checkpoint: Weights = {}
        self._blocks: Blocks | None = None
        self._loras: tuple[tuple[int, float], ...] = ()
        self._rotations = Rotations(module.pos_embed)
        self._modulator = Modulator(module.time_text_embed, config.hidden)
        self.paths = ForwardPaths(
            module,
            label_of(products),
            layout.device,
            layout.acceleration,
            is_leader=layout.rank == 0,
            among=RankSet.SEQUENCE,
            counts=packed[0].memory.counts if packed else None,
        )
        self.loras = FusedLoras(config, self.paths)

    @property
    def is_loaded(self) -> bool:
        return bool(self._checkpoint)

    @property
    def check(self) -> FastPathCheck:
        """The check of the products that the plugged weights have."""
        return self._current.check

    @property
    def lora_check(self) -> FastPathCheck:
        """The same for forwards with LoRAs."""
        return self._current.lora_check

    @property
    def control_check(self) -> FastPathCheck:
        """The same for forwards with residuals of ControlNets."""
        return self._current.control_check

    @property
    def _products(self) -> Products[Any, Any]:
        return self._current.products

    @property
    def takes_loras(self) -> bool:
        """Whether the products that the plugged weights have take branches: not those with rows in eight bits."""
        return isinstance(self._products, TensorRows)

    def branch_slots(self, by_layer: Mapping[str, Sequence[Branch]]) -> list[tuple[Branches, tuple[Branch, ...]]]:
        """Return the places of a LoRA's branches in fused blocks, from those of the module's layers."""
        if self.takes_loras:
            branch_kernels.prepare(self._dtype, self._layout.device)
        return self.loras.slots(by_layer)

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Return the fast path checks since the last call."""
        return tuple(each for known in self._all_products for check in known[1:] for each in check.take_checks())

    @property
    def _all_products(self) -> list[CheckedProducts]:
        return [each for each in (self._usual, self._float8) if each is not None]

    def reserve(self) -> int:
        """Allocate the memory that :meth:`plug` will fill; return its bytes.

        Raises:
            torch.OutOfMemoryError: the GPU has too little memory.
        """
        return self._products.reserve()

    def plug(self, checkpoint: Weights) -> None:
        """Use these tensors, by canonical name, until :meth:`unplug` or the next plug.

        Kernels read addresses, so with tensors that are not contiguous plain modules run instead.
        """
        apart = [name for name, tensor in checkpoint.items() if not tensor.is_contiguous()]
        if apart:
            logger.info("fused blocks are idle: %d tensors are not contiguous, first=%s", len(apart), apart[0])
        self._checkpoint = {} if apart else checkpoint
        self._blocks = None
        self.loras.unbind()
        if self._checkpoint:
            self._current = self._products_for(self._checkpoint)
            self._products.load(self._checkpoint)
        for each in self._all_products:
            if each is not self._current or apart:
                each.products.release()

    def unplug(self) -> None:
        """Drop all references to lent memory, and free the reserved buffers."""
        self._checkpoint = {}
        self._blocks = None
        self.loras.unbind()
        self.loras.clear()
        for each in self._all_products:
            each.products.release()
        self._modulator.unplug()

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        times: Times | None = None,
        options: CallOptions = PLAIN_CALL,
        controlnet_block_samples: Sequence[torch.Tensor] = (),
        controlnet_single_block_samples: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Predict the velocity: arguments and result are those of diffusers' ``FluxTransformer2DModel``.

        With ``times``, modulations of later timesteps are computed ahead. The variant of ``options`` says how the
        timestep is rounded, and the epsilon of the norms.
        """
        if self._blocks is None:
            self._bind()
        loras = self.loras.use(options)
        if options.loras != self._loras:
            self._modulator.forget()  # what it has cached is of other LoRAs
            self._loras = options.loras
        shares = partition_tokens(encoder_hidden_states.shape[1], hidden_states.shape[1], self._layout.degrees.sequence)
        own = shares[self._layout.sequence_rank]
        modulations = self._modulator(
            timestep, guidance, pooled_projections, hidden_states.dtype, options.variant, times
        )
        angles = self._rotations(txt_ids, img_ids, own)
        step_cache = options.step_cache
        valid = encoder_hidden_states.shape[1] + hidden_states.shape[1]
        config, epsilon = self._config, norm_epsilon(options.variant)
        added, controlled = by_block(
            (controlnet_block_samples, controlnet_single_block_samples),
            (config.double_blocks, config.single_blocks),
            own,
        )
        done = []
        for number in range(hidden_states.shape[0]):
            given: dict[str, Any] = {
                "text": encoder_hidden_states[number, own.text],
                "image": pad_end(hidden_states[number, own.image], own.padding, dim=0),
                "doubles": modulations.double[number],
                "singles": modulations.single[number],
                "angles": angles,
            }
            if added:
                given["residuals"] = tuple(each[number] for each in added)
            if loras is not None:  # embedders have branches of their own, which no graph has
                given["text"], given["image"] = self._embedded(given["text"], given["image"])
            sample, launched = partial(self._sample, valid, epsilon, loras, controlled), self.paths.launched
            if step_cache is not None:  # the host decides within the forward
                done.append(sample(given, ImageCache(step_cache, number)))
            elif loras is not None and loras.layout is None:  # the host has their strengths
                done.append(sample(given))
            else:
                capacity = None if self._exchange is None else self._exchange.capacity
                key = key_of(("blocks", valid, capacity, epsilon, *controlled), loras)
                note = "" if loras is None else loras.title
                done.append(self.paths.run(key, given, sample, sample, on_all_ranks=True, note=note))
            self.loras.count(loras, self.paths.launched - launched)
        module = self._module
        return gather(module.proj_out(module.norm_out(torch.stack(done), modulations.conditioning)), shares)

    def _products_for(self, checkpoint: Weights) -> CheckedProducts:
        """Return the products of these weights: the quickest that all of them have."""
        weights = [checkpoint[f"{name}.weight"] for name in product_shapes(self._config)]
        return self._float8 if self._float8 is not None and Float8Products.fits(weights, self._dtype) else self._usual

    def _embedded(self, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._module.context_embedder(text), self._module.x_embedder(image)

    def _joined(self, text: torch.Tensor, image: torch.Tensor, *, are_embedded: bool) -> torch.Tensor:
        """Return the embedded tokens of text and image in one tensor, (rows, hidden)."""
        module, at = self._module, text.shape[0]
        x = torch.empty(at + image.shape[0], self._config.hidden, dtype=text.dtype, device=text.device)
        for embedder, tokens, out in ((module.context_embedder, text, x[:at]), (module.x_embedder, image, x[at:])):
            if are_embedded:
                out.copy_(tokens)
            elif embedder.weight.dtype == embedder.bias.dtype == x.dtype:
                torch.addmm(embedder.bias, tokens, weight_of(embedder).t(), out=out)
            else:
                out.copy_(embedder(tokens))
        return x

    def _sample(
        self,
        valid: int,
        epsilon: float,
        loras: ActiveLoras | None,
        controlled: ControlledBlocks,
        given: Mapping[str, Any],
        cache: ImageCache | None = None,
    ) -> torch.Tensor:
        """Run all blocks on one sample's tokens of this rank; return its image tokens, (rows, hidden).

        With ``loras`` the tokens are embedded already.
        """
        text, image, doubles, singles, angles = (
            given[name] for name in ("text", "image", "doubles", "singles", "angles")
        )
        residuals: Sequence[torch.Tensor] = given.get("residuals", ())
        products: Products[Any, Any]
        products, blocks = (self._products, self._blocks) if loras is None else self.loras.blocks(loras)
        assert blocks is not None
        double, single = blocks.double, blocks.single
        width, at = self._config.hidden, text.shape[0]
        x = self._joined(text, image, are_embedded=loras is not None)
        starts = [(modulation, 0) for modulation in (*doubles, *singles)]
        firsts = [*((first.qkv, second.qkv) for first, second in double), *((each.qkv, each.qkv) for each in single)]
        normed = products.modulate(x, firsts[0], text_rows=at, shift=starts[0])
        qkv = torch.empty(x.shape[0], 3 * width, dtype=x.dtype, device=x.device)
        y = torch.empty_like(x)
        y_halves = (y[:at], y[at:])
        if cache is not None:
            cache.begin(x[at:])
        for number, streams in enumerate(double):
            modulation = doubles[number]
            for stream, half, out in zip(streams, products.halves(normed, at), (qkv[:at], qkv[at:]), strict=True):
                products.multiply(half, stream.qkv, out)
            norms = tuple(norm for stream in streams for norm in (stream.query_norm, stream.key_norm))
            outs, ups = ((streams[0].out, streams[1].out), (streams[0].up, streams[1].up))
            attended = products.take(self._attend(qkv, norms, epsilon, angles, at, valid), outs, at)
            for stream, half, out in zip(streams, products.halves(attended, at), y_halves, strict=True):
                products.multiply(half, stream.out, out)
            normed = products.modulate(
                x, ups, text_rows=at, added=y, gate=(modulation, 2 * width), shift=(modulation, 3 * width)
            )
            for stream, half, out in zip(streams, products.halves(normed, at), y_halves, strict=True):
                products.mlp(half, stream.up, stream.down, out)
            if controlled.double:
                x[at:] += residuals[controlled.double[number]]  # before the next kernel, which adds y and norms
            gate, following = (modulation, 5 * width), number + 1
            normed = products.modulate(x, firsts[following], text_rows=at, added=y, gate=gate, shift=starts[following])
            if number == 0 and cache is not None and cache.try_reuse(x[at:]):
                return x[at:]
        for number, block in enumerate(single):
            products.multiply(normed, block.qkv, qkv)
            attended = self._attend(qkv, (block.query_norm, block.key_norm) * 2, epsilon, angles, at, valid)
            products.mlp_and_attention(attended, normed, block.up, block.second, y)
            if controlled.single:
                x[at:] += residuals[controlled.single[number]]
            gate, following = (singles[number], 2 * width), len(double) + number + 1
            if following < len(starts):
                normed = products.modulate(
                    x, firsts[following], text_rows=at, added=y, gate=gate, shift=starts[following]
                )
            else:
                triton_kernels.add_and_modulate(x, text_rows=at, added=y, gate=gate)
        if cache is not None:
            cache.end(x[at:])
        return x[at:]

    def _attend(
        self,
        qkv: torch.Tensor,
        norms: tuple[torch.Tensor, ...],
        epsilon: float,
        angles: Angles,
        text_rows: int,
        valid: int,
    ) -> torch.Tensor:
        """Attend from this rank's tokens to the ``valid`` tokens of all ranks; (rows, hidden)."""
        heads, rows, width = self._config.heads, qkv.shape[0], self._config.hidden
        given: dict[str, Any] = {"heads": heads, "norms": norms, "angles": angles, "text_rows": text_rows}
        given["epsilon"] = epsilon
        if self._exchange is None:
            triton_kernels.norm_and_rotate(qkv, **given)
            query, key, value = qkv.view(rows, 3, heads, triton_kernels.HEAD_SIZE).unbind(1)
            return self._dot(query, key, value).reshape(rows, width)
        ranks, rank = self._layout.degrees.sequence, self._layout.sequence_rank
        buffers = self._exchange.reserve(rows, width, qkv.dtype)
        triton_kernels.norm_and_rotate(
            qkv, **given, bases=buffers.heads_bases, first_row=rank * rows, all_rows=ranks * rows
        )
        self._exchange.barrier()
        query, key, value = buffers.heads.view(3, ranks * rows, heads // ranks, triton_kernels.HEAD_SIZE)
        attended = self._dot(query, key[:valid], value[:valid]).reshape(ranks * rows, -1)
        triton_kernels.send_rows(attended, bases=buffers.tokens_bases, rank=rank, rows_a_rank=rows)
        self._exchange.barrier()
        return buffers.tokens

    def _dot(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention on (rows, heads, 128) tensors."""
        wide = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        return self._attend_with(*wide)[0].transpose(0, 1)

    def _bind(self) -> None:
        """Find the weights of all blocks, and of the modulations, in the plugged tensors."""
        checkpoint, config = self._checkpoint, self._config
        self._modulator.plug(
            *(
                with_branches(self._matrices(checkpoint, names), branches)
                for names, branches in zip(modulation_names(config), self.loras.modulations(), strict=True)
            )
        )
        norms = norms_of(checkpoint, self._dtype)
        self._blocks = bind_blocks(config, self._products.linear, norms)
        self.loras.bind(self._products, norms)

    def _matrices(self, checkpoint: Weights, names: list[str]) -> Matrices:
        if self._dequantiser is not None:
            given = [self._dequantiser.projection(checkpoint, name) for name in names]
            return PackedMatrices(self._dequantiser, given)
        parts: list[torch.Tensor] = []
        for part in ("weight", "bias"):
            tensors = [checkpoint[f"{name}.{part}"] for name in names]
            addresses = [each.data_ptr() for each in tensors if isinstance(each, torch.Tensor)]
            parts.append(torch.tensor(addresses, dtype=torch.int64).to(self._layout.device))
        weights, biases = parts
        return lambda vectors, rows: triton_kernels.multiply_vectors(weights, biases, vectors, rows)
