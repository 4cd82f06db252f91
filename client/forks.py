"""Objects of one process: a fork has none of their threads, and their locks as another thread held them."""

from __future__ import annotations

import os
from typing import Final, NoReturn, SupportsIndex

from xditd.ipc.errors import Unsupported


class Maker:
    """The process that made an object, which no fork of it can use."""

    def __init__(self, what: str, remedy: str) -> None:
        self._pid: Final = os.getpid()
        self._what = what
        self._remedy = remedy

    @property
    def is_here(self) -> bool:
        """Whether this process made the object."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse the object in a fork, before a lock of it is taken.

        Raises:
            Unsupported: this is a fork.
        """
        if not self.is_here:
            raise Unsupported(
                f"this {self._what} was made by process {self._pid} and is used by its fork {os.getpid()}; "
                f"{self._remedy} after the fork"
            )


def maker_of_client() -> Maker:
    """Return this process as the one that makes a client."""
    return Maker("client", "make a new Client")


class OfOneProcess:
    """An object that can be neither pickled nor copied: its loans, jobs and threads are this process's."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise Unsupported(
            f"{type(self).__name__}: it cannot be pickled or copied; make a Client in the other process, which finds "
            "what is lent by its component_id"
        )
