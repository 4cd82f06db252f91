"""The state of a module: the class and the attributes of each submodule, as a client sends them to the workers.

Tensors are lent by name in the manifest; everything else is in the state. So the workers can run a module that differs
from what its class makes of its configuration: other attention processors, LoRA layers, fused projections.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Final

import msgspec

from xditd.ipc import limits
from xditd.ipc.arguments import Argument, depth_of
from xditd.ipc.errors import BadRequest
from xditd.ipc.field_types import Described, Name

PACKAGES: Final = ("diffusers", "transformers", "peft", "torch")
"""The packages of whose classes workers make modules and objects."""

GENERATOR: Final = "torch:Generator"
DEVICE: Final = "device"
STATE: Final = "state"
"""The description of a random number generator: its class, and as attributes its device type and its state."""

Path = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)]


class SubmoduleState(Described, frozen=True, kw_only=True, omit_defaults=True):
    """One submodule: its class, as ``module:Class``, and its attributes.

    ``parameters`` and ``buffers`` name those that have a tensor, in their order; the manifest lends each of them under
    ``path.name``. ``empty_parameters``, ``empty_buffers`` and ``empty_modules`` are registered as ``None``.
    """

    class_name: Name
    parameters: Names = ()
    buffers: Names = ()
    not_saved: Names = ()
    """Buffers that a state dict leaves out."""
    empty_parameters: Names = ()
    empty_buffers: Names = ()
    empty_modules: Names = ()
    on_host: Names = ()
    """Attributes with tensors on the CPU: they stay there, whatever the device of the parameters."""
    attributes: Annotated[dict[Name, Argument], msgspec.Meta(max_length=limits.MAX_ARGUMENTS)] = msgspec.field(
        default_factory=dict
    )


class ModuleState(Described, frozen=True, kw_only=True):
    """All submodules by path, parents first; the path of the module itself is empty.

    ``same`` are the paths at which a submodule is registered again, and where it is registered first. ``versions`` are
    those of the packages whose classes they are, and of torch, in the process that describes: another version of a
    class may compute something else.
    """

    submodules: Annotated[dict[Path, SubmoduleState], msgspec.Meta(max_length=limits.MAX_TENSORS)]
    same: Annotated[dict[Path, Path], msgspec.Meta(max_length=limits.MAX_TENSORS)] = msgspec.field(default_factory=dict)
    versions: Annotated[dict[Name, Name], msgspec.Meta(max_length=len(PACKAGES))] = msgspec.field(default_factory=dict)


_decoder = msgspec.json.Decoder(ModuleState, strict=True)
_encoder = msgspec.json.Encoder()


def encode(state: ModuleState, label: str) -> bytes:
    """Encode and compress a state.

    Raises:
        BadRequest: it is larger than a message may carry.
    """
    plain = _encoder.encode(state)
    packed = zlib.compress(plain, 1)
    if len(plain) > limits.MAX_PLAIN_MODULE_STATE_BYTES or len(packed) > limits.MAX_MODULE_STATE_BYTES:
        raise BadRequest(
            f"{label}: the attributes of its {len(state.submodules)} submodules take {len(plain)} bytes, "
            f"{len(packed)} compressed; at most {limits.MAX_PLAIN_MODULE_STATE_BYTES} and "
            f"{limits.MAX_MODULE_STATE_BYTES} can be sent"
        )
    return packed


def decode(packed: bytes) -> ModuleState:
    """Decode a state.

    Raises:
        BadRequest: not a compressed state, or one beyond the limits.
    """
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(packed, limits.MAX_PLAIN_MODULE_STATE_BYTES)
        if len(plain) < limits.MAX_PLAIN_MODULE_STATE_BYTES and not unpacker.eof:
            raise BadRequest(f"the state of the module is cut off after {len(packed)} bytes")
        if not unpacker.eof:
            raise BadRequest(f"the state of the module takes more than {limits.MAX_PLAIN_MODULE_STATE_BYTES} bytes")
        state = _decoder.decode(plain)
        for path, submodule in state.submodules.items():
            for name, value in submodule.attributes.items():
                if depth_of(value) > limits.MAX_ARGUMENT_DEPTH:
                    raise BadRequest(f"attribute {name} of {path or 'the module'} is nested too deeply")
        return state
    except (zlib.error, msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the state of the module cannot be read: {error!s:.300}") from error
