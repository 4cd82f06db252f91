"""Run the forward of a class with its tokens split over ranks, as its token plan says.

The class's own code runs. Hooks on its submodules split arguments and gather results, and the functions that compute
attention are replaced while it runs, so that each token attends to those of all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from xditd.gpu_workers.models.cache_shares import CacheShares
from xditd.gpu_workers.models.exchanged_attention import ExchangedAttention
from xditd.gpu_workers.models.forward_state import ForwardState, Site
from xditd.gpu_workers.models.plan_checks import check_values, paths_of
from xditd.gpu_workers.models.replaced_attention import attention_replaced, namespaces
from xditd.gpu_workers.models.token_plans import Attention, Cache, PlanFault, Splits, TokenPlan, matches
from xditd.gpu_workers.parallel.streams import Ranks, Stream
from xditd.gpu_workers.parallel.token_shares import TokenShares


class PlannedModule:
    """A module with its token plan. All ranks make the same calls in the same order.

    Raises:
        PlanFault: the module has an attention that the plan does not declare, or lacks a path that it names.
    """

    def __init__(self, module: torch.nn.Module, plan: TokenPlan) -> None:
        self._module = module
        self._plan = plan
        self._paths = paths_of(module, plan)
        self._splits = self._resolve(plan.splits)
        self._gathers = self._resolve(plan.gathers)
        self._attentions: list[tuple[torch.nn.Module, Attention | None]] = [
            *((each, declared) for each, declared in self._resolve(plan.attentions)),
            *((self._paths[path], None) for path in self._paths for each in plan.whole if matches(each, path)),
            *((each, None) for each, _ in self._resolve(plan.exchanges)),
        ]
        self._exchanges = [ExchangedAttention(each, declared) for each, declared in self._resolve(plan.exchanges)]
        self._namespaces = namespaces()
        self._names: dict[torch.nn.Module, list[str]] = {}
        """The arguments of each hooked module's forward, which take as long to read as all hooks to set."""
        self.current: ForwardState | None = None
        """The state of the forward that runs now, if one does."""

    @property
    def hooked(self) -> list[torch.nn.Module]:
        """The submodules around or in which a forward splits, gathers or exchanges: all but those of ``attentions``."""
        return [each for each, _ in (*self._splits, *self._gathers, *self._resolve(self._plan.exchanges))]

    def site(self, module: torch.nn.Module) -> Site:
        """Return the state of a submodule's attention, as it is when a forward enters the submodule.

        Raises:
            PlanFault: the plan does not declare it.
        """
        for each, declared in self._attentions:
            if each is module:
                return Site(declared, module)
        raise PlanFault("an attention outside of the submodules that the plan declares")

    @property
    def cache(self) -> Cache | None:
        """The keys and values that calls keep, as the plan declares them."""
        return self._plan.cache

    def run(self, call: Callable[[], Any], ranks: Ranks, shares: TokenShares | None = None) -> Any:
        """Run ``call``, which calls the module once; every rank returns the whole result.

        Each rank keeps its share of the tensors of a cache, which ``shares`` has noted then.

        Raises:
            PlanFault: a stream has fewer tokens than there are ranks, or the forward is not as the plan declares.
        """
        forward = ForwardState(ranks)
        with ExitStack() as stack:
            names = self._names_of(self._module)
            check = partial(check_values, self._plan.refused, names)
            stack.enter_context(_removed(self._module.register_forward_pre_hook(check, with_kwargs=True)))
            for module, splits in self._splits:
                self._hook_splits(stack, forward, module, splits)
            if self._plan.cache is not None:
                self._hook_cache(stack, forward, self._plan.cache, names, TokenShares() if shares is None else shares)
            for module, gathers in self._gathers:
                stack.enter_context(_removed(module.register_forward_hook(partial(forward.gather_results, gathers))))
            for module, declared in self._attentions:
                enter = partial(forward.enter_attention, declared)
                stack.enter_context(_removed(module.register_forward_pre_hook(enter)))
                stack.enter_context(_removed(module.register_forward_hook(forward.leave_attention, always_call=True)))
            for exchanged in self._exchanges:
                for handle in exchanged.hook(forward.stream, ranks):
                    stack.enter_context(_removed(handle))
            stack.enter_context(attention_replaced(forward, self._namespaces, self._plan.refused_backends))
            stack.callback(setattr, self, "current", None)
            self.current = forward
            return call()

    def _resolve(self, declared: Mapping[str, Any]) -> list[tuple[torch.nn.Module, Any]]:
        return [
            (module, what)
            for pattern, what in declared.items()
            for path, module in self._paths.items()
            if matches(pattern, path)
        ]

    def _names_of(self, module: torch.nn.Module) -> list[str]:
        if module not in self._names:
            self._names[module] = list(inspect.signature(module.forward).parameters)
        return self._names[module]

    def _hook_splits(self, stack: ExitStack, forward: ForwardState, module: torch.nn.Module, splits: Splits) -> None:
        arguments = {name: split for name, split in splits.items() if isinstance(name, str)}
        results = {number: split for number, split in splits.items() if isinstance(number, int)}
        if arguments:
            names = self._names_of(module)
            hook = partial(forward.split_arguments, arguments, names)
            stack.enter_context(_removed(module.register_forward_pre_hook(hook, with_kwargs=True)))
        if results:
            stack.enter_context(_removed(module.register_forward_hook(partial(forward.split_results, results))))

    def _hook_cache(
        self, stack: ExitStack, forward: ForwardState, declared: Cache, names: list[str], shares: TokenShares
    ) -> None:
        """Hook the cache behind the split of arguments, so that these define their streams without it."""
        cache = CacheShares(declared, forward, shares, partial(self._share_heads, forward.ranks))
        stack.enter_context(
            _removed(self._module.register_forward_pre_hook(partial(cache.enter, names), with_kwargs=True))
        )
        stack.enter_context(_removed(self._module.register_forward_hook(cache.leave)))

    def _share_heads(self, ranks: Ranks, projection: str) -> Stream | None:
        found = {each.share_heads(projection, ranks) for each in self._exchanges}
        if len(found) != 1:
            raise PlanFault(f"the heads of {projection} that are in a cache are not exchanged alike in every attention")
        return found.pop()


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
