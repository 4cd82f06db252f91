"""Where conditioning lies while a sampler runs: on the device that samples, so that no step carries it there.

ComfyUI keeps conditioning on the host, gathers it anew at each step, and copies and converts it there on its way to the
GPU: 8 MiB a step for 512 tokens of 4096 numbers, which a forward of its own hides and one in the workers does not.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.conds
import torch

from xditd.client.comfyui.fused_sampler import FusedEuler


def place_conditioning(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
    """Move the conditioning of one run to the model's device, then let it run.

    ComfyUI calls it as a wrapper of ``Sampler.sample``, when ``guider.conds`` are this run's own: other nodes' tensors
    stay as they are, and what they put in place of these later counts as before.
    """
    if not isinstance(executor.class_obj, FusedEuler):  # which sends it once, from the host
        device = guider.model_patcher.load_device
        for conditions in guider.conds.values():
            for condition in conditions:
                placed = {name: _placed(value, device) for name, value in condition["model_conds"].items()}
                condition["model_conds"] = placed
    return executor(guider, *args, **kwargs)


def _placed(value: Any, device: torch.device) -> Any:
    tensor = getattr(value, "cond", None)
    if not isinstance(value, comfy.conds.CONDRegular) or not isinstance(tensor, torch.Tensor):
        return value
    if tensor.device == device:
        return value
    moved = copy.copy(value)
    moved.cond = tensor.to(device)
    return moved
