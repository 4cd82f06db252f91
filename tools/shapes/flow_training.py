"""Train the transformer of ``shapes``: rectified flow, then distilled guidance; its text encoders only on request."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from shapes.budget import Budget
from shapes.explained import Explained
from shapes.graphs import GraphedStep, adamw, set_rate
from shapes.pool import PATCHES, Pool, autocast
from shapes.profiling import Parts, profile
from shapes.text_tokens import tokens
from shapes.text_training import LONG_TEXT

LONG_SHARE: Final = 0.4
"""Of the batch in steps with long sentences: about as many tokens as in the others."""
WEAKEST_GUIDANCE: Final = 1.0
STRONGEST_GUIDANCE: Final = 5.0
GUIDED_FROM: Final = 0.1
GUIDED_FULLY: Final = 0.3
"""Sigmas below the former are not guided, above the latter they are in full: guidance at the end of sampling would only
push colours out of their range (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024)."""
SIGMA_MEAN: Final = 2.0
SIGMA_DEVIATION: Final = 1.5
"""Of the logits of sigmas in training. What words say of places, forms and colours is decided above a sigma of 0.9, as
latents of drawn forms show through weaker noise; two fifths of all sigmas lie there."""
EVEN_SHARE: Final = 0.1
"""Of sigmas that are spread evenly from 0 to 1."""
_PROFILED_AT: Final = 2
_EXPLAINED_EVERY: Final = 1000
_TIMED: Final = range(160, 200)
_SHARD_BYTES: Final = 15_000_000


class Flow(torch.nn.Module):
    """The transformer with its text encoders: from packed latents, sigmas, guidance and tokens to velocities."""

    def __init__(self, transformer: Any, text_encoder: Any, text_encoder_2: Any) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2

    def forward(
        self, latents: torch.Tensor, sigmas: torch.Tensor, guidance: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor
    ) -> torch.Tensor:
        """Return velocities, (batch, 256, 64). ``latents`` are noisy; sigmas and guidance are (batch,)."""
        pooled = self.text_encoder(input_ids=clip).pooler_output
        states = self.text_encoder_2(input_ids=t5).last_hidden_state
        places = torch.arange(PATCHES, device=latents.device, dtype=torch.float32)
        image_ids = torch.zeros(PATCHES, PATCHES, 3, device=latents.device)
        image_ids[..., 1], image_ids[..., 2] = places[:, None], places
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigmas,
            guidance=guidance,
            img_ids=image_ids.flatten(0, 1),
            txt_ids=torch.zeros(t5.shape[1], 3, device=latents.device),
            return_dict=False,
        )[0]


def sample_sigmas(count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Draw the sigmas of a step, (count,) float32 in (0, 1)."""
    logits = torch.randn(count, generator=generator, device=device) * SIGMA_DEVIATION + SIGMA_MEAN
    even = torch.rand(count, generator=generator, device=device)
    is_even = torch.rand(count, generator=generator, device=device) < EVEN_SHARE
    return torch.where(is_even, even, torch.sigmoid(logits))


