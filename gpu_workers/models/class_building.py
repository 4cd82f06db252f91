"""Build the module that a client describes: by its class from its configuration, then changed to the client's state.

Parameters are on the meta device; buffers and all other tensors have values. The result is described again and
compared, so that a module that would compute anything else than the client's is refused by name.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Final

import msgspec
import torch

from xditd.ipc.arguments import (
    Argument,
    LentTensor,
    ListOf,
    MapOf,
    Named,
    ObjectOf,
    Opaque,
    PairsOf,
    SetOf,
    Special,
    TupleOf,
    children,
    holds,
)
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.module_state import PACKAGES, ModuleState, SubmoduleState
from xditd.ipc.tensors import ModuleDescription
from xditd.ipc.transports.module_walk import HOOKS, class_name, walk_module
from xditd.ipc.transports.tensor_views import torch_dtype

_SUBMODULE: Final = "submodule:"
_SHOWN: Final = 3
_ABSENT: Final = object()


def find_class(name: str) -> type:
    """Return a class by ``module:Class``.

    Raises:
        Unsupported: it is of another package than those of ``PACKAGES``, or is not installed here.
    """
    module, _, path = name.partition(":")
    package = module.partition(".")[0]
    if package not in PACKAGES:
        raise Unsupported(f"class {name}: workers run classes of {', '.join(PACKAGES)} only; {package} is none of them")
    found: Any = None
    try:
        found = import_module(module)
        for each in path.split("."):
            found = getattr(found, each)
    except (ImportError, AttributeError, RuntimeError) as error:
        version = getattr(import_module(package), "__version__", "")
        raise Unsupported(f"class {name}: {package} {version} of the workers has no such class: {error}") from error
    if not isinstance(found, type):
        raise Unsupported(f"class {name}: this is a {type(found).__name__}, not a class")
    return found


def find_model_class(name: str, label: str) -> type[torch.nn.Module]:
    """Return a model class of diffusers or transformers.

    Raises:
        Unsupported: it is none, or is not installed here.
    """
    from diffusers.models.modeling_utils import ModelMixin

    kind = find_class(name)
    if not issubclass(kind, torch.nn.Module) or not (
        issubclass(kind, ModelMixin) or getattr(kind, "config_class", None) is not None
    ):
        raise Unsupported(f"{label}: {name} is no model class of diffusers or transformers")
    return kind


def build_module(described: ModuleDescription, label: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Build a module as its class makes it, in eval mode, with parameters on the meta device.

    With a ``dtype`` it is as ``from_pretrained(torch_dtype=dtype)`` makes it, with that as torch's default meanwhile.

    Raises:
        Unsupported: not a model class of diffusers or transformers, or one that is not installed here.
        BadRequest: a configuration that the class refuses.
    """
    kind: Any = find_model_class(described.class_name, label)
    try:
        config = json.loads(described.config)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{label}: its configuration is not JSON: {error}") from error
    # Both packages take a second or more to import.
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import ModelMixin, no_init_weights

    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or default)
        # Weight initialisation takes two thirds of the time to build a module.
        with init_empty_weights(include_buffers=False), no_init_weights():
            if issubclass(kind, ModelMixin):
                module: Any = kind.from_config(config)
            else:
                module = kind(_transformers_config(kind.config_class, config, dtype, label))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise BadRequest(
            f"{label}: {kind.__name__} cannot be made from its configuration: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_default_dtype(default)
    built: torch.nn.Module = module.eval().requires_grad_(False)
    return built


def _transformers_config(kind: Any, config: dict[str, Any], dtype: torch.dtype | None, label: str) -> Any:
    """Make a configuration, for a ``dtype`` in which its parts are built.

    Raises:
        Unsupported: it is of another type of model, whose values the class would ignore.
    """
    given = config.get("model_type")
    if dtype is not None and given is not None and given != kind.model_type:
        raise Unsupported(
            f"{label}: its configuration is of model_type {given!r:.100}, its class is of {kind.model_type}"
        )
    made = kind.from_dict(config)
    for each in (made, *(getattr(made, key, None) for key in made.sub_configs)):
        if dtype is not None and each is not None:
            each.dtype = dtype
    return made


def apply_state(module: torch.nn.Module, state: ModuleState, label: str) -> bool:
    """Change a module to a client's state; return whether it was in that state already.

    Attributes with lent tensors get them by :func:`set_tensors`.

    Raises:
        Unsupported: the state has classes, functions or objects that workers cannot make; the error names them.
    """
    found, _ = walk_module(module)
    if found == state:
        return True
    _set_submodules(module, state)
    found, _ = walk_module(module)
    for path, submodule in module.named_modules():
        _set_attributes(module, submodule, state.submodules[path].attributes, found.submodules[path].attributes)
    found, _ = walk_module(module)
    if differing := list(_differences(state, found)):
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise Unsupported(
            f"{label}: workers cannot make this module as it is: {'; '.join(differing[:_SHOWN])}{more}. "
            "Undo these changes of the module, and lend it again",
            names=differing,
        )
    return False


def _set_submodules(module: torch.nn.Module, state: ModuleState) -> None:
    """Make, replace and remove submodules until paths and classes are those of the state."""
    existing = dict(module.named_modules())
    kept: dict[str, torch.nn.Module] = {}
    for path, wanted in state.submodules.items():
        found = existing.get(path)
        if found is None or class_name(type(found)) != wanted.class_name:
            if not path:
                raise Unsupported(
                    f"{wanted.class_name} is lent, but its configuration is of {class_name(type(module))}"
                )
            found = _bare_module(wanted)
        kept[path] = found
        found._modules.clear()
        found._modules.update(dict.fromkeys(wanted.empty_modules))
        _register_tensors(found, wanted)
    for path, each in [*kept.items(), *((path, kept[first]) for path, first in state.same.items() if first in kept)]:
        parent, _, name = path.rpartition(".")
        if path and parent in kept:
            kept[parent]._modules[name] = each


def _bare_module(wanted: SubmoduleState) -> torch.nn.Module:
    """Make a module without its constructor, whose arguments are not known: the state has all that it sets."""
    kind = find_class(wanted.class_name)
    if not issubclass(kind, torch.nn.Module):
        raise Unsupported(f"class {wanted.class_name}: this is no module")
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    return module.eval()


def _register_tensors(module: torch.nn.Module, wanted: SubmoduleState) -> None:
    """Register the parameters and buffers of the state; new ones are empty until tensors are plugged."""
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    module._parameters.clear()
    module._buffers.clear()
    for name in wanted.parameters:
        parameter = parameters.get(name)
        module._parameters[name] = _empty_parameter() if parameter is None else parameter
    for name in wanted.buffers:
        buffer = buffers.get(name)
        module._buffers[name] = torch.empty(0, device="meta") if buffer is None else buffer
    module._parameters.update(dict.fromkeys(wanted.empty_parameters))
    module._buffers.update(dict.fromkeys(wanted.empty_buffers))
    module._non_persistent_buffers_set = set(wanted.not_saved)


def _empty_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


def _set_attributes(
    top: torch.nn.Module, module: torch.nn.Module, wanted: Mapping[str, Argument], found: Mapping[str, Argument]
) -> None:
    """Set and remove attributes until they are those of the state, but for those that cannot be made."""
    for name in found.keys() - wanted.keys():
        vars(module).pop(name, None)
    for name, value in wanted.items():
        if name not in HOOKS and found.get(name) != value and not holds(value, Opaque):
            vars(module)[name] = make_value(value, top, {})


def make_value(node: Argument, top: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Make the value of an attribute of a submodule of ``top``; a tensor that is not in ``tensors`` is on meta.

    Raises:
        Unsupported: a class or an enumeration that is not installed here.
        BadRequest: not the value of an attribute.
    """
    if isinstance(node, LentTensor):
        tensor = tensors.get(node.name)
        if tensor is None:
            return torch.empty(0, device="meta")
        # A copy: forwards keep views of such tables in caches of their own, and lent memory with views stays mapped.
        return tensor.to("cpu" if node.on_host else tensor.device, copy=True)
    if isinstance(node, (ListOf, TupleOf, SetOf)):
        items = [make_value(each, top, tensors) for each in node.items]
        return items if isinstance(node, ListOf) else tuple(items) if isinstance(node, TupleOf) else set(items)
    if isinstance(node, MapOf):
        return {key: make_value(each, top, tensors) for key, each in node.items.items()}
    if isinstance(node, PairsOf):
        return {make_value(key, top, tensors): make_value(each, top, tensors) for key, each in node.items}
    if isinstance(node, Named) and node.name.startswith(_SUBMODULE):
        return top.get_submodule(node.name.removeprefix(_SUBMODULE))
    if isinstance(node, ObjectOf):
        return make_object(
            node.class_name, {key: make_value(each, top, tensors) for key, each in node.attributes.items()}
        )
    return make_plain(node)


def make_plain(node: Argument) -> Any:
    """Make a value that holds no other.

    Raises:
        Unsupported: an enumeration that is not installed here.
        BadRequest: not such a value.
    """
    if isinstance(node, Special):
        return float(node.value)
    if isinstance(node, Named):
        return _named(node.name)
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise BadRequest(f"a {type(node).__name__} has no value here")


def make_object(name: str, attributes: Mapping[str, Any]) -> Any:
    """Make an object of a class without running its constructor.

    Raises:
        Unsupported: the class is not installed here, or its objects have more than attributes.
    """
    kind = find_class(name)
    if issubclass(kind, (torch.nn.Module, torch.Tensor)) or kind.__reduce_ex__ is not object.__reduce_ex__:
        raise Unsupported(f"class {name}: its objects cannot be made from attributes")
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


def _named(name: str) -> Any:
    if ":" not in name:
        return torch_dtype(name.removeprefix("torch."))
    path, _, member = name.rpartition(".")
    kind = find_class(path)
    if not issubclass(kind, enum.Enum) or member not in kind.__members__:
        raise Unsupported(f"{name}: this is no member of an enumeration")
    return kind[member]


def set_tensors(module: torch.nn.Module, state: ModuleState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a module the tensors of a manifest: parameters, buffers, and attributes that hold tensors.

    Those that are not lent stay as the class made them.
    """
    for path, submodule in module.named_modules():
        wanted = state.submodules[path]
        start = f"{path}." if path else ""
        for name in wanted.parameters:
            submodule._parameters[name] = torch.nn.Parameter(tensors[start + name], requires_grad=False)
        for name in wanted.buffers:
            if start + name in tensors:
                submodule._buffers[name] = tensors[start + name].clone()
        for name, value in wanted.attributes.items():
            lent = list(_lent_names(value))
            if lent and all(each in tensors for each in lent):
                vars(submodule)[name] = make_value(value, module, tensors)


def tensor_names(state: ModuleState) -> Iterator[str]:
    """Yield the names of all tensors of a module, as ``walk_module`` names them."""
    for path, submodule in state.submodules.items():
        start = f"{path}." if path else ""
        yield from (start + name for name in (*submodule.parameters, *submodule.buffers))
        for value in submodule.attributes.values():
            yield from _lent_names(value)


def _lent_names(node: Argument) -> Iterator[str]:
    if isinstance(node, LentTensor):
        yield node.name
    for _, each in children("", node):
        yield from _lent_names(each)


def _differences(wanted: ModuleState, found: ModuleState) -> Iterator[str]:
    """Say how a client's module differs from the one that workers can make."""
    for path, theirs in wanted.submodules.items():
        where = path or "the module"
        mine = found.submodules.get(path)
        if mine is None:
            yield f"{where} is a {theirs.class_name}"
            continue
        for name in sorted({*theirs.attributes, *mine.attributes}):
            if theirs.attributes.get(name, _ABSENT) != mine.attributes.get(name, _ABSENT):
                yield f"{name} of {where} is {_shown(theirs.attributes, name)}, here {_shown(mine.attributes, name)}"
        if msgspec.structs.replace(theirs, attributes={}) != msgspec.structs.replace(mine, attributes={}):
            yield f"{where} has other parameters, buffers or submodules"
    yield from (f"{path} is not in it" for path in found.submodules.keys() - wanted.submodules.keys())
    if wanted.same != found.same:
        yield "submodules are shared in another way"


def _shown(attributes: Mapping[str, Argument], name: str) -> str:
    if name not in attributes:
        return "absent"
    value = attributes[name]
    if isinstance(value, ListOf) and value.items and all(isinstance(each, Opaque) for each in value.items):
        return " and ".join(each.text for each in value.items if isinstance(each, Opaque))
    return f"a {value.text}" if isinstance(value, Opaque) else f"{value!r:.120}"
