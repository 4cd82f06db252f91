"""Wan 2.1 and 2.2 (text, first and last image) and VACE: their models in ComfyUI, and relatives that are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from xditd.client.comfyui.families.base import BaseAdapter
from xditd.client.comfyui.families.wan_calls import WanModel
from xditd.client.comfyui.families.wan_relatives import RELATIVES, name_relative
from xditd.client.comfyui.families.wan_vace import VaceModel
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter, ModelAdapter


class Wan(BaseAdapter):
    """The family; see :class:`~xditd.client.comfyui.families.adapter.Adapter`."""

    title: Final = "Wan 2.1 and 2.2 (text, first and last image, VACE)"

    def model_classes(self) -> tuple[type, ...]:
        import comfy.model_base

        return comfy.model_base.WAN21, comfy.model_base.WAN22, comfy.model_base.WAN21_Vace

    def config_classes(self) -> tuple[type, ...]:
        import comfy.supported_models as known

        relatives = (getattr(known, name, None) for name in RELATIVES)  # those that this ComfyUI knows
        return (
            known.WAN21_T2V, known.WAN21_I2V, known.WAN22_T2V, known.WAN21_Vace, *filter(None, relatives),
        )  # fmt: skip

    def check_config(self, config: Any, label: str) -> None:
        """Refuse related models, of which ComfyUI runs some with the same class.

        Raises:
            Unsupported: names the relative, or what the model reads besides what Wan does.
        """
        found = name_relative(type(config).__name__, config.unet_config)
        if found is not None:
            raise Unsupported(f"{label}: {found}; XDiT runs {self.title}, use the stock loader")

    def adapt(self, model: Any) -> ModelAdapter:
        import comfy.model_base

        transformer = model.diffusion_model
        if isinstance(model, comfy.model_base.WAN21_Vace):
            return VaceModel(transformer.vace_layers)
        images = transformer.img_emb
        return WanModel(
            has_image=images is not None,
            has_positions=images is not None and images.emb_pos is not None,
            has_frame_times=isinstance(model, comfy.model_base.WAN22),
        )


ADAPTER: Final[Adapter] = Wan()
