"""``StandIn``: one module whose forwards run in the workers.

The methods are replaced on the instance: its class, its configuration, its parameters and the hooks on it stay, so that
the pipeline finds what it expects.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
import weakref
from typing import Any, Final, NamedTuple

import torch

from xditd.client.class_modules import LentModule, call_module, lend_module
from xditd.client.client import Client
from xditd.client.diffusers.adapter_loans import AdapterLoans
from xditd.client.diffusers.adapters import NO_ADAPTERS, Scales
from xditd.client.diffusers.call_scale import finish, scale_of
from xditd.client.diffusers.changes import Snapshot
from xditd.client.diffusers.code_origin import check_code
from xditd.client.diffusers.numerics import current_numerics
from xditd.client.diffusers.placeholders import GUARDED, Placeholders
from xditd.client.diffusers.replaced_method import GET_STATE, ReplacedMethod, StateWithoutMethods, check_not_replaced
from xditd.client.diffusers.tensor_checks import check_tensors
from xditd.client.jobs.held_tensors import HeldTensor
from xditd.client.loans import Loan
from xditd.client.module_descriptions import is_described
from xditd.ipc.errors import BadRequest, DaemonUnreachable, LeaseLost, Unsupported, WorkersLost, XditdError
from xditd.ipc.facts import METHODS
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.transports.module_walk import is_describable

logger = logging.getLogger(__name__)

_ATTEMPTS: Final = 4
"""How often one call is sent at most: again after a change of the module, or after workers or a loan were lost."""

_installing: Final = threading.Lock()
"""Held from the check that no other object has replaced a module's methods until they are replaced."""


class _Lent(NamedTuple):
    """A module as it was lent, and its state at that time."""

    module: LentModule
    snapshot: Snapshot

    @property
    def loan(self) -> Loan:
        return self.module.loan


class _Ready(NamedTuple):
    """What one call uses: the loan, and the adapters with the ``scales`` that were read for it, ``times`` its own."""

    lent: _Lent
    scales: Scales
    times: float = 1.0
    loras: tuple[LoraUse, ...] = ()


