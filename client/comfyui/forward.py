"""Run the forward of a MODEL in the workers: ComfyUI calls :class:`RemoteForward` in place of the transformer.

It is a ComfyUI wrapper, so samplers, schedulers, guiders, masks, previews and LoRA loaders work on the MODEL as on any
other. The adapter of the model's family translates the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import comfy.model_management
import torch

from xditd.client.comfyui.step_inputs import StepInputs
from xditd.client.comfyui.understood import Understood
from xditd.client.comfyui.unsupported import check_forward
from xditd.client.comfyui.weights import RemoteWeights
from xditd.ipc.limits import MAX_BATCH
from xditd.ipc.transports.tensor_views import torch_dtype

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import ControlledCall, ForwardCall, ModelAdapter


class RemoteForward:
    """Wrapper that runs in place of the transformer's own forward."""

    def __init__(self, weights: RemoteWeights, family: ModelAdapter, understood: Understood | None = None) -> None:
        """Predict with ``weights``; ``understood`` checks in each step that nobody changed the model."""
        self._weights = weights
        self._family = family
        self._understood = understood
        self._inputs = StepInputs()
        self._schedule: tuple[object, Mapping[str, list[float]]] = (None, {})

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the other nodes' wrappers around :meth:`run` instead of the local model.

        Raises:
            Unsupported: the model was changed since the run began.
        """
        if self._understood is not None:
            self._understood.check_step()
        executor.original = self.run
        result: torch.Tensor = executor(*args, **kwargs)
        return result

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Predict for one batch; the arguments are those of the wrapped method.

        Raises:
            Unsupported: a patch or a model that the workers cannot run.
            BadRequest: no conditioning.
        """
        call = self._family.read(*args, **kwargs)
        check_forward(call.options, call.faults)
        # ComfyUI checks for Cancel in every operation of a local model; a remote forward is one operation.
        comfy.model_management.throw_exception_if_processing_interrupted()
        client, loan = self._weights.connect(), self._weights.in_use
        dtype = torch_dtype(loan.facts.dtype)
        numbers, kept = self._inputs.read(
            call.rows, call.numbers, call.texts, lambda texts: self._family.keep_row(texts, client.keep, dtype)
        )
        foreseen = self._read_schedule(call.options.get("sample_sigmas"))
        predicted = []
        for first in range(0, call.rows, MAX_BATCH):
            rows = slice(first, first + MAX_BATCH)
            theirs = {name: values[rows] for name, values in numbers.items()}
            forwards = call.arguments(rows, theirs, kept[rows], client.keep, dtype)
            controls = call.controls(rows, theirs, kept[rows], client.keep) if _has_controls(call) else []
            results = client.call_parts(
                loan, forwards, foreseen=foreseen, variant=self._family.variant, controls=controls
            )
            predicted.append(call.prediction(rows, results))
        return predicted[0] if len(predicted) == 1 else torch.cat(predicted)

    def _read_schedule(self, sigmas: torch.Tensor | None) -> Mapping[str, list[float]]:
        """Read the sampler's whole schedule, once per run."""
        if self._schedule[0] is not sigmas:
            values = [] if sigmas is None else sigmas.reshape(-1).double().tolist()
            self._schedule = (sigmas, self._family.schedule_values(values) if values else {})
        return self._schedule[1]


def _has_controls(call: ForwardCall) -> TypeGuard[ControlledCall]:
    return hasattr(call, "controls")
