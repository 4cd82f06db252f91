"""Make models and encoders from GGUF files, which are lent as they are: ComfyUI itself reads none.

Its blocks are dequantised where they are multiplied, and LoRAs are branches beside them. Nothing in ComfyUI can read or
change them, so other patches and nodes that merge or save weights are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import comfy.model_management
import comfy.ops
import folder_paths
import torch

from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.packed_tensors import LendableTensors
from xditd.client.comfyui.patcher import build_weightless, config_of, make_transformer_patcher, plain_names
from xditd.client.comfyui.source_files import SourceFiles
from xditd.client.comfyui.stock_dtypes import WeightDtype, compute_dtype
from xditd.client.comfyui.weights import Edit, RemoteWeights
from xditd.client.file_headers import read_header
from xditd.ipc.errors import Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.packed import logical_tensors
from xditd.ipc.tensors import ComponentKind, ComputeDType
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

if TYPE_CHECKING:
    from xditd.client.loans import Loan

END: Final = ".gguf"
_REMEDY: Final = "use a safetensors file of this model"


class StoredShapes(NamedTuple):
    """What the header of a GGUF file says: its tensors on the meta device, packed ones with their logical shapes.

    ``size_bytes`` are those of all tensors in the file.
    """

    shapes: dict[str, torch.Tensor]
    size_bytes: int
    files: SourceFiles


class GgufWeights(RemoteWeights):
    """The weights of a GGUF file and their loan; ``size_bytes`` is theirs in memory."""

    def __init__(
        self,
        path: str,
        kind: ComponentKind,
        stored: StoredShapes,
        dtype: torch.dtype,
    ) -> None:
        device = comfy.model_management.get_torch_device()
        super().__init__(
            {},
            kind=kind,
            label=Path(path).stem,
            device=str(device),
            is_whole=device.type == "cuda",
            connect=connect,
            compute_dtype=cast("ComputeDType", dtype_name(dtype)),
        )
        self._path = path
        self._files = stored.files
        self._shapes = stored.shapes
        self._stored_bytes = stored.size_bytes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    @property
    def shapes(self) -> dict[str, torch.Tensor]:
        return self._shapes

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """Refuse to give tensors, which saving and merging nodes ask for."""
        raise Unsupported(f"{self.label}: weights of a GGUF file cannot be read in ComfyUI: {_REMEDY}")

    @property
    def size_bytes(self) -> int:
        return self._stored_bytes if self._is_whole else 0

    def apply(self, edits: Mapping[str, Edit]) -> Loan:
        """Lend the file.

        Raises:
            Unsupported: there are patches that cannot be branches.
            StaleSource: the file was written or replaced since it was read.
        """
        if edits:
            raise Unsupported(
                f"{self.label}: patches that are no LoRA cannot be merged into a GGUF file ({listed(sorted(edits))}): "
                f"remove them, or {_REMEDY}",
                names=sorted(edits),
            )
        if not (self._is_whole and self._loan is not None and self._loan.is_live):
            self._files.check()
        return self.loan

    def _lend(self, _: Collection[str] | None = None) -> Loan:
        self.check_files()
        older = self._loan
        self._loan = self.connect().lend(
            self._path,
            kind=self.kind,
            label=self.label,
            device=self._device if self._is_whole else None,
            compute_dtype=self.compute_dtype,
        )
        if older is not None and older.is_live:
            older.return_()
        return self._loan


def gguf_files(folder_name: str) -> list[str]:
    """List the GGUF files in ComfyUI's folders of this name; ComfyUI's own list leaves them out."""
    return [
        name
        for folder in folder_paths.get_folder_paths(folder_name)
        for name in folder_paths.recursive_search(folder, [".git"])[0]
        if name.lower().endswith(END)
    ]


def make_gguf_model(path: str, choice: WeightDtype) -> Any:
    """Make a MODEL from a GGUF file. It is lent when a sampler first needs it.

    Raises:
        BadCheckpoint: the file is malformed.
        Unsupported: a model family that the workers do not run, or a choice of fp8.
    """
    label = Path(path).stem
    if choice.is_float8:
        raise Unsupported(
            f"{label}: a GGUF file keeps its types; set weight_dtype to default, bfloat16, float16 or float32"
        )
    stored = _read(path)
    shapes = plain_names(stored.shapes)
    config, family = config_of(shapes, label)
    dtype = compute_dtype(config, shapes, choice, is_mixed=True)
    config.set_inference_dtype(dtype, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = build_weightless(config, LendableTensors(config.process_unet_state_dict(shapes)).logical(dtype))
    weights = GgufWeights(path, ComponentKind.TRANSFORMER, stored._replace(shapes=shapes), dtype)
    return make_transformer_patcher(model, weights, family)


def gguf_encoder(path: str, dtype: torch.dtype) -> GgufWeights:
    """Return the weights of a text encoder in a GGUF file, which are dequantised into ``dtype``.

    Raises:
        BadCheckpoint: the file is malformed.
        Unsupported: a language model.
    """
    return GgufWeights(path, ComponentKind.TEXT_ENCODER, _read(path), dtype)


def _read(path: str) -> StoredShapes:
    lent = LentFile(path)
    try:
        header = read_header(lent)
    finally:
        lent.close()
    stored = logical_tensors(header.packed, {each.name: each for each in header.tensors})
    shapes = {
        name: torch.empty(
            each.shape, dtype=torch.bfloat16 if each.dtype == "packed" else torch_dtype(each.dtype), device="meta"
        )
        for name, each in stored.items()
    }
    return StoredShapes(shapes, sum(each.size_bytes for each in header.tensors), SourceFiles.of(lent))
