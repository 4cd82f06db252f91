"""Build, check and run a FLUX.1 transformer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from xditd.gpu_workers.families.flux1.class_arguments import check_arguments, rows_of
from xditd.gpu_workers.families.flux1.config import PACKED_CHANNELS, Flux1Config
from xditd.gpu_workers.families.flux1.control_residuals import padded_residuals
from xditd.gpu_workers.families.flux1.controlnet_config import Flux1ControlNetConfig
from xditd.gpu_workers.families.flux1.facts import REFERENCES, facts_of
from xditd.gpu_workers.families.flux1.fused import FusedFlux1
from xditd.gpu_workers.families.flux1.modulations import Times
from xditd.gpu_workers.families.flux1.prompt import Flux1Prompt
from xditd.gpu_workers.families.flux1.recipe import Flux1Recipe
from xditd.gpu_workers.families.flux1.sequence_parallel import SequenceParallelFlux1
from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults
from xditd.gpu_workers.packed.linear import packed_layers
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.token_partition import partition_tokens
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import TransformerFacts

logger = logging.getLogger(__name__)


class Flux1Operations:
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    recipe = Flux1Recipe()
    prompt = Flux1Prompt()

    def build(self, config: Flux1Config) -> torch.nn.Module:
        return SequenceParallelFlux1(
            is_original=config.is_original,
            in_channels=config.in_channels,
            out_channels=PACKED_CHANNELS,
            **config.class_arguments,
        )

    def fuse(
        self,
        config: Flux1Config,
        module: torch.nn.Module,
        layout: ParallelLayout,
        dtype: torch.dtype,
        exceptions: Mapping[str, torch.dtype],
    ) -> FusedFlux1 | None:
        is_cuda = layout.device.type == "cuda"
        if layout.precision != "bf16" and packed_layers(module):
            raise Unsupported(
                f"flux1: precision {layout.precision!r} takes bfloat16 weights, and these are packed; lend them as "
                "bfloat16, or start the daemon with precision bf16"
            )
        if layout.precision != "bf16" and is_cuda and (dtype != torch.bfloat16 or exceptions):
            found = sorted({str(each).removeprefix("torch.") for each in (dtype, *exceptions.values())})
            raise Unsupported(
                f"flux1: precision {layout.precision!r} takes bfloat16 weights, and these are {' and '.join(found)}; "
                "lend them as bfloat16, or start the daemon with precision bf16",
                names=[f"{target} is {each}" for target, each in exceptions.items()],
            )
        if not config.is_original:
            _run_plain_in_parts(layout)
            return None
        if layout.fused_attention is None or (is_cuda and dtype == torch.float32):
            return None
        if layout.degrees.ring > 1:
            _run_plain_in_ring(config.heads, layout)
            return None
        packed = packed_layers(module)
        if packed and packed[0].weight.dtype != dtype:
            logger.info("plain blocks run: packed weights are dequantised into another dtype main=%s", dtype)
            return None
        if (
            exceptions and not packed
        ):  # kernels read all weights of a block in one dtype; beside packed ones they are cast
            logger.info(
                "plain blocks run: weights have several dtypes main=%s others=%d first=%s",
                dtype, len(exceptions), next(iter(exceptions)),
            )  # fmt: skip
            return None
        fused = FusedFlux1(config, module, layout, layout.fused_attention, dtype)
        cast(Any, module).fused = fused
        return fused

    def facts(self, config: Flux1Config, layout: ParallelLayout) -> TransformerFacts:
        return facts_of(config, layout)

    def check(self, model: Model[Flux1Config], inputs: Inputs) -> None:
        _, text_tokens, image_tokens = check_arguments(model, inputs, model.config.in_channels)
        partition_tokens(text_tokens, image_tokens, model.layout.degrees.sequence)

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        rows, tokens, _ = inputs.arguments["hidden_states"].shape
        return ((tokens, PACKED_CHANNELS),) * rows

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        return rows_of(inputs, rows)

    def run(self, model: Model[Flux1Config], inputs: Inputs, options: CallOptions) -> RowResults:
        arguments = dict(inputs.arguments)
        if not model.config.has_guidance:
            arguments.pop("guidance", None)  # the class does not read it
        module = cast(SequenceParallelFlux1, model.module)
        return module.forward_rows(**arguments, times=_times(inputs, options), options=options)

    def check_control(
        self, config: Flux1Config, control: Flux1ControlNetConfig, *, generates: bool, names: Sequence[str]
    ) -> None:
        if control.hidden != config.hidden:
            raise BadRequest(
                f"the ControlNet's residuals have {control.hidden} channels, the transformer's blocks {config.hidden}; "
                "lend a ControlNet of this model"
            )
        if not generates:
            return
        if config.in_channels != PACKED_CHANNELS:
            raise Unsupported(
                f"flux1: a transformer of {config.in_channels} input channels (Fill, Canny, Depth) with ControlNets is "
                "in no pipeline of diffusers; lend FLUX.1 dev"
            )
        if REFERENCES in names:
            raise Unsupported(
                f"flux1: {REFERENCES} with ControlNets are in no pipeline of diffusers; leave one of them out"
            )

    def with_residuals(self, inputs: Inputs, residuals: Mapping[str, Sequence[torch.Tensor]]) -> Inputs:
        rows, tokens, _ = inputs.arguments["hidden_states"].shape
        given = {name: padded_residuals(name, each, rows, tokens) for name, each in residuals.items() if each}
        return replace(inputs, arguments={**inputs.arguments, **given})

    def tree(self, rows: RowResults) -> tuple[torch.Tensor]:
        return (rows if isinstance(rows, torch.Tensor) else torch.stack(rows),)


def _times(inputs: Inputs, options: CallOptions) -> Times | None:
    """Return the sigmas of this and later forwards, if the client gave them and all rows have the same."""
    foreseen = options.foreseen.get("timestep")
    moments = set(inputs.known.get("timestep", ()))
    scales = set(inputs.known.get("guidance", ()))
    if not foreseen or len(moments) != 1 or len(scales) > 1:
        return None
    if inputs.arguments.get("guidance") is not None and not scales:
        return None
    # Rounded as the timestep is, so that equal sigmas compare equal.
    rounded = torch.tensor(foreseen, dtype=inputs.arguments["timestep"].dtype).tolist()
    return Times(moments.pop(), scales.pop() if scales else None, tuple(rounded))


def _run_plain_in_parts(layout: ParallelLayout) -> None:
    """Log that plain blocks run, since the matrices that fused ones read are in several tensors.

    Raises:
        Unsupported: the settings ask for fused blocks, or for products in eight bits.
    """
    if layout.precision != "bf16" or layout.requested_kernels == "fused":
        asked = "kernels 'fused'" if layout.precision == "bf16" else f"precision {layout.precision!r}"
        raise Unsupported(
            f"flux1: {asked} with a file in diffusers' naming, in which query, key and value are tensors of their own: "
            "lend the original file (flux1-dev.safetensors), or start the daemon without it"
        )
    logger.info("plain blocks run: query, key and value are tensors of their own")


def _run_plain_in_ring(heads: int, layout: ParallelLayout) -> None:
    """Log that plain blocks run, since fused ones have no ring attention.

    Raises:
        Unsupported: the settings ask for fused blocks, or for products in eight bits.
    """
    degrees = layout.degrees
    is_lossless = layout.precision == "bf16"
    if not is_lossless or layout.requested_kernels == "fused":
        asked = "kernels 'fused'" if is_lossless else f"precision {layout.precision!r}"
        instead = "kernels auto" if is_lossless else "precision bf16"
        raise Unsupported(
            f"flux1: {asked} with {heads} attention heads on {degrees.world_size} workers, which need the layout "
            f"{degrees}: fused kernels have no ring attention; start the daemon with {instead}, or with --workers "
            f"{degrees.cfg * degrees.ulysses}"
        )
    logger.info("plain blocks run: fused ones have no ring attention heads=%d layout=%s", heads, degrees)
