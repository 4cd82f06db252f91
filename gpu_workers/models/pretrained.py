"""What ``from_pretrained`` of diffusers and transformers does with the tensors of a checkpoint, without reading them.

A module is built for a ``torch_dtype``, the checkpoint's main dtype; names are changed as the class does for older
checkpoints; and each tensor has the dtype that it would have after loading: the main one, or float32 in the parts that
a class keeps so (``_keep_in_fp32_modules``).

Sources: diffusers, ``models/modeling_utils.py`` and ``models/model_loading_utils.py``; transformers 5,
``modeling_utils.py`` and ``core_model_loading.py``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from xditd.gpu_workers.models.entries import TensorInfo
from xditd.ipc.errors import BadCheckpoint, Unsupported, UnsupportedDtype
from xditd.ipc.name_lists import listed
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

_MAIN_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
_FLOATS: Final = (*_MAIN_DTYPES, "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class LoadPlan:
    """The tensors that a module gets of a checkpoint: for each, its name there and its dtype in the module.

    Buffers that are not in it stay as the class makes them. Several names may share one tensor of the checkpoint.
    """

    sources: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class LoadDtypes:
    """The dtypes in which ``from_pretrained`` of diffusers loads the tensors of a class.

    ``main`` is the ``torch_dtype``, and ``kept`` are the names of the parts that the class keeps in float32.
    """

    main: torch.dtype
    kept: tuple[str, ...]

    @classmethod
    def of(cls, kind: type, main: torch.dtype) -> LoadDtypes:
        """Return those of a class, which is a ``ModelMixin``, with this ``torch_dtype``."""
        return cls(main, kept_in_float32(kind))

    def of_tensor(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in floating point, by its name in the checkpoint or in the class."""
        return torch.float32 if is_in_part(name, self.kept) else self.main


