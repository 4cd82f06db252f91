"""Check a run when its sampler starts, before weights are lent and before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from xditd.client.comfyui.controlnets import Make, place_controls
from xditd.client.comfyui.understood import COMPILE_KEY
from xditd.client.comfyui.unsupported import condition_faults, model_option_faults, refuse
from xditd.ipc.errors import BadRequest

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
            BadRequest: latents or texts of another model.
            Unsupported: names everything that the workers cannot run.
        """
        guider = executor.class_obj
        patcher = guider.model_patcher
        noise, latent_format = args[0] if args else kwargs["noise"], patcher.model.latent_format
        check_latents(noise.shape, latent_format.latent_channels, latent_format.latent_dimensions)
        used = {name: parts for name, parts in guider.conds.items() if not _is_unused(name, guider)}
        check_texts(used, attrgetter(self._family.text_weight)(patcher.model.diffusion_model).shape[-1])
        _drop_torch_compile(guider.model_options)
        refuse([
            *patcher.understood.faults(patcher),
            *model_option_faults(guider.model_options),
            *condition_faults(guider.conds, self._family),
            *place_controls(guider.conds, self._family, self._make_control),
        ])  # fmt: skip
        return executor(*args, **kwargs)


def _is_unused(name: str, guider: Any) -> bool:
    """Return whether ComfyUI never predicts with this conditioning, unless a node asks for it."""
    is_asked_for = guider.model_options.get("disable_cfg1_optimization", False)
    return name == "negative" and getattr(guider, "cfg", None) == 1.0 and not is_asked_for


def check_latents(shape: Sequence[int], channels: int, dimensions: int) -> None:
    """Refuse latents that are not (images, ``channels``, ...) with so many ``dimensions`` of an image or a video.

    Raises:
        BadRequest: names what is wrong, and where such latents come from.
    """
    found = None
    if len(shape) != 2 + dimensions:
        found = f"has {len(shape)} dimensions, and this model's have {2 + dimensions}"
    elif shape[1] != channels:
        found = f"has {shape[1]} channels, and this model's have {channels}"
    elif not all(shape):
        found = "is empty"
    if found is not None:
        raise BadRequest(
            f"XDiT: the latent {found} (its shape is {list(shape)}); make it with the model's own VAE, or with the "
            "empty latent node of its family"
        )


def check_texts(conditions: Mapping[str, Iterable[Mapping[str, Any]]], channels: int) -> None:
    """Refuse text embeddings that do not have so many ``channels``.

    Raises:
        BadRequest: names the conditioning, and what encodes texts for this model.
    """
    for name, parts in conditions.items():
        for part in parts:
            text = part.get("cross_attn")
            if text is not None and text.shape[-1] != channels:
                raise BadRequest(
                    f"XDiT: the {name} conditioning has text embeddings of {text.shape[-1]} channels, and this model "
                    f"reads {channels}; encode the text with the CLIP of this model (a loader's type chooses it)"
                )


def _drop_torch_compile(model_options: dict[str, Any]) -> None:
    """Remove torch.compile's wrapper: it only makes a local model faster, and the model is in the workers."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if wrappers.pop(COMPILE_KEY, None):
        logger.warning("TorchCompileModel is ignored: the model runs in the workers, not in ComfyUI")
