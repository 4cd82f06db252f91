"""Facts of a lent component (shapes, arguments, defaults), which workers report to clients."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Finite
from xditd.ipc.errors import BadRequest
from xditd.ipc.field_types import Bytes, Count, Described, DType, Name
from xditd.ipc.packed import PackedFormat
from xditd.ipc.protocol import Text
from xditd.ipc.tensors import ComponentKind

Guidance = Literal["none", "embedded", "classifier_free"]
"""How a model uses a guidance scale: not at all, as an input, or to weight two predictions."""

Side = Annotated[int, msgspec.Meta(ge=0)] | Name
"""A size, or a symbolic name (``batch``, ``tokens``): equal names in one component are equal sizes."""


class ArgumentFacts(Described, frozen=True, kw_only=True):
    """A tensor argument of a job: its name and shape. ``is_list``: a list of them, one for each row of the batch; with
    ``is_shared`` a list of any length, of which every row has all, such as reference images."""

    name: Name
    shape: Annotated[tuple[Side, ...], msgspec.Meta(max_length=limits.MAX_RANK)]
    is_list: bool = False
    is_shared: bool = False
    is_needed: bool = True


Listed = Annotated[tuple[ArgumentFacts, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]
Formats = Annotated[dict[PackedFormat, Bytes], msgspec.Meta(max_length=limits.MAX_PACKED_FORMATS)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]


class LatentScaling(Described, frozen=True, kw_only=True):
    """How latents in jobs are scaled from a VAE's ``z``: ``(z - shift) * factor``. Both have no unit."""

    factor: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
    shift: Finite


class LatentFacts(Described, frozen=True, kw_only=True):
    """The latents of a component: (batch, channels, height / pixels, width / pixels).

    Those of a video are (batch, channels, (video frames - 1) / frames + 1, height / pixels, width / pixels).
    """

    channels: Count
    pixels: Count
    """Pixels on a side for each latent."""
    multiple: Count = 1
    """Height and width in latents are multiples of it."""
    frames: Count = 0
    """Frames of a video for each latent frame, but that the first latent is one frame; 0: latents of images."""
    scaling: LatentScaling
    """Of a transformer: the scaling of its inputs and outputs. Of a VAE: its family's default, for jobs without a
    transformer; the tensors do not show it, and VAEs of several models have the same."""
    space: Name | None = None
    """The latent space: transformers and VAEs of one name fit each other, those of two do not, whatever the shapes.
    ``None`` of a family that names none: shapes alone are compared."""

    def shape(self, batch: int, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Return the shape of the latents of ``batch`` images or videos of ``height`` x ``width`` pixels."""
        sides = (height // self.pixels, width // self.pixels)
        if not self.frames:
            return batch, self.channels, *sides
        return batch, self.channels, (frames - 1) // self.frames + 1, *sides

    def shape_of(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the latents of (batch, channels, height, width); videos have frames before these."""
        batch, _, *frames, height, width = pixels
        if frames:
            return self.shape(batch, height, width, frames[0])
        return batch, self.channels, height // self.pixels, width // self.pixels

    def pixels_of(self, latents: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """Return the shape of the images or videos that latents of this shape are decoded to."""
        batch, _, *frames, height, width = latents
        count = [(each - 1) * self.frames + 1 for each in frames]
        return batch, channels, *count, height * self.pixels, width * self.pixels

    def check_frames(self, frames: int) -> None:
        """Check the frames of a generation.

        Raises:
            BadRequest: more than one of an image, or a number that does not divide.
        """
        if not self.frames:
            if frames != 1:
                raise BadRequest(f"frames: {frames} of a model of images; leave it at 1")
        elif not 1 <= frames <= limits.MAX_FRAMES or (frames - 1) % self.frames:
            near = max(0, min(frames, limits.MAX_FRAMES) - 1) // self.frames * self.frames + 1
            raise BadRequest(
                f"frames: {frames} is not 1 more than a multiple of {self.frames}, up to {limits.MAX_FRAMES}; "
                f"{near} is near"
            )

    def check_vae(self, vae: LatentFacts) -> None:
        """Check that a VAE's latents have the shape and the space of this transformer's. The scaling may differ.

        Raises:
            BadRequest: another number of channels, or of pixels for each latent, or another latent space.
        """
        for what, mine, its in (
            ("channels", self.channels, vae.channels),
            ("pixels on a side for each latent", self.pixels, vae.pixels),
            # A VAE of videos has images of one frame.
            ("frames for each latent frame", self.frames, vae.frames if self.frames else 0),
        ):
            if mine != its:
                raise BadRequest(f"vae: its latents have {its} {what}, the transformer's {mine}; lend that model's VAE")
        if None not in (self.space, vae.space) and self.space != vae.space:
            raise BadRequest(
                f"vae: its latents are of the space {vae.space}, the transformer's of {self.space}, and images would "
                "be noise; lend that model's VAE"
            )


class PromptFacts(Described, frozen=True, kw_only=True):
    """What the prompts of a transformer need, by role. Roles are diffusers' names of a pipeline's components.

    Weights in prompts, such as ``(cat:1.2)``, are text.
    """

    encoders: Annotated[dict[Name, Names], msgspec.Meta(max_length=limits.MAX_ROLES)]
    """For each role the families of its text encoder."""
    tokenizers: Annotated[dict[Name, Names], msgspec.Meta(max_length=limits.MAX_ROLES)]
    """For each role the classes of its tokenizer or processor, as transformers names them."""
    image_tokenizers: Annotated[dict[Name, Names], msgspec.Meta(max_length=limits.MAX_ROLES)] = msgspec.field(
        default_factory=dict
    )
    """The same for prompts with pictures; empty if ``max_images`` is 0."""
    max_images: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_PROMPT_IMAGES)] = 0
    """Pictures that a prompt takes."""
    takes_negative: bool = False
    takes_second: bool = False
    """Whether the second encoder may read other prompts than the first."""
    default_negative: Annotated[str, msgspec.Meta(max_length=limits.MAX_PROMPT_CHARS)] | None = None
    """The negative prompt that diffusers' pipeline takes if none is given and the guidance needs one."""
    options: Names = ()
    """Options of ``EncodePrompt`` that this family has."""


