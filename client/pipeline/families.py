"""What each model makes of the arguments of a call, as its pipeline in diffusers does.

Most of it follows from the facts: what a generation takes among its conditioning, what it starts from, how it is
guided. The classes below add what facts do not say: sizes of pictures, and which of two meanings an argument has.
Sources: diffusers, the pipelines that ``folders.PIPELINES`` lists; tests compare the bits with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from xditd.client.pipeline import pictures
from xditd.client.pipeline.calls import Call
from xditd.client.pipeline.sources import Source
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import TransformerFacts

if TYPE_CHECKING:
    import torch
    from PIL import Image

Encode = Callable[["torch.Tensor"], "torch.Tensor"]
"""Encodes pixels (1, 3, height, width) to the transformer's latents."""
SeePicture = Callable[["Image.Image"], "torch.Tensor"]
"""Gives the states of an image encoder for a picture."""

NEGATIVE: Final = "negative_prompt_embeds"
REFERENCES: Final = "reference_latents"
PIXELS: Final = 1024 * 1024


@dataclass
class Plan:
    """What a call gives to ``Client.generate``, besides texts."""

    width: int
    height: int
    frames: int
    conditioning: dict[str, Any] = field(default_factory=dict)
    start_image: torch.Tensor | None = None
    start_mask: torch.Tensor | None = None
    text_images: Sequence[Image.Image] = ()
    """What the text encoder sees beside the prompt."""
    text_options: dict[str, Any] = field(default_factory=dict)
    """Options of ``Client.encode_prompt``."""


