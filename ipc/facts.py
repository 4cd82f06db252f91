"""What the workers know of a lent component, so that clients carry no numbers of any model."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Finite
from xditd.ipc.errors import BadRequest
from xditd.ipc.tensors import Bytes, ComponentKind, Count, Described, DType, Name

Guidance = Literal["none", "embedded", "classifier_free"]
"""What a guidance scale is to a model: nothing, an input of it, or a weight between two predictions."""

Side = Annotated[int, msgspec.Meta(ge=0)] | Name
"""A size, or the name of what decides it (``batch``, ``tokens``): equal names in one component are equal sizes."""


class ArgumentFacts(Described, frozen=True, kw_only=True):
    """A tensor that a job takes: its name and shape. ``is_list``: a list of such, one for each row of the batch."""

    name: Name
    shape: Annotated[tuple[Side, ...], msgspec.Meta(max_length=limits.MAX_RANK)]
    is_list: bool = False
    is_needed: bool = True


Listed = Annotated[tuple[ArgumentFacts, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]


class LatentScaling(Described, frozen=True, kw_only=True):
    """How latents in jobs are made of a VAE's ``z``: they are ``(z - shift) * factor``. Both have no unit."""

    factor: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
    shift: Finite


class LatentFacts(Described, frozen=True, kw_only=True):
    """The latents of a component: (batch, channels, height / pixels, width / pixels)."""

    channels: Count
    pixels: Count
    """Pixels on a side for each latent."""
    multiple: Count = 1
    """Latents on a side come in multiples of it."""
    scaling: LatentScaling
    """A transformer's is that of the latents it reads and makes. A VAE's is what its family assumes where a job names
    no transformer: tensors do not tell it, and VAEs of several models look alike."""

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of the latents of ``batch`` images of so many pixels."""
        return batch, self.channels, height // self.pixels, width // self.pixels

    def check_vae(self, vae: LatentFacts) -> None:
        """Check that a VAE's latents are as large as these, a transformer's. How they are scaled may differ.

        Raises:
            BadRequest: another number of channels, or of pixels for each latent.
        """
        for what, mine, its in (
            ("channels", self.channels, vae.channels),
            ("pixels on a side for each latent", self.pixels, vae.pixels),
        ):
            if mine != its:
                raise BadRequest(f"vae: its latents have {its} {what}, the transformer's {mine}; lend that model's VAE")


class TransformerFacts(Described, frozen=True, kw_only=True):
    """Of a transformer. ``ulysses`` and ``ring`` are how its sequence is split over the ranks of this group."""

    heads: Count
    ulysses: Count
    ring: Count
    arguments: Listed
    """What ``Call`` takes, named as in the class's ``forward``."""
    variants: Names
    """Of ``Call`` and ``Generate``; the first one is ``class``."""
    conditioning: Listed
    """What ``Generate`` takes; the first one has a row for each image."""
    options: Names = ()
    """Of ``Generate``, besides those that every family has."""
    latents: LatentFacts
    guidance: Guidance
    default_guidance_scale: Finite
    default_steps: Count
    has_step_cache: bool = False


class VaeFacts(Described, frozen=True, kw_only=True):
    """Of a VAE. Pixels are in [-1, 1]."""

    latents: LatentFacts
    image_channels: Count
    has_encoder: bool


class TextEncoderFacts(Described, frozen=True, kw_only=True):
    """Of a text encoder: what its states are wide, how many tokens it takes, and whether it has a pooled state."""

    width: Count
    max_tokens: Count
    has_pooled: bool


class ComponentFacts(Described, frozen=True, kw_only=True):
    """Of any component; one of the last three is there, that of its ``kind``."""

    family: Name
    class_name: Name
    """Of diffusers or transformers."""
    kind: ComponentKind
    dtype: DType
    """Of most elements; what a transformer's tensors are cast to."""
    bytes_by_dtype: Annotated[dict[DType, Bytes], msgspec.Meta(max_length=16)]
    transformer: TransformerFacts | None = None
    vae: VaeFacts | None = None
    text_encoder: TextEncoderFacts | None = None