class TransformerFacts(Described, frozen=True, kw_only=True):
    """Facts of a transformer. ``ulysses`` and ``ring`` are its degrees in this group."""

    heads: Count
    ulysses: Count
    ring: Count
    arguments: Listed
    """Arguments of ``Call``, named as in the class's ``forward``."""
    variants: Names
    """Variants of ``Call`` and ``Generate``; the first one is ``class``."""
    conditioning: Listed
    """Arguments of ``Generate``; the first one has a row for each image."""
    options: Names = ()
    """Options of ``Generate`` that only this family has."""
    stages: Count = 1
    """With 2, ``Generate`` may run a second transformer, which predicts at low noise."""
    latents: LatentFacts
    float32_latents: Names = ()
    """The variants whose latents are float32, whatever the dtype of weights and conditioning; those of others have the
    dtype of the noise, or of the conditioning."""
    guidance: Guidance
    default_guidance_scale: Finite
    default_steps: Count
    default_height: Count = 1024
    default_width: Count = 1024
    default_frames: Count = 1
    default_fps: Count = 16
    """Frames a second of a video, as it was trained."""
    starts: Annotated[tuple[Literal["image", "mask"], ...], msgspec.Meta(max_length=2)] = ()
    """What a generation may start from: an image, by a strength, and a mask of it, for inpainting."""
    has_step_cache: bool = False
    prompt: PromptFacts | None = None
    """What ``EncodePrompt`` needs; ``None``: give the tensors of :attr:`conditioning`."""


class VaeFacts(Described, frozen=True, kw_only=True):
    """Facts of a VAE. Pixels are in [-1, 1]."""

    latents: LatentFacts
    image_channels: Count
    has_encoder: bool


class TextEncoderFacts(Described, frozen=True, kw_only=True):
    """Facts of a text encoder: the width of its states, its most tokens, and whether it has a pooled state.

    ``layers``: how many it has, if it takes masks and gives the states of layers; else 0. ``images``: the arguments of
    images in texts, as the processor of its class names them; none if it takes texts alone.
    """

    width: Count
    max_tokens: Count
    has_pooled: bool
    layers: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_LAYER)] = 0
    images: Annotated[tuple[ArgumentFacts, ...], msgspec.Meta(max_length=limits.MAX_IMAGE_ARGUMENTS)] = ()


