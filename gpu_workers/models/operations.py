"""What jobs do with the components of a family, and what the engine gives to it: protocols and their arguments."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from xditd.gpu_workers.models.entries import Shape

if TYPE_CHECKING:
    from xditd.gpu_workers.models.step_cache import StepCache
    from xditd.gpu_workers.parallel.layouts import ParallelLayout
    from xditd.ipc.facts import LatentScaling, TextEncoderFacts, TransformerFacts, VaeFacts
    from xditd.ipc.status import FusedCheck

RowResults = torch.Tensor | list[torch.Tensor]
"""A result for each row of a forward: along the first dimension of a tensor, or in a list where shapes may differ."""

ConfigT_co = TypeVar("ConfigT_co", bound=Hashable, covariant=True)
ConfigT_contra = TypeVar("ConfigT_contra", bound=Hashable, contravariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arguments of one forward: tensors are on the model's device, in the dtypes and shapes that were given.

    ``known`` are the values of those arguments that the host knows, in row-major order: what came as values.
    """

    arguments: Mapping[str, Any]
    known: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class CallOptions:
    """How forwards run, besides their arguments.

    ``foreseen`` are values of arguments in forwards to come, as they will be given; they change no bit of a result.
    """

    variant: str = "class"
    foreseen: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    step_cache: StepCache | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a generation shall make, as its client asked for it. ``batch`` is that of the conditioning.

    ``sigmas`` are used as they are, without the final 0; without them the family's own schedule runs.
    ``options`` are by the names of the facts.
    """

    batch: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    sigmas: tuple[float, ...] | None = None
    variant: str = "class"
    options: Mapping[str, float] = field(default_factory=dict)


class Operations(Protocol[ConfigT_contra]):
    """What every family does with a component; one of the three below says the rest."""

    def build(self, config: ConfigT_contra) -> torch.nn.Module:
        """Build the module. The caller makes it a meta module and sets the dtype."""

    def fuse(
        self,
        config: ConfigT_contra,
        module: torch.nn.Module,
        layout: ParallelLayout,
        dtype: torch.dtype,
        exceptions: Mapping[str, torch.dtype],
    ) -> FastPath | None:
        """Give ``module`` a faster forward on the checkpoint's own tensors, or return ``None`` where there is none.

        ``layout`` is this component's own. ``exceptions`` are the parameters of another dtype than ``dtype``.

        Raises:
            Unsupported: kernels or a precision that were asked for by name cannot be had in this layout, or from
                weights of these dtypes.
        """


class TransformerOperations(Operations[ConfigT_contra], Protocol[ConfigT_contra]):
    """How ``Call`` and ``Generate`` run a transformer."""

    def facts(self, config: ConfigT_contra, layout: ParallelLayout) -> TransformerFacts:
        """Say what clients need to know."""

    def check(self, model: Model[ConfigT_contra], inputs: Inputs) -> None:
        """Check the arguments of one forward, on every rank alike, before any of it runs.

        Their names are those of the facts, and what is needed is there. Floating tensors are finite, or are being
        found so. Whatever does not fit the configuration or the ranks is refused by name.

        Raises:
            BadRequest: a shape, a dtype, a value that the host knows.
            Unsupported: too few tokens for the ranks.
        """

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        """Return the shape of each row of a forward's result. Halves of a group share rows out between them."""

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        """Return the forward of some of the rows alone, as views."""

    def run(self, model: Model[ConfigT_contra], inputs: Inputs, options: CallOptions) -> RowResults:
        """Run one forward, and return its rows: whole on every rank that shares them, in the dtype of the weights.

        The ranks of a sequence run it together. Tensors are on the model's device and as they were given.
        """

    def tree(self, rows: RowResults) -> Any:
        """Return the result of a forward as its class has it: what ``forward(..., return_dict=False)`` returns."""

    @property
    def recipe(self) -> Recipe[ConfigT_contra]:
        """How ``Generate`` runs it."""


