"""Record the operations of one eager call of a block, which computes its result as always meanwhile.

Torch tells the thread that records of each operation; other threads and later calls are not affected. What a graph
cannot hold is refused: operations of other libraries, random numbers, values that are read from tensors, and tensors
that are neither arguments nor the block's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import TensorWeakRef

from xditd.gpu_workers.models import attention_operator, packed_operator
from xditd.gpu_workers.models.block_arguments import Place, put_places
from xditd.gpu_workers.models.block_attention import AttentionCall, AttentionFunctions
from xditd.gpu_workers.models.block_graphs import BlockGraph, NotCompiled, TensorKind, Value, operator_name
from xditd.gpu_workers.models.block_recordings import Recording, state_of
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.packed.linear import PackedLinear

_DROPOUTS: Final = frozenset({"aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"})


class BlockRecorder(TorchDispatchMode):
    """Records the operations of this thread while it is entered; ``finish`` returns them.

    Faults are kept until then, so that the call itself is never disturbed.
    """

    supports_higher_order_operators = True  # to refuse them; torch would raise

    def __init__(
        self, block: torch.nn.Module, arguments: Sequence[torch.Tensor], planned: PlannedModule | None = None
    ) -> None:
        super().__init__()
        self._planned = planned
        self._paths = {each: path for path, each in block.named_modules()}
        self._arguments = list(arguments)
        self._state = list(state_of(block))
        self._graph = BlockGraph([TensorKind.of(each) for each in (*arguments, *(each for _, each in self._state))])
        self._values: dict[int, tuple[TensorWeakRef, Value]] = {}
        self._attentions: list[AttentionCall] = []
        self._packed = {path: each for path, each in block.named_modules() if isinstance(each, PackedLinear)}
        self._packed_calls: list[str] = []
        self._last_attention: Value | None = None
        self._is_paused = False
        self.has_exchanged = False
        """Whether an attention has begun whose tokens are split over ranks."""
        self._fault: NotCompiled | None = None
        inputs = (*arguments, *(each for _, each in self._state))
        for place, tensor in reversed(tuple(enumerate(inputs))):  # of one that is given twice, its first place
            self._note(tensor, Value(place))
        self._storages = {each.untyped_storage()._cdata for each in (*arguments, *(each for _, each in self._state))}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._is_paused and self._fault is None:
            try:
                self._add(func, args, kwargs, result)
            except NotCompiled as fault:
                self._fault = fault
        return result

    @contextmanager
    def recording(self, functions: AttentionFunctions) -> Iterator[None]:
        """Record what this thread computes."""
        with functions.replaced(self._attend), self._packed_layers_replaced(), self:
            yield

    @contextmanager
    def _packed_layers_replaced(self) -> Iterator[None]:
        try:
            for path, layer in self._packed.items():
                layer.__dict__["forward"] = partial(self._multiply, path, layer)
            yield
        finally:
            for layer in self._packed.values():
                layer.__dict__.pop("forward", None)

    def finish(self, result: Any) -> Recording:
        """Return what was recorded, of a call that returned ``result``.

        Raises:
            NotCompiled: the call computed what a graph cannot hold.
        """
        if self._fault is not None:
            raise self._fault
        results: list[Value] = []
        arguments = {id(each): number for number, each in enumerate(self._arguments)}

        def place(tensor: torch.Tensor) -> Place:
            if (number := arguments.get(id(tensor))) is not None:
                return Place(True, number)
            value = self._value(tensor)
            if value not in results:
                results.append(value)
            return Place(False, results.index(value))

        tree = put_places(result, place)
        self._graph.results = results
        if not results:
            raise NotCompiled("a block computes no tensor")
        used = self._graph.drop_unused_inputs()
        count = len(self._arguments)
        return Recording(
            encoded=self._graph.encode(),
            kinds=tuple(self._graph.inputs),
            arguments=tuple(place for place in used if place < count),
            state=tuple(self._state[place - count][0] for place in used if place >= count),
            attentions=tuple(self._attentions),
            packed=tuple(self._packed_calls),
            results=tree,
        )

    def _attend(
        self,
        call: AttentionCall,
        compute: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute an attention of the block, and record it as one operation."""
        if self._is_paused:  # a backend that uses torch's function
            return compute(query, key, value, mask)
        self.has_exchanged = self._planned is not None and self._planned.current is not None
        self._is_paused = True
        try:
            with _disable_current_modes():  # some backends compile, which torch does not do under a mode
                attended = attention_operator.in_layout(compute(query, key, value, mask), call.heads_first)
        finally:
            self._is_paused = False
        if self._fault is None:
            try:
                call = self._at_site(call)
                if not isinstance(mask, (torch.Tensor, type(None))):
                    raise NotCompiled(f"an attention of a block has a {type(mask).__name__} as its mask")
                given = [None if each is None else self._value(each) for each in (query, key, value, mask)]
                number = len(self._attentions)
                self._append(
                    attention_operator.NAME, [*given, self._last_attention, number, call.heads_first], {}, attended
                )
                self._attentions.append(call)
                self._last_attention = self._value(attended)
            except NotCompiled as fault:
                self._fault = fault
        return attended

    def _multiply(self, path: str, layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """Compute a packed layer of the block, and record it as one operation."""
        own = partial(type(layer).forward, layer, x)
        if self._is_paused:
            return own()
        self._is_paused = True
        try:
            with _disable_current_modes():  # kernels of Triton and of other packages
                result: torch.Tensor = own().contiguous()
        finally:
            self._is_paused = False
        if self._fault is None:
            try:
                if path not in self._packed_calls:
                    self._packed_calls.append(path)
                args = [self._value(x), self._packed_calls.index(path), layer.out_features]
                self._append(packed_operator.NAME, args, {}, result)
            except NotCompiled as fault:
                self._fault = fault
        return result

    def _at_site(self, call: AttentionCall) -> AttentionCall:
        """Return an attention with the path of the submodule that computes it, if tokens are split."""
        if call.fault:
            raise NotCompiled(call.fault)
        forward = None if self._planned is None else self._planned.current
        if forward is None:
            return call
        path = self._paths.get(forward.sites[-1].module) if forward.sites else None
        if path is None:
            raise NotCompiled("an attention of a block belongs to a submodule outside of it")
        return replace(call, site=path)

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            raise NotCompiled(f"a block computes {func}, an operation with functions as arguments")
        name = operator_name(func)
        if name in _DROPOUTS and not args[2]:  # of a module that does not train: its argument
            self._note(result, self._value(args[0]))
            return
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotCompiled(f"a block draws random numbers ({name})")
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise NotCompiled(f"a block reads values of tensors ({name})")
        if func._schema.is_mutable:
            self._check_writes(func, args, kwargs)
        self._append(name, [self._given(each, name) for each in args], self._given(dict(kwargs), name), result)

    def _append(self, name: str, args: list[Any], kwargs: dict[str, Any], result: Any) -> None:
        place = len(self._graph.inputs) + len(self._graph.operations)
        self._graph.operations.append((name, args, kwargs))
        if isinstance(result, torch.Tensor):
            self._note(result, Value(place))
        elif isinstance(result, (tuple, list)):
            for item, each in enumerate(result):
                if isinstance(each, torch.Tensor):
                    self._note(each, Value(place, item))
        elif result is not None:
            raise NotCompiled(f"a block reads values of tensors ({name})")

    def _check_writes(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            if isinstance(given, torch.Tensor) and given.untyped_storage()._cdata in self._storages:
                raise NotCompiled("a block writes to its arguments or its own tensors")

    def _given(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._literal(value) if name == "aten.lift_fresh.default" else self._value(value)
        if isinstance(value, (list, tuple)):
            return [self._given(each, name) for each in value]
        if isinstance(value, dict):
            return {key: self._given(each, name) for key, each in value.items()}
        return value

    def _literal(self, tensor: torch.Tensor) -> Value:
        """Record a tensor that the code of the block writes out."""
        if tensor.numel() != 1 or tensor.device.type != "cpu":
            raise NotCompiled("a block makes a tensor of values in its code")
        place = len(self._graph.inputs) + len(self._graph.operations)
        kwargs = {"dtype": tensor.dtype, "device": tensor.device}
        self._is_paused = True
        try:
            number = tensor.item()
        finally:
            self._is_paused = False
        self._graph.operations.append(("aten.full.default", [list(tensor.shape), number], kwargs))
        return Value(place)

    def _note(self, tensor: torch.Tensor, value: Value) -> None:
        self._values[id(tensor)] = TensorWeakRef(tensor), value

    def _value(self, tensor: torch.Tensor) -> Value:
        known, value = self._values.get(id(tensor), (None, None))
        if known is None or value is None or known() is not tensor:
            raise NotCompiled(
                f"a block reads a tensor of the shape {list(tensor.shape)} that is no argument of it and not its own"
            )
        return value