class ControlNetFacts(Described, frozen=True, kw_only=True):
    """Facts of a ControlNet. ``ulysses`` and ``ring`` are its degrees in this group."""

    controls: Name
    """The family of the transformers that its residuals are for."""
    heads: Count
    ulysses: Count
    ring: Count
    arguments: Listed
    """Arguments of its forward in a ``Call``, named as in the class's."""
    modes: Count
    """How many kinds of pictures it tells apart by a mode; 0: it takes no mode."""
    residuals: Annotated[dict[Name, Count], msgspec.Meta(max_length=8)]
    """How many residuals it gives, by the name of the transformer's argument."""
    latents: LatentFacts
    """Those of its picture."""


METHODS: Final = ("forward", "encode", "decode")
"""The methods of a module that runs as its class which ``Call`` can run, where the class has them."""


class MethodFacts(Described, frozen=True, kw_only=True):
    """A method of a module: the names of its arguments, and of those without a default.

    ``takes_others``: it has ``**kwargs``.
    """

    arguments: Names
    needed: Names
    takes_others: bool = False


class ModuleFacts(Described, frozen=True, kw_only=True):
    """Facts of a module that runs as its class does. ``methods`` are those that ``Call`` can run."""

    methods: Annotated[dict[Name, MethodFacts], msgspec.Meta(max_length=16)]
    layout: Literal["rows", "tokens"] = "rows"
    """How several ranks run it: ``rows``, the parts of a call and the rows of a batch on different ranks; ``tokens``,
    so or with the tokens of every row split over all ranks, whichever gives a rank less to do."""
    layout_reason: Text = ""
    """Why ranks cannot split its tokens."""
    family_reason: Text = ""
    """Why no family runs it: which were asked, and what does not fit. Empty if the client asked for its class."""


class LoraFacts(Described, frozen=True, kw_only=True):
    """Facts of a LoRA: how many of its layers have names of which families, and which have names of none."""

    families: Annotated[dict[Name, Count], msgspec.Meta(max_length=64)]
    text_encoders: Annotated[tuple[Names, ...], msgspec.Meta(max_length=64)] = ()
    """Families of text encoders of which it has layers: any of one entry has the layers that this entry is of."""
    layers: Count
    largest_rank: Count
    unknown: Annotated[tuple[Name, ...], msgspec.Meta(max_length=limits.MAX_LORA_NAMES)] = ()
    """The first of them, as the file spells them."""
    unknown_count: Count = 0


class TokenizerFacts(Described, frozen=True, kw_only=True):
    """Facts of a tokenizer or a processor: how many ids it has, from 0, and which of its files are used."""

    vocabulary: Count
    files: Names
    takes_images: bool
    has_chat_template: bool


class ComponentFacts(Described, frozen=True, kw_only=True):
    """Facts of any component; of the last seven fields, the one of its ``kind`` is set."""

    family: Name
    class_name: Name
    """The class in diffusers or transformers."""
    kind: ComponentKind
    dtype: DType
    """The dtype of most elements, to which a transformer's tensors are cast."""
    bytes_by_dtype: Annotated[dict[DType, Bytes], msgspec.Meta(max_length=16)]
    """Bytes of the tensors that it reads, by dtype."""
    bytes_by_format: Formats = msgspec.field(default_factory=dict)
    """Bytes of those of its packed weights with their companions, by format."""
    scratch_bytes: Bytes = 0
    """The size of the buffer into which a rank dequantises one packed weight at a time; all components share it."""
    transformer: TransformerFacts | None = None
    vae: VaeFacts | None = None
    text_encoder: TextEncoderFacts | None = None
    controlnet: ControlNetFacts | None = None
    module: ModuleFacts | None = None
    lora: LoraFacts | None = None
    tokenizer: TokenizerFacts | None = None

    @property
    def family_reason(self) -> str:
        """Why no family runs it: empty if one does, or if its client asked for the class."""
        return "" if self.module is None else self.module.family_reason
