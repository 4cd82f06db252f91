"""``StandIn``: one module whose forwards run in the workers.

The methods are replaced on the instance: its class, its configuration, its parameters and the hooks on it stay, so that
the pipeline finds what it expects.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Final

import torch

from xditd.client.class_modules import call_module, lend_module
from xditd.client.client import Client
from xditd.client.diffusers.changes import Snapshot
from xditd.client.diffusers.numerics import current_numerics
from xditd.client.diffusers.placeholders import Placeholders
from xditd.client.jobs.held_tensors import HeldTensor
from xditd.client.loans import Loan
from xditd.ipc.errors import BadRequest, DaemonUnreachable, LeaseLost, Unsupported, WorkersLost
from xditd.ipc.transports.module_walk import method_signature

logger = logging.getLogger(__name__)

METHODS: Final = ("forward", "encode", "decode")
_GUARDED: Final = (
    "state_dict",
    "save_pretrained",
    "to",
    "cpu",
    "cuda",
    "half",
    "float",
    "double",
    "bfloat16",
    "_apply",
)


class StandIn:
    """A module of a pipeline, lent to the workers while it is installed.

    ``calls`` counts the calls that ran in the workers. Safe to use from several threads, as far as the module is.
    """

    def __init__(self, client: Client, module: torch.nn.Module, name: str, *, keeps_weights: bool) -> None:
        self.client = client
        self.module = module
        self.name = name
        self.calls = 0
        self.lends = 0
        self._methods = tuple(each for each in METHODS if callable(getattr(type(module), each, None)))
        self._signatures = {each: method_signature(getattr(type(module), each)) for each in self._methods}
        self._replaced = frozenset({*self._methods, *(() if keeps_weights else _GUARDED)})
        self._loan: Loan | None = None
        self._snapshot: Snapshot | None = None
        self._placeholders: Placeholders | None = None
        self._keeps_weights = keeps_weights

    def install(self) -> None:
        """Lend the module, and replace its methods.

        Raises:
            Unsupported: the module is changed in a way that workers cannot follow; names it and the remedy.
        """
        taken = [each for each in self._replaced if each in vars(self.module)]
        if taken:
            raise Unsupported(
                f"{self.name}: its {taken[0]} was replaced before, by {_owner_of(vars(self.module)[taken[0]])}: "
                "offloading and caches of other libraries cannot run in the workers; remove them first "
                "(pipe.remove_all_hooks(), module.disable_cache())"
            )
        self._lend()
        if not self._keeps_weights:
            assert self._loan is not None
            self._loan.adopt()
            self._placeholders = Placeholders(self.module, self.name)
            self._placeholders.install(_GUARDED)
            self._snapshot = Snapshot(self.module, self._replaced)
        for method in self._methods:
            vars(self.module)[method] = self._make(method)

    def remove(self) -> None:
        """Give the module back as it was, and end its loan."""
        for method in self._methods:
            vars(self.module).pop(method, None)
        if self._placeholders is not None and self._loan is not None:
            self._placeholders.remove(self.client, self._loan)
            self.client.revoke(self._loan)
        elif self._loan is not None and self._loan.is_live:
            self._loan.return_()
        self._loan = self._snapshot = self._placeholders = None

    def _make(self, method: str) -> Callable[..., Any]:
        original = getattr(self.module, method)

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._call(method, args, kwargs)

        # Pipelines look at the signature to see which arguments a model takes.
        run.__signature__ = _without_self(self._signatures[method])  # type: ignore[attr-defined]
        return run

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = _bind(self._signatures[method], self.module, args, kwargs)
        self._check_gradients()
        device = _device_of(self.module)
        numerics = current_numerics(device)
        for is_last in (False, False, True):
            if self._loan is None or not self._loan.is_live:
                self._lend()
            assert self._loan is not None
            changes: list[str] = []
            try:
                result = call_module(
                    self.client,
                    self._loan,
                    arguments,
                    method=method,
                    numerics=numerics,
                    device=device,
                    while_running=functools.partial(self._check_unchanged, changes),
                )
            except _Changed:
                self._follow(changes)
            except (LeaseLost, DaemonUnreachable, WorkersLost) as error:
                # A call changes nothing but its objects, and those only at its end: it may run again.
                if is_last or self._placeholders is not None or _holds_tensors(arguments):
                    raise
                logger.warning("component %s is lent again: %s", self.name, error.detail)
                self._wait_for_daemon()
            else:
                self.calls += 1
                return result
        raise Unsupported(f"{self.name}: the module changes during each of its calls; leave it out of components")

    def _lend(self) -> None:
        before = self._loan
        self._snapshot = Snapshot(self.module, self._replaced)
        self._loan = lend_module(
            self.client, self.module, label=self.name, generation=self.lends, replaced=self._replaced
        )
        self.lends += 1
        if before is not None and before.is_live and before.component_id != self._loan.component_id:
            before.return_()

    def _check_unchanged(self, found: list[str]) -> None:
        assert self._snapshot is not None
        found += self._snapshot.changes()
        if found:
            raise _Changed

    def _follow(self, changes: list[str]) -> None:
        """Lend the module as it is now."""
        if self._placeholders is not None:
            raise Unsupported(
                f"{self.name}: {', '.join(changes[:3])} changed, but its weights are in the daemon alone: use "
                "keep='client' for modules that change"
            )
        logger.info("component %s has changed, and is lent again: %s", self.name, ", ".join(changes[:3]))
        self._lend()

    def _wait_for_daemon(self) -> None:
        self.client.wait_ready(self.client.deadline_s)

    def _check_gradients(self) -> None:
        if torch.is_grad_enabled() and any(each.requires_grad for each in self.module.parameters()):
            raise BadRequest(
                f"{self.name}: its parameters require gradients, and workers compute none: call it under "
                "torch.no_grad(), as pipelines do, or after requires_grad_(False)"
            )


class _Changed(Exception):
    """The module is no longer what was lent."""


def _bind(
    signature: inspect.Signature, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments by name; raises ``TypeError`` as the method itself does."""
    bound = signature.bind(module, *args, **kwargs)
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise BadRequest(f"{type(module).__name__}: arguments without names (*{name}) cannot be sent; name them")
        else:
            found[name] = value
    return found


def _without_self(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _device_of(module: torch.nn.Module) -> torch.device:
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in the arguments whose contents were lost with the workers."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, HeldTensor)
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return hasattr(value, "__dict__") and any(map(_holds_tensors, vars(value).values()))


def _owner_of(function: Any) -> str:
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__name__)}"
