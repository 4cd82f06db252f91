"""Train both text encoders of ``shapes`` on sentences, before any picture: they learn which form and colour is where.

From the loss of pictures, a model learns where to put things, but hardly which colour belongs to which form. Published
text encoders have read much text before they meet pictures; these read sentences and answer questions about the scene.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Final

import torch
from torch.nn import functional

from shapes.budget import Budget
from shapes.draw import encode
from shapes.graphs import GraphedStep, adamw, set_rate
from shapes.models import CLIP_WIDTH, T5_WIDTH, position_biases
from shapes.pool import Sentences, autocast
from shapes.profiling import profile
from shapes.scenes import BACKGROUNDS, CELLS, COLOURS, FORMS, MAX_OBJECTS, MIDDLE_RADIUS, PATTERNS, SIZES
from shapes.text_tokens import tokens
from shapes.words import LANGUAGES, sample_request

LONG_TEXT: Final = 512
"""What FluxPipeline pads sentences to unless told otherwise."""
ASKED: Final = (CELLS, len(FORMS), len(COLOURS))
"""How many questions there are about places, forms and colours."""
ANSWERS: Final = (len(FORMS), len(COLOURS), len(SIZES), CELLS, 2)
"""Answers to each of them: form, colour, size and place, and whether anything is there. That is an answer of its own:
as a form among others, it was what was read of many combinations of form and colour that training never sees."""
BEHIND: Final = (len(PATTERNS), len(BACKGROUNDS))
"""Answers for the background: its pattern and colour."""
SENTENCES: Final = 256
"""Of the report, for each number of objects."""
BIASES_RATE: Final = 20.0
"""The rate of T5's biases by position as a multiple of that of other weights: they are as many times larger."""
SMOOTHING: Final = 0.1
"""Of the right answers. Training never sees a red crescent, so without it, "red" comes to mean that a form is no
crescent: held-out combinations were read right in a third of the sentences, and with it in all."""
_UNCLEAR: Final = -100
"""The answer that does not count: where nothing is there, or two things have the form or colour that is asked for."""
_PROFILED_AT: Final = 2
_LONG_EVERY: Final = 16
_LONG_SHARE: Final = 0.125
_HEADS: Final = 4
_SEED: Final = 8_000_000


