"""Train both text encoders of ``shapes`` on sentences, before any picture: they learn which form and colour is where.

From the loss of pictures, a model learns where to put things, but hardly which colour belongs to which form. Published
text encoders have read much text before they meet pictures; these read sentences and answer questions about the scene.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Protocol

import torch
from torch.nn import functional

from shapes.draw import encode
from shapes.graphs import GraphedStep, adamw, set_rate
from shapes.models import CLIP_WIDTH, T5_WIDTH
from shapes.pool import autocast, tokens
from shapes.scenes import BACKGROUNDS, CELLS, COLOURS, FORMS, MAX_OBJECTS, MIDDLE_RADIUS, PATTERNS, SIZES
from shapes.vae_training import Budget
from shapes.words import LANGUAGES, sample_request

LONG_TEXT: Final = 512
"""What FluxPipeline pads sentences to unless told otherwise."""
AT_A_PLACE: Final = (1 + len(FORMS), 1 + len(COLOURS), 1 + len(SIZES))
"""Answers for a place: its form, colour and size, of which the first is that nothing is there."""
BEHIND: Final = (len(PATTERNS), len(BACKGROUNDS))
"""Answers for the background: its pattern and colour."""
SENTENCES: Final = 256
"""Of the report, for each number of objects."""
_LONG_EVERY: Final = 16
_LONG_SHARE: Final = 0.125
_HEADS: Final = 4
_SEED: Final = 8_000_000


class Sentences(Protocol):
    """Where sentences come from: :class:`shapes.pool.Pool`."""

    def refresh(self) -> None: ...

    def sentences(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]: ...


def said(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the right answers, int64: for places (scenes, 9, 3) and for backgrounds (scenes, 2).

    ``rows`` are as :func:`~shapes.draw.encode` writes them.
    """
    things = rows[:, :MAX_OBJECTS]
    is_there = things[..., 0] >= 0
    column, line = ((things[..., axis] * 3).long().clamp(0, 2) for axis in (2, 3))
    cell = torch.where(is_there, column + 3 * line, CELLS)
    answers = torch.stack([things[..., 0] + 1, things[..., 1] + 1, 1 + (things[..., 4] > MIDDLE_RADIUS)], -1).long()
    places = torch.zeros(len(rows), CELLS + 1, len(AT_A_PLACE), dtype=torch.long, device=rows.device)
    places.scatter_(1, cell[..., None].expand_as(answers), answers)
    return places[:, :CELLS], rows[:, MAX_OBJECTS, :2].long()


class Reader(torch.nn.Module):
    """Asks T5's states in one step of attention for each place and for the background; asks CLIP's pooled vector for
    the background, and which forms and colours there are. Used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = torch.nn.Parameter(torch.randn(CELLS + 1, T5_WIDTH) * 0.1)
        self.key, self.value, self.out = (torch.nn.Linear(T5_WIDTH, T5_WIDTH) for _ in range(3))
        self.at_places = torch.nn.Linear(T5_WIDTH, sum(AT_A_PLACE))
        self.behind = torch.nn.Linear(T5_WIDTH, sum(BEHIND))
        self.pooled = torch.nn.Linear(CLIP_WIDTH, len(FORMS) + len(COLOURS) + sum(BEHIND))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits for places (batch, 9, 21) and backgrounds (batch, 9) from ``states`` (batch, tokens, 192)."""
        questions = self.questions.to(states.dtype).expand(len(states), -1, -1)
        heads = [
            each.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for each in (questions, self.key(states), self.value(states))
        ]
        found = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        found = self.out(found)
        return self.at_places(found[:, :CELLS]), self.behind(found[:, CELLS])


