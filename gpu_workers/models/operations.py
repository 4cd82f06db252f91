"""The protocols by which jobs run the components of a family: transformers, VAEs, text encoders."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from xditd.gpu_workers.models.entries import Shape

if TYPE_CHECKING:
    from xditd.gpu_workers.kernels.branches import Branch, Branches
    from xditd.gpu_workers.kernels.static_branches import StaticCounts
    from xditd.gpu_workers.models.forward_paths import ForwardPaths
    from xditd.gpu_workers.models.planned_path import PlannedPath
    from xditd.gpu_workers.models.step_cache import StepCache
    from xditd.gpu_workers.packed.tensors import PackedTensor
    from xditd.gpu_workers.parallel.layouts import ParallelLayout
    from xditd.ipc.facts import ControlNetFacts, LatentScaling, TextEncoderFacts, TransformerFacts, VaeFacts
    from xditd.ipc.job_parts import Schedule
    from xditd.ipc.status import FusedCheck

RowResults = torch.Tensor | list[torch.Tensor]
"""The result of a forward by row: the first dimension of a tensor, or a list if shapes may differ."""

Residuals = Mapping[str, Sequence[torch.Tensor]]
"""What a ControlNet gives a transformer's blocks, (rows, tokens, channels) each, by the transformer's argument."""

ConfigT_co = TypeVar("ConfigT_co", bound=Hashable, covariant=True)
ConfigT_contra = TypeVar("ConfigT_contra", bound=Hashable, contravariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arguments of one forward: tensors are on the model's device, in the client's dtypes and shapes.

    ``known`` are the values, in row-major order, of those arguments that the client sent as numbers.
    """

    arguments: Mapping[str, Any]
    known: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    controls: tuple[Any, ...] = ()
    """ControlNets that run before the forward (``models.controls.Control``), whose residuals the engine adds to the
    arguments."""


@dataclass(frozen=True, slots=True, eq=False)
class CallOptions:
    """Options of forwards, besides their arguments.

    ``foreseen`` are the values of arguments in later forwards, for work ahead of time; they change no bit of a result.
    ``loras`` are equal if the branches in the module's layers are; a path that does not run these layers adds them,
    too.
    """

    variant: str = "class"
    foreseen: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    step_cache: StepCache | None = None
    loras: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The settings of a generation, as the client gave them. ``batch`` is that of the conditioning.

    ``sigmas``, without the final 0, are used as they are, or with a ``schedule`` as it shifts them; ``None`` are those
    of the family. ``options`` have the names of the facts.
    """

    batch: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    sigmas: tuple[float, ...] | None = None
    variant: str = "class"
    options: Mapping[str, float] = field(default_factory=dict)
    frames: int = 1
    stages: int = 1
    """The transformers that the client gave: 2 with one for low noise."""
    schedule: Schedule | None = None
    """The scheduler that the client gave; ``None`` is the family's own."""
    vae_dtype: torch.dtype | None = None
    """Of the weights of the VAE that the client gave; ``None`` without one."""


class Operations(Protocol[ConfigT_contra]):
    """The operations that all kinds have; each of the three protocols below adds its own."""

    def build(self, config: ConfigT_contra) -> torch.nn.Module:
        """Build the module. The caller sets the meta device and the dtype."""

    def fuse(
        self,
        config: ConfigT_contra,
        module: torch.nn.Module,
        layout: ParallelLayout,
        dtype: torch.dtype,
        exceptions: Mapping[str, torch.dtype],
    ) -> FastPath | None:
        """Give ``module`` a faster forward that reads the checkpoint's tensors; return ``None`` if there is none.

        ``layout`` is this component's own. ``exceptions`` are the parameters of another dtype than ``dtype``, without
        the biases of packed layers, which cast them.

        Raises:
            Unsupported: the kernels or the precision of the settings cannot run in this layout, or with weights of
                these dtypes.
        """


class TransformerOperations(Operations[ConfigT_contra], Protocol[ConfigT_contra]):
    """The operations of a transformer, for ``Call`` and ``Generate``."""

    def facts(self, config: ConfigT_contra, layout: ParallelLayout) -> TransformerFacts:
        """Return the facts that clients need."""

    def check(self, model: Model[ConfigT_contra], inputs: Inputs) -> None:
        """Check the arguments of one forward, on every rank alike, before any of it runs.

        The engine has checked the names and that no needed one is missing; it checks that floating tensors are finite.

        Raises:
            BadRequest: a wrong shape, dtype, or value that the host knows; names the argument.
            Unsupported: too few tokens for the ranks.
        """

    def rows(self, inputs: Inputs) -> tuple[Shape, ...]:
        """Return the shape of each row of a forward's result. The halves of a group split the rows."""

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        """Return the inputs of these rows alone, as views."""

    def run(self, model: Model[ConfigT_contra], inputs: Inputs, options: CallOptions) -> RowResults:
        """Run one forward, and return its rows, in the dtype of the weights.

        The ranks of a sequence run it together, and each returns whole rows.
        """

    def tree(self, rows: RowResults) -> Any:
        """Return what ``forward(..., return_dict=False)`` of the diffusers class returns."""

    @property
    def recipe(self) -> Recipe[ConfigT_contra]:
        """How ``Generate`` runs it."""