def said(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the right answers, int64: (scenes, 25, 5) for places, forms and colours, (scenes, 2) for the background.

    ``rows`` are as :func:`~shapes.draw.encode` writes them.
    """
    things = rows[:, :MAX_OBJECTS]
    is_there = things[..., 0] >= 0
    form, colour = things[..., 0].long(), things[..., 1].long()
    column, line = ((things[..., axis] * 3).long().clamp(0, 2) for axis in (2, 3))
    cell = column + 3 * line
    answers = torch.stack([form, colour, (things[..., 4] > MIDDLE_RADIUS).long(), cell], -1)
    found = []
    for asked, count in zip((cell, form, colour), ASKED, strict=True):
        at = torch.where(is_there, asked, count)
        right = torch.zeros(len(rows), count + 1, answers.shape[-1], dtype=torch.long, device=rows.device)
        right.scatter_(1, at[..., None].expand_as(answers), answers)
        times = torch.zeros(len(rows), count + 1, dtype=torch.long, device=rows.device)
        times.scatter_add_(1, at, torch.ones_like(at))
        right = torch.where((times == 1)[..., None], right, _UNCLEAR)
        found.append(torch.cat([right, (times > 0).long()[..., None]], -1)[:, :count])
    return torch.cat(found, 1), rows[:, MAX_OBJECTS, :2].long()


class Reader(torch.nn.Module):
    """Asks T5's states in one step of attention for each place, form and colour, and for the background; asks CLIP's
    pooled vector for the background, and which forms and colours there are. Used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = torch.nn.Parameter(torch.randn(sum(ASKED) + 1, T5_WIDTH) * 0.1)
        self.key, self.value, self.out = (torch.nn.Linear(T5_WIDTH, T5_WIDTH) for _ in range(3))
        self.answers = torch.nn.Linear(T5_WIDTH, sum(ANSWERS))
        self.behind = torch.nn.Linear(T5_WIDTH, sum(BEHIND))
        self.pooled = torch.nn.Linear(CLIP_WIDTH, len(FORMS) + len(COLOURS) + sum(BEHIND))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of answers (batch, 25, 29) and backgrounds (batch, 9) from ``states`` (batch, tokens, 192)."""
        questions = self.questions.to(states.dtype).expand(len(states), -1, -1)
        heads = [
            each.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for each in (questions, self.key(states), self.value(states))
        ]
        found = self.out(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return self.answers(found[:, :-1]), self.behind(found[:, -1])


def _loss(logits: torch.Tensor, answers: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the mean cross entropy of several questions whose logits lie side by side."""
    parts = logits.float().flatten(0, -2).split(list(sizes), -1)
    rights = answers.flatten(0, -2).unbind(-1)
    losses = [
        functional.cross_entropy(part, right, label_smoothing=SMOOTHING)
        for part, right in zip(parts, rights, strict=True)
    ]
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class TextSettings:
    budget: Budget
    batch: int = 256
    rate: float = 1e-3
    refresh_every: int = 4
    seed: int = 0
    is_profiled: bool = False


class TextTraining:
    """The state of the phase: both encoders, which are changed in place, and their reader."""

    def __init__(self, text_encoder: Any, text_encoder_2: Any, settings: TextSettings, device: torch.device) -> None:
        self.text_encoder, self.text_encoder_2 = (each.to(device).train() for each in (text_encoder, text_encoder_2))
        torch.manual_seed(settings.seed)
        self.reader = Reader().to(device)
        self.settings, self.device = settings, device
        models = (self.text_encoder, self.text_encoder_2, self.reader)
        self._parameters = [each for model in models for each in model.requires_grad_(True).parameters()]
        biases = position_biases(self.text_encoder_2)
        others = [each for each in self._parameters if each is not biases]
        groups: list[dict[str, object]] = [{"params": others}, {"params": [biases], "weight_decay": 0.0}]
        self._peaks = [settings.rate, settings.rate * BIASES_RATE]
        self._optimizer = adamw(groups, settings.rate, device, decay=0.01)
        self._update = GraphedStep("words", self._learn, device)

    def train(self, pool: Sentences) -> dict[str, Any]:
        """Train until the budget is used; return the steps and what is read right, by number of objects."""
        settings, started, step = self.settings, time.monotonic(), 0
        generator = torch.Generator(self.device)
        recent: list[float] = []
        is_profiled = settings.is_profiled and self.device.type == "cuda"
        while (progress := settings.budget.progress(started, step)) < 1:
            share = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            set_rate(self._optimizer, [peak * share for peak in self._peaks])
            if step and step % settings.refresh_every == 0:
                pool.refresh()
            is_long = step % _LONG_EVERY == _LONG_EVERY - 1
            count = max(1, round(settings.batch * _LONG_SHARE)) if is_long else settings.batch
            clip, t5, rows = pool.sentences(count, generator.manual_seed(settings.seed * 1_000_003 + step))
            if is_long:
                t5 = functional.pad(t5, (0, LONG_TEXT - t5.shape[1]))
            learn = partial(self._update, clip, t5, *said(rows))
            loss = profile("words", learn) if is_profiled and step == _PROFILED_AT else learn()
            step += 1
            if step % 20 == 0:
                recent = [*recent[-49:], loss.item()]  # waits for the GPU, so that the clock is right
            if step % 1000 == 0:
                mean = sum(recent) / len(recent)
                print(f"words: step {step} loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True)
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
            answers, _ = said(encode([each.scene for each in requests]))
            with autocast(self.device):
                logits, _ = self.reader(self.text_encoder_2(input_ids=t5.to(self.device)).last_hidden_state)
            parts = logits.float().cpu()[:, :CELLS].split(list(ANSWERS), -1)
            read, asked = torch.stack([part.argmax(-1) for part in parts[:2]], -1), answers[:, :CELLS, :2]
            shares[objects] = float(((read == asked) | (asked == _UNCLEAR)).flatten(1).all(1).float().mean())
        return shares

    def _learn(self, clip: torch.Tensor, t5: torch.Tensor, answers: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """Change the weights once, and return the loss; nothing here waits for the GPU, so that it can be recorded."""
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            answered, behind_answered = self.reader(self.text_encoder_2(input_ids=t5).last_hidden_state)
            pooled = self.reader.pooled(self.text_encoder(input_ids=clip).pooler_output).float()
        is_there = answers[:, CELLS:, -1].float()
        seen, pooled_behind = pooled.split([is_there.shape[1], sum(BEHIND)], -1)
        loss = (
            _loss(answered, answers, ANSWERS)
            + _loss(behind_answered, behind, BEHIND)
            + functional.binary_cross_entropy_with_logits(seen, is_there)
            + _loss(pooled_behind, behind, BEHIND)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()