class StandIn:
    """A module of a pipeline, lent to the workers while it is installed.

    ``calls`` counts the calls that ran in the workers, ``lends`` the loans, which is the generation of the next one.
    ``wait_s`` is how long a call waits for a daemon that is started again, ``acceleration`` that of its loans. Safe to
    use from several threads, as far as the module is. ``owner`` is the ``Accelerated`` of the module.

    The module keeps this object and its owner alive: it runs in the workers until it is removed. A module without
    references is given back with a ``ResourceWarning`` when it is garbage-collected.
    """

    def __init__(
        self,
        client: Client,
        module: torch.nn.Module,
        name: str,
        *,
        owner: object,
        keeps_weights: bool,
        wait_s: float,
        acceleration: str | None = None,
    ) -> None:
        self.client = client
        self.module = module
        self.name = name
        self.calls = 0
        self.lends = 0
        self._wait_s = wait_s
        self._acceleration = acceleration
        self._pid = os.getpid()
        self._placeholders = None if keeps_weights else Placeholders(module, name)
        names = tuple(each for each in METHODS if callable(getattr(type(module), each, None)))
        self._replaced = frozenset({*names, *((GET_STATE,) if keeps_weights else GUARDED)})
        self._state = StateWithoutMethods(module)
        self._methods = {each: ReplacedMethod(module, each, self._call, owner) for each in names}
        self._lent: _Lent | None = None
        self._has_branches = keeps_weights
        """Whether LoRA layers run as branches beside the layers of the lent module, where they can."""
        is_text_encoder = type(module).__module__.startswith("transformers.")
        self._adapters = AdapterLoans(client, name, "text_encoder" if is_text_encoder else "model")
        self._loans: list[Loan] = []
        """All loans, which the finalizer returns: it has no reference to the module."""
        self._finalizer: weakref.finalize[..., StandIn] | None = None
        self._is_removed = False
        self._running: list[int] = []
        """The threads of running calls."""
        self._changed = threading.Condition()
        """Guards the fields; notified when a call ends."""
        self._lending = threading.Lock()

    def install(self) -> None:
        """Lend the module, and replace its methods.

        Raises:
            BadRequest: the module is no model of diffusers or transformers.
            Unsupported: the module is changed in a way that workers cannot follow, or accelerated already; the error
                names the change and the remedy.
        """
        if not is_described(self.module):
            raise BadRequest(
                f"{self.name}: {type(self.module).__module__}.{type(self.module).__qualname__} is no model of "
                "diffusers or transformers, and runs in this process only: leave it out of components"
            )
        with _installing:
            self._install()

    def _install(self) -> None:
        for name in (*self._methods, *self._replaced):  # the methods first: they show what is accelerated already
            check_not_replaced(self.module, name, self.name)
        lent = self._lend(None)
        if self._placeholders is not None:
            try:
                lent.loan.adopt()
            except BaseException:
                self._lent = None
                lent.loan.return_()
                raise
            self._placeholders.install()
            self._lent = _Lent(lent.module, Snapshot(self.module, self._replaced))
        # It references the client, so that the client's own finalizer runs after it.
        self._finalizer = weakref.finalize(self, _give_back_collected, self.client, self._loans, self.name, self._pid)
        self._finalizer.atexit = False  # the daemon sees the process end
        for method in self._methods.values():
            method.install()
        if self._placeholders is None:
            self._state.install()

    def check_not_calling(self) -> None:
        """Refuse to wait for a call of this very thread, which a signal handler has interrupted.

        Raises:
            BadRequest: such a call runs.
        """
        if threading.get_ident() in self._running:
            raise BadRequest(
                f"{self.name}: a call of it runs in this thread, which a signal handler cannot wait for: raise an "
                "exception there, which ends the call, and give the model back after it"
            )

    def remove(self) -> None:
        """Give the module back as it was, when its running calls have ended, and end its loan.

        Raises:
            LeaseLost: its weights were in the daemon alone, and were lost with its workers.
        """
        with self._changed:
            self._is_removed = True
            if os.getpid() == self._pid:
                self._changed.wait_for(lambda: not self._running)
        for method in self._methods.values():
            method.remove()
        self._state.remove()
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._lent is None or os.getpid() != self._pid:
            return  # a forked process has a copy of the loan, which the other one ends
        try:
            self._give_back(self._lent.loan)
        except XditdError:
            self._lent = None
            raise
        self._lent = None  # not after an interrupt: another remove() copies kept weights back

    def _give_back(self, loan: Loan) -> None:
        if self._placeholders is not None:
            self._placeholders.remove(self.client, loan)
        elif loan.is_live:
            loan.return_()
        self._adapters.return_all()

    # A function that torch.compile traces runs the client as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _call(self, method: ReplacedMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if os.getpid() != self._pid:
            raise Unsupported(
                f"{self.name}: process {self._pid} lent it, and this process is a fork of it: fork before accelerate()"
            )
        with self._changed:
            is_removed = self._is_removed
            if not is_removed:
                self._running.append(threading.get_ident())
        if is_removed:  # the caller has kept the method beyond the block
            return method.original(*args, **kwargs)
        try:
            return self._run(method, args, kwargs)
        finally:
            with self._changed:
                self._running.remove(threading.get_ident())
                self._changed.notify_all()

    def _run(self, method: ReplacedMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = method.bind(args, kwargs)
        self._check_methods(method)
        self._check_gradients()
        device = _device_of(self.module)
        if device.type == "meta":
            raise Unsupported(
                f"{self.name}: its weights are on the meta device: load them first; where sequential offloading has "
                "put them there, pipe.remove_all_hooks() brings them back"
            )
        numerics = current_numerics(device)
        lent = self._lent
        is_current, is_lost = True, False
        for attempt in range(_ATTEMPTS):
            changes: list[str] = []
            try:
                ready = self._prepare(lent, method.name, arguments, is_current=is_current, is_lost=is_lost)
                lent, is_current, is_lost = ready.lent, True, False
                result = call_module(
                    self.client,
                    lent.loan,
                    arguments,
                    method=method.name,
                    numerics=numerics,
                    device=device,
                    while_running=functools.partial(_check_unchanged, lent.snapshot, ready.scales, changes),
                    loras=ready.loras,
                )
            except _Changed:
                self._note_change(changes)
                is_current = False
            except (LeaseLost, DaemonUnreachable, WorkersLost) as error:
                # A call changes only the objects among its arguments, and those at its end: it may run again.
                if self._placeholders is not None and isinstance(error, LeaseLost):
                    raise LeaseLost(self._placeholders.lost_text(error.detail)) from error
                if attempt == _ATTEMPTS - 1 or self._placeholders is not None or _holds_tensors(arguments):
                    raise
                logger.warning("component %s is called again: %s", self.name, error.detail)
                self.client.wait_ready(self._wait_s)
                is_lost = isinstance(error, LeaseLost)
                is_current = not is_lost
            else:
                finish(self.module, ready.times)
                with self._changed:
                    self.calls += 1
                return result
        raise Unsupported(f"{self.name}: the module changes during each of its calls; leave it out of components")

    def _prepare(
        self, lent: _Lent | None, method: str, arguments: dict[str, Any], *, is_current: bool, is_lost: bool
    ) -> _Ready:
        """Lend what is not lent as it is now, and choose the LoRAs of a call."""
        scales = lent.snapshot.adapters.scales() if lent is not None and lent.loan.is_live and is_current else None
        if lent is None or scales is None:
            lent = self._lend(lent, is_lost=is_lost)
            scales = lent.snapshot.adapters.scales()
        adapters = lent.snapshot.adapters
        if not adapters.layers or scales is None:  # a change since is found while the call runs
            return _Ready(lent, {})
        times = scale_of(type(self.module), method, arguments)
        if times is None:
            logger.info("component %s: its forward scales LoRA layers in its own way: they are lent", self.name)
            self._has_branches = False
            return _Ready(self._lend(lent), {})
        with self._lending:
            loras = self._adapters.uses(adapters, scales, times)
            self._note_loans(lent)
        return _Ready(lent, scales, times, loras)

    def _note_loans(self, lent: _Lent) -> None:
        self._loans[:] = [lent.loan, *self._adapters.loans]

    def _lend(self, before: _Lent | None, *, is_lost: bool = False) -> _Lent:
        """Lend the module as it is now, unless another thread has done so since ``before``.

        If nothing has changed but LoRA layers that are branches, its loan stays, unless it ``is_lost``.
        """
        with self._lending:
            if self._lent is not None and self._lent is not before:
                return self._lent
            if before is not None and self._placeholders is not None:
                before.loan.check()
                raise LeaseLost("its loan has ended")
            check_tensors(self.module, self.name)
            snapshot = Snapshot(self.module, self._replaced, has_branches=self._has_branches)
            check_code(snapshot.namespaces, self.name)
            self._adapters.keep_only(NO_ADAPTERS if is_lost else snapshot.adapters)
            is_live = before is not None and before.loan.is_live and not is_lost
            if before is not None and is_live and snapshot.has_same_base(before.snapshot):
                self._lent = _Lent(before.module, snapshot)
                self._note_loans(self._lent)
                return self._lent
            lent = lend_module(
                self.client,
                self.module,
                label=self.name,
                generation=self.lends,
                replaced=self._replaced,
                acceleration=self._acceleration,
                base_layers=snapshot.adapters.layers,
                before=None if before is None else before.module,
            )
            self.lends += 1
            self._lent = _Lent(lent, snapshot)
            self._note_loans(self._lent)
            return self._lent

    def _note_change(self, changes: list[str]) -> None:
        if self._placeholders is not None:
            raise Unsupported(
                f"{self.name}: {', '.join(changes[:3])} changed, but its weights are in the daemon alone: use "
                "keep='client' for modules that change"
            )
        logger.info("component %s has changed, and is lent again: %s", self.name, ", ".join(changes[:3]))

    def _check_methods(self, called: ReplacedMethod) -> None:
        """Check the other methods, which ``called`` may use: the workers run those of the class."""
        for name, method in self._methods.items():
            if method is not called and vars(self.module).get(name) is not method:
                raise Unsupported(
                    f"{self.name}: its {name} was replaced within the accelerate block, and workers run that of "
                    f"{type(self.module).__name__}: restore it, or leave this model out of components"
                )

    def _check_gradients(self) -> None:
        if torch.is_grad_enabled() and any(each.requires_grad for each in self.module.parameters()):
            raise BadRequest(
                f"{self.name}: its parameters require gradients, and workers compute none: call it under "
                "torch.no_grad(), as pipelines do, or after requires_grad_(False)"
            )


def _give_back_collected(_: Client, loans: list[Loan], name: str, pid: int) -> None:
    """End the loan of a module that was garbage-collected. Runs at any point of any thread, so it takes no lock."""
    if os.getpid() != pid:
        return  # a fork has a copy of the loan, which the other process ends
    for loan in loans:
        loan.return_soon()
    warnings.warn(
        f"{name} was garbage-collected while it was accelerated: its loan ends now; use a with block, or call "
        "unaccelerate(pipe)",
        ResourceWarning,
        stacklevel=1,
    )


class _Changed(Exception):
    """The module differs from what was lent."""


def _check_unchanged(snapshot: Snapshot, scales: Scales, found: list[str]) -> None:
    found += snapshot.changes()
    if not found and (snapshot.adapters.scales() or {}) != scales:
        found.append("scales of LoRA layers")
    if found:
        raise _Changed


def _device_of(module: torch.nn.Module) -> torch.device:
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _holds_tensors(value: Any) -> bool:
    """Return whether the arguments have held tensors, whose values are lost with the workers."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, HeldTensor)
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return is_describable(value) and any(map(_holds_tensors, vars(value).values()))