class Recipe(Protocol[ConfigT_contra]):
    """How a family samples latents from noise. The loop over the steps is in ``jobs/generate.py``."""

    def check(self, config: ConfigT_contra, wanted: Wanted) -> None:
        """Check the settings that need no tensor.

        Raises:
            BadRequest: a wrong size, option or number; names it and what is accepted.
        """

    def start(
        self, model: Model[ConfigT_contra], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> DenoisingRun:
        """Check conditioning and noise, and prepare the steps.

        ``conditioning`` has the names of the facts, on the model's device, in the client's dtypes. ``noise``
        has the shape of the facts' latents, finite, in :meth:`noise_dtype`.

        Raises:
            BadRequest, Unsupported: as ``TransformerOperations.check``; on every rank alike.
        """

    def noise_dtype(self, dtype: torch.dtype, variant: str) -> torch.dtype:
        """Return the dtype in which the family's own pipeline draws noise, for weights of ``dtype``.

        Variants for which it is float32 whatever the weights have give clients float32 latents (``float32_latents`` of
        the facts).
        """


class DenoisingRun(Protocol):
    """One running generation: the parts of its steps that depend on the family."""

    @property
    def scheduler(self) -> Any:
        """A scheduler of diffusers whose timesteps are set."""

    @property
    def latents(self) -> torch.Tensor:
        """The first latents, in the shape and dtype of the steps."""

    @property
    def foreseen(self) -> Mapping[str, tuple[float, ...]]:
        """The values of arguments in all steps, if the host knows them; as in ``CallOptions``."""

    @property
    def stages(self) -> Sequence[int]:
        """Of each step, the transformer that runs it: 0 the first, then 1 the second. Needed with two."""

    def parts(self, latents: torch.Tensor, step: int) -> list[Inputs]:
        """Return the inputs of the independent forwards of one step."""

    def predicted(self, rows: Sequence[RowResults], latents: torch.Tensor, step: int) -> torch.Tensor:
        """Combine the rows of all parts into the scheduler's ``model_output``, in the shape of ``latents``.

        ``latents - sigma * predicted`` is the prediction of the clean latents at this step.
        """

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents of a step in the shape of the facts' latents."""


class VaeOperations(Operations[ConfigT_contra], Protocol[ConfigT_contra]):
    """The operations of a VAE, for ``Decode``, ``Encode`` and ``Generate``."""

    def facts(self, config: ConfigT_contra) -> VaeFacts:
        """Return the facts that clients need."""

    def shares(self, model: Model[ConfigT_contra], latents: torch.Tensor) -> bool:
        """Return whether all ranks decode these latents together; ``False`` if rank 0 alone is faster."""

    def decode(
        self, model: Model[ConfigT_contra], latents: torch.Tensor, scaling: LatentScaling, *, is_shared: bool
    ) -> Generator[torch.Tensor]:
        """Decode (batch, channels, h, w) to images (batch, 3, height, width), not clamped to [-1, 1].

        Yields the images at once, but videos in chunks of frames, in order, (batch, 3, frames, height, width); the
        caller owns each. ``scaling`` is that of ``latents``: the VAE computes with ``latents / factor + shift``.

        Raises (before the first chunk):
            BadRequest: a wrong shape, or values that are not finite.
        """

    def shares_encode(self, model: Model[ConfigT_contra], image: torch.Tensor) -> bool:
        """Return whether all ranks encode this image or video together; ``False`` if rank 0 alone does."""

    def encode(
        self, model: Model[ConfigT_contra], image: torch.Tensor, scaling: LatentScaling, *, is_shared: bool = False
    ) -> torch.Tensor:
        """Encode images (batch, 3, height, width) in [-1, 1] to ``(mode - shift) * factor`` of the posterior's mode.

        Videos have frames before the height. ``is_shared``: all ranks run it, and each gets all latents.

        Raises:
            BadRequest: a wrong shape, values that are not finite, or a checkpoint without an encoder.
        """


class TextEncoderOperations(Operations[ConfigT_contra], Protocol[ConfigT_contra]):
    """The operations of a text encoder, for ``EncodeText``."""

    def facts(self, config: ConfigT_contra) -> TextEncoderFacts:
        """Return the facts that clients need."""

    def vocabulary(self, config: ConfigT_contra) -> int:
        """Return the size of the vocabulary."""

    def encode(
        self, model: Model[ConfigT_contra], token_ids: torch.Tensor, *, pooled: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode checked token ids (batch, tokens) to hidden states (batch, tokens, width), and the pooled state.

        Of encoders whose facts have ``layers`` it also takes ``mask`` (batch, tokens), int64, 0 for padding, and
        ``layers``, whose states it then returns one beside the other. Of those with ``images`` it takes these, on the
        host, with the names and ranks of the facts, and finite.

        Raises:
            BadRequest: images that do not fit each other or the tokens; names the argument.
        """


class ControlNetOperations(Operations[ConfigT_contra], Protocol[ConfigT_contra]):
    """The operations of a ControlNet, whose residuals a transformer of :class:`TakesControls` gets."""

    def facts(self, config: ConfigT_contra, layout: ParallelLayout) -> ControlNetFacts:
        """Return the facts that clients need."""

    def check(self, model: Model[ConfigT_contra], inputs: Inputs) -> None:
        """Check the arguments of one forward, as ``TransformerOperations.check`` does."""

    def check_mode(self, config: ConfigT_contra, mode: int | None) -> None:
        """Check the kind of picture of a generation; ``None`` is none given.

        Raises:
            BadRequest: it has none of this number, or needs one.
        """

    def picture(self, model: Model[ConfigT_contra], latents: torch.Tensor, mode: int | None) -> Mapping[str, Any]:
        """Return the arguments of a generation's forwards that its picture gives; they do not change between steps.

        ``latents`` (batch, channels, height, width) are those of the picture, on the model's device, finite.
        """

    def beside(self, config: ConfigT_contra, forward: Inputs, picture: Mapping[str, Any]) -> Inputs:
        """Return the inputs of the forward that goes with a ``forward`` of the transformer."""

    def take_rows(self, inputs: Inputs, rows: slice) -> Inputs:
        """Return the inputs of these rows alone, as views."""

    def residuals(self, model: Model[ConfigT_contra], inputs: Inputs, variant: str) -> Residuals:
        """Run one forward; every rank of the sequence returns all tokens, in the dtype of the weights, not scaled.

        ``variant`` is that of the transformer's forward.
        """


class TakesControls(Protocol[ConfigT_contra]):
    """What a transformer's operations have besides, if ControlNets exist for its family."""

    def check_control(self, config: ConfigT_contra, control: Any, *, generates: bool, names: Sequence[str]) -> None:
        """Check that a ControlNet of the configuration ``control`` fits this transformer.

        ``generates``: the forwards are those of the recipe, whose conditioning has ``names``.

        Raises:
            BadRequest: it has other sizes.
            Unsupported: this variant runs with ControlNets in no pipeline, or not with this conditioning.
        """

    def with_residuals(self, inputs: Inputs, residuals: Mapping[str, Sequence[torch.Tensor]]) -> Inputs:
        """Return the inputs of a forward with residuals.

        Raises:
            BadRequest: they have more tokens than the image, or another number of rows.
        """


class Model(Protocol[ConfigT_co]):
    """A model with plugged weights, as a family sees it."""

    @property
    def config(self) -> ConfigT_co:
        """The configuration that ``Family.configure`` returned."""

    @property
    def module(self) -> torch.nn.Module:
        """The module that ``Operations.build`` returned, with parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def layout(self) -> ParallelLayout:
        """The parallel degrees and the attention backend of this component."""

    @property
    def planned(self) -> PlannedPath:
        """The path that ``Operations.fuse`` returned, for families that run their class by its token plan."""


class BranchMemory(Protocol):
    """Copies of the factors of a model's LoRAs, which graphs read."""

    @property
    def counts(self) -> StaticCounts:
        """What was done to them."""

    @property
    def nbytes(self) -> int:
        """Their bytes."""

    @property
    def detail(self) -> str:
        """Why the last forward with LoRAs could have no graph, as others can; empty if it could."""


class FastPath(Protocol):
    """A forward that reads the tensors of a checkpoint by canonical name, besides the module's own parameters."""

    paths: ForwardPaths
    """The paths of its forwards."""

    @property
    def loras(self) -> BranchMemory:
        """The LoRAs of its forwards."""

    takes_loras: bool
    """Whether its forward has the branches of :meth:`branch_slots`; else the module's own runs with LoRAs."""

    warm_up_sizes: Mapping[str, int]
    """The sizes of the forward that warms up an announced model, by their names in the facts; empty for no warm-up."""

    def branch_slots(self, by_layer: Mapping[str, Sequence[Branch]]) -> list[tuple[Branches, tuple[Branch, ...]]]:
        """Return the places of a LoRA's branches in this forward, from those of the module's layers."""

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Return the fast path checks since the last call."""

    def reserve(self) -> int:
        """Allocate the memory that :meth:`plug` fills with converted weights; return its bytes, mostly 0."""

    def plug(self, checkpoint: Mapping[str, torch.Tensor | PackedTensor]) -> None:
        """Use these tensors until :meth:`unplug` or the next plug."""

    def unplug(self) -> None:
        """Drop all references to lent memory, and free the reserved buffers."""
