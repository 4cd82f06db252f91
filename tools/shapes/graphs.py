"""Steps of training as CUDA graphs: one launch instead of thousands, so that the GPU does not wait for Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

WARM_STEPS: Final = 6
"""Steps before a shape is recorded: kernels are compiled and chosen, and the optimizer has its state."""


class GraphedStep:
    """A function of tensors that returns one tensor, recorded once for each set of shapes and then replayed.

    The function may read and write other tensors in place, such as weights and an optimizer's state, but must not read
    values on the host, draw random numbers or depend on anything else that changes. What a replay returns is
    overwritten by the next one. On a CPU, and after a recording that failed, it is called as it is.
    """

    def __init__(self, name: str, step: Callable[..., torch.Tensor], device: torch.device) -> None:
        self._name, self._step = name, step
        self._is_recorded = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_recorded else None
        self._seen: dict[tuple[torch.Size, ...], int] = {}
        self._graphs: dict[
            tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], torch.Tensor]
        ] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if not self._is_recorded or self._stream is None:
            return self._step(*inputs)
        shapes = tuple(each.shape for each in inputs)
        if shapes not in self._graphs:
            self._seen[shapes] = self._seen.get(shapes, 0) + 1
            if self._seen[shapes] <= WARM_STEPS or not self._record(shapes, inputs):
                return self._aside(self._stream, inputs)
        graph, static, result = self._graphs[shapes]
        torch._foreach_copy_(list(static), list(inputs))
        graph.replay()
        return result

    def _aside(self, stream: torch.cuda.Stream, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run the step on the stream that records, to which autograd would otherwise have to be moved."""
        here = torch.cuda.current_stream(stream.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = self._step(*inputs)
        here.wait_stream(stream)
        return result

    def _record(self, shapes: tuple[torch.Size, ...], inputs: tuple[torch.Tensor, ...]) -> bool:
        static = tuple(each.clone() for each in inputs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = self._step(*static)
        except Exception as error:  # noqa: BLE001 - whatever a kernel or a library refuses: training goes on without the graph
            print(f"{self._name}: not recorded as a CUDA graph, goes on without: {error!r:.300}", flush=True)
            self._is_recorded = False
            return False
        self._graphs[shapes] = graph, static, result
        print(f"{self._name}: recorded as a CUDA graph", flush=True)
        return True


def set_rate(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Set the rate of each group: in place if it is a tensor, which a recorded step reads."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def adamw(groups: list[dict[str, object]], rate: float, device: torch.device, *, decay: float) -> torch.optim.AdamW:
    """Build AdamW that a CUDA graph may hold: fused, with a rate of its own on the GPU for each group."""
    if device.type != "cuda":
        return torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), weight_decay=decay)
    groups = [{**group, "lr": torch.tensor(rate, device=device)} for group in groups]
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), weight_decay=decay, fused=True, capturable=True)
