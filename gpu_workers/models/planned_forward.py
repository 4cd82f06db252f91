"""Run the forward of a class with its tokens split over ranks, as its token plan says.

The class's own code runs. Hooks on its submodules split arguments and gather results, and the functions that compute
attention are replaced while it runs, so that each token attends to those of all ranks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

from xditd.gpu_workers.models.exchanged_attention import ExchangedAttention
from xditd.gpu_workers.models.token_plans import LAST, Attention, PlanFault, Split, TokenPlan, matches
from xditd.gpu_workers.parallel.streams import Ranks, Stream, gather, take
from xditd.gpu_workers.parallel.token_attention import Tokens, attend, without_repeats
from xditd.ipc.name_lists import listed

_DISPATCH: Final = "dispatch_attention_fn"
"""diffusers' function for attention by any backend, which its models import by name."""


class PlannedModule:
    """A module with its token plan. All ranks make the same calls in the same order.

    Raises:
        PlanFault: the module has an attention that the plan does not declare, or lacks a path that it names.
    """

    def __init__(self, module: torch.nn.Module, plan: TokenPlan) -> None:
        self._module = module
        self._plan = plan
        self._paths = dict(module.named_modules())
        _check_declared(self._paths, plan)
        self._paths |= _last_of_lists(self._paths)
        self._splits = self._resolve(plan.splits)
        self._gathers = self._resolve(plan.gathers)
        self._attentions: list[tuple[torch.nn.Module, Attention | None]] = [
            *((each, declared) for each, declared in self._resolve(plan.attentions)),
            *((self._paths[path], None) for path in self._paths for each in plan.whole if matches(each, path)),
            *((each, None) for each, _ in self._resolve(plan.exchanges)),
        ]
        self._exchanges = [ExchangedAttention(each, declared) for each, declared in self._resolve(plan.exchanges)]
        self._namespaces = [
            vars(each) for name, each in list(sys.modules.items())
            if name.startswith("diffusers.models.") and _DISPATCH in vars(each)
        ]  # fmt: skip

    def run(self, call: Callable[[], Any], ranks: Ranks) -> Any:
        """Run ``call``, which calls the module once; every rank returns the whole result.

        Raises:
            PlanFault: a stream has fewer tokens than there are ranks, or the forward is not as the plan declares.
        """
        forward = _Forward(ranks)
        with ExitStack() as stack:
            names = list(inspect.signature(self._module.forward).parameters)
            check = partial(_check_arguments, self._plan.refused, names)
            stack.enter_context(_removed(self._module.register_forward_pre_hook(check, with_kwargs=True)))
            for module, splits in self._splits:
                self._hook_splits(stack, forward, module, splits)
            for module, gathers in self._gathers:
                stack.enter_context(_removed(module.register_forward_hook(partial(forward.gather_results, gathers))))
            for module, declared in self._attentions:
                enter = partial(forward.enter_attention, declared)
                stack.enter_context(_removed(module.register_forward_pre_hook(enter)))
                stack.enter_context(_removed(module.register_forward_hook(forward.leave_attention, always_call=True)))
            for exchanged in self._exchanges:
                for handle in exchanged.hook(forward.stream, ranks):
                    stack.enter_context(_removed(handle))
            stack.enter_context(_attention_replaced(forward, self._namespaces))
            return call()

    def _resolve(self, declared: Mapping[str, Any]) -> list[tuple[torch.nn.Module, Any]]:
        return [
            (module, what)
            for pattern, what in declared.items()
            for path, module in self._paths.items()
            if matches(pattern, path)
        ]

    def _hook_splits(
        self, stack: ExitStack, forward: _Forward, module: torch.nn.Module, splits: Mapping[str | int, Split]
    ) -> None:
        arguments = {name: split for name, split in splits.items() if isinstance(name, str)}
        results = {number: split for number, split in splits.items() if isinstance(number, int)}
        if arguments:
            names = list(inspect.signature(module.forward).parameters)
            hook = partial(forward.split_arguments, arguments, names)
            stack.enter_context(_removed(module.register_forward_pre_hook(hook, with_kwargs=True)))
        if results:
            stack.enter_context(_removed(module.register_forward_hook(partial(forward.split_results, results))))


