"""Find what messages name: classes of modules, of objects in attributes and arguments, and constants."""

from __future__ import annotations

import enum
from importlib import import_module
from typing import Any, Final

import torch

from xditd.ipc.errors import Unsupported
from xditd.ipc.module_state import PACKAGES
from xditd.ipc.transports.tensor_views import torch_dtype

_CLASS: Final = "class:"
_DEVICES: Final = {f"device:{each}": each for each in ("cpu", "cuda", "meta")}

_ALLOWED_MODULES: Final = (
    "diffusers",
    "diffusers.configuration_utils",
    "diffusers.hooks.",
    "diffusers.models.",
    "diffusers.pipelines.",
    "diffusers.utils.",
    "peft.tuners.",
    "peft.utils.",
    "torch.nn.modules.",
    "torch.nn.parameter",
    "torch.nn.utils.parametrizations",
    "torch.nn.utils.parametrize",
    "transformers",
    "transformers.activations",
    "transformers.cache_utils",
    "transformers.generation.configuration_utils",
    "transformers.modeling_",
    "transformers.models.",
    "transformers.pytorch_utils",
    "transformers.utils.",
)
"""The modules whose classes can be named; with ``.`` or ``_`` at the end, all that start so.

The packages have scripts too, whose import changes settings of the process.
"""


def find_class(name: str, where: str) -> type:
    """Return a class by ``module:Class``. ``where`` says in errors whose packages these are.

    Raises:
        Unsupported: the class is of another module, or is not installed in ``where``.
    """
    module, _, path = name.partition(":")
    package = module.partition(".")[0]
    if module == "torch.nn.utils.parametrize" and path.startswith("Parametrized"):  # torch makes one for each module
        raise Unsupported(
            f"class {name}: {where} cannot make parametrised modules (weight_norm, spectral_norm, orthogonal): call "
            "torch.nn.utils.parametrize.remove_parametrizations(submodule, 'weight') for each, and lend it again"
        )
    if not _is_allowed(module):
        raise Unsupported(f"class {name}: only classes of the models of {', '.join(PACKAGES)} can be used")
    try:
        found: Any = import_module(module)
        for each in path.split("."):
            found = getattr(found, each)
            if not isinstance(found, type):
                raise Unsupported(f"class {name}: {each} is a {type(found).__name__}, not a class")
    except Unsupported:
        raise
    except Exception as error:  # whatever the import of a module raises
        try:
            version = getattr(import_module(package), "__version__", "")
        except ImportError:
            raise Unsupported(f"class {name}: {package} is not installed in {where}: pip install {package}") from error
        raise Unsupported(
            f"class {name}: {package} {version} of {where} has no such class: {type(error).__name__}: {error}"
        ) from error
    if not _is_allowed(found.__module__):  # imported there from elsewhere
        raise Unsupported(f"class {name}: it is one of {found.__module__}, whose classes cannot be used")
    return found  # type: ignore[no-any-return]


def _is_allowed(module: str) -> bool:
    is_script = module.rpartition(".")[2].startswith(("convert_", "__"))
    return not is_script and any(
        module.startswith(each) if each.endswith((".", "_")) else module == each for each in _ALLOWED_MODULES
    )


def find_named(name: str, where: str) -> Any:
    """Return what :class:`~xditd.ipc.arguments.Named` names, but for a submodule: a dtype, a device, a member of an
    enumeration, or a class.

    Raises:
        Unsupported: it is none of these, or is not installed in ``where``.
    """
    if ":" not in name:
        return torch_dtype(name.removeprefix("torch."))
    if name in _DEVICES:
        return torch.device(_DEVICES[name])
    if name.startswith(_CLASS):
        return find_class(name.removeprefix(_CLASS), where)
    path, _, member = name.rpartition(".")
    kind = find_class(path, where)
    if not issubclass(kind, enum.Enum) or member not in kind.__members__:
        raise Unsupported(f"{name}: this is no member of an enumeration")
    return kind[member]
