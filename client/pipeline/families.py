"""What each model makes of the arguments of a call, as its pipeline in diffusers does, beyond what its facts say.

These are sizes of pictures, and which of two meanings an argument has. Sources: diffusers, the pipelines that
``folders.PIPELINES`` lists; tests compare the bits with them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.client.pipeline import pictures
from xditd.client.pipeline.adapter import Adapter, Encode, Plan, SeePicture
from xditd.client.pipeline.calls import Call
from xditd.client.pipeline.sources import SECOND, Source
from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported
from xditd.ipc.facts import TransformerFacts

if TYPE_CHECKING:
    import torch
    from PIL import Image

PIXELS: Final = 1024 * 1024
_STARTED_GUIDANCE: Final = 7.0
"""The guidance scale of FLUX.1 for image to image, inpaint and ControlNets, unless it is given."""
KONTEXT_SIZES: Final = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""The sizes that FLUX.1 Kontext was trained with: its reference gets the one of the nearest aspect."""


class Flux1(Adapter):
    """FLUX.1: a picture is a start, or of Fill what the mask is of; one reference, which Kontext takes."""

    without_references = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    edits = ("FluxKontextPipeline",)

    def defaults(self) -> dict[str, Any]:
        found = super().defaults()
        if self.source.pipeline_class in ("FluxImg2ImgPipeline", "FluxInpaintPipeline"):
            found["guidance"] = _STARTED_GUIDANCE
        return found

    def default_guidance(self, call: Call) -> float:
        is_started = call.image is not None and not self.is_fill
        has_none = call.control is None or (isinstance(call.control, list | tuple) and not call.control)
        has_nets = not has_none and "control_image" not in self.takes
        if (is_started or has_nets) and "guidance" not in self.chosen:
            return _STARTED_GUIDANCE
        return super().default_guidance(call)

    @property
    def is_fill(self) -> bool:
        return "masked_image_latents" in self.takes

    @property
    def has_control(self) -> bool:
        return not self.is_fill

    def add_image(self, call: Call, plan: Plan, see: SeePicture) -> None:
        if not self.is_fill:
            super().add_image(call, plan, see)
            return
        if call.mask is None:
            raise BadRequest(f"mask: {self.title} paints what it shows anew; give it beside image")
        picture = pictures.rgb(pictures.opened(call.image, "image"))
        plan.conditioning["image"] = pictures.pixels_of(pictures.resized(picture, plan.width, plan.height))
        mask = pictures.mask_of(pictures.opened(call.mask, "mask"), plan.width, plan.height)
        plan.conditioning["mask"] = mask.repeat(call.batch, 1, 1, 1)

    def plan(self, call: Call, encode: Encode, see: SeePicture) -> Plan:
        if self.is_fill and call.image is None:
            raise BadRequest(f"image: {self.title} needs the picture and its mask")
        return super().plan(call, encode, see)

    def references(self, given: Sequence[Image.Image]) -> Sequence[Image.Image]:
        if len(given) > 1:
            raise BadRequest(f"references: {len(given)}; {self.title} takes one: join several pictures into one")
        return given

    def reference(self, picture: Image.Image) -> Image.Image:
        aspect = picture.width / picture.height
        _, width, height = min((abs(aspect - w / h), w, h) for w, h in KONTEXT_SIZES)
        multiple = self.facts.latents.pixels * self.facts.latents.multiple
        return pictures.resized(picture, width // multiple * multiple, height // multiple * multiple)


class Flux2(Adapter):
    """FLUX.2: klein's base is guided, its distilled weights are not, and a folder says which it has."""

    def defaults(self) -> dict[str, Any]:
        found = super().defaults()
        is_base = self.source.pipeline_class == "Flux2KleinPipeline" and not self.source.settings.get("is_distilled")
        if is_base and self.facts.guidance == "classifier_free":  # an index that says nothing is of the base, too
            found |= {"guidance": 4.0, "steps": 50}
        return found

    def guidance(self, scale: float | None, default: float, negative: Sequence[str] | None) -> tuple[float, bool]:
        if self.source.settings.get("is_distilled") is True and scale is not None and scale > self.guides_above:
            raise BadRequest(f"guidance {scale:g}: the folder says that its weights are distilled; leave it out")
        return super().guidance(scale, default, negative)

    def options(self) -> dict[str, Any]:
        return {"kv_cache": 1} if self.source.pipeline_class == "Flux2KleinKVPipeline" else {}

    def plan(self, call: Call, encode: Encode, see: SeePicture) -> Plan:
        scheduler = self.source.scheduler or {}
        if call.sigmas is not None and call.steps is None and scheduler.get("use_dynamic_shifting"):
            raise BadRequest("sigmas without steps: the scheduler shifts them by the number of steps; give steps=, too")
        return super().plan(call, encode, see)

    def size(self, call: Call) -> tuple[int, int]:
        if not call.references:
            return super().size(call)
        first = self.reference(pictures.opened(call.references[0], "references[0]"))
        return call.width or first.width, call.height or first.height

    def reference(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        if min(width, height) < 64 or max(width / height, height / width) > 8:
            raise BadRequest(f"references: {width}x{height} pixels; use 64 or more on a side, and 8:1 at most")
        if width * height > PIXELS:
            scale = math.sqrt(PIXELS / (width * height))
            picture = pictures.resized(picture, int(width * scale), int(height * scale))
            width, height = picture.size
        multiple = self.facts.latents.pixels * self.facts.latents.multiple
        wide, high = width // multiple * multiple, height // multiple * multiple
        left, top = (width - wide) // 2, (height - high) // 2
        return picture.crop((left, top, left + wide, top + high))


def area_size(picture: Image.Image, area: int) -> tuple[int, int]:
    """Return the width and height of about so many pixels, in multiples of 32, with a picture's aspect.

    Raises:
        BadRequest: the picture is so narrow that a side is none or longer than a job takes.
    """
    ratio = picture.width / picture.height
    width = math.sqrt(area * ratio)
    height = width / ratio
    found = round(width / 32) * 32, round(height / 32) * 32
    if min(found) < 1 or max(found) > limits.MAX_SIDE_PIXELS:
        raise BadRequest(
            f"references: {picture.width}x{picture.height} pixels are {found[0]}x{found[1]} at {area} in all; give one "
            "that is less narrow"
        )
    return found


class QwenImage(Adapter):
    """Qwen-Image: guided with a negative prompt alone. The encoder sees references, too."""

    empty_negative = None
    without_references = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    edits = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")

    @property
    def has_length(self) -> bool:
        return super().has_length and self.source.model_class not in self.edits  # which cut nothing

    @property
    def is_first_edit(self) -> bool:
        return self.source.model_class == "QwenImageEditPipeline"

    def size(self, call: Call) -> tuple[int, int]:
        if not call.references:
            return super().size(call)
        one = call.references[0] if self.is_first_edit else call.references[-1]
        width, height = area_size(pictures.opened(one, "references"), PIXELS)
        return call.width or width, call.height or height

    def references(self, given: Sequence[Image.Image]) -> Sequence[Image.Image]:
        if self.is_first_edit and len(given) > 1:
            raise BadRequest(f"references: {len(given)}; {self.title} takes one (2509 and later: several)")
        return given

    def reference(self, picture: Image.Image) -> Image.Image:
        return pictures.resized(picture, *area_size(picture, PIXELS))

    def add_references(self, call: Call, plan: Plan, encode: Encode) -> None:
        super().add_references(call, plan, encode)
        if self.source.model_class in self.edits and not call.references:
            raise BadRequest(f"references: {self.title} of this folder edits pictures; give one or more")
        plan.text_images = [pictures.rgb(pictures.opened(each, "references")) for each in call.references]
        if self.is_first_edit:
            plan.text_options = {"edit": True}


_BASE_SHIFT: Final = 6.0
"""Of the schedule of Z-Image Base."""


class ZImage(Adapter):
    """Z-Image: guided above 0. Without a size, a picture decides. The shift of a folder tells Base from Turbo."""

    guides_above = 0.0

    def defaults(self) -> dict[str, Any]:
        found = super().defaults()
        scheduler = self.source.scheduler or {}
        if self.source.model_class is not None and scheduler.get("shift") == _BASE_SHIFT:
            found |= {"guidance": 5.0, "steps": 50}
        return found

    def strength(self, call: Call) -> float:
        is_own = call.strength is None and "strength" not in self.chosen
        return 1.0 if is_own and call.mask is not None else super().strength(call)

    def size(self, call: Call) -> tuple[int, int]:
        if call.image is None or (call.width and call.height):
            return super().size(call)
        picture = pictures.opened(call.image, "image")
        multiple = self.facts.latents.pixels * self.facts.latents.multiple
        wide, high = (side // multiple * multiple for side in picture.size)
        if not (call.width or wide) or not (call.height or high):
            raise BadRequest(
                f"image: {picture.width}x{picture.height} pixels, and {self.title} makes {multiple} or more on a side; "
                "give width and height"
            )
        return call.width or wide, call.height or high


_EXPANDING: Final = ("WanPipeline", "WanImageToVideoPipeline")
"""The pipelines that read ``expand_timesteps``, which is False unless their folders say it."""


class Wan(Adapter):
    """Wan: pictures are frames of the video."""

    shifts_sigmas = False

    def check_settings(self) -> None:
        settings, has_two = self.source.settings, SECOND in self.source.parts
        ratio = settings.get("boundary_ratio")
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1):
            raise BadCheckpoint(f"{self.title}: boundary_ratio={ratio!r:.100} is no number above 0, at most 1")
        if ratio is not None and not has_two:
            raise Unsupported(
                f"{self.title}: boundary_ratio={ratio:g} is where a second transformer begins, and there is none; give "
                "transformer_2="
            )
        if ratio is None and self.source.pipeline_class is not None and has_two:  # its class's own, too
            raise Unsupported(
                f"{self.title}: boundary_ratio=None: its pipeline never runs transformer_2; set the ratio where the "
                "second transformer begins, such as 0.875"
            )
        is_expanded = "image" in self.takes and not self.takes["image"].is_needed
        wanted = settings.get("expand_timesteps") or False
        if self.source.pipeline_class in _EXPANDING and wanted is not is_expanded:
            raise Unsupported(
                f"{self.title}: expand_timesteps={wanted!r:.100}, and this transformer is computed with {is_expanded} "
                "here (True is of TI2V); open the folder that the transformer is of"
            )

    def options(self) -> dict[str, Any]:
        ratio = self.source.settings.get("boundary_ratio")
        return {} if ratio is None or SECOND not in self.source.parts else {"boundary_ratio": float(ratio)}

    def add_image(self, call: Call, plan: Plan, see: SeePicture) -> None:
        given = {"image": call.image} | ({} if call.last_image is None else {"last_image": call.last_image})
        opened = {name: pictures.rgb(pictures.opened(each, name)) for name, each in given.items()}
        for name, picture in opened.items():
            plan.conditioning[name] = pictures.pixels_of(pictures.resized(picture, plan.width, plan.height))
        if "image_embeds" in self.takes:
            import torch

            plan.conditioning["image_embeds"] = torch.cat([see(each) for each in opened.values()])

    def plan(self, call: Call, encode: Encode, see: SeePicture) -> Plan:
        for name, value in (("image", call.image), ("last_image", call.last_image)):
            if name in self.takes and self.takes[name].is_needed and value is None:
                raise BadRequest(f"{name}: {self.title} makes videos from one; give {name}=")
        if call.last_image is not None and call.image is None:
            raise BadRequest("last_image without image: give the first picture, too")
        return super().plan(call, encode, see)


class WanVace(Wan):
    """Wan VACE: a control video with a mask, and references, each on a white canvas of the video's size."""

    def add_control(self, call: Call, plan: Plan) -> None:
        if call.mask is not None and call.control is None:
            raise BadRequest("mask without control: give the video that it is of, a list of pictures")
        for name, given in (("video", call.control), ("mask", call.mask)):
            if given is not None:
                plan.conditioning[name] = self._video(name, given, plan)

    def _video(self, name: str, given: Any, plan: Plan) -> torch.Tensor:
        import torch

        argument = "control" if name == "video" else name
        if isinstance(given, str | os.PathLike | Mapping) or not hasattr(given, "__iter__"):
            raise BadRequest(
                f"{argument}: {given!r:.100} of type {type(given).__name__}; give a list, a picture for each frame"
            )
        opened = [pictures.rgb(pictures.opened(each, f"{argument}[{n}]")) for n, each in enumerate(given)]
        if len(opened) != plan.frames:
            raise BadRequest(f"{argument}: {len(opened)} pictures for {plan.frames} frames; give one for each")
        frames = [pictures.pixels_of(pictures.resized(each, plan.width, plan.height)) for each in opened]
        video = torch.stack(frames, dim=2)
        return video if name == "video" else torch.clamp((video + 1) / 2, min=0, max=1)[:, :1]

    def add_references(self, call: Call, plan: Plan, encode: Encode) -> None:  # noqa: ARG002 (the job encodes them)
        import torch

        canvases = []
        for number, each in enumerate(call.references):
            picture = pictures.rgb(pictures.opened(each, f"references[{number}]"))
            multiple = self.facts.latents.pixels  # as the pipeline's processor, which gets no size
            wide, high = (side // multiple * multiple for side in picture.size)
            scale = min(plan.height / max(1, high), plan.width / max(1, wide))
            size = (int(high * scale), int(wide * scale))
            if 0 in size:
                raise BadRequest(
                    f"references[{number}]: {picture.width}x{picture.height} pixels; give {multiple} or more on a "
                    "side, and one that is less narrow"
                )
            pixels = pictures.pixels_of(pictures.resized(picture, wide, high))
            pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0]
            canvas = torch.ones(3, plan.height, plan.width)
            top, left = (plan.height - size[0]) // 2, (plan.width - size[1]) // 2
            canvas[:, top : top + size[0], left : left + size[1]] = pixels
            canvases.append(canvas)
        if canvases:
            plan.conditioning["reference_images"] = canvases


ADAPTERS: Final[Mapping[str, type[Adapter]]] = {
    "flux1": Flux1,
    "flux2": Flux2,
    "qwen_image": QwenImage,
    "z_image": ZImage,
    "wan": Wan,
    "wan_vace": WanVace,
}


def adapter_for(family: str, facts: TransformerFacts, source: Source, title: str) -> Adapter:
    """Return the rules of a family; those of most families for one that is installed from elsewhere.

    Raises:
        Unsupported, BadCheckpoint: a value of the folder contradicts what is computed; names it.
    """
    found = ADAPTERS.get(family, Adapter)(facts, source, title)
    found.check_settings()
    return found