def main_dtype(kind: type, tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the ``torch_dtype`` with which to load a checkpoint: that of most elements.

    Those that the class keeps in float32 are not counted, if there are others.

    Raises:
        UnsupportedDtype: no class computes in it.
    """
    parts = kept_in_float32(kind)
    elements: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for name, info in tensors.items():
        if info.dtype in _FLOATS:
            counter = kept if is_in_part(name, parts) else elements
            counter[info.dtype] += math.prod(info.shape)
    counted = elements or kept
    if not counted:
        return torch.float32
    main = counted.most_common(1)[0][0]
    if main not in _MAIN_DTYPES:
        raise UnsupportedDtype(
            f"most of its weights are {main}, in which {kind.__name__} does not compute: lend a checkpoint in "
            f"{', '.join(_MAIN_DTYPES[:3])}"
        )
    return torch_dtype(main)


def plan_load(module: torch.nn.Module, tensors: Mapping[str, TensorInfo], main: torch.dtype) -> LoadPlan:
    """Plan which tensors of a checkpoint ``module`` gets. The module may change as its class changes it when it loads.

    Raises:
        BadCheckpoint: missing, unexpected and wrongly shaped tensors.
        Unsupported: tensors that the class joins or splits when it loads them.
        UnsupportedDtype: integers in place of parameters in floating point, which diffusers casts as they are.
    """
    from diffusers.models.modeling_utils import ModelMixin

    if isinstance(module, ModelMixin):
        sources = {name: name for name in tensors}
        module._fix_state_dict_keys_on_load(sources)
        ignored = list(module._keys_to_ignore_on_load_unexpected or ())
    else:
        sources = _renamed(module, tensors)
        ignored = _ignored_names(module)
    held = module.state_dict(keep_vars=True)
    unexpected = [
        source
        for name, source in sources.items()
        if name not in held and not any(re.search(pattern, name) for pattern in ignored)
    ]
    sources = {name: source for name, source in sources.items() if name in held}
    sources.update(_tied(module, held, sources))
    missing = [name for name in held if name not in sources and isinstance(held[name], torch.nn.Parameter)]
    misshapen = [
        f"{source} is {list(tensors[source].shape)}, expected {list(held[name].shape)}"
        for name, source in sources.items()
        if tuple(held[name].shape) != tensors[source].shape
    ]
    check_fit({"missing": missing, "unexpected": unexpected, "wrongly shaped": misshapen}, type(module).__name__)
    integers = sorted(
        f"{source} is {tensors[source].dtype}"
        for name, source in sources.items()
        if tensors[source].dtype not in _FLOATS
        and isinstance(held[name], torch.nn.Parameter)
        and held[name].is_floating_point()
    )
    if integers:
        raise UnsupportedDtype(
            f"{type(module).__name__} computes with these in floating point, and the checkpoint does not say what "
            f"their integers mean: {listed(integers)}; lend another checkpoint of this model, or one with markers",
            names=integers,
        )
    return LoadPlan(sources, _loaded_dtypes(module, held, sources, tensors, main))


def check_fit(faults: Mapping[str, Collection[str]], class_name: str) -> None:
    """Refuse tensors that do not fit a class: lists of them, by what is wrong with them.

    Raises:
        BadCheckpoint: one of the lists is not empty.
    """
    parts = [f"{len(names)} {what}: {listed(sorted(names))}" for what, names in faults.items() if names]
    if parts:
        raise BadCheckpoint(
            f"the tensors do not fit {class_name}: {'; '.join(parts)}",
            names=[f"{what}: {name}" for what, names in faults.items() for name in sorted(names)],
        )


def finish_buffers(module: torch.nn.Module) -> None:
    """Fill the buffers of a model of transformers as it does when it loads: outside the main dtype, by its own code.

    Parameters are on meta, where filling them does nothing.
    """
    for each in module.modules():
        vars(each).pop("_is_hf_initialized", None)
    with torch.no_grad():
        module.initialize_weights()  # type: ignore[operator]


def converted_names(plan: LoadPlan, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of a module's tensors whose dtype differs from the checkpoint's."""
    return [name for name, at in plan.sources.items() if dtype_name(plan.dtypes[name]) != tensors[at].dtype]


def _renamed(module: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names of a checkpoint's tensors by the names that transformers gives them.

    Raises:
        Unsupported: it joins or splits some, or is too old to say.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        from transformers import __version__

        raise Unsupported(
            f"the workers' transformers {__version__} cannot say how {type(module).__name__} is loaded, 5 or "
            "later can: load the model with from_pretrained, and lend the module"
        ) from error
    transforms = get_model_conversion_mapping(module)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if not isinstance(each, WeightRenaming)]
    held, prefix = module.state_dict(), module.base_model_prefix
    found: dict[str, str] = {}
    for given in sorted(names, key=dot_natural_key):
        name, conversion = rename_source_key(given, renamings, converters, prefix, held)
        if name not in held and given in held:
            name, conversion = rename_source_key(given, [], [], prefix, held)
        if conversion is not None and name in held:
            raise Unsupported(
                f"{type(module).__name__} is not loaded as it is stored: its class converts {given} to "
                f"{name}: load the model with from_pretrained, and lend the module"
            )
        if name in found:
            raise BadCheckpoint(f"{found[name]} and {given} are both {name} of {type(module).__name__}")
        found[name] = given
    return found


def _ignored_names(module: Any) -> list[str]:
    """Return the patterns of tensors that a model of transformers ignores in checkpoints."""
    found = list(module._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in module.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        found.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        found.append(r"(^|\.)position_ids$")
    return found


def _tied(module: Any, held: Mapping[str, torch.Tensor], sources: Mapping[str, str]) -> dict[str, str]:
    """Return the sources of tensors that are not in a checkpoint, but are tied to one that is."""
    ties = [set(pair) for pair in getattr(module, "all_tied_weights_keys", {}).items()]
    by_tensor: dict[int, set[str]] = {}
    for name, tensor in held.items():
        by_tensor.setdefault(id(tensor), set()).add(name)
    ties += [names for names in by_tensor.values() if len(names) > 1]
    found: dict[str, str] = {}
    for _ in ties:  # a tie may follow from another
        for names in ties:
            known = [name for name in sorted(names) if name in sources or name in found]
            if known:
                source = sources.get(known[0]) or found[known[0]]
                found.update({name: source for name in names if name not in sources and name in held})
    return found


def kept_in_float32(kind: Any) -> tuple[str, ...]:
    """Return the names of the parts that a class keeps in float32 (``_keep_in_fp32_modules``)."""
    strict = getattr(kind, "_keep_in_fp32_modules_strict", None) or ()
    kept = getattr(kind, "_keep_in_fp32_modules", None) or ()
    return (*([kept] if isinstance(kept, str) else kept), *strict)


def is_in_part(name: str, parts: Collection[str]) -> bool:
    """Return whether one of the names in a tensor's path is among ``parts``."""
    return bool(parts) and not set(name.split(".")).isdisjoint(parts)


def _loaded_dtypes(
    module: Any,
    held: Mapping[str, torch.Tensor],
    sources: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    main: torch.dtype,
) -> dict[str, torch.dtype]:
    from diffusers.models.modeling_utils import ModelMixin

    if isinstance(module, ModelMixin):
        loading = LoadDtypes.of(type(module), main)
        return {
            name: loading.of_tensor(name) if tensors[source].dtype in _FLOATS else held[name].dtype
            for name, source in sources.items()
        }
    from transformers.core_model_loading import build_glob_alternation

    found = {name: held[name].dtype for name in sources}
    if planned := module._get_dtype_plan(main):
        pattern, patterns, _ = build_glob_alternation(list(planned))
        for name in found:
            if match := pattern.search(name):
                found[name] = planned[patterns[match.lastgroup]]
    return found
