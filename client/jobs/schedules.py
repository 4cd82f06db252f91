"""The scheduler of a generation, as ``scheduler_config.json`` of diffusers has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.job_parts import Schedule

CLASS: Final = "_class_name"


def schedule_of(config: Mapping[str, object]) -> Schedule:
    """Read a scheduler's configuration: its class, and its settings, which the workers check.

    Names that begin with ``_`` are diffusers' own notes, and empty lists are as good as none.

    Raises:
        BadRequest: no configuration, or one that names no class.
        Unsupported: a setting whose value is neither a number, a text, a boolean nor ``None``; names it.
    """
    class_name = config.get(CLASS) if isinstance(config, Mapping) else None
    if not isinstance(class_name, str) or not class_name:
        raise BadRequest(f"scheduler: no configuration of a scheduler, which names its class as {CLASS}")
    settings: dict[str, bool | int | float | str | None] = {}
    for name, value in config.items():
        if not isinstance(name, str) or name.startswith("_") or value == []:
            continue
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if not (value is None or is_number or (isinstance(value, str) and 0 < len(value) <= limits.MAX_NAME_CHARS)):
            raise Unsupported(f"scheduler: {name}={value!r:.100} of {class_name} cannot be sent; leave it out")
        settings[name] = value  # type: ignore[assignment]
    if len(settings) > limits.MAX_SCHEDULE_SETTINGS:
        raise BadRequest(f"scheduler: {len(settings)} settings, at most {limits.MAX_SCHEDULE_SETTINGS}")
    return Schedule(class_name=class_name, settings=settings)