def _last_of_lists(paths: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Return the last submodule of every list, by the path with which plans name it."""
    return {
        f"{path}.{LAST}": module[-1]
        for path, module in paths.items()
        if isinstance(module, torch.nn.ModuleList) and len(module)
    }


def _check_declared(paths: Mapping[str, torch.nn.Module], plan: TokenPlan) -> None:
    known = (*paths, *_last_of_lists(paths))
    attentions = (*plan.attentions, *plan.exchanges, *plan.whole)
    declared = (*plan.splits, *plan.gathers, *attentions)
    required = [each for each in declared if each and each not in plan.optional]
    if absent := [each for each in required if not any(matches(each, path) for path in known)]:
        raise PlanFault(f"the plan names {listed(absent)}, which this module does not have")
    undeclared = [
        path
        for path, module in paths.items()
        if _computes_attention(module) and not any(matches(each, path) for each in attentions)
    ]
    if undeclared:
        raise PlanFault(f"the plan does not declare the attention of {listed(undeclared)}")


def _check_arguments(
    refused: Mapping[str, Callable[[Any], bool]],
    names: Sequence[str],
    _: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if found := [name for name, test in refused.items() if name in given and test(given[name])]:
        raise PlanFault(f"the plan does not cover this value of {listed(found)}")


def _computes_attention(module: torch.nn.Module) -> bool:
    """Whether this may be a module that computes attention: it has a processor, or is called so and has none inside."""
    if hasattr(module, "processor") or isinstance(module, torch.nn.MultiheadAttention):
        return True
    name = type(module).__name__
    is_named_so = ("Attention" in name or "Attn" in name) and "Processor" not in name
    return is_named_so and not any(_computes_attention(each) for each in module.children())


@dataclass
class _Site:
    """The submodule whose attention is computed now."""

    declared: Attention | None
    module: torch.nn.Module
    calls: int = 0

    def next(self) -> Attention | None:
        """Return the declaration of the next attention of the submodule.

        Raises:
            PlanFault: it computes more than are declared.
        """
        if self.declared is None:
            return None
        known = (self.declared, *self.declared.others)
        if self.calls >= len(known):
            raise PlanFault(f"an attention of {len(known)} declared calls computes more")
        self.calls += 1
        return known[self.calls - 1]

    def repeats(self, declared: Attention, query: torch.Tensor, key: torch.Tensor) -> int:
        """Return how often the class has repeated each head of keys.

        Raises:
            PlanFault: it has not as declared.
        """
        if declared.repeats is None:
            return 1
        many, few = (getattr(self.module, name, 0) for name in declared.repeats)
        if not few or many % few or key.shape[2] != query.shape[2] or key.shape[2] % (many // few):
            raise PlanFault(f"an attention has {key.shape[2]} heads of keys, which are not repeated as declared")
        return int(many // few)


@dataclass
class _Forward:
    """The state of one forward: the streams that were seen, and where it is."""

    ranks: Ranks
    streams: dict[str, Stream] = field(default_factory=dict)
    sites: list[_Site] = field(default_factory=list)
    is_inside: bool = False

    def split(self, value: Any, split: Split, what: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._split_tensor(value, split, what)
        if isinstance(value, (list, tuple)):
            return type(value)(self.split(each, split, what) for each in value)
        if isinstance(value, dict):
            return {name: self.split(each, split, what) for name, each in value.items()}
        return value

    def _split_tensor(self, tensor: torch.Tensor, split: Split, what: str) -> torch.Tensor:
        dim = split.dim + tensor.ndim if split.dim < 0 else split.dim
        if split.ndim not in (None, tensor.ndim) or tensor.shape[dim] == 1:
            return tensor
        if split.is_prefix:
            known = self.stream(split.stream)
            first, rest = tensor.tensor_split([known.tokens], dim)
            if first.shape[dim] != known.tokens:
                raise PlanFault(f"{what} has {tensor.shape[dim]} tokens, {split.stream} alone has {known.tokens}")
            return torch.cat([take(first, dim, known, self.ranks.rank), rest], dim)
        tokens = tensor.shape[dim]
        stream = self.streams.get(split.stream)
        if stream is None:
            if tokens < self.ranks.size:
                raise PlanFault(f"{tokens} tokens of {split.stream} are fewer than {self.ranks.size} workers")
            stream = self.streams[split.stream] = Stream.of(tokens, self.ranks.size)
        if tokens != stream.tokens:
            raise PlanFault(f"{what} has {tokens} tokens, others of {split.stream} have {stream.tokens}")
        return take(tensor, dim, stream, self.ranks.rank)

    def split_arguments(
        self,
        splits: Mapping[str, Split],
        names: Sequence[str],
        _: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given, named = list(args), dict(kwargs)
        for name, split in splits.items():
            if name in named:
                named[name] = self.split(named[name], split, name)
            elif name in names and names.index(name) < len(given):
                given[names.index(name)] = self.split(given[names.index(name)], split, name)
        return tuple(given), named

    def split_results(self, splits: Mapping[int, Split], _: torch.nn.Module, __: Any, results: Any) -> Any:
        return self._for_each(splits, results, lambda split, value: self.split(value, split, "a result"))

    def gather_results(self, gathers: Mapping[int, Split], _: torch.nn.Module, __: Any, results: Any) -> Any:
        return self._for_each(gathers, results, self._gather)

    def _gather(self, split: Split, own: torch.Tensor) -> torch.Tensor:
        counts = self.stream(split.stream).counts
        if own.shape[split.dim] != counts[self.ranks.rank]:
            raise PlanFault(
                f"a result has {own.shape[split.dim]} tokens of {split.stream}, this worker has "
                f"{counts[self.ranks.rank]}"
            )
        return gather(own, split.dim, counts, self.ranks)

    @staticmethod
    def _for_each(splits: Mapping[int, Split], results: Any, change: Callable[[Split, Any], Any]) -> Any:
        if isinstance(results, (tuple, list)):
            found = [change(splits[number], each) if number in splits else each for number, each in enumerate(results)]
            return type(results)(found)
        return change(splits[0], results)

    def stream(self, name: str) -> Stream:
        found = self.streams.get(name)
        if found is None:
            raise PlanFault(f"no tokens of {name} were split before they are used")
        return found

    def enter_attention(self, declared: Attention | None, module: torch.nn.Module, *_: Any) -> None:
        self.sites.append(_Site(declared, module))

    def leave_attention(self, *_: Any) -> None:
        site = self.sites.pop()
        if site.declared is not None and not site.calls and sys.exc_info()[0] is None:
            raise PlanFault("an attention of the plan is not computed by a function that is known")

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    ) -> torch.Tensor:
        """Compute an attention of this forward; tensors are (batch, tokens, heads, head size).

        Raises:
            PlanFault: it is not declared, or its tokens are not those that are declared.
        """
        if not self.sites:
            raise PlanFault("an attention outside of the submodules that the plan declares")
        declared = self.sites[-1].next()
        if declared is None:
            return run(query, key, value, mask)
        queries = self._tokens(declared.queries, query, "queries")
        keys = self._tokens(declared.keys, key, "keys")
        repeats = self.sites[-1].repeats(declared, query, key)
        if mask is not None and keys is not None and not _is_of_all(mask, queries, keys):
            raise PlanFault("a mask that says nothing of this worker's queries and the keys of the others")
        key, value, run = without_repeats(key, value, repeats, self.ranks, run)
        return attend(query, key, value, mask, queries, keys, self.ranks, run)

    def check_causal(self, is_causal: bool) -> None:
        """Raise if an attention over split tokens would be causal: no plan declares that."""
        if is_causal and self.sites and self.sites[-1].declared is not None:
            raise PlanFault("a causal attention, which no plan declares")

    def _tokens(self, names: Sequence[str], tensor: torch.Tensor, what: str) -> Tokens | None:
        if not names:
            return None
        known = tuple(self.streams[name] for name in names if name in self.streams)
        if not known:
            raise PlanFault(f"no tokens of {listed(names)} were split before they are used")
        tokens = Tokens(known)
        own = tokens.counts[self.ranks.rank]
        if tensor.ndim != 4 or tensor.shape[1] != own:
            raise PlanFault(f"an attention has {what} of the shape {list(tensor.shape)}, its streams {own} tokens")
        return tokens


def _is_of_all(mask: torch.Tensor, queries: Tokens | None, keys: Tokens) -> bool:
    """Return whether a mask is one of keys alone, or has all queries or all keys."""
    rows = mask.shape[-2] if mask.ndim > 1 else 1
    return mask.shape[-1] in (1, keys.total) or rows == 1 or queries is None or rows == queries.total


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _attention_replaced(forward: _Forward, namespaces: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Let a forward compute all attention of this process: that of torch, and that of diffusers' backends."""
    of_torch = functional.scaled_dot_product_attention
    of_diffusers = [(namespace, namespace[_DISPATCH]) for namespace in namespaces]

    def run_inside(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        forward.is_inside = True
        try:
            return function(*args, **kwargs)
        finally:
            forward.is_inside = False

    def dispatched(
        function: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        forward.check_causal(is_causal)

        def run(*given: Any) -> torch.Tensor:
            return run_inside(function, *given[:3], given[3], dropout_p, is_causal, *args, **kwargs)

        return forward.attend(query, key, value, attn_mask, run)

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if forward.is_inside:
            return of_torch(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        forward.check_causal(is_causal)

        def run(*given: Any) -> torch.Tensor:
            q, k, v = (each.transpose(1, 2) for each in given[:3])
            return of_torch(q, k, v, given[3], dropout_p, is_causal, **kwargs).transpose(1, 2)

        q, k, v = (each.transpose(1, 2) for each in (query, key, value))
        return forward.attend(q, k, v, attn_mask, run).transpose(1, 2)

    functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
    for namespace, function in of_diffusers:
        namespace[_DISPATCH] = partial(dispatched, function)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = of_torch
        for namespace, function in of_diffusers:
            namespace[_DISPATCH] = function
