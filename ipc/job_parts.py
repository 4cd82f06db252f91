"""What the requests of jobs are made of: LoRAs, ControlNets, forwards, numerics, schedules and settings."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Arguments, Finite, Whole
from xditd.ipc.field_types import Count, Described, Name
from xditd.ipc.loras import Scale
from xditd.ipc.protocol import ComponentId
from xditd.ipc.tensors import IoTensor

Side = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE_PIXELS)]
Unit = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Guidance = Annotated[float, msgspec.Meta(ge=0.0, le=limits.MAX_GUIDANCE)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class StepStrength(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The strength of a LoRA from a step on, counted from 0."""

    step: Annotated[int, msgspec.Meta(ge=1, lt=limits.MAX_STEPS)]
    strength: Scale


class LoraUse(Described, frozen=True, kw_only=True):
    """A lent LoRA that a job adds to a component, and how strongly; 0 is as without it.

    ``later`` are its strengths from later steps of a generation on, in their order.
    """

    component_id: ComponentId
    strength: Scale
    later: Annotated[tuple[StepStrength, ...], msgspec.Meta(max_length=limits.MAX_STEPS)] = ()


LoraUses = Annotated[tuple[LoraUse, ...], msgspec.Meta(max_length=limits.MAX_LORAS)]


BlockResiduals = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_CONTROLLED_BLOCKS)], ...],
    msgspec.Meta(max_length=limits.MAX_CONTROLLED_BLOCKS),
]
"""For each block of a transformer in turn, the number of the residual that it gets."""


class PartControl(Described, frozen=True, kw_only=True):
    """A lent ControlNet that runs before a forward, whose results get its residuals, times ``scale``.

    ``arguments`` are named as in the signature of its class. ``blocks`` are, by the name of the transformer's argument,
    which blocks get which residuals; without them, the transformer's class decides.
    """

    component_id: ComponentId
    arguments: Arguments
    scale: Scale = 1.0
    blocks: Annotated[dict[Name, BlockResiduals], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=dict)


class Part(Described, frozen=True, kw_only=True):
    """One forward: its arguments, named as in the signature of the component's class.

    The residuals of several ``controls`` are added up in their order.
    """

    arguments: Arguments
    controls: Annotated[tuple[PartControl, ...], msgspec.Meta(max_length=limits.MAX_CONTROLS)] = ()


class Numerics(Described, frozen=True, kw_only=True):
    """The caller's settings of torch and diffusers that change the bits of a forward. Workers set them for one call."""

    autocast: Literal["float16", "bfloat16", "float32"] | None = None
    """The dtype of ``torch.autocast`` on the module's device, if it is enabled."""
    default_dtype: Literal["float16", "bfloat16", "float32", "float64"] = "float32"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    convolutions_in_tf32: bool = True
    reductions_in_half: bool = True
    """Whether products in bfloat16 and float16 may be summed in that dtype."""
    attention_kernels: Annotated[
        tuple[Literal["flash", "memory_efficient", "math", "cudnn"], ...], msgspec.Meta(max_length=4)
    ] = (
        "flash",
        "memory_efficient",
        "math",
        "cudnn",
    )
    """The kernels that torch's ``scaled_dot_product_attention`` may choose from."""
    is_deterministic: bool = False
    attention_backend: Name = "native"
    """diffusers' name of the attention backend in use."""


class Schedule(Described, frozen=True, kw_only=True):
    """A scheduler of diffusers, as its ``scheduler_config.json`` has it: its class, and the settings of that."""

    class_name: Name
    settings: Annotated[
        dict[Name, bool | Whole | Finite | Name | None], msgspec.Meta(max_length=limits.MAX_SCHEDULE_SETTINGS)
    ] = msgspec.field(default_factory=dict)


class Sampling(Described, frozen=True, kw_only=True):
    """Sampling parameters of a generation, the same for all families.

    ``sigmas`` has ``steps`` descending values in (0, 1]; the final 0 is implied, as in diffusers. Without it the
    family's schedule is used, and without ``guidance_scale`` the family's default. ``options`` are those of the family,
    named in its facts; others are refused. With a ``step_cache_threshold`` above 0, a step whose first block's residual
    differs from that of the last computed step by less than this, relative to it, reuses the residual of all other
    blocks: not lossless.
    """

    height: Side
    width: Side
    frames: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_FRAMES)] = 1
    """Of a video; an image is one."""
    strength: Unit = 1.0
    """With a start image, the share of the steps that run: the last ones, from that image with their noise."""
    schedule: Schedule | None = None
    """In place of the family's own. It shifts ``sigmas``, as in diffusers' pipelines; without it they are unchanged."""
    steps: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_STEPS)]
    sigmas: Annotated[tuple[Unit, ...], msgspec.Meta(max_length=limits.MAX_STEPS)] | None = None
    guidance_scale: Guidance | None = None
    seed: Seed | None = None
    step_cache_threshold: Unit = 0.0
    variant: Name = "class"
    options: Annotated[dict[Name, bool | Whole | Finite], msgspec.Meta(max_length=64)] = msgspec.field(
        default_factory=dict
    )


class CutText(Described, frozen=True, kw_only=True):
    """A text of which the encoder of ``role`` reads the first ``read`` of ``tokens`` tokens, with those of a template.

    ``number`` counts the prompts of the request, or its negative prompts.
    """

    role: Name
    number: Count
    is_negative: bool = False
    tokens: Count
    read: Count


CutTexts = Annotated[tuple[CutText, ...], msgspec.Meta(max_length=2 * limits.MAX_BATCH * limits.MAX_ROLES)]


class Control(Described, frozen=True, kw_only=True):
    """A lent ControlNet of a generation, in the steps from the share ``start`` to the share ``end`` of all steps.

    Its residuals are multiplied by ``scale``. Either ``image``, (batch or 1, channels, height, width) in [-1, 1], which
    the generation's VAE encodes, or ``latents`` of one, shaped as those of the generation, are given. ``mode`` is the
    kind of the picture for a ControlNet of several kinds.
    """

    component_id: ComponentId
    scale: Scale = 1.0
    start: Unit = 0.0
    end: Unit = 1.0
    mode: Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_CONTROL_MODES)] | None = None
    image: IoTensor | None = None
    latents: IoTensor | None = None
