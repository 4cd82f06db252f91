"""What a model family says of its checkpoints; :mod:`~xditd.gpu_workers.models.operations` is what it does with one."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Literal, Protocol, TypeVar

from xditd.gpu_workers.models.entries import Entry, Shape
from xditd.gpu_workers.models.operations import Operations

Kind = Literal["transformer", "vae", "text_encoder"]
ConfigT = TypeVar("ConfigT", bound=Hashable)


class Family(Protocol[ConfigT]):
    """What a family says of its checkpoints, and what it can do with one (``operations``)."""

    @property
    def name(self) -> str:
        """As it appears in logs, status and errors."""

    @property
    def title(self) -> str:
        """What of it can be run, in people's words, with a file that fits: ``FLUX.1 dev (flux1-dev.safetensors)``."""

    @property
    def kind(self) -> Kind:
        """What a component of this family is for."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Canonical names that files hold in place of, or as a copy beside, another one: copy to original."""

    @property
    def ignored(self) -> re.Pattern[str] | None:
        """Canonical names of tensors that no job reads, of any dtype, besides what ``tells_nothing`` in any model."""

    @property
    def fused_widths(self) -> tuple[int, ...]:
        """Hidden sizes whose fused kernels are compiled when a group starts; others compile at their first step."""

    def claims(self, names: Collection[str]) -> bool:
        """Say whether these names, without a prefix, are a checkpoint of this family, complete or not."""

    def canonical(self, name: str) -> str:
        """Return the one spelling of a tensor name that has no prefix."""

    def configure(self, shapes: Mapping[str, Shape]) -> ConfigT:
        """Infer the configuration, a frozen dataclass, from canonical names and shapes alone.

        Raises:
            BadCheckpoint: a dimension can be read nowhere, or has an impossible value.
            Unsupported: a known variant of the family that is not implemented.
        """

    def entries(self, config: ConfigT, names: Collection[str]) -> Iterator[Entry]:
        """List every tensor that a checkpoint of this configuration holds.

        ``names`` are the canonical names of one: a family whose files come in several layouts lists that one's.
        """

    def heads(self, config: ConfigT) -> int:
        """Count the attention heads that its sequence is split by; 0 where one rank runs it whole."""

    @property
    def operations(self) -> Operations[ConfigT]:
        """What jobs do with its components: those of its ``kind``, imported when the first one is lent."""
