"""Text conditioning for jobs: kept in the workers, read from a file, or random."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xditd.client.job_inputs import check_embeds, check_guidance
from xditd.client.tensor_text import tensor_text
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, named
from xditd.ipc.name_lists import listed
from xditd.ipc.recognition import unsupported_error

if TYPE_CHECKING:
    import torch

    from xditd.client.session import Session

EMBEDS: Final = "prompt_embeds"
POOLED: Final = "pooled_prompt_embeds"

_numbers = itertools.count(1)  # across the clients of this process: the workers know conditionings by process and id


class Conditioning:
    """Text conditioning that workers keep: tensors cross with the first ``denoise`` that uses it, then only a name.

    Holds a copy on the host, to send it again when the workers have lost it or pushed it out (it is then sent along
    with the request, unasked). ``guidance`` is for guidance-distilled checkpoints. One row serves a whole batch.
    """

    def __init__(
        self, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor, guidance: float | None = None
    ) -> None:
        self.batch = check_embeds(prompt_embeds, pooled_prompt_embeds)
        self.guidance = None if guidance is None else check_guidance("guidance", guidance)
        embeds, pooled = (each.detach().to("cpu", copy=True) for each in (prompt_embeds, pooled_prompt_embeds))
        # Twice the size: the workers hold it in the dtype of the model, which may be a wider one.
        is_kept = 2 * (embeds.nbytes + pooled.nbytes) <= limits.MAX_KEPT_CONDITIONING_BYTES
        self._held = _Held(embeds, pooled, f"c{next(_numbers)}" if is_kept else None)

    @property
    def prompt_embeds(self) -> torch.Tensor:
        """(batch, text tokens, context), on the host. Do not write to it: workers would not notice."""
        return self._held.prompt_embeds

    @property
    def pooled_prompt_embeds(self) -> torch.Tensor:
        """(batch, pooled), on the host. Do not write to it."""
        return self._held.pooled_prompt_embeds

    @property
    def conditioning_id(self) -> str | None:
        """Its name in the workers; ``None`` if it is too large to be kept, and crosses every time."""
        return self._held.conditioning_id

    @classmethod
    def passing(cls, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> Conditioning:
        """Tensors for one request, where they are: nothing is copied, and no worker keeps them."""
        passing = cls.__new__(cls)
        passing.batch = check_embeds(prompt_embeds, pooled_prompt_embeds)
        passing.guidance = None
        passing._held = _Held(prompt_embeds, pooled_prompt_embeds, None)
        return passing

    def with_guidance(self, guidance: float | None) -> Conditioning:
        """The same with another guidance; the workers keep the tensors once for both."""
        other = Conditioning.__new__(Conditioning)
        other.batch = self.batch
        other.guidance = None if guidance is None else check_guidance("guidance", guidance)
        other._held = self._held
        return other

    def __repr__(self) -> str:
        embeds, pooled = tensor_text(self.prompt_embeds), tensor_text(self.pooled_prompt_embeds)
        return f"<Conditioning prompt_embeds {embeds}, pooled {pooled}, guidance {self.guidance}>"

    def is_kept_by(self, session: Session) -> bool:
        """Whether the workers behind a session were sent it; they may have lost it since."""
        return self._held.keeper is not None and self._held.keeper() is session

    def note_kept_by(self, session: Session) -> None:
        if self.conditioning_id is not None:
            self._held.keeper = weakref.ref(session)


class _Held:
    """What conditionings of different guidance share."""

    def __init__(
        self, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor, conditioning_id: str | None
    ) -> None:
        self.prompt_embeds = prompt_embeds
        self.pooled_prompt_embeds = pooled_prompt_embeds
        self.conditioning_id = conditioning_id
        self.keeper: weakref.ref[Session] | None = None


def conditionings_of(
    given: Conditioning | Sequence[Conditioning] | torch.Tensor, pooled_prompt_embeds: torch.Tensor | None
) -> list[Conditioning]:
    """Read what a forward is given: one conditioning, several, or tensors.

    Raises:
        BadRequest: something else, or tensors that are not a pair.
    """
    if pooled_prompt_embeds is not None:
        return [Conditioning.passing(given, pooled_prompt_embeds)]  # type: ignore[arg-type]
    listed = [given] if isinstance(given, Conditioning) else given
    if not isinstance(listed, Sequence) or not all(isinstance(each, Conditioning) for each in listed):
        raise BadRequest(
            f"conditioning: {type(given).__name__} alone cannot be used; give what condition() returns, one or "
            "several, or prompt_embeds and pooled_prompt_embeds"
        )
    return list(listed)


def read_conditioning(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read ``prompt_embeds`` and ``pooled_prompt_embeds``; a missing batch axis is put in front.

    Raises:
        BadCheckpoint: the file is no sound safetensors file.
        BadRequest: it lacks one of the two.
    """
    from xditd.client.tensor_files import read_tensors

    tensors = read_tensors(path)
    missing = [name for name in (EMBEDS, POOLED) if name not in tensors]
    if missing:
        there = listed(tensors) or "no tensors"
        raise BadRequest(f"{path}: lacks {' and '.join(missing)}; it holds {there}", names=tensors)
    embeds, pooled = tensors[EMBEDS], tensors[POOLED]
    return embeds[None] if embeds.ndim == 2 else embeds, pooled[None] if pooled.ndim == 1 else pooled


def random_conditioning(transformer: Path, seed: int, text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw normal values of the widths that a FLUX.1 checkpoint takes: a test pattern, not a prompt.

    Raises:
        BadRequest: the widths cannot be told from the tensor names.
    """
    import torch

    context, pooled = conditioning_widths(transformer)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, text_tokens, context, generator=generator)
    return embeds, torch.randn(1, pooled, generator=generator)


def conditioning_widths(transformer: Path) -> tuple[int, int]:
    """Tell context and pooled width by the layers that take them in, under any prefix.

    Raises:
        BadRequest, Unsupported: it is no FLUX.1 transformer.
        BadCheckpoint: it is not a sound safetensors file.
    """
    from xditd.client.tensor_files import read_stored

    stored = read_stored(transformer)
    widths = []
    for layer in ("txt_in.weight", "vector_in.in_layer.weight"):
        found = [each.shape for name, each in stored.items() if name == layer or name.endswith(f".{layer}")]
        if len(found) != 1 or len(found[0]) != 2:
            what = BadRequest(
                f"no FLUX.1 transformer by its names ({len(found)} tensors are {layer}, instead of one matrix): give "
                "another file, or embeddings of your own"
            )
            raise named(str(transformer), unsupported_error(stored) or what)
        widths.append(found[0][1])
    return widths[0], widths[1]
