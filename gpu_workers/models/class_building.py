"""Change a module to the state that a client describes, and give it the lent tensors.

The changed module is described again and compared, so that one that would compute anything else than the client's is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Final

import msgspec
import torch

from xditd.gpu_workers.models.configured_classes import HERE
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
from xditd.ipc.module_state import DEVICE, GENERATOR, PACKAGES, STATE, ModuleState, SubmoduleState
from xditd.ipc.transports.module_classes import find_class, find_named
from xditd.ipc.transports.module_walk import CONFIG, HOOKS, OWN, class_name, version_of, walk_module

_SUBMODULE: Final = "submodule:"
_SHOWN: Final = 3
_ABSENT: Final = object()

_REMEDIES: Final = {
    "_compiled_call_impl": "undo compile() (del module._compiled_call_impl)",
    "_hf_hook": "remove offloading by pipe.remove_all_hooks()",
    "_diffusers_hook": "turn caching and offloading off (disable_cache(), pipe.remove_all_hooks())",
    **dict.fromkeys(HOOKS, "remove the hooks"),
    "processor": "use attention processors of diffusers",
}
"""What to do, by the names of attributes that workers cannot make."""


def apply_state(module: torch.nn.Module, state: ModuleState) -> bool:
    """Change a module to a client's state; return whether it was in that state already.

    Attributes with lent tensors get them by :func:`set_tensors`.

    Raises:
        Unsupported: the state has classes, functions or objects that workers cannot make; the error names them.
        BadRequest: not the state of any module.
    """
    found, _ = walk_module(module)
    if _comparable(found) == _comparable(state):
        return True
    _set_submodules(module, state)
    _check_paths(module, state)
    found, _ = walk_module(module)
    for path, submodule in module.named_modules():
        _set_attributes(module, submodule, state.submodules[path].attributes, found.submodules[path].attributes)
    found, _ = walk_module(module)
    if differing := list(_differences(state, found)):
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise Unsupported(
            f"workers cannot make this module as it is: {'; '.join(differing[:_SHOWN])}{more}. " + _remedy(differing),
            names=differing,
        )
    return False


def _remedy(differing: Sequence[str]) -> str:
    text = " ".join(differing)
    found = list(dict.fromkeys(remedy for name, remedy in _REMEDIES.items() if name in text)) or ["undo these changes"]
    return f"{'; '.join(found).capitalize()}, and lend it again"


def check_versions(theirs: Mapping[str, str]) -> None:
    """Check that the packages of a client's module have the same versions here.

    Raises:
        Unsupported: one has another version, or is not installed here; names each, and both versions.
    """
    differing = []
    for package, version in theirs.items():
        here = _version_here(package)
        if here != version:
            differing.append(f"{package} is {version} in your process and {here or 'not installed'} in {HERE}")
    if differing:
        raise Unsupported(
            f"{'; '.join(differing)}: another version may compute something else. Install the same versions on "
            "both sides; a family's model may also be lent as its file or its state dict",
            names=differing,
        )


def _version_here(package: str) -> str | None:
    if package not in PACKAGES:
        raise Unsupported(f"package {package!r}: only classes of {', '.join(PACKAGES)} can be used")
    try:
        import_module(package)
    except ImportError:
        return None
    return version_of(package)


def _check_paths(module: torch.nn.Module, state: ModuleState) -> None:
    """Check that the module has the paths of the state, and no more: others, or one of a cycle, cannot be walked.

    Raises:
        BadRequest: it has not; the error names a path.
    """
    left = {*state.submodules, *state.same}
    pending = [("", module)]
    while pending:
        path, each = pending.pop()
        if path not in left:
            raise BadRequest(f"the state of the module does not describe its submodule {path[:200]!r}")
        left.remove(path)
        start = f"{path}." if path else ""
        pending += [(start + name, child) for name, child in each._modules.items() if child is not None]
    if left:
        raise BadRequest(f"the state of the module has a submodule {min(left)[:200]!r} without its parent")


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
    kind = find_class(wanted.class_name, HERE)
    if not issubclass(kind, torch.nn.Module):
        raise Unsupported(f"class {wanted.class_name}: this is no module")
    module: torch.nn.Module = object.__new__(kind)
    torch.nn.Module.__init__(module)
    vars(module)["training"] = False  # not eval(), which a class may define in its own way
    return module


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
        if name in OWN and name not in HOOKS and (name, value) != ("training", True):
            raise BadRequest(f"attribute {name}: every module has its own")
        if name in HOOKS or found.get(name, _ABSENT) == value or holds(value, Opaque):
            continue
        if name == CONFIG:
            vars(vars(module)[CONFIG]).update(make_value(value, top, {}, on_host=False))
        else:
            vars(module)[name] = make_value(value, top, {}, on_host=False)


def make_value(node: Argument, top: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, on_host: bool) -> Any:
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
        return tensor.to("cpu" if on_host else tensor.device, copy=True)
    if isinstance(node, (ListOf, TupleOf)):
        items = [make_value(each, top, tensors, on_host=on_host) for each in node.items]
        return items if isinstance(node, ListOf) else tuple(items)
    if isinstance(node, SetOf):
        return {make_key(each) for each in node.items}
    if isinstance(node, MapOf):
        return {key: make_value(each, top, tensors, on_host=on_host) for key, each in node.items.items()}
    if isinstance(node, PairsOf):
        return {make_key(key): make_value(each, top, tensors, on_host=on_host) for key, each in node.items}
    if isinstance(node, Named) and node.name.startswith(_SUBMODULE):
        try:
            return top.get_submodule(node.name.removeprefix(_SUBMODULE))
        except AttributeError as error:
            raise BadRequest(f"{node.name}: the module has none of this path") from error
    if isinstance(node, ObjectOf):
        return make_object(
            node.class_name,
            {key: make_value(each, top, tensors, on_host=on_host) for key, each in node.attributes.items()},
        )
    return make_plain(node)


def make_key(node: Argument) -> Any:
    """Make a key of a map or a member of a set: a plain value, or a tuple of them.

    Raises:
        Unsupported, BadRequest: as for :func:`make_plain`.
    """
    return tuple(map(make_key, node.items)) if isinstance(node, TupleOf) else make_plain(node)


def make_plain(node: Argument) -> Any:
    """Make a value that holds no other.

    Raises:
        Unsupported: an enumeration that is not installed here.
        BadRequest: not such a value.
    """
    if isinstance(node, Special):
        return float(node.value)
    if isinstance(node, Named):
        return find_named(node.name, HERE)
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise BadRequest(f"a {type(node).__name__} has no value here")


def make_object(name: str, attributes: Mapping[str, Any]) -> Any:
    """Make an object of a class without running its constructor.

    Raises:
        Unsupported: the class is not installed here, or its objects have more than attributes.
    """
    if name == GENERATOR:
        return _make_generator(attributes)
    kind = find_class(name, HERE)
    if (
        issubclass(kind, (torch.nn.Module, torch.Tensor, type))
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or hasattr(kind, "__del__")
    ):
        raise Unsupported(f"class {name}: its objects cannot be made from attributes")
    try:
        made = object.__new__(kind)
        vars(made).update(attributes)
    except TypeError as error:  # an abstract class, one in C, or one without a __dict__
        raise Unsupported(f"class {name}: its objects cannot be made from attributes: {error}") from error
    return made


def _make_generator(attributes: Mapping[str, Any]) -> torch.Generator:
    """Make a random number generator in a given state.

    Raises:
        BadRequest: no valid state, or that of a generator of a GPU for workers without one.
    """
    device, state = attributes.get(DEVICE), attributes.get(STATE)
    try:
        generator = torch.Generator(device)
        generator.set_state(state.cpu() if isinstance(state, torch.Tensor) else torch.empty(0))
    except (RuntimeError, TypeError) as error:
        raise BadRequest(
            f"generator: workers cannot make one for {device!r} in the given state: {error!s:.200}"
        ) from error
    return generator


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
                on_host = name in wanted.on_host
                vars(submodule)[name] = make_value(value, module, tensors, on_host=on_host)


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


def _comparable(state: ModuleState) -> ModuleState:
    """Leave out where tensors are: those of a module without weights are on meta."""
    submodules = {
        path: msgspec.structs.replace(each, on_host=()) if each.on_host else each
        for path, each in state.submodules.items()
    }
    return ModuleState(submodules=submodules, same=state.same)


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
        if msgspec.structs.replace(theirs, attributes={}, on_host=()) != msgspec.structs.replace(
            mine, attributes={}, on_host=()
        ):
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
