"""The image that a generation starts from, and its mask: checked, and written to a job's block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xditd.client.jobs import checks
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import TransformerFacts

if TYPE_CHECKING:
    import torch

_AXES: Final = {
    "start_image": ("image", "(batch, 3, height, width)"),
    "start_mask": ("mask", "(batch, 1, height, width)"),
}


def check_start(
    image: torch.Tensor | None,
    mask: torch.Tensor | None,
    strength: float,
    facts: TransformerFacts,
    size: tuple[int, int, int],
    *,
    has_vae: bool,
) -> None:
    """Check the start of a generation of ``size`` (batch, height, width).

    Raises:
        BadRequest: names the argument, its value and the remedy.
    """
    batch, *sides = size
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 <= strength <= 1.0:
        raise BadRequest(f"strength: {strength!r} is not a number from 0 to 1")
    if image is None:
        if mask is not None or strength != 1.0:
            what = "start_mask" if mask is not None else f"strength {strength:g}"
            raise BadRequest(f"{what} without start_image would have no effect: give the image, or leave it out")
        return
    if not has_vae:
        raise BadRequest("start_image: the generation's VAE encodes it; give vae=")
    for name, given in (("start_image", image), ("start_mask", mask)):
        if given is None:
            continue
        kind, axes = _AXES[name]
        if kind not in facts.starts:
            raise BadRequest(f"{name}: generations of this transformer take none; leave it out")
        checks.check_tensor(name, given, axes, 4)
        if list(given.shape[2:]) != sides:
            raise BadRequest(
                f"{name}: shape {checks.shape_text(given)} for a generation of {sides[0]}x{sides[1]}; resize it"
            )
        if given.shape[0] not in (1, batch):
            raise BadRequest(f"{name}: {given.shape[0]} for {batch} images; give one for each, or one for all")


def steps_to_run(steps: int, strength: float) -> int:
    """Return how many of the steps run with this strength, by the rule of diffusers' pipelines."""
    return steps - int(max(steps - min(steps * strength, steps), 0))
