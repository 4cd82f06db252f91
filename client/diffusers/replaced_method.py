"""``ReplacedMethod``: the attribute of a module that replaces one of its methods while the workers run the module."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Final, NoReturn

import torch

from xditd.client.accelerated_methods import AcceleratedMethod
from xditd.ipc.errors import Unsupported
from xditd.ipc.transports.module_walk import is_own_method, method_signature


class ReplacedMethod(AcceleratedMethod):
    """Calls ``run`` with itself and the arguments. ``original`` is the method as the module had it.

    ``owner`` is the ``Accelerated`` that the module belongs to; the module keeps it alive.
    Pipelines read its signature to see which arguments a model takes. It cannot be pickled.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        name: str,
        run: Callable[[ReplacedMethod, tuple[Any, ...], dict[str, Any]], Any],
        owner: Any,
    ) -> None:
        self.name = name
        self.owner = owner
        self.before: Any = vars(module).get(name)
        """What the module had in place of its class's method, or ``None``."""
        self.original: Callable[..., Any] = getattr(module, name)
        self._module = module
        self._run = run
        functools.update_wrapper(self, self.original)
        self._signature = method_signature(getattr(type(module), name))
        self.__signature__ = self._signature.replace(parameters=list(self._signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self, args, kwargs)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name.

        Raises:
            TypeError: the method does not take them, as the method itself says it.
            Unsupported: there are arguments without names, of a method with ``*args``.
        """
        bound = self._signature.bind(self._module, *args, **kwargs)
        found: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                raise Unsupported(
                    f"{type(self._module).__name__}.{self.name}: arguments without names (*{name}) cannot be sent; "
                    "name them"
                )
            else:
                found[name] = value
        return found

    def install(self) -> None:
        vars(self._module)[self.name] = self

    def remove(self) -> None:
        """Restore what the module had, unless another library has replaced the method since."""
        if vars(self._module).get(self.name) is self:
            del vars(self._module)[self.name]
            if self.before is not None:
                vars(self._module)[self.name] = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self._module))
        if copy is None:
            raise Unsupported(f"{type(self._module).__name__}.{self.name}: copy the module, not its method")
        return types.MethodType(getattr(type(self._module), self.name), copy)

    def __reduce__(self) -> NoReturn:
        raise Unsupported(
            f"{type(self._module).__name__}: it runs in the workers and cannot be pickled; leave the accelerate block "
            "first, or save its state_dict()"
        )


GET_STATE: Final = "__getstate__"


class StateWithoutMethods:
    """The ``__getstate__`` of a module: copies of it have the methods of their class, and so run in this process.

    Without it, the methods of a shallow copy would run the module of which it is a copy.
    Source: Python, "Pickling Class Instances"; ``copy.copy``, ``copy.deepcopy`` and pickle ask the instance for it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self) -> dict[str, Any]:
        attributes = vars(self._module).items()
        return {name: each for name, each in attributes if not isinstance(each, (ReplacedMethod, StateWithoutMethods))}

    def install(self) -> None:
        vars(self._module)[GET_STATE] = self

    def remove(self) -> None:
        if vars(self._module).get(GET_STATE) is self:
            del vars(self._module)[GET_STATE]


def check_not_replaced(module: torch.nn.Module, name: str, label: str) -> None:
    """Check that a method is that of the class.

    Raises:
        Unsupported: it was replaced, or is accelerated already; the error says by what it was replaced, and the remedy.
    """
    found = vars(module).get(name)
    if found is None or is_own_method(module, name, found):
        return
    if isinstance(found, ReplacedMethod):
        raise Unsupported(
            f"{label}: it is accelerated already: leave that accelerate block, or give the model back by "
            "unaccelerate(pipe) of xditd.client"
        )
    owner = found.func if isinstance(found, functools.partial) else found
    text = f"{getattr(owner, '__module__', None)}.{getattr(owner, '__qualname__', type(owner).__name__)}"
    raise Unsupported(
        f"{label}: its {name} was replaced before, by {text}, which workers cannot run: restore it; where offloading "
        "or a cache has replaced it, by pipe.remove_all_hooks() or module.disable_cache()"
    )
