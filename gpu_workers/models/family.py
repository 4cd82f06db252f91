"""The ``Family`` protocol: how a model family recognises and describes its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from xditd.gpu_workers.models.entries import Entry, Shape
from xditd.gpu_workers.models.operations import Operations

Kind = Literal["transformer", "vae", "text_encoder", "controlnet"]
ConfigT = TypeVar("ConfigT", bound=Hashable)


class Family(Protocol[ConfigT]):
    """How a family recognises and describes its checkpoints; ``operations`` runs them."""

    @property
    def name(self) -> str:
        """Its name in logs, status and errors."""

    @property
    def title(self) -> str:
        """The supported models for people, with an example of a file: ``FLUX.1 dev (flux1-dev.safetensors)``."""

    @property
    def kind(self) -> Kind:
        """The kind of its components."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Canonical names of tied tensors, from copy to original: files hold either, or both."""

    @property
    def ignored(self) -> re.Pattern[str] | None:
        """Canonical names of tensors that no job reads, of any dtype, besides those of ``tells_nothing``."""

    @property
    def fused_widths(self) -> tuple[int, ...]:
        """Hidden sizes whose fused kernels are compiled when a group starts; others compile at the first step."""

    def claims(self, names: Collection[str]) -> bool:
        """Return whether these names, without a prefix, are of this family, complete or not."""

    def canonical(self, name: str) -> str:
        """Return the canonical spelling of a tensor name without a prefix."""

    def configure(self, shapes: Mapping[str, Shape]) -> ConfigT:
        """Infer the configuration, a frozen dataclass, from canonical names and shapes alone.

        Raises:
            BadCheckpoint: a dimension cannot be read, or has an impossible value.
            Unsupported: a known variant of the family that is not implemented.
        """

    def entries(self, config: ConfigT, names: Collection[str]) -> Iterator[Entry]:
        """List every tensor that a checkpoint of this configuration holds.

        ``names`` are the canonical names of one: a family with several namings lists the tensors of that one.
        """

    def heads(self, config: ConfigT) -> int:
        """Return the number of attention heads for sequence parallelism; 0 if each rank runs the whole model."""

    @property
    def operations(self) -> Operations[ConfigT]:
        """The operations of its ``kind``, imported when the first component is lent."""


@runtime_checkable
class HasSettings(Protocol[ConfigT]):
    """What a family has besides, if a model's configuration says what no tensor shows."""

    def with_settings(self, config: ConfigT, settings: Mapping[str, Any]) -> ConfigT:
        """Return the configuration of a model whose ``config.json``, or live module, has these settings."""
