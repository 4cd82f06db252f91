"""One forward of a module as a CUDA graph: its kernels are launched by one call, not one by one by the host.

A graph has the addresses of its inputs, weights and tables, and every value that the host has computed. So it serves
calls that differ in the contents of their tensors on the GPU alone, with the same weights at the same addresses.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xditd.gpu_workers.packed.counts import PackedProductCounts
from xditd.gpu_workers.parallel.row_trees import build, structure_of, tensors_of


class CaptureRefused(Exception):
    """A forward cannot be captured; the message says why, in one line."""


class CapturedForward:
    """A captured forward, with the tensors of its inputs. It holds its own memory, and none of the weights.

    Do not run it once the weights are unmapped: it reads their addresses.

    Raises:
        CaptureRefused: the host has to wait for the device within the forward, the forward writes to its arguments, its
            result holds objects, or CUDA refuses the capture.
        torch.OutOfMemoryError: there is no memory for its tensors.
    """

    def __init__(
        self,
        forward: Callable[[Mapping[str, Any]], Any],
        arguments: Mapping[str, Any],
        weights: Sequence[torch.Tensor],
        device: torch.device,
        counts: PackedProductCounts | None = None,
    ) -> None:
        """Capture ``forward(arguments)``, on the stream for captures; nothing is computed.

        ``arguments`` may be changed by nobody else from now on. ``weights`` are tensors whose memory is not this
        process's own; they are not kept. Each replay adds the graph's packed products to ``counts``.
        """
        self.arguments = arguments
        self._inputs = [each for each in tensors_of(arguments) if each.is_cuda]
        self._graph = torch.cuda.CUDAGraph()
        self._counts = counts or PackedProductCounts()
        watched = _Watched([*weights, *self._inputs], device)
        versions = [_version(each) for each in self._inputs]
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free_bytes = torch.cuda.mem_get_info(device)[0]
        with _Capture(self._graph, device):
            try:
                with watched, self._counts.apart() as self._products:
                    result = forward(arguments)
            except (CaptureRefused, torch.OutOfMemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - whatever the class raises: it then runs as it is
                traceback.clear_frames(error.__traceback__)
                raise CaptureRefused(f"{type(error).__name__}: {error}".splitlines()[0][:300]) from None
        self.memory_bytes = max(0, free_bytes - torch.cuda.mem_get_info(device)[0])
        """GPU memory that the capture allocated, beyond what other graphs have."""
        structure = structure_of(result, 0)
        if structure is None:
            raise CaptureRefused("its result holds objects")
        if [_version(each) for each in self._inputs] != versions:
            raise CaptureRefused("it writes to its arguments")
        self._structure = structure
        self._results = list(tensors_of(result))
        self._tables = watched.tables

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """Return what the forward gives for arguments of the same structure, in new tensors; the host does not wait."""
        given = (each for each in tensors_of(arguments) if each.is_cuda)
        for mine, its in zip(self._inputs, given, strict=True):
            mine.copy_(its)
        return self.replay_last()

    def replay_last(self) -> Any:
        """Return the result for the arguments that the inputs have now."""
        self._graph.replay()
        self._counts.add(self._products)
        return build(self._structure, (each.clone() for each in self._results))


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class _Capture:
    """A capture into the memory that all graphs of a GPU share: they are never replayed at the same time."""

    _streams: Final[dict[torch.device, torch.cuda.Stream]] = {}
    _anchors: Final[dict[torch.device, torch.cuda.CUDAGraph]] = {}
    """A graph of each GPU that keeps the memory known to torch while there is no other one."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # memory belongs to one stream
        self._graph, self._device = graph, device
        self._on_stream = torch.cuda.stream(self._streams[device])

    def __enter__(self) -> None:
        self._on_stream.__enter__()
        try:
            if self._device not in self._anchors:
                self._anchors[self._device] = self._anchor()
            # Relaxed, because copies from the host are made on another stream meanwhile.
            pool = self._anchors[self._device].pool()
            self._graph.capture_begin(pool=pool, capture_error_mode="relaxed")
        except BaseException:
            self._on_stream.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError as refused:
            self._recover()
            if isinstance(refused, torch.OutOfMemoryError):
                raise
            raise CaptureRefused(f"CUDA ended the capture: {refused}".splitlines()[0][:300]) from None
        finally:
            self._on_stream.__exit__(*error)

    def _recover(self) -> None:
        """Undo what torch leaves after a capture that CUDA has ended.

        Its allocator still gives out the memory of graphs, and its random numbers are those of a graph until the next
        capture ends. Earlier graphs keep their memory, later ones get other memory.
        """
        pool = self._anchors.pop(self._device).pool()
        torch._C._cuda_endAllocateToPool(self._device.index, pool)
        self._anchors[self._device] = self._anchor()

    def _anchor(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="relaxed")
        torch.zeros(1, device=self._device)
        graph.capture_end()
        return graph


