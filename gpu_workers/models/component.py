"""One lent component of a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.class_model import ClassModel
from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.lent_copies import LentCopies
from xditd.gpu_workers.models.lora_binding import LentLora
from xditd.gpu_workers.models.lora_match import LoraMatch
from xditd.gpu_workers.models.matching import AnyMatch
from xditd.gpu_workers.models.module_match import ModuleMatch
from xditd.gpu_workers.models.tokenizer_match import LentTokenizer, TokenizerMatch
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.facts import ComponentFacts, ControlNetFacts, TransformerFacts, VaeFacts
from xditd.ipc.tensors import CopiedBytes, Manifest


@dataclass
class Component:
    """One lent component. ``bindings`` are views of ``opened`` blocks or of ``copies``, which this rank owns."""

    component_id: str
    match: AnyMatch
    bindings: Bindings
    manifest: Manifest
    facts: ComponentFacts
    tensors: dict[str, torch.Tensor]
    """The lent tensors that jobs read, by name, as views like the bindings."""
    checkpoint: Bindings
    """The same by canonical name, for fast paths; packed weights with their companions."""
    opened: list[OpenBlock | None]
    lent_copies: LentCopies
    copies: list[torch.Tensor]
    """All memory of this rank that the tensors and bindings take."""
    copied: CopiedBytes
    timings_ms: dict[str, float]
    filled_bytes: int = 0
    """Memory of the model that a plug fills with weights made of these."""

    @property
    def model(self) -> CachedModel:
        """The model of a component with a family."""
        assert isinstance(self.match, CheckpointMatch)
        return self.match.model

    @property
    def class_model(self) -> ClassModel:
        """The model of a component that runs as its own class."""
        assert isinstance(self.match, ModuleMatch)
        return self.match.model

    @property
    def runnable(self) -> CachedModel | ClassModel:
        """The model of a component that jobs run."""
        assert not isinstance(self.match, (LoraMatch, TokenizerMatch))
        return self.match.model

    @property
    def lora(self) -> LentLora:
        """The factors of a component that is a LoRA."""
        assert isinstance(self.match, LoraMatch)
        return self.match.model

    @property
    def tokenizer(self) -> LentTokenizer:
        """The tokenizer of a component that is one."""
        assert isinstance(self.match, TokenizerMatch)
        return self.match.model

    @property
    def transformer_facts(self) -> TransformerFacts:
        assert self.facts.transformer is not None
        return self.facts.transformer

    @property
    def vae_facts(self) -> VaeFacts:
        assert self.facts.vae is not None
        return self.facts.vae

    @property
    def controlnet_facts(self) -> ControlNetFacts:
        assert self.facts.controlnet is not None
        return self.facts.controlnet

    @property
    def is_loaded(self) -> bool:
        return self.match.model.owner == self.component_id