class Recipe(Protocol[ConfigT_contra]):
    """How a family makes latents of noise. The loop over the steps is the engine's (``jobs/generate.py``)."""

    def check(self, config: ConfigT_contra, wanted: Wanted) -> None:
        """Check what needs no tensor.

        Raises:
            BadRequest: a size, an option, a number; by name, with what would do.
        """

    def start(
        self, model: Model[ConfigT_contra], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> DenoisingRun:
        """Check conditioning and noise, and make ready to step.

        ``conditioning`` is by the names of the facts, on the model's device, in the dtypes that were given. ``noise``
        is (batch, channels, height / pixels, width / pixels), finite, in :meth:`noise_dtype`.

        Raises:
            BadRequest, Unsupported: as ``TransformerOperations.check``; on every rank alike.
        """

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        """Return the dtype of noise for weights of ``dtype``: drawn in it, as the family's own pipeline does."""


class DenoisingRun(Protocol):
    """One generation under way: everything in its steps that hangs on the family."""

    @property
    def scheduler(self) -> Any:
        """A scheduler of diffusers whose timesteps are set."""

    @property
    def latents(self) -> torch.Tensor:
        """What the first step starts from, in the shape and dtype in which steps are made."""

    @property
    def foreseen(self) -> Mapping[str, tuple[float, ...]]:
        """Values of arguments in all steps, where the host knows them; as in ``Call``."""

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        """Return the forwards of one step: one, or several that are independent."""

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        """Combine the rows of each part to what the scheduler steps by, shaped as ``latents``, in their dtype.

        ``latents - sigma * predicted`` is what the step takes the clean latents for.
        """

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents between two steps as (batch, channels, height, width)."""


class VaeOperations(Operations[ConfigT_contra], Protocol[ConfigT_contra]):
    """How ``Decode``, ``Encode`` and ``Generate`` run a VAE."""

    def facts(self, config: ConfigT_contra) -> VaeFacts:
        """Say what clients need to know."""

    def shares(self, model: Model[ConfigT_contra], latents: torch.Tensor) -> bool:
        """Say whether all ranks decode these latents together; else one does it sooner alone."""

    def decode(
        self, model: Model[ConfigT_contra], latents: torch.Tensor, scaling: LatentScaling, *, is_shared: bool
    ) -> torch.Tensor:
        """Decode (batch, channels, h, w) to images (batch, 3, height, width), not cut off at [-1, 1].

        ``scaling`` is that of ``latents``: the VAE computes with ``latents / factor + shift``.

        Raises:
            BadRequest: shape, or values that are not finite.
        """

    def encode(self, model: Model[ConfigT_contra], image: torch.Tensor, scaling: LatentScaling) -> torch.Tensor:
        """Encode images (batch, 3, height, width) in [-1, 1] to ``(mode - shift) * factor`` of the posterior's mode.

        Raises:
            BadRequest: shape, values that are not finite, or a checkpoint without an encoder.
        """


class TextEncoderOperations(Operations[ConfigT_contra], Protocol[ConfigT_contra]):
    """How ``EncodeText`` runs a text encoder."""

    def facts(self, config: ConfigT_contra) -> TextEncoderFacts:
        """Say what clients need to know."""

    def vocabulary(self, config: ConfigT_contra) -> int:
        """How many tokens it knows."""

    def encode(
        self, model: Model[ConfigT_contra], token_ids: torch.Tensor, *, pooled: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode token ids (batch, tokens), checked, to hidden states (batch, tokens, width), and pooled ones."""


class Model(Protocol[ConfigT_co]):
    """A plugged model, as a family sees it: the model that the engine holds."""

    @property
    def config(self) -> ConfigT_co:
        """What ``Family.configure`` returned."""

    @property
    def module(self) -> torch.nn.Module:
        """What ``Family.build`` returned, with parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """That of most weights."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def layout(self) -> ParallelLayout:
        """How the ranks share its work."""


class FastPath(Protocol):
    """A forward that reads the tensors of a checkpoint by canonical name, besides the module's own parameters."""

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Hand out how it compared with the plain forward, each comparison once."""

    def reserve(self) -> int:
        """Get the memory that :meth:`plug` fills with what it makes of a checkpoint; return its bytes, mostly 0."""

    def plug(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors until :meth:`unplug` or the next plug."""

    def unplug(self) -> None:
        """Drop all references to lent memory, and free the reserved buffers."""
