"""Compare the configuration of a module or of a ``config.json`` with that of the class that a family builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.class_defaults import settings_of
from xditd.gpu_workers.models.configured_classes import HERE
from xditd.ipc.errors import Unsupported
from xditd.ipc.tensors import ModuleDescription
from xditd.ipc.transports.module_classes import find_class

_FREE: Final = frozenset({"sample_size", "force_upcast", "out_channels", "decoder_base_dim"})
"""Settings that do not show in results, or that a class has under two values of the same meaning."""

_COMPUTED: Final = (
    "hidden_act",
    "feed_forward_proj",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "rope_theta",
    "rope_type",
    "mrope_section",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "relative_attention_max_distance",
    "use_sliding_window",
)
"""Settings of transformers' classes that show in results and in no tensor. Most of the others are of training, of
sampling or of the tokenizer."""

_COMPUTED_OF_PICTURES: Final = (
    "hidden_act",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
    "fullatt_block_indexes",
)
"""The same of the part of a model of texts and pictures that reads pictures."""
_PICTURES: Final = "vision_config"
"""The settings of that part in those of the model, and the key of their class."""


class Difference(NamedTuple):
    """A setting that differs: ``given`` is the setting with its value, and ``built`` the value of the family."""

    name: str
    given: str
    built: str


def config_differences(described: ModuleDescription, match: CheckpointMatch) -> list[Difference]:
    """Return the settings of a module or a ``config.json`` that differ from those with which a family builds the class.

    Those that one of the two does not have are of no account. The class is one of them, unless diffusers or
    transformers have none of its name.
    """
    built: Any = getattr(match.model.module, "config", None)
    given = settings_of(described)
    if hasattr(built, "to_dict"):  # of transformers
        found = [*_class_difference(described, match, _is_of_one_model)]
        pictures = _config_of_pictures(match.model.module)
        built = _computed(built.to_dict()) | _computed_of_pictures({_PICTURES: pictures})
        given = _computed(given) | _computed_of_pictures(given)
        given = {name: value for name, value in given.items() if value is not None}
    elif isinstance(built, Mapping):
        found = [*_class_difference(described, match, _is_one_of_diffusers)]
    else:  # a module of a family's own
        return []
    return found + [
        Difference(name, f"{name}={value!r:.100}", f"{built[name]!r:.100}")
        for name, value in given.items()
        if name in built and name not in _FREE and _plain(built[name]) != _plain(value)
    ]


def _class_difference(
    described: ModuleDescription, match: CheckpointMatch, is_same: Callable[[type, type], bool]
) -> Iterator[Difference]:
    try:
        given = find_class(described.class_name, HERE)
    except Unsupported:  # such as WanModel, of the original repository
        return
    built = next(each for each in type(match.model.module).__mro__ if _package(each) in ("diffusers", "transformers"))
    if not is_same(given, built) and given.__name__ not in getattr(match.family, "same_classes", ()):
        name = "_class_name" if _package(given) == "diffusers" else "architectures"
        yield Difference(name, f"{name}={given.__name__!r}", repr(built.__name__))


def _is_one_of_diffusers(given: type, built: type) -> bool:
    return issubclass(built, given)


def _is_of_one_model(given: type, built: type) -> bool:
    """Return whether two classes of transformers have the same decoder or encoder: Mistral3 has that of Mistral."""
    return given.__module__.startswith(built.__module__.rpartition(".")[0])


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _computed(config: Mapping[str, object]) -> dict[str, object]:
    every = dict(config)
    # Models of texts and pictures nest the settings of the decoder; transformers nests those of rotary embeddings, in 4
    # under another name.
    for name in ("text_config", "rope_scaling", "rope_parameters"):
        nested = every.get(name)
        every |= nested if isinstance(nested, Mapping) else {}
    return {name: every[name] for name in _COMPUTED if name in every}


def _config_of_pictures(module: Any) -> Mapping[str, object]:
    """Return the settings of the part of a module of transformers that reads pictures; none if it has none."""
    configs = (getattr(each, "config", None) for each in getattr(module, "modules", list)())
    found: Any = next((each for each in configs if getattr(each, "base_config_key", "") == _PICTURES), None)
    return {} if found is None else found.to_dict()


def _computed_of_pictures(config: Mapping[str, object]) -> dict[str, object]:
    nested = config.get(_PICTURES)
    if not isinstance(nested, Mapping):
        return {}
    return {f"{_PICTURES}.{name}": nested[name] for name in _COMPUTED_OF_PICTURES if name in nested}


def _plain(value: object) -> object:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
