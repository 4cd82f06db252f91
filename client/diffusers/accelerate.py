"""``accelerate``: run the models of a diffusers pipeline on the daemon's workers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from xditd.client.waiting import check_seconds
from xditd.ipc.errors import BadRequest, Unsupported, XditdError

if TYPE_CHECKING:
    from xditd.client.client import Client
    from xditd.client.diffusers.stand_in import StandIn
    from xditd.ipc.tensors import Acceleration

logger = logging.getLogger(__name__)

DENOISERS: Final = ("transformer", "transformer_2", "transformer_ref", "unet")
"""The components that run in the workers unless others are named: those that run in every step."""

WAIT_S: Final = 120.0
"""How many seconds ``accelerate`` waits for a daemon that is being started, and for its workers."""


def accelerate(
    pipe: Any,
    *,
    components: Sequence[str] | None = None,
    keep: Literal["client", "daemon"] = "client",
    client: Client | None = None,
    runtime_dir: str | os.PathLike[str] | None = None,
    wait_s: float = WAIT_S,
    acceleration: Acceleration | None = None,
) -> Accelerated:
    """Run models of ``pipe`` on the daemon's workers, until the returned object is closed or its ``with`` block ends.

    ``pipe`` is any pipeline of diffusers, modular ones too, or one module. ``components`` are names of its models:
    ``transformer``, ``transformer_2``, ``transformer_ref``, ``unet`` (default: those of them that it has),
    ``controlnet``, ``vae``, ``text_encoder`` and so on. Their weights are lent, not copied, as far as
    :meth:`Client.lend` can. Everything else of the pipeline works as before. A model that changes is lent again: LoRA
    layers, IP adapters, attention processors, written weights.

    With ``keep="daemon"`` the workers copy the weights, and this process frees its own until the block ends; the models
    can then not be changed, moved or saved. If the workers end before the block does, the weights are lost: the end of
    the block raises ``LeaseLost``, and the models' methods raise ``Unsupported`` until they are loaded again.

    If workers or the daemon end during a call with ``keep="client"``, the call waits up to ``wait_s`` seconds for new
    ones, and runs again. The contents of a KV cache are lost with the workers: a call with one raises ``LeaseLost``.

    On GPUs, the daemon compiles the blocks of a model in the background, which round otherwise, and captures forwards
    as CUDA graphs. ``acceleration="captured"`` or ``"eager"`` keeps the bits of the class; without it the daemon's
    setting says.

    The models stay in the workers also if nothing references the returned object: :func:`unaccelerate` then gives them
    back. Models that are garbage-collected before are given back with a ``ResourceWarning``.

    Without a ``client``, one is made for ``runtime_dir`` and closed at the end; it waits up to ``wait_s`` for workers.

    Raises:
        BadRequest: the pipeline has no such component, or it is no model.
        Unsupported: a model is changed in a way that workers cannot follow; the error names the change and the remedy.
        DaemonUnreachable: no daemon answered within ``wait_s``.
    """
    if keep not in ("client", "daemon"):
        raise BadRequest(f"keep: {keep!r}; use 'client' or 'daemon'")
    # Imported here: torch and diffusers take seconds.
    import diffusers  # noqa: F401
    import torch

    from xditd.client.client import Client
    from xditd.client.diffusers.stand_in import StandIn

    modules = _modules_of(pipe, components, torch.nn.Module)
    if client is not None and not isinstance(client, Client):
        raise BadRequest(f"client: a {type(client).__name__}; give a Client, or the daemon's folder as runtime_dir")
    if client is not None and runtime_dir is not None:
        raise BadRequest(f"runtime_dir: {runtime_dir!r:.100}, and the client has a daemon already: give one of the two")
    check_seconds("wait_s", wait_s)
    owns_client = client is None
    client = client or Client(runtime_dir, name="diffusers", wait_s=wait_s)
    accelerated = Accelerated(client, owns_client=owns_client)
    try:
        for name, module in modules.items():
            accelerated.add(
                StandIn(
                    client,
                    module,
                    name,
                    owner=accelerated,
                    keeps_weights=keep == "client",
                    wait_s=wait_s,
                    acceleration=acceleration,
                )
            )
    except BaseException:
        accelerated.close()
        raise
    return accelerated


def unaccelerate(pipe: Any) -> None:
    """Close every :class:`Accelerated` to which models of ``pipe``, a pipeline or one module, belong.

    That gives back all models of each, as at the end of its ``with`` block. Does nothing if no model is accelerated.

    Raises:
        LeaseLost: see :meth:`Accelerated.close`.
    """
    import torch

    from xditd.client.diffusers.replaced_method import ReplacedMethod

    found = [pipe] if isinstance(pipe, torch.nn.Module) else list(getattr(pipe, "__dict__", {}).values())
    models = [each for each in found if isinstance(each, torch.nn.Module)]
    compiled = [each for each in models if _is_compiled(each)]
    models += [part for each in compiled for part in each.children()]
    models += [part for each in models for part in getattr(each, "nets", ())]
    # The order of the models: a set of owners would have none.
    owners = {
        id(method.owner): method.owner
        for model in models
        for method in vars(model).values()
        if isinstance(method, ReplacedMethod)
    }
    with contextlib.ExitStack() as stack:  # all of them are closed, also if one fails
        for each in owners.values():
            stack.callback(each.close)


class Accelerated:
    """Models of a pipeline that run in the workers. ``close()``, or the end of its block, gives them back.

    ``client`` is the client that has lent them; with ``owns_client`` it is closed with this object.
    """

    def __init__(self, client: Client, *, owns_client: bool) -> None:
        self.client = client
        self._owns_client = owns_client
        self._stand_ins: dict[str, StandIn] = {}
        self._is_closed = False
        self._pid = os.getpid()

    def add(self, stand_in: StandIn) -> None:
        """Lend a model and replace its methods; see :meth:`StandIn.install` for what it raises."""
        stand_in.install()
        self._stand_ins[stand_in.name] = stand_in

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the models that run in the workers."""
        return tuple(self._stand_ins)

    @property
    def calls(self) -> dict[str, int]:
        """How many calls of each model ran in the workers."""
        return {name: each.calls for name, each in self._stand_ins.items()}

    def close(self) -> None:
        """Wait for running calls, give every model back as it was, and end the loans. May be called twice.

        After an interrupt (Ctrl+C) another call gives back what is left.

        Raises:
            LeaseLost: with ``keep="daemon"``, weights were lost with the workers; names the models.
            BadRequest: called within a call of the same thread, by a signal handler.
        """
        if self._is_closed:
            return
        for each in self._stand_ins.values():
            each.check_not_calling()
        self._is_closed = True
        try:
            with contextlib.ExitStack() as stack:  # all of them are removed, also if one fails
                for each in self._stand_ins.values():
                    stack.callback(each.remove)
        except XditdError:
            raise
        except BaseException:
            self._is_closed = False
            raise
        finally:
            if self._owns_client and os.getpid() == self._pid:
                self.client.close()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except XditdError as failed:
            if error is None:
                raise
            logger.warning("block left by another error, and not all models were given back: %s", failed.detail)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{len(self._stand_ins)} models: {', '.join(self._stand_ins)}"
        return f"<Accelerated {state}>"


