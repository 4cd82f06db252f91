"""The files and folders of models that flags name, on loan."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from xditd.client.model_folders import has_config
from xditd.client.part_checks import kind_fault
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.client import Client
    from xditd.client.loans import Loan
    from xditd.ipc.tensors import ComponentKind


def lend_as(client: Client, path: str, kind: ComponentKind, parsed: argparse.Namespace, **more: Any) -> Loan:
    """Lend a model of a kind. A folder is lent with its configuration, with which a family has to agree.

    Raises:
        Unsupported: no family runs the folder as it is, or as this kind; says why.
        XditdError: as ``Client.lend``.
    """
    loan = client.lend(path, kind=None if has_config(path) else kind.value, device=parsed.device, **more)
    if fault := kind_fault(loan.facts, kind):
        loan.return_()
        raise Unsupported(f"{kind.value}: {path}: {fault}")
    return loan