class Adapter:
    """The rules of most families; others change some."""

    guides_above: ClassVar[float] = 1.0
    """The guidance scale up to which no negative prompt takes part."""
    empty_negative: ClassVar[str | None] = ""
    """The negative prompt of a guided call without one; ``None``: such a call is not guided."""

    default_strength: ClassVar[float] = 0.6
    """Of a picture that a call starts from, as in diffusers' pipelines."""

    def __init__(self, facts: TransformerFacts, source: Source, title: str) -> None:
        self.facts = facts
        self.source = source
        self.title = title
        self.takes = {each.name: each for each in facts.conditioning}

    # --- What it takes ---------------------------------------------------------------------------

    def refused(self) -> dict[str, str]:
        """Return the arguments that no call of this model takes, with the reason."""
        facts, takes = self.facts, self.takes
        starts = "image" in facts.starts
        reasons = {
            "negative_prompt": (NEGATIVE in takes, "it has no classifier-free guidance, which a negative prompt needs"),
            "guidance": (facts.guidance != "none", "its weights take no guidance scale"),
            "image": (starts or "image" in takes, "it makes pictures from words alone"),
            "mask": ("mask" in facts.starts or "mask" in takes, "it has no inpainting"),
            "strength": (starts, "it does not start from a picture"),
            "last_image": ("last_image" in takes, "it takes no last picture"),
            "references": (REFERENCES in takes or "reference_images" in takes, "it takes no references"),
            "control": (self.has_control, "it takes no control picture and no ControlNet"),
            "frames": (bool(facts.latents.frames), "it makes pictures, no videos"),
            "options": (bool(facts.options), "it has no options of its own"),
            "step_cache": (facts.has_step_cache, "it has no step cache"),
        }
        return {name: why for name, (is_taken, why) in reasons.items() if not is_taken}

    @property
    def has_control(self) -> bool:
        return "control_image" in self.takes or "video" in self.takes

    def defaults(self) -> dict[str, Any]:
        """Return what a call without arguments uses."""
        facts = self.facts
        return {
            "width": facts.default_width,
            "height": facts.default_height,
            "frames": facts.default_frames,
            "fps": facts.default_fps,
            "steps": facts.default_steps,
            "guidance": facts.default_guidance_scale,
            "strength": self.default_strength,
        }

    def options(self) -> dict[str, Any]:
        """Return the options of every generation, which the folder says."""
        return {}

    def guidance(self, scale: float | None, default: float, negative: Sequence[str] | None) -> tuple[float, bool]:
        """Return the guidance scale of a call, and whether a negative prompt takes part.

        Raises:
            BadRequest: a scale without a negative prompt, or a negative prompt that would have no effect.
        """
        if self.facts.guidance != "classifier_free":
            return (default if scale is None else scale), False
        used = default if scale is None else scale
        if used <= self.guides_above:
            if negative is not None:
                raise BadRequest(
                    f"negative_prompt with guidance {used:g} would have no effect in {self.title}: leave it out, or "
                    f"guide with more than {self.guides_above:g}"
                )
            return used, False
        if negative is None and self.empty_negative is None:
            if scale is not None:
                raise BadRequest(
                    f'guidance {scale:g} of {self.title} needs a negative_prompt, which may be " ": without one its '
                    "pipeline does not guide"
                )
            return self.guides_above, False
        return used, True

    def is_guided(self, scale: float | None, default: float) -> bool:
        """Whether a call with this scale would use a negative prompt."""
        used = default if scale is None else scale
        return self.facts.guidance == "classifier_free" and used > self.guides_above

    def strength(self, call: Call) -> float:
        """Return the strength of a call that starts from a picture."""
        return float(call.defaults["strength"] if call.strength is None else call.strength)

    # --- What it makes of pictures -----------------------------------------------------------------

    def plan(self, call: Call, encode: Encode, see: SeePicture) -> Plan:
        """Check and resize the pictures of a call.

        Raises:
            BadRequest: a picture that cannot be read, or is missing; names the argument.
        """
        plan = Plan(*self.size(call), frames=self.frames(call))
        self.add_references(call, plan, encode)
        if call.image is not None:
            self.add_image(call, plan, see)
        elif call.mask is not None and "video" not in self.takes:
            raise BadRequest("mask without image: give the picture that it is of")
        elif call.strength is not None:
            raise BadRequest(f"strength {call.strength:g} without image would have no effect: give the picture")
        self.add_control(call, plan)
        return plan

    def size(self, call: Call) -> tuple[int, int]:
        return call.width or call.defaults["width"], call.height or call.defaults["height"]

    def frames(self, call: Call) -> int:
        if not self.facts.latents.frames:
            return 1
        return int(call.frames or call.defaults["frames"])

    def add_image(self, call: Call, plan: Plan, see: SeePicture) -> None:  # noqa: ARG002 (Wan shows it to CLIP)
        """Start from the picture, or from what a mask leaves of it."""
        if call.references:
            raise BadRequest("image beside references: its pipelines take one of both; leave one out")
        picture = pictures.opened(call.image, "image")
        plan.start_image = pictures.pixels_of(pictures.resized(pictures.rgb(picture), plan.width, plan.height))
        if call.mask is not None:
            plan.start_mask = pictures.mask_of(pictures.opened(call.mask, "mask"), plan.width, plan.height)

    def add_references(self, call: Call, plan: Plan, encode: Encode) -> None:
        if not call.references:
            return
        opened = [
            pictures.rgb(pictures.opened(each, f"references[{number}]")) for number, each in enumerate(call.references)
        ]
        plan.conditioning[REFERENCES] = [
            encode(pictures.pixels_of(self.reference(each)))[0] for each in self.references(opened)
        ]

    def references(self, given: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """Check the number of references."""
        return given

    def reference(self, picture: Image.Image) -> Image.Image:
        """Resize a reference for the VAE."""
        return picture

    def add_control(self, call: Call, plan: Plan) -> None:
        if call.control is None:
            if "control_image" in self.takes:
                raise BadRequest(f"control: {self.title} makes pictures from one; give control=")
            return
        if "control_image" in self.takes:
            picture = pictures.rgb(pictures.opened(call.control, "control"))
            plan.conditioning["control_image"] = pictures.pixels_of(pictures.resized(picture, plan.width, plan.height))


KONTEXT_SIZES: Final = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""The sizes that FLUX.1 Kontext was trained with: its reference gets the one of the nearest aspect."""


class Flux1(Adapter):
    """FLUX.1: a picture is a start, or of Fill what the mask is of; one reference, which Kontext takes."""

    def defaults(self) -> dict[str, Any]:
        found = super().defaults()
        if self.source.pipeline_class in ("FluxImg2ImgPipeline", "FluxInpaintPipeline"):
            found["guidance"] = 7.0
        return found

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
        if self.source.settings.get("is_distilled") is False and self.facts.guidance == "classifier_free":
            found |= {"guidance": 4.0, "steps": 50}
        return found

    def guidance(self, scale: float | None, default: float, negative: Sequence[str] | None) -> tuple[float, bool]:
        if self.source.settings.get("is_distilled") is True and scale is not None and scale > self.guides_above:
            raise BadRequest(f"guidance {scale:g}: the folder says that its weights are distilled; leave it out")
        return super().guidance(scale, default, negative)

    def options(self) -> dict[str, Any]:
        return {"kv_cache": 1} if self.source.pipeline_class == "Flux2KleinKVPipeline" else {}

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
    """Return the width and height of about so many pixels, in multiples of 32, with a picture's aspect."""
    ratio = picture.width / picture.height
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(width / 32) * 32, round(height / 32) * 32


class QwenImage(Adapter):
    """Qwen-Image: guided with a negative prompt alone. The encoder sees references, too."""

    empty_negative = None

    @property
    def is_first_edit(self) -> bool:
        return self.source.pipeline_class == "QwenImageEditPipeline"

    def refused(self) -> dict[str, str]:
        found = super().refused()
        if self.source.pipeline_class in ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
            why = "its pipeline edits references; give the picture as references="
            found |= {"image": why, "mask": why, "strength": why}
        return found

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
        if self.source.pipeline_class in ("QwenImageEditPipeline", "QwenImageEditPlusPipeline") and not call.references:
            raise BadRequest(f"references: {self.title} of this folder edits pictures; give one or more")
        plan.text_images = [pictures.rgb(pictures.opened(each, "references")) for each in call.references]
        if self.is_first_edit:
            plan.text_options = {"edit": True}


class ZImage(Adapter):
    """Z-Image: guided above 0. Without a size, a picture decides."""

    guides_above = 0.0

    def strength(self, call: Call) -> float:
        is_own = call.strength is None and call.defaults["strength"] == self.default_strength
        return 1.0 if is_own and call.mask is not None else super().strength(call)

    def size(self, call: Call) -> tuple[int, int]:
        if call.image is None or (call.width and call.height):
            return super().size(call)
        picture = pictures.opened(call.image, "image")
        multiple = self.facts.latents.pixels * self.facts.latents.multiple
        wide, high = (side // multiple * multiple for side in picture.size)
        return call.width or wide, call.height or high


class Wan(Adapter):
    """Wan: pictures are frames of the video."""

    def options(self) -> dict[str, Any]:
        ratio = self.source.settings.get("boundary_ratio")
        return {} if ratio is None or "transformer_2" not in self.source.parts else {"boundary_ratio": float(ratio)}

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
            pixels = pictures.pixels_of(pictures.resized(picture, wide, high))
            scale = min(plan.height / high, plan.width / wide)
            size = (int(high * scale), int(wide * scale))
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
    """Return the rules of a family; those of most families for one that is installed from elsewhere."""
    return ADAPTERS.get(family, Adapter)(facts, source, title)
