"""``PackedLinear``: a linear layer whose weight is packed, in place of ``torch.nn.Linear``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels.branches import Branches
from xditd.gpu_workers.packed.counts import PackedProductCounts
from xditd.gpu_workers.packed.scratch import ScratchBuffer
from xditd.gpu_workers.packed.shown_weight import ShownWeight
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.packed.triton_dequantise import dequantise_fastest

if TYPE_CHECKING:
    from xditd.gpu_workers.packed.embedding import PackedEmbedding


class PackedMemory:
    """What the packed layers of a rank share: the scratch buffer, and the counts of their products."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = ScratchBuffer(device)
        self.counts = PackedProductCounts()


class PackedLinear(torch.nn.Module):
    """A linear layer with a packed weight, which :meth:`plug` gives it: (..., in_features) to (..., out_features).

    The reference forward dequantises the weight into the scratch buffer, in the compute dtype, and has the bits of
    ``F.linear(x, dequantised, bias)``; on GPUs Triton dequantises, and ``int8_convrot`` may differ in last bits. A
    weight with a ``native`` product is multiplied by that instead. A bias of another dtype is cast to that of the
    product, so that a float32 bias does not make the whole layer compute in float32. ``branches`` are added to the
    result, which has the dtype of the input.

    The weight is dequantised into ``dtype``. ``weight`` shows ``shown`` instead, if the layer's inputs are of it:
    models ask a weight for its dtype and cast to that what they multiply.
    """

    def __init__(
        self, linear: torch.nn.Linear, dtype: torch.dtype, memory: PackedMemory, shown: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.training = linear.training
        self.memory = memory
        self.branches = Branches()
        self._dtype = dtype
        self._packed: PackedTensor | None = None
        self._placeholder = torch.empty(self.out_features, self.in_features, dtype=shown or dtype, device="meta")

    @property
    def weight(self) -> torch.Tensor:
        """The weight for code that asks for its shape, dtype or device, or reads it: then it is dequantised anew.

        While a block is compiled, or nothing is plugged, a tensor on meta without values.
        """
        if self._packed is None or torch.compiler.is_compiling():
            return self._placeholder
        shown = self._placeholder
        return ShownWeight(shown.shape, shown.dtype, self._packed.values.device, self._copy)

    @property
    def scratch_bytes(self) -> int:
        """The size of its dequantised weight."""
        return self._placeholder.numel() * self._dtype.itemsize

    @property
    def packed(self) -> PackedTensor:
        """The plugged weight."""
        assert self._packed is not None
        return self._packed

    def plug(self, packed: PackedTensor) -> None:
        """Use this weight until :meth:`unplug` or the next call."""
        assert packed.shape == (self.out_features, self.in_features)
        self._packed = packed

    def unplug(self) -> None:
        """Drop all references to lent memory."""
        self._packed = None

    def dequantised(self) -> torch.Tensor:
        """Return the weight (out, in) in the compute dtype, in the scratch buffer: valid until the next layer runs."""
        return dequantise_fastest(self.packed, self.memory.scratch.view(self._placeholder.shape, self._dtype))

    def _copy(self) -> torch.Tensor:
        self.memory.counts.count_reference(self.packed, "the model's code reads the weight")
        values = torch.empty(self._placeholder.shape, dtype=self._dtype, device=self.packed.values.device)
        return dequantise_fastest(self.packed, values).to(self._placeholder.dtype)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Count a native product, and return its weight, its scale and the bias."""
        packed = self.packed
        self.memory.counts.count_native(packed.format)
        return packed.values, packed.scale, self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branches.add(self._multiply(x), x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        if packed.native is not None:
            self.memory.counts.count_native(packed.format)
            return packed.native(x, packed, self.bias)
        self.memory.counts.count_reference(packed)
        weight, bias = self.dequantised(), self.bias
        if x.dtype == weight.dtype:
            return F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
        wide = torch.promote_types(x.dtype, weight.dtype)
        found = F.linear(x.to(wide), weight.to(wide), bias if bias is None else bias.to(wide))
        return found.to(x.dtype)

    def extra_repr(self) -> str:
        packed = "nothing plugged" if self._packed is None else self._packed.format
        return f"in_features={self.in_features}, out_features={self.out_features}, packed={packed}"


class BranchedLinear(torch.nn.Linear):
    """A plain linear layer with branches: without any it computes as its base class does."""

    branches: Branches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branches.add(super().forward(x), x)


def add_branches_to(module: torch.nn.Module) -> dict[str, Branches]:
    """Give all plain linear layers branches; return those of all layers, packed ones too, by the layers' names."""
    found: dict[str, Branches] = {}
    for path, layer in module.named_modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = BranchedLinear  # its parameters, hooks and attributes stay
            layer.__dict__["branches"] = Branches()
        if isinstance(layer, BranchedLinear | PackedLinear):
            found[path] = layer.branches
    return found


def pack_linears(
    module: torch.nn.Module,
    dtypes: Mapping[str, torch.dtype],
    memory: PackedMemory,
    shown: torch.dtype | None = None,
) -> dict[str, PackedLinear]:
    """Replace the linear layers with these weights by packed ones; return them by the weights' names.

    ``dtypes`` are the compute dtypes by the weights' names. ``shown`` is that of :class:`PackedLinear`.
    """
    found: dict[str, PackedLinear] = {}
    for target, dtype in dtypes.items():
        path = target.removesuffix(".weight")
        parent, _, name = path.rpartition(".")
        layer = module.get_submodule(path)
        assert isinstance(layer, torch.nn.Linear)
        found[target] = PackedLinear(layer, dtype, memory, shown)
        setattr(module.get_submodule(parent), name, found[target])
    return found


def packed_layers(module: torch.nn.Module) -> list[PackedLinear]:
    """Return all layers of a module that multiply packed weights."""
    return [each for each in module.modules() if isinstance(each, PackedLinear)]


def largest_bytes(layers: Iterable[PackedLinear | PackedEmbedding]) -> int:
    """Return how many bytes of the scratch buffer the largest of these layers needs; 0 without any."""
    return max((layer.scratch_bytes for layer in layers), default=0)


def weight_of(layer: PackedLinear | torch.nn.Linear) -> torch.Tensor:
    """Return the weight of a linear layer; of a packed one it is valid until the next packed layer runs."""
    return layer.dequantised() if isinstance(layer, PackedLinear) else layer.weight


def is_linear_weight(module: torch.nn.Module, target: str) -> bool:
    """Return whether a parameter is the weight of a plain linear layer; one of a subclass may do more with it."""
    path, _, name = target.rpartition(".")
    return name == "weight" and type(module.get_submodule(path)) is torch.nn.Linear
