"""For tests of ComfyUI's adapters: numbers, and the arguments that an adapter makes of a call."""

from __future__ import annotations

from typing import Any

import torch

from xditd.client.comfyui.step_inputs import StepInputs
from xditd.client.jobs.arguments import KeptTensor


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(model: Any, *given: Any, dtype: torch.dtype = torch.bfloat16, **more: Any) -> dict[str, Any]:
    """Return the only forward that a model's adapter makes of a call of ComfyUI's model."""
    call = model.read(*given, **more)
    assert not call.faults
    numbers, kept = StepInputs().read(
        call.rows, call.numbers, call.texts, lambda texts: model.keep_row(texts, KeptTensor, dtype)
    )
    (found,) = call.arguments(slice(0, call.rows), numbers, kept, KeptTensor, dtype)
    return found
