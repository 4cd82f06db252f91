"""Train a LoRA for ``shapes`` that draws outlines in place of filled forms, and judge it at several strengths.

    PYTHONPATH=tools:.pkg python -m shapes.lora models/shapes out/outlines.safetensors --seconds 90

The file has the names of diffusers (``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``), so that
``load_lora_weights`` and ``lend_lora`` read it. After Ctrl-C or SIGTERM, training ends, and what it has learned
is written and judged.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from shapes.arguments import output_file, whole
from shapes.budget import Budget, Interrupt
from shapes.draw import OUTLINE
from shapes.flow_training import STRONGEST_GUIDANCE, WEAKEST_GUIDANCE, Flow, add_noise, weighted_loss
from shapes.graphs import GraphedStep, adamw, set_rate
from shapes.judge import held_out_requests
from shapes.judged_lora import SENTENCES, judge_strengths, write_report
from shapes.models import build_parts, build_pipeline, load_parts
from shapes.pool import Pool, autocast, prepare_gpu
from shapes.samplers import Sampler, pipeline_sampler

RANK: Final = 8
_OBJECT_WEIGHT: Final = 3.0
"""How often patches that objects touch count beyond once: all others are right without factors."""
_LAYERS: Final = re.compile(
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|blocks\.\d+\.proj_out)$"
)


class Lora(torch.nn.Module):
    """Factors of the linear layers of a transformer's blocks; while :meth:`applied`, its layers add their products."""

    def __init__(self, transformer: torch.nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._layers = [
            (name, layer)
            for name, layer in transformer.named_modules()
            if isinstance(layer, torch.nn.Linear) and _LAYERS.search(name)
        ]
        self.down, self.up = torch.nn.ParameterList(), torch.nn.ParameterList()
        for _, layer in self._layers:
            down = torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
            self.down.append(torch.nn.Parameter(down))
            self.up.append(torch.nn.Parameter(torch.zeros(layer.out_features, rank)))

    @contextmanager
    def applied(self, strength: float = 1.0) -> Iterator[None]:
        """Add ``strength`` times the factors' product to each layer."""
        hooks = []
        for (_, layer), down, up in zip(self._layers, self.down, self.up, strict=True):

            def add(
                _: torch.nn.Module,
                given: tuple[torch.Tensor, ...],
                result: torch.Tensor,
                down: torch.Tensor = down,
                up: torch.Tensor = up,
            ) -> torch.Tensor:
                linear = torch.nn.functional.linear
                return result + strength * linear(linear(given[0], down.to(given[0].dtype)), up.to(given[0].dtype))

            hooks.append(layer.register_forward_hook(add))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def save(self, path: Path) -> None:
        """Write the factors in bfloat16; their scale is 1, so there are no alphas."""
        tensors = {}
        for (name, _), down, up in zip(self._layers, self.down, self.up, strict=True):
            for part, factor in (("lora_A", down), ("lora_B", up)):
                tensors[f"transformer.{name}.{part}.weight"] = factor.detach().to("cpu", torch.bfloat16).contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)


class LoraTraining:
    """Trains factors on the pictures of a pool; the model's weights stay as they are.

    Half of the pictures are learned at guidance 1, as FLUX.1's LoRAs are, the others at all those that
    :mod:`shapes.flow_training` distils: what is drawn with guidance has outlines, too.
    """

    def __init__(self, flow: Flow, device: torch.device, *, batch: int, rate: float, seed: int) -> None:
        self._flow, self._device = flow.requires_grad_(False), device
        self._batch, self._rate, self._seed = batch, rate, seed
        self.lora = Lora(flow.transformer, RANK, torch.Generator().manual_seed(seed)).to(device)
        self._optimizer = adamw([{"params": list(self.lora.parameters())}], rate, device, decay=0.0)
        self._update = GraphedStep("lora", self._learn, device)
        self._generator = torch.Generator(device)

    def train(self, pool: Pool, budget: Budget) -> Lora:
        """Train until the budget is used, and return the factors."""
        started, step = time.monotonic(), 0
        while (progress := budget.progress(started, step)) < 1:
            share = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            set_rate(self._optimizer, [self._rate * share])
            if step and step % 4 == 0:
                pool.refresh()
            loss = self._step(pool, step)
            if step % 100 == 0:  # waits for the GPU, so that the clock is right
                print(f"lora: step {step} loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
            step += 1
        print(f"lora: {step} steps, {time.monotonic() - started:.0f} s", flush=True)
        return self.lora

    def _step(self, pool: Pool, step: int) -> torch.Tensor:
        count, device = self._batch, self._device
        generator = self._generator.manual_seed(self._seed * 1_000_003 + step)
        latents, clip, t5, covered = pool.batch(count, generator)
        noisy, sigmas, target = add_noise(latents, generator)
        span = torch.rand(count, generator=generator, device=device)
        guidance = WEAKEST_GUIDANCE + (STRONGEST_GUIDANCE - WEAKEST_GUIDANCE) * (2 * span - 1).clamp(min=0)
        return self._update(noisy, sigmas, guidance, clip, t5, target, 1 + _OBJECT_WEIGHT * covered)

    def _learn(
        self,
        noisy: torch.Tensor,
        sigmas: torch.Tensor,
        guidance: torch.Tensor,
        clip: torch.Tensor,
        t5: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Change the factors once, and return the loss. ``target`` is (batch, 256, 64), ``weights`` (batch, 256)."""
        with autocast(self._device), self.lora.applied():
            velocity = self._flow(noisy, sigmas, guidance, clip, t5)
        loss = weighted_loss(velocity, target, weights)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA for shapes that draws outlines.")
    parser.add_argument("folder", type=Path, help="a pipeline's folder, or one that shapes.train wrote")
    parser.add_argument(
        "out",
        type=output_file(".safetensors"),
        help="a .safetensors file; a .json and a .png of the same name lie beside it",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--steps", type=whole(0), default=0, help="in place of seconds")
    parser.add_argument("--batch", type=whole(1), default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--pool", type=whole(1), default=16_384)
    parser.add_argument("--chunk", type=whole(1), default=256)
    parser.add_argument("--workers", type=whole(0), default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sentences", type=whole(0), default=SENTENCES, help="that are judged at the end; 0: none")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda":
        prepare_gpu()
    parts: dict[str, Any] = build_parts()
    lacking = set(parts) - set(load_parts(given.folder, parts))
    if lacking:
        parser.error(f"{given.folder}: no weights of {', '.join(sorted(lacking))}; train shapes first")
    for part in parts.values():
        part.to(device).eval().requires_grad_(False)
    flow = Flow(parts["transformer"], parts["text_encoder"], parts["text_encoder_2"])
    slots = max(1, given.pool // given.chunk)
    pool = Pool(
        parts["vae"], device, seed=given.seed, slots=slots, size=given.chunk, workers=given.workers, outline=OUTLINE
    )
    interrupt = Interrupt()
    budget = Budget(given.seconds, given.steps, interrupt)
    with interrupt.watched():
        training = LoraTraining(flow, device, batch=given.batch, rate=given.rate, seed=given.seed)
        lora = training.train(pool, budget)
    lora.save(given.out)
    if not given.sentences:
        return
    pipeline = build_pipeline(parts)
    with ExitStack() as applied:

        def at(strength: float) -> Sampler:
            applied.close()
            applied.enter_context(lora.applied(strength))
            return pipeline_sampler(pipeline)

        found, shown = judge_strengths(
            at, held_out_requests(given.sentences), batch=100 if device.type == "cuda" else 8
        )
    write_report(found, shown, json_file=given.out.with_suffix(".json"), sheet=given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
