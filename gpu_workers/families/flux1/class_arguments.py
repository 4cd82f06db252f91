"""The arguments that the classes of FLUX.1's transformers and of its ControlNets both take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from xditd.gpu_workers.families.flux1.config import Flux1Sizes
from xditd.gpu_workers.models.job_checks import check_batch, check_known, check_tensor
from xditd.gpu_workers.models.operations import Inputs, Model

_OF_ALL_ROWS: Final = ("img_ids", "txt_ids")
"""Arguments that all rows share."""


def check_arguments(
    model: Model[Flux1Sizes], inputs: Inputs, channels: int, alike: Sequence[str] = ()
) -> tuple[int, int, int]:
    """Check the arguments of both; return the rows, and the tokens of the text and of the image.

    ``channels`` are those of an image token. ``alike`` are further arguments of the shape of ``hidden_states``.

    Raises:
        BadRequest: names the argument, its value and the remedy.
    """
    given, config = inputs.arguments, model.config
    image, text = given["hidden_states"], given["encoder_hidden_states"]
    check_tensor("hidden_states", image, (None, None, channels), model.dtype)
    rows, image_tokens = image.shape[:2]
    check_batch("hidden_states", rows)
    for name in alike:
        check_tensor(name, given[name], (rows, image_tokens, channels), model.dtype)
    check_tensor("encoder_hidden_states", text, (rows, None, config.context_channels), model.dtype)
    check_tensor("pooled_projections", given["pooled_projections"], (rows, config.pooled_channels), model.dtype)
    check_tensor("img_ids", given["img_ids"], (image_tokens, 3))
    check_tensor("txt_ids", given["txt_ids"], (text.shape[1], 3))
    check_tensor("timestep", given["timestep"], (rows,))
    check_known("timestep", inputs.known, 0.0, 1.0, "give sigmas, not the 0 to 1000 of a scheduler")
    if config.has_guidance or given.get("guidance") is not None:
        check_tensor("guidance", given.get("guidance"), (rows,))
    return rows, text.shape[1], image_tokens


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """Return the arguments of some rows, as views."""
    return Inputs(
        {name: each if name in _OF_ALL_ROWS or each is None else each[rows] for name, each in inputs.arguments.items()},
        {name: each if name in _OF_ALL_ROWS else each[rows] for name, each in inputs.known.items()},
    )
