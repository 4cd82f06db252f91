"""What a model family tells the node pack about itself: everything in which ComfyUI's models differ from each other.

:class:`Adapter` is for the family, :class:`ModelAdapter` for one model of it, :class:`ForwardCall` for one call of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from xditd.client.comfyui.weights import RemoteWeights
    from xditd.client.jobs.arguments import KeptTensor

Keep = Callable[["torch.Tensor"], "KeptTensor"]
"""``Client.keep``: the tensor crosses with the first call that names it, and stays in the workers."""

Kept = Mapping[str, Any]
"""What the workers keep of one row of conditioning, by name; the adapter made it, and it alone reads it."""

Arguments = dict[str, Any]
"""Of one forward, named and given as the diffusers class of the model takes them."""


class ForwardCall(Protocol):
    """One call of ComfyUI's model, as its adapter reads it. Rows are those of the batch that ComfyUI made."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Return ComfyUI's ``transformer_options`` of the call."""

    @property
    def faults(self) -> Sequence[str]:
        """Name what the call carries that the workers cannot run (a control, reference images), for an error."""

    @property
    def numbers(self) -> Mapping[str, torch.Tensor]:
        """Return what the host has to know of each row, ``(rows,)`` each, on any device: all are read in one wait."""

    @property
    def texts(self) -> Mapping[str, torch.Tensor]:
        """Return the conditioning, ``(rows, ...)`` each: it stays the same for many steps, and is compared by content.

        All of one call are on one device. :meth:`ModelAdapter.keep_row` is given one row of each.
        """

    def arguments(
        self, rows: slice, numbers: Mapping[str, list[float]], kept: Sequence[Kept], keep: Keep, dtype: torch.dtype
    ) -> list[Arguments]:
        """Return the forwards that predict ``rows``; ``numbers`` and ``kept`` are those of these rows alone.

        Several forwards are independent of each other, and may run on different ranks. The first tensor is on
        ComfyUI's device: results come there. ``dtype`` is that of the weights. What only times and scales steps by is a
        small tensor on the CPU, whose values cross within the message.
        """

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        """Return ComfyUI's prediction for ``rows``, of what each of their forwards gave."""


class ModelAdapter(Protocol):
    """One model of a family, as ComfyUI holds it: on the meta device, without weights."""

    @property
    def wrapper(self) -> str:
        """The kind of wrapper (``comfy.patcher_extension.WrappersMP``) that stands in for the model's own forward.

        ``diffusion_model`` where the model's class calls wrappers of this kind, else ``apply_model``.
        """

    @property
    def variant(self) -> str:
        """Whose rounding the workers follow, in calls and in their own loop: a name of the transformer's facts."""

    @property
    def multiple(self) -> int:
        """Latents on a side of an image come in multiples of it, for the workers' loop."""

    @property
    def loop_keys(self) -> frozenset[str]:
        """Keys of a CONDITIONING that :meth:`loop_inputs` takes into account; with others, ComfyUI's own loop runs."""

    @property
    def loop_conds(self) -> frozenset[str]:
        """Of what ComfyUI's model makes of them (``model_conds``), the names that :meth:`loop_inputs` reads."""

    def read(self, *args: Any, **kwargs: Any) -> ForwardCall:
        """Read a call: the arguments are those of the method that :attr:`wrapper` wraps.

        Raises:
            BadRequest: something that every call needs is not there.
        """

    def keep_row(self, texts: Mapping[str, torch.Tensor], keep: Keep, dtype: torch.dtype) -> Kept:
        """Keep one row of :attr:`ForwardCall.texts`, which has not been seen before. The host may wait here."""

    def foreseen(self, sigmas: Sequence[float]) -> Mapping[str, list[float]]:
        """Return arguments' values in the calls of a whole run, in their units, from the sampler's sigmas.

        Values that no forward could be given are left out.
        """

    def condition_faults(self, part: Mapping[str, Any]) -> Iterator[str]:
        """Name what one part of a CONDITIONING carries that the workers cannot run, besides what no family can."""

    def loop_inputs(self, conditions: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], float | None]:
        """Return what ``Client.generate`` takes as conditioning, and the guidance scale, of ComfyUI's ``model_conds``.

        Tensors have any number of rows, which are repeated to ``rows``; lists have that many entries.
        """


class Adapter(Protocol):
    """One model family."""

    @property
    def title(self) -> str:
        """What of it can be run, for people: ``FLUX.1 (dev, schnell and their fine-tunes)``."""

    def model_classes(self) -> tuple[type, ...]:
        """Return ComfyUI's classes of its models, in ``comfy.model_base``."""

    def config_classes(self) -> tuple[type, ...]:
        """Return ComfyUI's classes of its configurations, in ``comfy.supported_models``.

        A VAE goes with the family if it has the latents of one of their ``latent_format``.
        """

    def check_config(self, config: Any, label: str) -> None:
        """Refuse a relative that ComfyUI configures with the same classes.

        Raises:
            Unsupported: names it.
        """

    def adapt(self, model: Any) -> ModelAdapter:
        """Make the adapter of one of ComfyUI's models. The model's ``model_sampling`` may be replaced later."""

    def text_model(self, files: Mapping[str, RemoteWeights]) -> TextModel | None:
        """Make its text encoders of the files' weights, by label; ``None`` where encoding stays ComfyUI's own.

        Raises:
            BadRequest: these are not the files that it reads.
        """


@dataclass(frozen=True)
class TextModel:
    """Text encoders that run in the workers, where ComfyUI has its own.

    ``module`` has the methods that ComfyUI's CLIP calls, and the names and shapes of ``parts`` as its modules.
    ``parts`` are the encoders' weights, each with the names that ComfyUI gives its tensors, and those of the file.
    """

    module: torch.nn.Module
    parts: Sequence[tuple[RemoteWeights, Mapping[str, str]]]
    tokenizer: Any
