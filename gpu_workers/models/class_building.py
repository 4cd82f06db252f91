"""Change a module to the state that a client describes, and give it the lent tensors.

The changed module is described again and compared, so that one that would compute anything else than the client's is
refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Final

import msgspec
import torch

from xditd.gpu_workers.models.configured_classes import HERE
from xditd.gpu_workers.models.described_values import make_value
from xditd.ipc.arguments import Argument, LentTensor, ListOf, ObjectOf, Opaque, TupleOf, children, holds
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.field_types import Described
from xditd.ipc.module_state import PACKAGES, ModuleState, SubmoduleState
from xditd.ipc.name_lists import SENTENCE_CHARS
from xditd.ipc.transports.module_classes import find_class
from xditd.ipc.transports.module_walk import CONFIG, HOOKS, OWN, class_name, version_of, walk_module

logger = logging.getLogger(__name__)

_SHOWN: Final = 3
_ABSENT: Final = object()

_REMEDIES: Final = {
    "_compiled_call_impl": "undo compile() (del module._compiled_call_impl)",
    "_hf_hook": "remove offloading by pipe.remove_all_hooks()",
    # remove_all_hooks() of diffusers' pipelines leaves these two.
    "hooks of diffusers, group_offloading": "load the model anew, without group offloading",
    "hooks of diffusers, layerwise_casting": "load the model anew, without layerwise casting",
    "hooks of diffusers": "turn caching off by model.disable_cache()",
    **dict.fromkeys(HOOKS, "remove the hooks"),
    "processor": "use attention processors of diffusers",
}
"""What to do, by what the text of a difference has in it: names of attributes, or what they hold."""


def apply_state(module: torch.nn.Module, state: ModuleState) -> str:
    """Change a module to a client's state; return the first differences from what its class makes, or "".

    A tuple in place of a list of the same values is none: a configuration in JSON, of which the module was made, has
    lists alone, and defaults of classes are tuples.
    Attributes with lent tensors get them by :func:`set_tensors`.

    Raises:
        Unsupported: the state has classes, functions or objects that workers cannot make; the error names them.
        BadRequest: not the state of any module.
    """
    found, _ = walk_module(module)
    if _comparable(found) == _comparable(state):
        return ""
    as_lists, found_as_lists = _with_lists(_comparable(state)), _with_lists(_comparable(found))
    is_as_made = as_lists == found_as_lists
    first = _first(list(_differences(as_lists, found_as_lists)))
    if not is_as_made:
        logger.info("a %s is not as its class makes it: %.600s", type(module).__name__, first)
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
    return "" if is_as_made else first[:SENTENCE_CHARS] or "its state"


def _first(differing: Sequence[str]) -> str:
    """Say how a module differs, in one sentence. Training mode, which every submodule has, is said once."""
    others = [each for each in differing if not each.startswith("training of ")]
    training = ["it is in training mode (call its eval() before you lend it)"] * (len(others) < len(differing))
    return "; ".join([*training, *others][:_SHOWN])


def _remedy(differing: Sequence[str]) -> str:
    # Of each difference the first that fits: the more special ones come first.
    fitting = (next((remedy for name, remedy in _REMEDIES.items() if name in text), None) for text in differing)
    found = list(dict.fromkeys(remedy for remedy in fitting if remedy)) or ["undo these changes"]
    return f"{'; '.join(found).capitalize()}, and lend it again"


def check_versions(theirs: Mapping[str, str]) -> None:
    """Check that the packages of a client's module have the same versions here.

    Raises:
        Unsupported: one has another version, or is not installed here; the error names each, and both versions.
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
    """Check that the module has the paths of the state, and no others. Submodules in a cycle would have others.

    Raises:
        BadRequest: paths differ; the error names one.
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
    """Make a module without its constructor, whose arguments are not known: the state has all that it would set."""
    kind = find_class(wanted.class_name, HERE)
    if not issubclass(kind, torch.nn.Module):
        raise Unsupported(f"class {wanted.class_name}: this is no module")
    module: torch.nn.Module = object.__new__(kind)
    torch.nn.Module.__init__(module)
    vars(module)["training"] = False  # not eval(), which a class may define in its own way
    return module


def _register_tensors(module: torch.nn.Module, wanted: SubmoduleState) -> None:
    """Register the parameters and buffers of the state; new ones are empty, on meta, until tensors are plugged."""
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


def set_tensors(module: torch.nn.Module, state: ModuleState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a module the tensors of a manifest: parameters, buffers, and attributes that hold tensors.

    Parameters are views of lent memory, buffers and attributes are copies. Those that are not lent stay as the class
    made them.
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
            if value is None or isinstance(value, (bool, int, float, str)):
                continue
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


def _with_lists(state: ModuleState) -> ModuleState:
    """Put lists in place of the tuples among the attributes."""
    submodules = {
        path: msgspec.structs.replace(each, attributes={key: _as_list(value) for key, value in each.attributes.items()})
        for path, each in state.submodules.items()
    }
    return ModuleState(submodules=submodules, same=state.same)


def _as_list(node: Argument) -> Argument:
    return ListOf(items=tuple(map(_as_list, node.items))) if isinstance(node, ListOf | TupleOf) else node


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
                here = _shown(mine.attributes, name)
                yield f"{name} of {where} is {_shown(theirs.attributes, name)}, in {HERE} it is {here}"
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
    if isinstance(value, ObjectOf):
        return f"a {value.class_name} object" + (f" with {value.attributes!r:.120}" if value.attributes else "")
    if isinstance(value, Opaque):
        return value.text if value.text.startswith("hooks") else f"a {value.text}"
    if isinstance(value, ListOf | TupleOf) and not any(isinstance(each, Described) for each in value.items):
        return f"{list(value.items) if isinstance(value, ListOf) else value.items!r:.120}"
    return f"{value!r:.120}"
