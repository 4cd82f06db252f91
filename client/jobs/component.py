"""A component as jobs name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ComponentFacts, ControlNetFacts, TextEncoderFacts, TransformerFacts, VaeFacts
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.tensors import ComponentKind

F = TypeVar("F", TransformerFacts, VaeFacts, TextEncoderFacts, ControlNetFacts)


@dataclass(frozen=True)
class Component:
    """The id and the facts of a component that a job uses, and the LoRAs that the job adds to it."""

    component_id: str
    facts: ComponentFacts
    loras: tuple[LoraUse, ...] = ()

    @property
    def transformer(self) -> TransformerFacts:
        return self._of_kind(ComponentKind.TRANSFORMER, self.facts.transformer)

    @property
    def vae(self) -> VaeFacts:
        return self._of_kind(ComponentKind.VAE, self.facts.vae)

    @property
    def text_encoder(self) -> TextEncoderFacts:
        return self._of_kind(ComponentKind.TEXT_ENCODER, self.facts.text_encoder)

    @property
    def controlnet(self) -> ControlNetFacts:
        return self._of_kind(ComponentKind.CONTROLNET, self.facts.controlnet)

    def _of_kind(self, kind: ComponentKind, found: F | None) -> F:
        if found is None:
            why = f"; no family runs it: {self.facts.family_reason}" if self.facts.family_reason else ""
            raise BadRequest(
                f"component {self.component_id}: a {self.facts.kind.value} where a {kind.value} is needed{why}"
            )
        return found
