"""The protocols by which ``EncodePrompt`` runs a transformer family's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from xditd.gpu_workers.models.operations import ConfigT_contra

if TYPE_CHECKING:
    from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
    from xditd.ipc.facts import PromptFacts

Conditioning = Mapping[str, torch.Tensor | list[torch.Tensor]]
"""Tensors, or lists of one for each prompt, by the names of the transformer's facts."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptInputs:
    """The prompts of one request, or its negative prompts, and what goes with each of them.

    ``images`` are of PIL. ``options`` have the names of the facts.
    """

    texts: Sequence[str]
    images: Sequence[Any] = ()
    options: Mapping[str, float] = field(default_factory=dict)
    second: Sequence[str] = ()
    """What the second encoder reads in place of ``texts``, one for each; none: it reads these, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Token ids (texts, tokens), int64, on the host.

    ``mask``, of the same shape, is 0 for padding; ``None``: the encoder does not take one. ``images`` are further
    arguments of the encoder, as its facts name them.
    """

    token_ids: torch.Tensor
    mask: torch.Tensor | None = None
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dropped: int = 0
    """Of the states, how many tokens of a template are left out at the front; the recipe does it."""
    kept: int | None = None
    """How many tokens are kept behind these; the recipe cuts the others."""
    lengths: Sequence[int] = ()
    """Of each text, how many tokens it has before it is cut; none where nothing is cut."""


class PromptEncoders(Protocol):
    """The text encoders of a request, by role, as a recipe uses them."""

    def states(
        self, role: str, tokens: Tokens, *, layers: Sequence[int] = (), pooled: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode tokens to hidden states (texts, tokens, width), and the pooled state (texts, width) if asked for.

        Both are in the dtype of the encoder's weights, to which float32 results are rounded, on its device. ``layers``
        are those of ``EncodeText``.

        Raises:
            BadRequest: an id that is not in the encoder's vocabulary, too many tokens, or images that do not fit.
            NotFinite: a state is not finite.
        """

    def layers(self, role: str) -> int:
        """Return how many layers an encoder has."""


class PromptRecipe(Protocol[ConfigT_contra]):
    """How a transformer's family makes conditioning of texts. Rank 0 runs it."""

    def facts(self, config: ConfigT_contra) -> PromptFacts:
        """Return what clients have to lend, and may give."""

    def tokenize(
        self, config: ConfigT_contra, inputs: PromptInputs, tokenizers: Mapping[str, BuiltTokenizer]
    ) -> Mapping[str, Tokens]:
        """Return the tokens of each encoder by its role. ``tokenizers`` are those of the facts, by role.

        Raises:
            BadRequest: an option of another value, or pictures that the family does not take; names it.
        """

    def encode(self, config: ConfigT_contra, tokens: Mapping[str, Tokens], encoders: PromptEncoders) -> Conditioning:
        """Return the conditioning of these tokens, by the names of the transformer's facts.

        The engine casts floating tensors to the dtype of the transformer's weights. Of negative prompts, it puts
        ``negative_`` before the names.
        """


@runtime_checkable
class TakesPrompts(Protocol[ConfigT_contra]):
    """What a transformer's operations have besides, if its family makes conditioning of texts."""

    @property
    def prompt(self) -> PromptRecipe[ConfigT_contra]:
        """How ``EncodePrompt`` runs."""
