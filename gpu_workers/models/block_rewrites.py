"""Rewrite graphs of blocks before they are compiled, where the compiler has no good kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

from xditd.gpu_workers.kernels.dtypes import HALF_DTYPES
from xditd.gpu_workers.models.block_graphs import TensorKind
from xditd.gpu_workers.models.product_operator import OPERATOR

VERSION: Final = 2
"""Raise it when graphs are rewritten in another way: those on disk were compiled before."""

_ATEN: Final[Any] = torch.ops.aten
_VIEWS: Final = frozenset({_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default})
_SAME_DTYPE: Final = _VIEWS | {
    _ATEN.alias.default, _ATEN.expand.default, _ATEN.permute.default, _ATEN.select.int, _ATEN.slice.Tensor,
    _ATEN.squeeze.dim, _ATEN.transpose.int, _ATEN.unsqueeze.default,
}  # fmt: skip

Kinds = Mapping[Node, TensorKind]
"""The kinds of a graph's inputs, by their nodes."""


def rewrite(module: GraphModule, inputs: Sequence[TensorKind]) -> None:
    """Rewrite a graph in place; ``inputs`` are the kinds of its inputs in order."""
    kinds = dict(zip((node for node in module.graph.nodes if node.op == "placeholder"), inputs, strict=True))
    for node in list(module.graph.nodes):
        if node.target == _ATEN.gelu.default:
            _fuse_gelu(node, kinds)
        elif node.target == _ATEN.view_as_real.default:
            _rotate_in_reals(node, kinds)
    for node in list(module.graph.nodes):
        if node.target in (_ATEN.addmm.default, _ATEN._addmm_activation.default, _ATEN.mm.default):
            _use_dense_product(node, kinds)
    module.graph.eliminate_dead_code()
    module.recompile()


def _fuse_gelu(gelu: Node, kinds: Kinds) -> None:
    """Let a product whose result goes to GELU (tanh) alone compute it, as cuBLAS does in its epilogue.

    A kernel for GELU alone would read and write four times the width of the model for each token. cuBLAS has such an
    epilogue in half precision on GPUs only.
    """
    product = gelu.args[0]
    while isinstance(product, Node) and product.target in _VIEWS and len(product.users) == 1:
        product = product.args[0]
    if not isinstance(product, Node) or product.target != _ATEN.addmm.default or len(product.users) != 1:
        return
    bias = kinds.get(product.args[0])  # type: ignore[arg-type]
    is_half = bias is not None and bias.device.type == "cuda" and bias.dtype in HALF_DTYPES and len(bias.shape) == 1
    if gelu.kwargs.get("approximate") != "tanh" or product.kwargs or not is_half:
        return
    product.target = _ATEN._addmm_activation.default
    product.kwargs = {"use_gelu": True}
    gelu.replace_all_uses_with(gelu.args[0])  # type: ignore[arg-type]


def _use_dense_product(product: Node, kinds: Kinds) -> None:
    """Let :data:`OPERATOR` compute the product of a layer in half precision on a GPU."""
    gelu = bool(product.kwargs.get("use_gelu"))
    bias = None if product.target == _ATEN.mm.default else product.args[0]
    rows, weight = product.args[-2:]
    if set(product.kwargs) - {"use_gelu"} or not isinstance(weight, Node) or weight.target != _ATEN.t.default:
        return
    given = [kinds.get(each) for each in (weight.args[0], bias) if each is not None]  # type: ignore[arg-type]
    if any(each is None or each.device.type != "cuda" or each.dtype not in HALF_DTYPES for each in given):
        return
    if bias is not None and len(kinds[bias].shape) != 1:  # type: ignore[index]
        return
    product.target = OPERATOR
    product.args = (rows, weight, bias, gelu)
    product.kwargs = {}


def _rotate_in_reals(result: Node, kinds: Kinds) -> None:
    """Compute a product of complex numbers, seen as pairs, in real ones: the compiler has no kernels for complex ones.

    Rotary embeddings are such products; their kernels of torch read and write float32.
    """
    product = result.args[0]
    if not isinstance(product, Node) or product.target != _ATEN.mul.Tensor or len(product.users) != 1:
        return
    pairs = [each for each in product.args if isinstance(each, Node) and each.target == _ATEN.view_as_complex.default]
    others = [each for each in product.args if each not in pairs]
    if len(pairs) != 1 or not isinstance(others[0], Node) or not _is_complex(others[0], kinds):
        return
    with result.graph.inserting_before(result):
        call: Callable[..., Node] = result.graph.call_function
        factors = call(_ATEN.view_as_real.default, (others[0],))
        real, imaginary, cosine, sine = (
            call(_ATEN.select.int, (each, -1, item)) for each in (pairs[0].args[0], factors) for item in (0, 1)
        )
        first = call(_ATEN.sub.Tensor, (_times(call, real, cosine), _times(call, imaginary, sine)))
        second = call(_ATEN.add.Tensor, (_times(call, real, sine), _times(call, imaginary, cosine)))
        result.replace_all_uses_with(call(_ATEN.stack.default, ([first, second], -1)))


def _times(call: Callable[..., Node], one: Node, other: Node) -> Node:
    return call(_ATEN.mul.Tensor, (one, other))


def _is_complex(node: Node, kinds: Kinds) -> bool:
    """Return whether a tensor is known to be complex: a view of an input that is."""
    while node not in kinds and node.target in _SAME_DTYPE and isinstance(node.args[0], Node):
        node = node.args[0]
    return node in kinds and kinds[node].dtype.is_complex
