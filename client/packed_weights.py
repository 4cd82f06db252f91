"""Find the packed weights of a checkpoint that is lent, and their companions, by markers, names and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from xditd.client import packed_markers
from xditd.client.packed_markers import MARKER, METADATA, LayerFormat
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.packed import PackedWeight, TensorLike, packed_faults
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.stored_tensors import Header

if TYPE_CHECKING:
    import torch

FLOAT8: Final = ("float8_e4m3fn", "float8_e5m2")
_WEIGHT: Final = ".weight"
_ENDS: Final = (
    (".weight_scale", ".scale_weight"),
    (".weight_scale_2",),
    (".input_scale", ".scale_input"),
)
"""Name endings of companions, new and old, in the order of ``_Companions``."""
_REFUSED: Final[Mapping[str, str]] = {
    ".pre_quant_scale": "a scale of the layer's input (AWQ)",
    ".weight_zero_point": "an offset of the weights",
}
"""Name endings beside packed weights that change what they mean, and that no format here has."""


@dataclass(frozen=True)
class Packing:
    """The packed weights of a checkpoint, and the names of its markers, which are not lent."""

    packed: tuple[PackedWeight, ...] = ()
    markers: frozenset[str] = frozenset()


NO_PACKING: Final = Packing()


class _Companions(NamedTuple):
    """The names of a weight's companions, as ``PackedWeight`` has them."""

    scale: str | None = None
    scale_2: str | None = None
    input_scale: str | None = None


class _Info(NamedTuple):
    """A tensor without its bytes."""

    dtype: str
    shape: tuple[int, ...]


def find_packing(
    tensors: Mapping[str, TensorLike],
    read: Callable[[str], bytes],
    metadata: Iterable[tuple[str, str]] = (),
    known: Iterable[PackedWeight] = (),
) -> Packing:
    """Find the packed weights among ``tensors``, which are all of the checkpoint.

    ``read`` returns the bytes of a marker, a few KiB. ``metadata`` is a file's name and the text of its
    ``_quantization_metadata``, for each file that has one; ``known`` are the packed weights of GGUF files. Tensors of
    fp8 without a marker count as packed, too, whatever their number of dimensions.

    Raises:
        BadCheckpoint: a marker is malformed, two of them contradict each other, or a weight or its companions do not
            have the dtypes and shapes of its format.
        Unsupported: a format or a parameter is not known.
    """
    markers = packed_markers.marker_names(tensors)
    layers = _described_layers(tensors, markers, read, metadata)
    old = {
        name.removesuffix(packed_markers.OLD_MARKER): packed_markers.allows_fp8_products(name, tensors[name])
        for name in markers
        if packed_markers.is_old_marker(name)
    }
    found = [*known, *(_described_weight(layer, described, tensors) for layer, described in layers.items())]
    taken = {name for packed in found for name in packed.names}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8 and name not in taken and not packed_markers.is_old_marker(name):
            found.append(_float8_weight(name, tensor, tensors, old))
    faults = packed_faults(found, tensors)
    if faults:
        raise BadCheckpoint(
            f"packed weights do not have the form of their format: {listed(faults, joint='; ', chars=SENTENCE_CHARS)}; "
            "get the file again, or lend another one of this model",
            names=faults,
        )
    return Packing(tuple(found), frozenset(markers))


def packing_of_files(files: Sequence[LentFile], headers: Sequence[Header]) -> Packing:
    """Find the packed weights in open files of one model; see :func:`find_packing`."""
    places = {
        stored.name: (lent, stored) for lent, header in zip(files, headers, strict=True) for stored in header.tensors
    }

    def read(name: str) -> bytes:
        lent, stored = places[name]
        return lent.read(stored.size_bytes, stored.offset_bytes)

    metadata = [
        (lent.path, header.metadata[METADATA])
        for lent, header in zip(files, headers, strict=True)
        if METADATA in header.metadata
    ]
    known = [packed for header in headers for packed in header.packed]
    return find_packing({name: stored for name, (_, stored) in places.items()}, read, metadata, known)


