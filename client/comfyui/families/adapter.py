"""Interfaces that a model family implements for the node pack.

:class:`Adapter` is for the family, :class:`ModelAdapter` for one model of it, :class:`ForwardCall` for one call of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from xditd.client.comfyui.weights import RemoteWeights
    from xditd.client.jobs.arguments import KeptTensor
    from xditd.client.jobs.controls import CallControl

Keep = Callable[["torch.Tensor"], "KeptTensor"]
"""``Client.keep``: the tensor is sent with the first call that uses it, and stays in the workers."""

Kept = Mapping[str, Any]
"""One row of conditioning that the workers keep, by name; only the adapter that made it reads it."""

Arguments = dict[str, Any]
"""Arguments of one forward, as the diffusers class of the model takes them."""


class ForwardCall(Protocol):
    """One call of ComfyUI's model, as its adapter reads it. Rows are those of the batch that ComfyUI made."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Return ComfyUI's ``transformer_options`` of the call."""

    @property
    def faults(self) -> Sequence[str]:
        """Name what the call carries that the workers cannot run (a control, reference images), for an error."""

    @property
    def numbers(self) -> Mapping[str, torch.Tensor]:
        """Return the values that the host needs of each row, ``(rows,)`` each; one device sync reads them all."""

    @property
    def texts(self) -> Mapping[str, torch.Tensor]:
        """Return the conditioning, ``(rows, ...)`` each, on the device of :attr:`numbers`.

        It is the same in many steps and compared by content. :meth:`ModelAdapter.keep_row` gets one row of each.
        """

    def arguments(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep, dtype: torch.dtype
    ) -> list[Arguments]:
        """Return the forwards that predict ``rows``; ``numbers`` and ``kept`` belong to these rows only.

        Forwards are independent of each other, and may run on different ranks. The first tensor is on ComfyUI's
        device, where results are written. ``dtype`` is that of the weights. Timesteps and guidance scales are small
        CPU tensors, whose values are sent within the message.
        """

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        """Return ComfyUI's prediction for ``rows`` from the results of their forwards."""


class ModelAdapter(Protocol):
    """One model of a family, as ComfyUI holds it: on the meta device, without weights."""

    @property
    def wrapper(self) -> str:
        """The kind of wrapper (``comfy.patcher_extension.WrappersMP``) that replaces the model's own forward.

        ``diffusion_model`` if the model's class calls wrappers of this kind, else ``apply_model``.
        """

    @property
    def variant(self) -> str:
        """Whose rounding the workers follow, in calls and in their own loop: a name in the transformer's facts."""

    @property
    def multiple(self) -> int:
        """The workers' loop needs latent heights and widths that are multiples of this."""

    @property
    def has_frame_axis(self) -> bool:
        """Whether ComfyUI's latents of images have an axis of frames, (rows, channels, 1, height, width)."""

    @property
    def text_weight(self) -> str:
        """Name of the transformer's weight that reads text embeddings: its columns are their channels."""

    @property
    def loop_keys(self) -> frozenset[str]:
        """Keys of a CONDITIONING that :meth:`loop_inputs` uses; if there are others, ComfyUI's own loop runs."""

    @property
    def loop_conds(self) -> frozenset[str]:
        """Names in ComfyUI's ``model_conds`` that :meth:`loop_inputs` reads."""

    def read(self, *args: Any, **kwargs: Any) -> ForwardCall:
        """Read a call: the arguments are those of the method that :attr:`wrapper` wraps.

        Raises:
            BadRequest: an argument that every call needs is missing.
        """

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        """Keep one new row of :attr:`ForwardCall.texts` in the workers. The host may wait for the device here."""

    def schedule_values(self, sigmas: Sequence[float]) -> Mapping[str, list[float]]:
        """Return values of arguments in all calls of a run, in the argument's units, from the sampler's sigmas.

        Values outside the argument's range are left out.
        """

    def condition_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        """Name what one part of a CONDITIONING carries that this family cannot run in the workers."""

    def loop_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        """Name what one part of a CONDITIONING carries that :meth:`loop_inputs` cannot pass on, but calls can."""

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        """Return the conditioning and the guidance scale for ``Client.generate`` from ComfyUI's ``model_conds``.

        Tensors may have any number of rows, which are repeated to ``rows``; lists have ``rows`` entries.
        """


@dataclass(frozen=True)
class ControlSource:
    """How a stock ControlNet is lent. ``tensors`` are in ``dtype``, in which stock computes.

    ``numbers`` are ComfyUI's lists of residuals, by the kind of blocks (``input``, ``output``): for each of its places
    the number of the residual that ComfyUI puts there.
    """

    label: str
    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    numbers: Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class ControlCall:
    """A call of a stock ControlNet's model that its lent copy has noted: ``given`` are its arguments by name."""

    weights: RemoteWeights
    given: Mapping[str, Any]


class Residual:
    """Stands for one residual, or a sum of several, while ComfyUI scales and adds them.

    Multiplied in place, as ComfyUI does with a tensor that several blocks share; a sum is a new one.
    """

    def __init__(self, call: ControlCall, kind: str, number: int) -> None:
        self.terms: tuple[tuple[ControlCall, str, int, float], ...] = ((call, kind, number, 1.0),)
        """The call, the kind of blocks, the residual's number, and its scale."""
        self.shape = call.given["x"].shape

    def __imul__(self, scale: float) -> Residual:
        self.terms = tuple((call, kind, number, before * float(scale)) for call, kind, number, before in self.terms)
        return self

    def __add__(self, other: object) -> Residual:
        if not isinstance(other, Residual):
            return NotImplemented
        made = copy.copy(self)
        made.terms = (*self.terms, *other.terms)
        return made


class ControlledModelAdapter(ModelAdapter, Protocol):
    """A model that runs with ControlNets in the workers."""

    def control_source(self, control: Any) -> ControlSource | str:
        """Return how a stock ControlNet is lent, or what of it the workers cannot run, for an error."""


class ControlledCall(ForwardCall, Protocol):
    """A call that may have ControlNets."""

    def controls(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep
    ) -> list[list[CallControl]]:
        """Return the ControlNets of each of the forwards of :meth:`ForwardCall.arguments`; empty if there are none."""


class Adapter(Protocol):
    """One model family."""

    @property
    def title(self) -> str:
        """Name of the family for users, with the models that run: ``FLUX.1 (dev, schnell and their fine-tunes)``."""

    def model_classes(self) -> tuple[type, ...]:
        """Return the family's model classes in ``comfy.model_base``."""

    def config_classes(self) -> tuple[type[Any], ...]:
        """Return the family's configuration classes in ``comfy.supported_models``.

        A VAE belongs to the family if its latents have the channels and dimensions of one of their ``latent_format``.
        """

    def check_config(self, config: Any, label: str) -> None:
        """Refuse a related model that ComfyUI configures with the same classes.

        Raises:
            Unsupported: names the model.
        """

    def adapt(self, model: Any) -> ModelAdapter:
        """Make the adapter of one ComfyUI model. The model's ``model_sampling`` may be replaced later."""
