"""Check a token plan against a module when it is built, and the arguments of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xditd.gpu_workers.models.token_plans import LAST, PlanFault, TokenPlan, matches
from xditd.ipc.name_lists import listed


def paths_of(module: torch.nn.Module, plan: TokenPlan) -> dict[str, torch.nn.Module]:
    """Return the submodules by the paths with which plans name them.

    Raises:
        PlanFault: the module has an attention that the plan does not declare, or lacks a path or an argument that it
            names.
    """
    paths = dict(module.named_modules())
    _check_declared(paths, plan)
    paths |= _last_of_lists(paths)
    _check_arguments(paths, plan)
    return paths


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


def _check_arguments(paths: Mapping[str, torch.nn.Module], plan: TokenPlan) -> None:
    """Check that each argument is one of a module at its path: of blocks of several kinds, not all take it."""
    for pattern, splits in plan.splits.items():
        taken = [
            inspect.signature(module.forward).parameters for path, module in paths.items() if matches(pattern, path)
        ]
        takes_any = any(each.kind is each.VAR_KEYWORD for names in taken for each in names.values())
        absent = [name for name in splits if isinstance(name, str) and not any(name in names for names in taken)]
        if taken and absent and not takes_any:
            raise PlanFault(f"the plan names {listed(absent)}, which {pattern or 'the module'} does not take")


def check_values(
    refused: Mapping[str, Callable[[Any], bool]],
    names: Sequence[str],
    _: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Raise if a call has a value that the plan refuses: a hook before a forward of these argument ``names``."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if found := [name for name, test in refused.items() if name in given and test(given[name])]:
        raise PlanFault(f"the plan does not cover this value of {listed(found)}")


def _computes_attention(module: torch.nn.Module) -> bool:
    """Return whether a module may compute attention: it has a processor, or is called so and has none inside."""
    if hasattr(module, "processor") or isinstance(module, torch.nn.MultiheadAttention):
        return True
    name = type(module).__name__
    is_named_so = ("Attention" in name or "Attn" in name) and "Processor" not in name
    return is_named_so and not any(_computes_attention(each) for each in module.children())