def packing_of_tensors(tensors: Mapping[str, torch.Tensor], metadata: str | None = None) -> Packing:
    """Find the packed weights in a state dict, with the metadata of its file if it has some; see
    :func:`find_packing`."""

    def read(name: str) -> bytes:
        if tensors[name].is_meta:
            raise BadRequest(f"tensor {name} is on device meta: only cpu and cuda tensors can be lent")
        return bytes(tensors[name].detach().cpu().tolist())

    infos = {name: _Info(str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in tensors.items()}
    return find_packing(infos, read, [] if metadata is None else [("the state dict", metadata)])


def _described_layers(
    tensors: Mapping[str, TensorLike],
    markers: Iterable[str],
    read: Callable[[str], bytes],
    metadata: Iterable[tuple[str, str]],
) -> dict[str, LayerFormat]:
    """Return the layers that markers or metadata describe, by their names in this checkpoint."""
    found: dict[str, LayerFormat] = {}
    for where, text in metadata:
        named = packed_markers.read_metadata(text, where)
        for layer, described in zip(_find_layers(named, tensors), named.values(), strict=True):
            # Without a layer it is of a part that this checkpoint does not have.
            if layer is not None and found.setdefault(layer, described) != described:
                raise BadCheckpoint(
                    f"{METADATA} of {where} says of {layer} {described}, and elsewhere {found[layer]}: get the files "
                    "again, of one revision"
                )
    for name in markers:
        if packed_markers.is_old_marker(name):
            continue
        packed_markers.check_marker(name, tensors[name])
        layer, described = name.removesuffix(MARKER), packed_markers.read_marker(name, read(name))
        if layer + _WEIGHT not in tensors:
            raise BadCheckpoint(f"tensor {name} describes {layer + _WEIGHT}, which is missing")
        if found.setdefault(layer, described) != described:
            raise BadCheckpoint(f"tensor {name} contradicts {METADATA} of the header: {described}, not {found[layer]}")
    return found


def _find_layers(names: Iterable[str], tensors: Iterable[str]) -> list[str | None]:
    """Find layers in a checkpoint: by their names, or, if these are without its prefix, by the end of one name."""
    layers = {name.removesuffix(_WEIGHT) for name in tensors if name.endswith(_WEIGHT)}
    wanted = [*names]
    if all(name in layers for name in wanted):
        return [*wanted]
    ends: dict[str, str | None] = {}
    missing = {name for name in wanted if name not in layers}
    for layer in layers:
        end = layer
        while "." in end:
            end = end.partition(".")[2]
            if end in missing:  # all ends of 16,384 long names would take gigabytes
                ends[end] = None if end in ends else layer
    return [name if name in layers else ends.get(name) for name in wanted]


def _described_weight(layer: str, described: LayerFormat, tensors: Mapping[str, TensorLike]) -> PackedWeight:
    name = layer + _WEIGHT
    tensor = tensors[name]
    if described.stored_as not in (None, tensor.dtype):
        raise BadCheckpoint(f"tensor {name} is {tensor.dtype}, but its marker says {described.stored_as}")
    shape = tensor.shape
    if described.format == "nvfp4" and len(shape) == 2:
        shape = (shape[0], 2 * shape[1])
    return PackedWeight(
        name,
        described.format,
        tuple(shape),
        *_companions(layer, tensors),
        described.group,
        described.quantises_input,
    )


def _float8_weight(
    name: str, tensor: TensorLike, tensors: Mapping[str, TensorLike], old: Mapping[str, bool]
) -> PackedWeight:
    """Describe fp8 without a marker of its own: scaled, if scales lie beside it, or plain.

    The input may be quantised if an old marker above it allows that, or if the file has a scale for it.
    """
    companions = _companions(name.removesuffix(_WEIGHT), tensors) if name.endswith(_WEIGHT) else _Companions()
    above = _prefix_above(name, old)
    allows = companions.input_scale is not None
    if above is not None:
        allows = old[above] and companions.scale is not None
    return PackedWeight(name, "float8", tuple(tensor.shape), *companions, quantises_input=allows)


def _prefix_above(name: str, old: Collection[str]) -> str | None:
    """Return the longest of these prefixes that a name has; each ends with a dot, or is empty."""
    end = name.rfind(".")
    while end >= 0:
        if name[: end + 1] in old:
            return name[: end + 1]
        end = name.rfind(".", 0, end)
    return "" if "" in old else None


def _companions(layer: str, tensors: Mapping[str, TensorLike]) -> _Companions:
    for end, what in _REFUSED.items():
        if layer + end in tensors:
            raise Unsupported(
                f"tensor {layer + end}, {what}, cannot be applied: lend another file of this model", names=[layer + end]
            )
    given = [[layer + end for end in ends if layer + end in tensors] for ends in _ENDS]
    twice = next((names for names in given if len(names) > 1), None)
    if twice is not None:
        raise BadCheckpoint(
            f"tensors {' and '.join(twice)} are both the same scale of {layer}{_WEIGHT}, in a new and an old name: "
            "lend another file of this model",
            names=twice,
        )
    return _Companions(*(names[0] if names else None for names in given))