_WAITS: Final = frozenset(
    {
        "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "is_nonzero", "equal", "unique_dim",
        "_unique2", "unique_consecutive", "bincount", "repeat_interleave",
    }
)  # fmt: skip
"""Operators of which the host reads a value or a size from the device."""

_BY_MASK: Final = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
"""Operators that do so if an index is a mask."""


def _refuse_to_wait(*_: Any) -> None:
    raise CaptureRefused("the host waits for the device in its forward (synchronize)")


class _Watched(TorchDispatchMode):
    """Sees every operator of a forward during its capture, and refuses those for which the host waits.

    A copy from the host is made once, outside of the graph: with the same arguments the class computes the same values
    on the host each time. ``tables`` are such copies, and the tensors that the module holds besides its weights: the
    graph has their addresses.
    """

    def __init__(self, weights: Sequence[torch.Tensor], device: torch.device) -> None:
        super().__init__()
        self.tables: list[torch.Tensor] = []
        self._device = device
        self._known = {each.untyped_storage()._cdata for each in weights}
        self._side = torch.cuda.Stream(device)
        # Memory of this process that no graph has: compiled code allocates that of its results unseen.
        segments = torch.cuda.memory_snapshot()
        self._own = [
            range(each["address"], each["address"] + each["total_size"])
            for each in segments
            if each["device"] == device.index and tuple(each["segment_pool_id"]) == (0, 0)
        ]
        self._lifts_only = torch._C._only_lift_cpu_tensors()
        self._synchronize = torch.cuda.synchronize

    def __enter__(self) -> _Watched:
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") is a copy that is seen
        torch.cuda.synchronize = _refuse_to_wait  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.cuda.synchronize = self._synchronize
        torch._C._set_only_lift_cpu_tensors(self._lifts_only)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        name = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else str(func)
        self._check(name, given, args, kwargs)
        for each in given:
            if each.is_cuda and self._note(each) and any(each.data_ptr() in segment for segment in self._own):
                self.tables.append(each)
        if name == "_to_copy" and not given[0].is_cuda and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return self._copy_now(lambda: func(*args, **kwargs))
        if name == "copy_" and given[0].is_cuda and not given[1].is_cuda:
            args = (args[0], self._copy_now(lambda: given[1].to(self._device)), *args[2:])
        result = func(*args, **kwargs)
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._note(each)
        return result

    def _note(self, tensor: torch.Tensor) -> bool:
        """Note the memory of a tensor; return whether it is new."""
        storage = tensor.untyped_storage()._cdata
        is_new = storage not in self._known
        self._known.add(storage)
        return is_new

    def _copy_now(self, copy: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.cuda.stream(self._side):
            copied = copy()
        self._side.synchronize()
        self._note(copied)
        self.tables.append(copied)
        return copied

    @staticmethod
    def _check(name: str, given: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not any(each.is_cuda for each in given):
            return
        waits = name in _WAITS
        if name in _BY_MASK:
            indices = [each for each in tree_leaves(args[1]) if isinstance(each, torch.Tensor)]
            waits = any(each.is_cuda and each.dtype in (torch.bool, torch.uint8) for each in indices)
        elif name == "_to_copy":
            waits = given[0].is_cuda and torch.device(kwargs.get("device") or "cuda").type == "cpu"
        elif name == "copy_":
            waits = not given[0].is_cuda
        if waits:
            raise CaptureRefused(f"the host waits for the device in its forward ({name})")
