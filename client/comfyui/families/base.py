"""What adapters of several families share; the interfaces are in :mod:`~xditd.client.comfyui.families.adapter`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xditd.client.comfyui.unsupported import is_empty
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_GUIDANCE, MAX_STEPS

if TYPE_CHECKING:
    import torch

    from xditd.client.comfyui.families.adapter import Keep, Kept

KNOWN_SIZES: Final = 8
"""For how many image sizes and text lengths the workers keep the token positions."""

CONTROL: Final = "ControlNet"

_REFERENCES: Final = "reference_latents"


class BaseAdapter:
    """See :class:`~xditd.client.comfyui.families.adapter.Adapter`."""


class BaseModelAdapter:
    """See :class:`~xditd.client.comfyui.families.adapter.ModelAdapter`."""

    wrapper: str = "diffusion_model"
    has_frame_axis: bool = False
    refused: Mapping[str, str] = {}
    """Keys of conditioning that change the model's input in a way that the workers cannot, with names for users."""
    has_guidance: bool = False
    """Whether the model embeds a guidance scale."""
    takes_sigmas: bool = False
    """Whether the argument ``timestep`` of a call is the sampler's sigma."""

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        return {name: keep(each.to(dtype) if each.is_floating_point() else each) for name, each in texts.items()}

    def schedule_values(self, sigmas: Sequence[float]) -> Mapping[str, list[float]]:
        if not self.takes_sigmas:
            return {}
        return {"timestep": [sigma for sigma in sigmas if 0.0 <= sigma <= 1.0][:MAX_STEPS]}

    def condition_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        yield from (what for key, what in self.refused.items() if not is_empty(part.get(key)))
        if not is_empty(part.get(_REFERENCES)):
            yield from self.method_faults(part.get("reference_latents_method"))
        if self.has_guidance and part.get("guidance", 0.0) is None:
            yield "conditioning without guidance (FluxDisableGuidance)"

    def loop_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        guidance = part.get("guidance")
        if self.has_guidance and guidance is not None and not 0.0 <= float(guidance) <= MAX_GUIDANCE:
            yield f"guidance {float(guidance):g} is not from 0 to {MAX_GUIDANCE:g}"

    def method_faults(self, method: str | None) -> Iterator[str]:
        """Name ComfyUI's method of placing reference latents if the workers do not have it; ``None`` is the model's."""
        yield from ()

    def numbers(
        self, timestep: torch.Tensor, rows: int, guidance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the time and, if the model embeds it, the guidance scale of each row, (rows,) each."""
        found = {"timestep": timestep.reshape(-1).expand(rows)}
        if guidance is not None and self.has_guidance:
            found["guidance"] = guidance.expand(rows)
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseCall:
    """The parts of each call; see :class:`~xditd.client.comfyui.families.adapter.ForwardCall`."""

    x: torch.Tensor
    numbers: Mapping[str, torch.Tensor]
    texts: Mapping[str, torch.Tensor]
    options: Mapping[str, Any]
    faults: Sequence[str]

    @property
    def rows(self) -> int:
        return int(self.x.shape[0])


class KeptPositions:
    """Tensors of token positions that the workers keep, for the sizes that were used last."""

    def __init__(self) -> None:
        self._known: dict[object, Any] = {}

    def get(self, key: object, keep: Keep, make: Callable[[], torch.Tensor]) -> Any:
        found = self._known.get(key)
        if found is None:
            while len(self._known) >= KNOWN_SIZES:
                del self._known[next(iter(self._known))]
            found = self._known[key] = keep(make())
        return found


def text_of(context: torch.Tensor | None) -> torch.Tensor:
    """Return the text embeddings of a call.

    Raises:
        BadRequest: there are none.
    """
    if context is None:
        raise BadRequest("XDiT: the conditioning has no text embeddings; connect CLIP Text Encode")
    return context


def control_faults(control: object) -> list[str]:
    """Name the control that ComfyUI gives to a call."""
    return [CONTROL] if control else []
