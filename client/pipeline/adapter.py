"""What most models make of the arguments of a call, by the facts of their transformers.

Facts say what a generation takes among its conditioning, what it starts from, and how it is guided. ``families.py`` has
what they do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from xditd.client.pipeline import pictures
from xditd.client.pipeline.calls import Call
from xditd.client.pipeline.sources import Source
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import TransformerFacts
from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    import torch
    from PIL import Image

Encode = Callable[["torch.Tensor"], "torch.Tensor"]
"""Encodes pixels (1, 3, height, width) to the transformer's latents."""
SeePicture = Callable[["Image.Image"], "torch.Tensor"]
"""Gives the states of an image encoder for a picture."""

NEGATIVE: Final = "negative_prompt_embeds"
REFERENCES: Final = "reference_latents"
MAX_LENGTH: Final = "max_sequence_length"
"""The argument, and the option of prompts."""


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

    default_length: ClassVar[int] = 512
    """The tokens to which prompts are padded or cut, as in diffusers' pipelines."""

    shifts_sigmas: ClassVar[bool] = True
    """Whether the pipelines take sigmas, which their scheduler shifts."""

    without_references: ClassVar[tuple[str, ...]] = ()
    """Pipelines of transformers that take references, which take none themselves."""
    edits: ClassVar[tuple[str, ...]] = ()
    """Pipelines of these transformers whose picture is a reference."""

    def __init__(self, facts: TransformerFacts, source: Source, title: str) -> None:
        self.facts = facts
        self.source = source
        self.title = title
        self.takes = {each.name: each for each in facts.conditioning}
        self.chosen: frozenset[str] = frozenset()
        """The defaults that the pipeline was opened with, by their names."""

    def check_settings(self) -> None:
        """Refuse values of the folder that contradict what is computed.

        Raises:
            Unsupported, BadCheckpoint: names the setting and its value.
        """

    # --- What it takes ---------------------------------------------------------------------------

    def refused(self) -> dict[str, str]:
        """Return the arguments that no call of this model takes, with the reason."""
        facts, takes = self.facts, self.takes
        starts = "image" in facts.starts
        references = REFERENCES in takes or "reference_images" in takes
        no_start = "it starts from no picture: give those that the prompt refers to as references="
        has_second = facts.prompt is not None and facts.prompt.takes_second
        reasons = {
            "prompt_2": (has_second, "its pipeline has one text for all of its encoders"),
            "weights": (False, "its pipeline has no weights in prompts, (cat:1.2) is text"),
            "negative_prompt": (NEGATIVE in takes, "it has no classifier-free guidance, which a negative prompt needs"),
            MAX_LENGTH: (self.has_length, "its prompts have one length"),
            "guidance": (facts.guidance != "none", "its weights take no guidance scale"),
            "image": (starts or "image" in takes, no_start if references else "it makes pictures from words alone"),
            "mask": ("mask" in facts.starts or "mask" in takes, "it has no inpainting"),
            "strength": (starts, "it does not start from a picture"),
            "last_image": ("last_image" in takes, "it takes no last picture"),
            "references": (references, "it takes no references"),
            "control": (self.has_control, "it takes no control picture and no ControlNet"),
            "frames": (bool(facts.latents.frames), "it makes pictures, no videos"),
            "options": (bool(facts.options), "it has no options of its own"),
            "step_cache": (facts.has_step_cache, "it has no step cache"),
        }
        return {name: why for name, (is_taken, why) in reasons.items() if not is_taken} | self.refused_by_class()

    def refused_by_class(self) -> dict[str, str]:
        """Return what the folder's pipeline does not take, though its transformer does."""
        used = self.source.model_class
        if used in self.without_references:
            return {"references": f"a {used} takes none, as {listed(self.edits)} would"}
        if used in self.edits:
            return dict.fromkeys(("image", "mask", "strength"), f"a {used} edits references; give references=")
        return {}

    @property
    def has_length(self) -> bool:
        """Whether a call says how many tokens its prompts have."""
        return self.facts.prompt is not None and MAX_LENGTH in self.facts.prompt.options

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
            **({MAX_LENGTH: self.default_length} if self.has_length else {}),
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
        """Return whether a call with this scale would use a negative prompt."""
        used = default if scale is None else scale
        return self.facts.guidance == "classifier_free" and used > self.guides_above

    def default_guidance(self, call: Call) -> float:
        """Return the guidance scale of a call that gives none."""
        return float(call.defaults["guidance"])

    def strength(self, call: Call) -> float:
        """Return the strength of a call that starts from a picture."""
        return float(call.defaults["strength"] if call.strength is None else call.strength)

    def length(self, call: Call) -> int | None:
        """Return to how many tokens the prompts of a call are padded or cut; ``None`` for the model's own number."""
        wanted = call.max_sequence_length or call.defaults.get(MAX_LENGTH)
        return None if wanted == self.default_length else wanted

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