def add_noise(latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw noise and sigmas for packed latents; return the noisy latents, the sigmas (count,) and the velocities."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    sigmas = sample_sigmas(len(latents), generator, latents.device)
    return torch.lerp(latents, noise, sigmas[:, None, None]), sigmas, noise - latents


def weighted_loss(velocity: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of velocities (count, 256, 64), with patches weighted by (count, 256)."""
    error = (velocity.float() - target).square().mean(-1)
    return (weights * error).mean() / weights.mean()


@dataclass(frozen=True)
class FlowSettings:
    """One phase: rectified flow; with ``is_distilled``, guidance from a teacher that answers with and without words.

    The rate falls from ``rate`` to its share ``final``; with a ``text_rate`` of 0 the text encoders stay as they are.
    Patches that objects cover count ``object_weight`` times in the first half of the budget, and as the others from
    three quarters on: objects are few pixels, but most of what is to be learned; at the end the velocity must be the
    unweighted mean. One step of ``long_every`` pads sentences to 512 tokens; 0: none does.
    """

    budget: Budget
    is_distilled: bool = False
    batch: int = 256
    rate: float = 1e-3
    text_rate: float = 0.0
    final: float = 0.01
    object_weight: float = 1.0
    long_every: int = 16
    decay: float = 0.999
    refresh_every: int = 8
    dropped: float = 0.1
    seed: int = 0
    is_compiled: bool = True
    is_profiled: bool = False

    @property
    def name(self) -> str:
        return "distilled" if self.is_distilled else "flow"


class FlowTraining:
    """The state of a phase. ``ema`` holds the averaged weights, which are what is kept."""

    def __init__(self, flow: Flow, settings: FlowSettings, device: torch.device) -> None:
        self.flow = flow.to(device).train().requires_grad_(True)
        self.settings, self.device, self.step = settings, device, 0
        self.ema = copy.deepcopy(flow).eval().requires_grad_(False)
        self._teacher = copy.deepcopy(self.ema) if settings.is_distilled else None
        self._peaks = {"transformer": settings.rate}
        for name in ("text_encoder", "text_encoder_2"):
            if settings.text_rate:
                self._peaks[name] = settings.text_rate
            else:
                getattr(flow, name).requires_grad_(False)
        self._parameters: list[torch.Tensor] = [each for each in flow.parameters() if each.requires_grad]
        self._averages: list[torch.Tensor] = [
            average
            for average, each in zip(self.ema.parameters(), flow.parameters(), strict=True)
            if each.requires_grad
        ]
        groups: list[dict[str, object]] = [{"params": list(getattr(flow, name).parameters())} for name in self._peaks]
        self._optimizer = adamw(groups, settings.rate, device, decay=0.01)
        self._update = GraphedStep(settings.name, self._learn, device)
        self._generator = torch.Generator(device)
        self._no_words = tuple(each.to(device) for each in tokens([""]))
        if settings.is_compiled and device.type == "cuda":
            # Block by block: seconds where the whole model takes minutes, and one code for all blocks of a kind.
            torch._dynamo.config.cache_size_limit = 64
            for each in (self.flow, self._teacher):
                if each is not None:
                    each.transformer.compile_repeated_blocks(dynamic=False)

    def train(self, pool: Pool, *, until: int = 0, explained: Explained | None = None) -> float:
        """Train until the budget is used, or to step ``until``; return the mean loss of the last steps.

        ``explained`` is asked of the averaged weights now and then, and printed.
        Each step draws from a generator seeded with its number, so a training that is resumed repeats the same steps.
        """
        settings = self.settings
        started, told, told_at = time.monotonic(), self.step, 0.0
        recent: list[float] = []
        loss = torch.zeros(())  # of a phase that is interrupted before its first step
        is_profiled = settings.is_profiled and self.device.type == "cuda"
        parts = Parts(("refresh", "batch and noise", "update", "averages"))
        while (progress := settings.budget.progress(started, self.step)) < 1 and self.step != (until or -1):
            warm = min(1.0, (self.step + 1) / 200)
            share = warm * (settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress)))
            set_rate(self._optimizer, [peak * share for peak in self._peaks.values()])
            extra = (settings.object_weight - 1) * min(1.0, max(0.0, 3 - 4 * progress))
            timed = parts if is_profiled and self.step - told in _TIMED else None
            if timed:
                timed.begin()
            if self.step and self.step % settings.refresh_every == 0:
                pool.refresh()
            if timed:
                timed.mark()
            if is_profiled and self.step - told == _PROFILED_AT:
                loss = profile(settings.name, partial(self._step, pool, extra))
            else:
                loss = self._step(pool, extra, timed)
            self.step += 1
            if is_profiled and self.step - told == _TIMED.stop:
                print(f"{settings.name}: on the GPU's stream a step has {parts}", flush=True)
            if self.step % 20 == 0:
                recent = [*recent[-24:], loss.item()]  # waits for the GPU, so that the clock is right
            if self.step % 200 == 0:
                now = time.monotonic() - started
                print(
                    f"{settings.name}: step {self.step} loss {sum(recent) / len(recent):.4f}, {now:.0f} s, "
                    f"{200 / max(now - told_at, 1e-9):.1f} steps/s",
                    flush=True,
                )
                told_at = now
            if explained and self.step % _EXPLAINED_EVERY == 0:
                shares = ", ".join(f"{objects}: {share:.2f}" for objects, share in explained(self.ema).items())
                print(
                    f"{settings.name}: step {self.step}, explained by words, by number of objects: {shares}", flush=True
                )
        print(f"{settings.name}: {self.step} steps, {time.monotonic() - started:.0f} s", flush=True)
        return sum(recent) / len(recent) if recent else float(loss)

    def _step(self, pool: Pool, extra: float, timed: Parts | None = None) -> torch.Tensor:
        settings, device = self.settings, self.device
        is_long = settings.long_every and self.step % settings.long_every == settings.long_every - 1
        count = max(1, round(settings.batch * LONG_SHARE)) if is_long else settings.batch
        generator = self._generator.manual_seed(settings.seed * 1_000_003 + self.step)
        latents, clip, t5, covered = pool.batch(count, generator)
        noisy, sigmas, target = add_noise(latents, generator)
        guidance = torch.full((count,), WEAKEST_GUIDANCE, device=device)
        if self._teacher is None:
            is_dropped = (torch.rand(count, generator=generator, device=device) < settings.dropped)[:, None]
            clip, t5 = (torch.where(is_dropped, *both) for both in zip(self._no_words, (clip, t5), strict=True))
        else:
            span = torch.rand(count, generator=generator, device=device)
            guidance = guidance + span * (STRONGEST_GUIDANCE - WEAKEST_GUIDANCE)
        if is_long:
            t5 = torch.nn.functional.pad(t5, (0, LONG_TEXT - t5.shape[1]))
        weights = 1 + extra * covered
        if timed:
            timed.mark()
        loss = self._update(noisy, sigmas, guidance, clip, t5, target, weights)
        if timed:
            timed.mark()
        decay = min(settings.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)
        if timed:
            timed.mark()
        return loss

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
        """Change the weights once, and return the loss; nothing here waits for the GPU, so that it can be recorded.

        ``target`` is (batch, 256, 64), ``weights`` of patches are (batch, 256). In the distilled phase, the teacher's
        guided answer takes the target's place.
        """
        if self._teacher is not None:
            weakest = torch.full_like(guidance, WEAKEST_GUIDANCE)
            with torch.no_grad(), autocast(self.device):
                with_words = self._teacher(noisy, sigmas, weakest, clip, t5).float()
                nothing = (empty.expand(len(noisy), -1) for empty in self._no_words)
                without = self._teacher(noisy, sigmas, weakest, *nothing).float()
            strength = (guidance - 1) * ((sigmas - GUIDED_FROM) / (GUIDED_FULLY - GUIDED_FROM)).clamp(0, 1)
            target = with_words + strength[:, None, None] * (with_words - without)
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            velocity = self.flow(noisy, sigmas, guidance, clip, t5)
        loss = weighted_loss(velocity, target, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def save_state(self, folder: Path) -> None:
        """Write weights, averages and the optimizer's moments in files below 16 MB, float32."""
        folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, torch.Tensor] = {}
        number = size = 0
        for name, tensor in self._state().items():
            tensor = tensor.detach().cpu().contiguous()
            if shard and size + tensor.nbytes > _SHARD_BYTES:
                save_file(shard, folder / f"state-{number:02}.safetensors")
                shard, number, size = {}, number + 1, 0
            shard[name], size = tensor, size + tensor.nbytes
        save_file(shard, folder / f"state-{number:02}.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": self.step, "phase": self.settings.name}))

    def load_state(self, folder: Path) -> None:
        """Read what :meth:`save_state` wrote; the next step is the one that would have followed.

        Raises:
            ValueError: the state is of another phase.
        """
        known = json.loads((folder / "state.json").read_text())
        if known["phase"] != self.settings.name:
            raise ValueError(f"{folder}: state of the phase {known['phase']}, not {self.settings.name}: use its flags")
        found: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            found |= load_file(path)
        with torch.no_grad():
            for name, tensor in self._state(is_complete=True).items():
                tensor.copy_(found[name])
        self.step = known["step"]

    def _state(self, *, is_complete: bool = False) -> Mapping[str, torch.Tensor]:
        tensors = {f"flow.{name}": each for name, each in self.flow.named_parameters()}
        tensors |= {f"ema.{name}": each for name, each in self.ema.named_parameters()}
        for number, parameter in enumerate(self._parameters):
            kept = self._optimizer.state[parameter]
            if is_complete and not kept:
                at = self.device if self.device.type == "cuda" else "cpu"
                kept["step"] = torch.zeros((), device=at)
                kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors |= {f"optimizer.{number}.{name}": each for name, each in kept.items()}
        return tensors
