"""``RunSettings``: what a call of a pipeline was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class UsedLora(NamedTuple):
    """A LoRA of a call: path, strength as given, roles of the parts whose layers it changed, and when it was lent."""

    path: str
    strength: Any
    roles: tuple[str, ...]
    lent_ns: int


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a call was made with: given arguments, and the defaults of those that were not.

    ``files`` are the paths of all parts by role, ``loras`` the LoRAs as they were used.
    """

    model: str
    family: str
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    num_images: int
    seed: int
    batch: int
    """How many pictures or videos there are: ``num_images`` of each prompt, or of each row of its tensors."""
    strength: float = 1.0
    max_sequence_length: int | None = None
    """The tokens of prompts; ``None`` for the model's own number, or without words."""
    step_cache: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    variant: str = "class"
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lent_ns: Mapping[str, int] = field(default_factory=dict)
    """When the files of a role were lent."""
    loras: tuple[UsedLora, ...] = ()
    has_image: bool = False
    has_mask: bool = False
    references: int = 0
    has_control: bool = False
    has_last_image: bool = False
    has_sigmas: bool = False
    prompts_2: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()
    """Arguments that the model does not take: their values here have no meaning."""

    @property
    def prompt(self) -> str:
        """The only prompt, or all of them, a line each."""
        return "\n".join(self.prompts)

    @property
    def negative_prompt(self) -> str:
        """As :attr:`prompt`."""
        return "\n".join(self.negative_prompts)
