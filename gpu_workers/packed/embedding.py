"""``PackedEmbedding``: a table of tokens that is packed, in place of ``torch.nn.Embedding``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.packed.triton_dequantise import dequantise_fastest
from xditd.ipc.packed import SCALED_COLUMNS


class PackedEmbedding(torch.nn.Module):
    """A table whose rows are dequantised when they are looked up; :meth:`plug` gives it the packed table.

    Integer ids of any shape give (*shape, embedding_dim) in the compute dtype, or in ``shown`` if that is given, with
    the bits of ``F.embedding(ids, dequantised)`` and without the memory of the dequantised table. The hooks of the
    layer that it replaces are kept.
    """

    scratch_bytes = 0
    """Rows that are looked up need no scratch buffer."""

    def __init__(
        self,
        embedding: torch.nn.Embedding,
        dtype: torch.dtype,
        device: torch.device,
        shown: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.training = embedding.training
        self._forward_hooks.update(embedding._forward_hooks)
        self._dtype = dtype
        self._shown = shown or dtype
        self._packed: PackedTensor | None = None
        # Code that multiplies by it would get NaN, which no job accepts.
        nan = torch.full((), torch.nan, dtype=self._shown, device=device)
        self._placeholder = nan.expand(self.num_embeddings, self.embedding_dim)

    @property
    def weight(self) -> torch.Tensor:
        """A tensor of one number, for code that asks for the shape, the dtype or the device of the table."""
        return self._placeholder

    @property
    def packed(self) -> PackedTensor:
        """The plugged table."""
        assert self._packed is not None
        return self._packed

    def plug(self, packed: PackedTensor) -> None:
        """Use this table until :meth:`unplug` or the next call."""
        assert packed.shape == (self.num_embeddings, self.embedding_dim)
        self._packed = packed

    def unplug(self) -> None:
        """Drop all references to lent memory."""
        self._packed = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = _rows(self.packed, ids.reshape(-1))
        out = torch.empty(rows.shape, dtype=self._dtype, device=rows.values.device)
        return dequantise_fastest(rows, out).view(*ids.shape, self.embedding_dim).to(self._shown)

    def extra_repr(self) -> str:
        packed = "nothing plugged" if self._packed is None else self._packed.format
        return f"{self.num_embeddings}, {self.embedding_dim}, packed={packed}"


def can_look_up(module: torch.nn.Module, target: str, packed_format: str) -> bool:
    """Return whether a parameter is a plain table, whose format has no tiles of scales."""
    path, _, name = target.rpartition(".")
    layer = module.get_submodule(path)
    is_plain = type(layer) is torch.nn.Embedding and layer.max_norm is None
    return name == "weight" and is_plain and packed_format not in SCALED_COLUMNS


def pack_embeddings(
    module: torch.nn.Module,
    targets: Iterable[str],
    dtype: torch.dtype,
    device: torch.device,
    shown: torch.dtype | None = None,
) -> dict[str, PackedEmbedding]:
    """Replace the embeddings with these tables by packed ones, wherever the module has them; return them by name."""
    found: dict[str, PackedEmbedding] = {}
    for target in targets:
        layer = module.get_submodule(target.removesuffix(".weight"))
        assert isinstance(layer, torch.nn.Embedding)
        found[target] = PackedEmbedding(layer, dtype, device, shown)
        for parent in module.modules():
            for name, child in parent._modules.items():
                if child is layer:
                    parent._modules[name] = found[target]
    return found


def _rows(packed: PackedTensor, rows: torch.Tensor) -> PackedTensor:
    """Return a copy of these rows of a table."""
    values = packed.values.view(torch.uint8).view(packed.shape[0], -1).index_select(0, rows)
    scale = packed.scale
    if scale is not None and scale.ndim:
        scale = scale.index_select(0, rows)
    return replace(
        packed, shape=(len(rows), *packed.shape[1:]), values=values.view(packed.values.dtype), scale=scale, native=None
    )