def _is_compiled(module: Any) -> bool:
    """Return whether it is what ``torch.compile`` wraps around a module."""
    return type(module).__name__ == "OptimizedModule"


def _modules_of(pipe: Any, components: Sequence[str] | None, kind: type) -> dict[str, Any]:
    """Return the models of a pipeline by name; those of a list of models (several ControlNets) one by one."""
    if isinstance(pipe, kind):
        if components is not None:
            raise BadRequest(
                f"components: {type(pipe).__name__} is one model, which has none; leave them out, or give its pipeline"
            )
        return _split_lists({type(pipe).__name__: pipe})
    if isinstance(components, str):
        raise BadRequest(f"components: {components!r} is one text; give a tuple of names, ({components!r},)")
    if components is None:
        found = {name: getattr(pipe, name, None) for name in DENOISERS}
        modules = {name: each for name, each in found.items() if isinstance(each, kind)}
        if not modules:
            raise BadRequest(
                f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}: give a pipeline or a model of diffusers, "
                "and name other models of a pipeline with components="
            )
        return _split_lists(modules)
    if not components:
        raise BadRequest("components: no name is given; name models of the pipeline, or leave components out")
    modules = {}
    if not isinstance(components, Iterable) or not all(isinstance(each, str) for each in components):
        raise BadRequest(f"components: {components!r:.100}; give a tuple of names of the pipeline's models")
    for name in components:
        each = getattr(pipe, name, None)
        if not isinstance(each, kind):
            known = sorted(key for key, value in vars(pipe).items() if isinstance(value, kind))
            if hasattr(pipe, name):
                what = "None" if each is None else f"a {type(each).__name__}"
                fault = f"{name} of {type(pipe).__name__} is {what}, no model"
            else:
                fault = f"{type(pipe).__name__} has no attribute {name!r}"
            raise BadRequest(f"components: {fault}; it has {', '.join(known)}")
        modules[name] = each
    return _split_lists(modules)


def _split_lists(modules: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in modules.items():
        if _is_compiled(module):
            raise Unsupported(
                f"{name}: it is compiled by torch.compile(): accelerate the module that it wraps (_orig_mod)"
            )
        nets = getattr(module, "nets", None)
        parts = {name: module} if nets is None else {f"{name}.nets.{number}": each for number, each in enumerate(nets)}
        # The same model under two names is lent once.
        found.update({key: each for key, each in parts.items() if all(each is not other for other in found.values())})
    return found
