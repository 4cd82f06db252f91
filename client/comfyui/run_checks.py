"""Check a run when its sampler starts, before weights are lent and before the first step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from xditd.client.comfyui.controlnets import Make, place_controls
from xditd.client.comfyui.understood import COMPILE_KEY
from xditd.client.comfyui.unsupported import condition_faults, model_option_faults, refuse

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import ModelAdapter

logger = logging.getLogger(__name__)


class RunChecks:
    """Refuses a run that needs, in any of its steps, what the workers cannot run. A wrapper of ``outer_sample``."""

    def __init__(self, family: ModelAdapter, make_control: Make) -> None:
        self._family = family
        self._make_control = make_control

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the model, its options and all conditioning, let ControlNets run in the workers, then run.

        Raises:
            Unsupported: names everything that the workers cannot run.
        """
        guider = executor.class_obj
        patcher = guider.model_patcher
        _drop_torch_compile(guider.model_options)
        refuse([
            *patcher.understood.faults(patcher),
            *model_option_faults(guider.model_options),
            *condition_faults(guider.conds, self._family),
            *place_controls(guider.conds, self._family, self._make_control),
        ])  # fmt: skip
        return executor(*args, **kwargs)


def _drop_torch_compile(model_options: dict[str, Any]) -> None:
    """Remove torch.compile's wrapper: it only makes a local model faster, and the model is in the workers."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if wrappers.pop(COMPILE_KEY, None):
        logger.warning("TorchCompileModel is ignored: the model runs in the workers, not in ComfyUI")
