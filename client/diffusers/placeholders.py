"""Parameters without memory, for modules whose weights the daemon keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xditd.client.class_modules import read_tensors
from xditd.client.client import Client
from xditd.client.loans import Loan
from xditd.ipc.errors import Unsupported


class Placeholders:
    """Replaces the data of a module's parameters by a single element each, with their device, dtype and shape."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._guarded: list[str] = []

    def install(self, guarded: Sequence[str]) -> None:
        """Free the parameters' memory; the methods ``guarded`` then raise ``Unsupported``."""
        for parameter in self._module.parameters():
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
        for method in guarded:
            if hasattr(self._module, method):
                self._guarded.append(method)
                vars(self._module)[method] = self._refuse(method)

    def remove(self, client: Client, loan: Loan) -> None:
        """Read the weights back from the daemon."""
        for method in self._guarded:
            vars(self._module).pop(method, None)
        read_tensors(client, loan, dict(self._module.named_parameters()))

    def _refuse(self, method: str) -> Any:
        def refuse(*_args: Any, **_kwargs: Any) -> Any:
            raise Unsupported(
                f"{self._name}.{method}: the weights are in the daemon (keep='daemon'), and this process has only "
                "placeholders; leave the accelerate block first"
            )

        return refuse
