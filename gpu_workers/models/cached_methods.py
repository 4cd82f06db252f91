"""Methods that keep their results for ever: ``functools.lru_cache`` on methods of a class, such as tables of positions.

Results are kept by the submodule, which computes with the tensors of one loan after another. So each loan has its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, Final

import torch

_Cache: Final = type(functools.lru_cache(int))


class CachedMethods:
    """The results that such methods of a module have for one loan: for the tensors that are in it then."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._found = [
            (submodule, name, _own(submodule, function, cache))
            for submodule in module.modules()
            for name, function, cache in _cached(type(submodule))  # type: ignore[arg-type]  # classes have a hash
            if name not in vars(submodule)
        ]

    def install(self) -> None:
        """Have the submodules use these results, until their attributes are restored."""
        for submodule, name, method in self._found:
            vars(submodule)[name] = method


def _own(submodule: torch.nn.Module, function: Callable[..., Any], cache: Any) -> Callable[..., Any]:
    cached = functools.lru_cache(**cache.cache_parameters())(functools.partial(function, submodule))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(submodule, *args, **kwargs) if torch.compiler.is_compiling() else cached(*args, **kwargs)

    return call


@functools.cache
def _cached(kind: type) -> tuple[tuple[str, Callable[..., Any], Any], ...]:
    """Return the names of such methods of a class, their functions, and the caches."""
    return tuple(
        (name, inspect.unwrap(cache), cache)
        for name in dir(kind)
        for cache in _caches_in(inspect.getattr_static(kind, name))
    )


def _caches_in(value: object) -> Iterator[Any]:
    """Yield the cache of a method. Decorators of diffusers and transformers pass it by while a compiler traces."""
    if isinstance(value, _Cache):
        yield value
    elif isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        found = [cell.cell_contents for cell in value.__closure__ or () if isinstance(cell.cell_contents, _Cache)]
        yield from found[:1]
