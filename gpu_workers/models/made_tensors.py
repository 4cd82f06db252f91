"""Check the tensors of a live module that no checkpoint holds: a family computes its own, and would ignore others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.errors import Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import Manifest
from xditd.ipc.transports.tensor_views import BlockViews

_ANGLE_ERROR: Final = 1e-3
"""Sines of a large position differ by this much where a GPU has computed its angle in float32."""
_RELATIVE_ERROR: Final = 1e-5


def check_made_tensors(match: CheckpointMatch, manifest: Manifest, opened: Sequence[OpenBlock | None]) -> None:
    """Check that lent tables of positions and the like are those that the module's class makes.

    Each rank checks the blocks that it maps itself. Tables may have been computed on another device, and rounded to the
    dtype of the weights.

    Raises:
        Unsupported: some are not; the error names them.
    """
    changed = []
    for spec in manifest.tensors:
        block = opened[spec.block] if spec.name in match.made else None
        if block is not None:
            lent = BlockViews(block.bytes).view(spec).to("cpu", copy=True)
            if not _is_same(lent, match.made[spec.name], match.dtype):
                changed.append(spec.name)
    if changed:
        raise Unsupported(
            f"{manifest.label}: family {match.family.name} makes {listed(changed)} by itself, and yours "
            f"{'differ' if len(changed) > 1 else 'differs'} from what the class makes: lend the module with "
            "as_class=True, or build it anew",
            names=changed,
        )


def _is_same(lent: torch.Tensor, made: torch.Tensor, dtype: torch.dtype) -> bool:
    made = made.cpu()
    if lent.shape != made.shape or lent.dtype not in (made.dtype, dtype):
        return False
    if not (lent.is_floating_point() or lent.is_complex()):
        return torch.equal(lent, made)
    error = max(_RELATIVE_ERROR, 2 * torch.finfo(lent.dtype).eps)
    wide = torch.complex128 if lent.is_complex() else torch.float64
    tolerance = _ANGLE_ERROR if lent.ndim > 1 else 0.0  # one row of frequencies, or a table of their sines
    return torch.allclose(lent.to(wide), made.to(lent.dtype).to(wide), rtol=error, atol=tolerance, equal_nan=True)