def _loss(logits: torch.Tensor, answers: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the mean cross entropy of several questions whose logits lie side by side."""
    parts = logits.float().flatten(0, -2).split(list(sizes), -1)
    rights = answers.flatten(0, -2).unbind(-1)
    return torch.stack(
        [functional.cross_entropy(part, right) for part, right in zip(parts, rights, strict=True)]
    ).mean()


@dataclass(frozen=True)
class TextSettings:
    budget: Budget
    batch: int = 512
    rate: float = 1.5e-3
    refresh_every: int = 32
    seed: int = 0


class TextTraining:
    """The state of the phase: both encoders, which are changed in place, and their reader."""

    def __init__(self, text_encoder: Any, text_encoder_2: Any, settings: TextSettings, device: torch.device) -> None:
        self.text_encoder, self.text_encoder_2 = (each.to(device).train() for each in (text_encoder, text_encoder_2))
        torch.manual_seed(settings.seed)
        self.reader = Reader().to(device)
        self.settings, self.device = settings, device
        models = (self.text_encoder, self.text_encoder_2, self.reader)
        self._parameters = [each for model in models for each in model.requires_grad_(True).parameters()]
        self._optimizer = adamw([{"params": self._parameters}], settings.rate, device, decay=0.01)
        self._update = GraphedStep("words", self._learn, device)

    def train(self, pool: Sentences) -> dict[str, Any]:
        """Train until the budget is used; return the steps and what is read right, by number of objects."""
        settings, started, step = self.settings, time.monotonic(), 0
        generator = torch.Generator(self.device)
        while (progress := settings.budget.progress(started, step)) < 1:
            share = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            set_rate(self._optimizer, [settings.rate * share])
            if step and step % settings.refresh_every == 0:
                pool.refresh()
            is_long = step % _LONG_EVERY == _LONG_EVERY - 1
            count = max(1, round(settings.batch * _LONG_SHARE)) if is_long else settings.batch
            clip, t5, rows = pool.sentences(count, generator.manual_seed(settings.seed * 1_000_003 + step))
            if is_long:
                t5 = functional.pad(t5, (0, LONG_TEXT - t5.shape[1]))
            loss = self._update(clip, t5, *said(rows))
            step += 1
            if step % 20 == 0:
                loss.item()  # waits for the GPU, so that the clock is right
            if step % 1000 == 0:
                print(f"words: step {step} loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
        right = {str(objects): round(share, 3) for objects, share in self.read_right().items()}
        print(
            f"words: {step} steps, {time.monotonic() - started:.0f} s, read right by number of objects: {right}",
            flush=True,
        )
        return {"steps": step, "read_right": right}

    @torch.no_grad()
    def read_right(self) -> dict[int, float]:
        """Return, by number of objects, of how many sentences all forms and colours are read at their places.

        Every sentence has a combination that training never sees, and names the place of every object.
        """
        shares = {}
        for objects in range(1, MAX_OBJECTS + 1):
            rng = Random(_SEED + objects)
            requests = [
                sample_request(rng, objects=objects, language=LANGUAGES[at % 2], style="places", held_out=True)
                for at in range(SENTENCES)
            ]
            _, t5 = tokens([each.text for each in requests])
            places, _ = said(encode([each.scene for each in requests]))
            with autocast(self.device):
                logits, _ = self.reader(self.text_encoder_2(input_ids=t5.to(self.device)).last_hidden_state)
            parts = logits.float().cpu().split(list(AT_A_PLACE), -1)
            right = torch.stack([part.argmax(-1) for part in parts[:2]], -1) == places[..., :2]
            shares[objects] = float(right.flatten(1).all(1).float().mean())
        return shares

    def _learn(
        self, clip: torch.Tensor, t5: torch.Tensor, places: torch.Tensor, backgrounds: torch.Tensor
    ) -> torch.Tensor:
        """Change the weights once, and return the loss; nothing here waits for the GPU, so that it can be recorded."""
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            at_places, behind = self.reader(self.text_encoder_2(input_ids=t5).last_hidden_state)
            pooled = self.reader.pooled(self.text_encoder(input_ids=clip).pooler_output).float()
        there = [
            (places[..., which, None] == torch.arange(1, size, device=places.device)).any(1).float()
            for which, size in enumerate(AT_A_PLACE[:2])
        ]
        seen, pooled_behind = pooled.split([len(FORMS) + len(COLOURS), sum(BEHIND)], -1)
        loss = (
            _loss(at_places, places, AT_A_PLACE)
            + _loss(behind, backgrounds, BEHIND)
            + functional.binary_cross_entropy_with_logits(seen, torch.cat(there, -1))
            + _loss(pooled_behind, backgrounds, BEHIND)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()
