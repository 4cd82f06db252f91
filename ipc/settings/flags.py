"""Flags that several verbs of ``xditd`` have."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from xditd.ipc import limits
from xditd.ipc.settings.setting import about

Steps = Annotated[int, Meta(ge=1, le=limits.MAX_STEPS)]

RUNTIME_DIR: Final = about(
    "folder of the daemon's sockets (default: $XDG_RUNTIME_DIR/xditd, or /tmp/xditd-<uid>)", kind="path"
)
VERBOSE: Final = about("also log on stderr what is done: everything of level info", short="-v")
_JSON: Final = about("print JSON on stdout, for programs")


class JsonFlags(msgspec.Struct, frozen=True, kw_only=True):
    """Flags of ``comfyui`` and ``models``, and of every other verb."""

    json: Annotated[bool, _JSON] = False


class DaemonFlags(msgspec.Struct, frozen=True, kw_only=True):
    """Flags of every verb that connects to a daemon."""

    runtime_dir: Annotated[str | None, RUNTIME_DIR] = None
    json: Annotated[bool, _JSON] = False
