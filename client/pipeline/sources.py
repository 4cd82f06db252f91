"""What a pipeline is made of: its parts by role, its tokenizers, its scheduler, and what its folder says besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xditd.ipc.tensors import ComponentKind

TRANSFORMER: Final = "transformer"
SECOND: Final = "transformer_2"
VAE: Final = "vae"
IMAGE_ENCODER: Final = "image_encoder"
ENCODERS: Final = "text_encoder"
"""Roles of text encoders begin with it: ``text_encoder``, ``text_encoder_2`` and so on."""


@dataclass(frozen=True)
class Part:
    """One component: its path, what kind it is, and the ``variant`` of a folder's weights."""

    path: str
    kind: ComponentKind | None = None
    variant: str | None = None
    prefix: str | None = None
    """What the names of its tensors begin with, in a file that has several such components."""


@dataclass(frozen=True)
class Source:
    """The parts of a pipeline.

    ``pipeline_class`` is that of a folder's ``model_index.json``, ``settings`` the values that it has besides, and
    ``variant`` the one of the transformer's generations. ``scheduler`` is what its ``scheduler_config.json`` says;
    ``None`` is the family's own.
    """

    name: str
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    pipeline_class: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    variant: str = "class"
    has_own_transformer: bool = True
    """Whether the transformer is that of the folder, not one that was given in its place."""

    @property
    def model_class(self) -> str | None:
        """The pipeline whose transformer this is: of a file, and of one in place of the folder's, that is not known."""
        return self.pipeline_class if self.has_own_transformer else None

    @property
    def encoders(self) -> tuple[str, ...]:
        """The roles of its text encoders, in order."""
        return tuple(sorted(role for role in self.parts if role.startswith(ENCODERS)))


KINDS: Final[Mapping[str, ComponentKind]] = {
    TRANSFORMER: ComponentKind.TRANSFORMER,
    SECOND: ComponentKind.TRANSFORMER,
    VAE: ComponentKind.VAE,
}


def kind_of(role: str) -> ComponentKind | None:
    """Return the kind that the part of a role must have; ``None`` if it may be of a family or run as its class."""
    return KINDS.get(role)
