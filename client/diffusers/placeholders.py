"""Parameters without memory, for modules whose weights the daemon keeps."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

import torch

from xditd.client.class_modules import connect_again, read_tensors
from xditd.client.client import Client
from xditd.client.loans import Loan
from xditd.ipc.errors import LeaseLost, Unsupported, XditdError
from xditd.ipc.facts import METHODS

GUARDED: Final = (
    "state_dict",
    "load_state_dict",
    "save_pretrained",
    "to",
    "cpu",
    "cuda",
    "half",
    "float",
    "double",
    "bfloat16",
    "_apply",
    "__deepcopy__",
    "__getstate__",
    "fuse_qkv_projections",
    "fuse_lora",
    "unfuse_lora",
)
"""Methods that would read, write or move the weights."""


class Placeholders:
    """Replaces the data of a module's parameters by one element each, expanded to the same shape, dtype and device."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._parameters = dict(module.named_parameters())
        """By the names that they have in the daemon, which a change of the module does not change."""
        self._installed: dict[str, Any] = {}

    def install(self) -> None:
        """Free the parameters' memory. The module's methods in :data:`GUARDED` then raise ``Unsupported``."""
        for parameter in self._parameters.values():
            # Not a number: nothing that computes with it in this process gives a plausible result.
            value = math.nan if parameter.is_floating_point() or parameter.is_complex() else 0
            parameter.data = parameter.data.new_full((), value).expand(parameter.shape)
        _return_free_memory()
        self._guard(
            "the weights are in the daemon (keep='daemon'), and this process has only placeholders; leave the "
            "accelerate block first"
        )

    def remove(self, client: Client, loan: Loan) -> None:
        """Copy the weights back to this process, restore the methods, and free the daemon's copy.

        Raises:
            LeaseLost: the weights were lost with the workers. From then on the module's methods raise ``Unsupported``.
        """
        try:
            if loan.is_live:
                self._read(client, loan)
            else:
                # The client was closed, or its session has ended: the daemon may have the weights still.
                with connect_again(client) as other:
                    self._read(other, loan)
        except XditdError as error:
            text = self.lost_text(error.detail)
            self._guard(text, *METHODS)
            raise LeaseLost(text) from error

    def lost_text(self, reason: str) -> str:
        """Return the message of an error for weights that were lost, with the remedy."""
        fault = reason.partition("; ")[0]  # without its remedy, to lend again: there is nothing left to lend
        return (
            f"{self._name}: its weights were in the daemon alone (keep='daemon') and are lost: {fault}; load the "
            "model from its files again"
        )

    def _read(self, client: Client, loan: Loan) -> None:
        read_tensors(client, loan, self._parameters)
        for name, installed in self._installed.items():
            if vars(self._module).get(name) is installed:
                del vars(self._module)[name]
        client.revoke(loan)

    def _guard(self, text: str, *more: str) -> None:
        for name in (*GUARDED, *more):
            if name == "__deepcopy__" or hasattr(type(self._module), name):
                self._installed[name] = vars(self._module)[name] = self._refuse(name, text)

    def _refuse(self, method: str, text: str) -> Any:
        start = "" if text.startswith(self._name) else f"{self._name}.{method}: "

        def refuse(*_args: Any, **_kwargs: Any) -> Any:
            raise Unsupported(f"{start}{text}")

        return refuse


def _return_free_memory() -> None:
    """Return the host's memory to the system: glibc keeps what was allocated in pieces below 32 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
