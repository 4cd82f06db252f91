"""The settings that a ``config.json`` leaves to its class."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from typing import Any

from xditd.gpu_workers.models.configured_classes import find_model_class
from xditd.ipc.errors import Unsupported
from xditd.ipc.tensors import ModuleDescription

logger = logging.getLogger(__name__)


def settings_of(described: ModuleDescription) -> dict[str, Any]:
    """Return the configuration of a module, with what its class takes for settings that a ``config.json`` lacks.

    That of a live module has them all. A class that is not of diffusers or transformers adds nothing.
    """
    given: dict[str, Any] = json.loads(described.config)
    if described.state:
        return given
    try:
        kind: Any = find_model_class(described.class_name)
    except Unsupported:
        return given
    config_class = getattr(kind, "config_class", None)
    if config_class is None:
        parameters = inspect.signature(kind.__init__).parameters.values()
        return {each.name: each.default for each in parameters if each.default is not each.empty} | given
    try:
        made = config_class.from_dict(json.loads(described.config))  # it changes parts of what it is given
        return _merged(made.to_dict(), given)
    except Exception as error:  # noqa: BLE001  # whatever the class raises
        logger.info("%s takes no configuration as it is lent: %s", described.class_name, error)
        return given


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Add defaults to settings, also to those of each part that models of texts and pictures nest."""
    nested = {
        name: _merged(defaults[name], value)
        for name, value in given.items()
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping)
    }
    return {**defaults, **given, **nested}
