"""The denoising loop over stages: whole images while it warms up, then patches that follow each other closely.

The first stage starts on a patch as soon as the last one has taken that patch through the step before, and goes on
with the next patch meanwhile. Nothing is lost where every step is a warm-up step: that is one process's computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from xditd.gpu_workers.pipefusion.flux1 import Rotary, StagedFlux1
from xditd.gpu_workers.pipefusion.key_values import KeyValues
from xditd.gpu_workers.pipefusion.links import StageLinks
from xditd.gpu_workers.pipefusion.shares import deal_patches
from xditd.gpu_workers.timesteps import SCALE
from xditd.ipc.requests import Variant


@dataclass(frozen=True, slots=True)
class Inputs:
    """A checked job, on the device, in the model's dtype.

    ``noise`` is (batch, image tokens, packed channels), in the dtype that latents have between steps, ``text`` (batch,
    text tokens, channels), ``pooled`` (batch, channels), ``guidance`` (batch,) in float32; ``text_ids`` and
    ``image_ids`` are the tokens' positions, (tokens, 3).
    """

    noise: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    guidance: torch.Tensor | None
    text_ids: torch.Tensor
    image_ids: torch.Tensor
    variant: Variant


def sample(
    model: StagedFlux1,
    links: StageLinks,
    inputs: Inputs,
    schedule: FlowMatchEulerDiscreteScheduler,
    *,
    patches: int,
    warm_up_steps: int,
    on_step: Callable[[int, int], None] | None,
    on_denoised: Callable[[torch.Tensor], None] | None,
) -> torch.Tensor:
    """Denoise ``inputs.noise`` along ``schedule``, whose timesteps are set; return the latents on every rank.

    ``on_step(done, total)`` runs on every rank after each step was issued there, which is not at the same time; if it
    raises, it has to on all of them after the same step. ``on_denoised`` runs on the first stage before it, with the
    clean latents that the latest complete step foresaw, rounded to the latents' dtype: this step while it warms up,
    then the step before. All ranks give one, or none.

    Raises:
        Unsupported: fewer image tokens than patches.
    """
    turns = _Turns(model, links, inputs, schedule, patches, on_denoised)
    steps = len(schedule.timesteps)
    for step in range(steps):
        if step < warm_up_steps:
            turns.take_whole(step)
        else:
            turns.take_patches(step, is_last_step=step == steps - 1)
        if on_step is None:
            continue
        try:
            on_step(step + 1, steps)
        except BaseException:
            turns.abandon()
            raise
    return turns.share_result()


@dataclass(frozen=True, slots=True)
class _Patch:
    """Some image tokens, and the rotary tables of all text tokens and these."""

    tokens: slice
    rotary: Rotary

    @classmethod
    def of(cls, tokens: slice, text: int, tables: Rotary) -> _Patch:
        cosine, sine = (torch.cat((table[:text], table[text:][tokens])) for table in tables)
        return cls(tokens, (cosine, sine))

    @property
    def length(self) -> int:
        return int(self.tokens.stop - self.tokens.start)


class _Turns:
    """One job on one rank. The first and the last stage keep the latents, each patch's as of its latest step."""

    def __init__(
        self,
        model: StagedFlux1,
        links: StageLinks,
        inputs: Inputs,
        schedule: FlowMatchEulerDiscreteScheduler,
        patches: int,
        on_denoised: Callable[[torch.Tensor], None] | None,
    ) -> None:
        self._model, self._links, self._inputs, self._on_denoised = model, links, inputs, on_denoised
        self._timesteps, self._sigmas = schedule.timesteps, schedule.sigmas
        self._batch, tokens, self._channels = inputs.noise.shape
        tables = model.pos_embed(torch.cat((inputs.text_ids, inputs.image_ids)))
        self._whole = _Patch(slice(0, tokens), tables)
        self._patches = [_Patch.of(tokens, inputs.text.shape[1], tables) for tokens in deal_patches(tokens, patches)]
        self._latents = inputs.noise.clone()
        self._foreseen = torch.empty_like(self._latents) if on_denoised is not None else None
        self._results_owed: list[_Patch] = []
        self._text = model.context_embedder(inputs.text) if links.is_first else inputs.text
        self._key_values = KeyValues(inputs.text.shape[1])

    def take_whole(self, step: int) -> None:
        """Take the whole image through a step, one stage after the other."""
        self._key_values.turn_to(None)
        self._take(step, self._whole, self._modulation(step), None)
        if self._links.is_first:
            # There is nothing to do meanwhile, and the listener gets what belongs to this step.
            self._take_result(self._whole)
            self._show()

    def take_patches(self, step: int, *, is_last_step: bool) -> None:
        """Take each patch through a step; all stages are at work, on different patches."""
        modulation = self._modulation(step)
        text = None
        for patch in self._patches:
            if self._results_owed:
                self._take_result(patch)
            self._key_values.turn_to(patch.tokens)
            text = self._take(step, patch, modulation, text, is_result_wanted=not is_last_step)
        if self._results_owed:
            self._show()
        self._results_owed = self._patches if self._links.is_first and not is_last_step else []

    def _take(
        self,
        step: int,
        patch: _Patch,
        modulation: torch.Tensor,
        text: torch.Tensor | None,
        *,
        is_result_wanted: bool = True,
    ) -> torch.Tensor:
        """Take some image tokens through this stage; return the text that it started from.

        Text comes with the first patch of a step (``text`` is ``None``), and serves for the others as well. The first
        stage wants the last one's result in order to go on from it.
        """
        links, model = self._links, self._model
        is_first_patch = text is None
        if links.is_first:
            text, image = self._text, model.x_embedder(self._latents[:, patch.tokens].to(self._text.dtype))
        else:
            text, image = self._receive_states(patch, text)
        image, text_after = model.run_stage(image, text, modulation, patch.rotary, self._key_values)
        if not links.is_last:
            links.send(torch.cat((text_after, image), dim=1) if is_first_patch else image)
            return text
        prediction = model.predict(image, modulation).to(self._latents.dtype)
        before, sigma = self._latents[:, patch.tokens].float(), self._sigmas[step]
        # As FlowMatchEulerDiscreteScheduler.step does, which counts its calls and not our patches.
        after = (before + (self._sigmas[step + 1] - sigma) * prediction).to(prediction.dtype)
        foreseen = () if self._foreseen is None else ((before - sigma * prediction).to(prediction.dtype),)
        self._latents[:, patch.tokens] = after  # and with it ``before``, where that is no copy
        if is_result_wanted:
            links.send(torch.cat((after, *foreseen)))
        return text

    def _receive_states(self, patch: _Patch, text: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, hidden = self._text.dtype, self._model.inner_dim
        if text is not None:
            return text, self._links.receive((self._batch, patch.length, hidden), dtype)
        text_length = self._text.shape[1]
        both = self._links.receive((self._batch, text_length + patch.length, hidden), dtype)
        return both[:, :text_length], both[:, text_length:]

    def _take_result(self, patch: _Patch) -> None:
        """On the first stage: take what the last one made of a patch in the latest step."""
        copies = 1 if self._foreseen is None else 2
        result = self._links.receive((copies * self._batch, patch.length, self._channels), self._latents.dtype)
        self._latents[:, patch.tokens] = result[: self._batch]
        if self._foreseen is not None:
            self._foreseen[:, patch.tokens] = result[self._batch :]

    def abandon(self) -> None:
        """Take what is under way, so that no message is left in the links; every rank does after the same step."""
        for patch in self._results_owed:
            self._take_result(patch)
        self._links.settle()

    def share_result(self) -> torch.Tensor:
        """Hand the last stage's latents on to every rank, by the links, since a broadcast has yet to connect."""
        links = self._links
        if not links.is_last:
            self._latents = links.receive(tuple(self._latents.shape), self._latents.dtype)
        if links.stage != links.stages - 2:  # whose next one has them from the start
            links.send(self._latents)
        links.settle()
        return self._latents

    def _show(self) -> None:
        if self._on_denoised is not None and self._foreseen is not None:
            self._on_denoised(self._foreseen)

    def _modulation(self, step: int) -> torch.Tensor:
        # Rounded and divided as FluxPipeline does, for the same bits.
        timestep = self._timesteps[step].expand(self._batch).to(self._latents.dtype) / SCALE
        return self._model.condition(timestep, self._inputs.guidance, self._inputs.pooled, self._inputs.variant)
