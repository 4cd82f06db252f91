"""Matrix products by cuBLASLt without a workspace, for which torch has no argument.

With a workspace cuBLAS takes kernels that schedule their tiles by a counter in memory, which a memset has to clear
before each of them, also in a CUDA graph. Without one it takes kernels whose schedule is fixed. Constants and
structures are those of ``cublasLt.h`` of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, Final, NamedTuple

import torch

_COMPUTE_32F: Final = 68
_R_32F: Final = 0
_DTYPES: Final = {torch.float16: 2, torch.bfloat16: 14}
_TRANSPOSED: Final = 1

_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER, _DESC_BIAS_DTYPE = 3, 7, 8, 26
_PREF_MAX_WORKSPACE_BYTES, _PREF_ALIGNMENT_A = 1, 5
_EPILOGUES: Final = {(False, False): 1, (True, False): 4, (False, True): 32, (True, True): 36}
"""By whether there are a bias and GELU (tanh)."""

MAX_ALIGNMENT: Final = 256
"""Bytes; larger alignments do not matter."""


class Refused(Exception):
    """cuBLASLt is not there, or has no kernel for a product; the message says what it returned."""


class DenseKind(NamedTuple):
    """A product of ``rows`` (rows, inputs) with a weight (outputs, inputs), and how its tensors are laid out.

    ``strides`` of dimension 0, in elements, are those of the weight, the rows and the result; ``alignments`` of the
    addresses, in bytes, are theirs and that of the bias.
    """

    rows: int
    inputs: int
    outputs: int
    strides: tuple[int, int, int]
    alignments: tuple[int, int, int, int]
    dtype: torch.dtype
    has_bias: bool
    has_gelu: bool


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class StaticProduct:
    """A product of one kind on the current GPU, by the first kernel that cuBLASLt names without a workspace.

    Raises:
        Refused: there is none.
    """

    def __init__(self, kind: DenseKind) -> None:
        self._lib, self._handle = _library()
        self._description, self._layouts = c_void_p(), [c_void_p() for _ in range(3)]
        weakref.finalize(self, _destroy, self._lib, self._description, self._layouts)
        # Row-major tensors are column-major ones transposed: (outputs, rows) = weight, transposed, by (inputs, rows).
        dtype, (of_weight, of_rows, of_result) = _DTYPES[kind.dtype], kind.strides
        _check(self._lib.cublasLtMatmulDescCreate(byref(self._description), _COMPUTE_32F, _R_32F), "description")
        self._describe(_DESC_TRANSA, c_int(_TRANSPOSED))
        self._describe(_DESC_EPILOGUE, c_int(_EPILOGUES[kind.has_bias, kind.has_gelu]))
        if kind.has_bias:
            self._describe(_DESC_BIAS_DTYPE, c_int(dtype))
            self._describe(_DESC_BIAS_POINTER, c_void_p(kind.alignments[3]))  # an address that is so aligned
        shapes = (
            (kind.inputs, kind.outputs, of_weight),
            (kind.inputs, kind.rows, of_rows),
            (kind.outputs, kind.rows, of_result),
        )
        for layout, (first, second, leading) in zip(self._layouts, shapes, strict=True):
            made = self._lib.cublasLtMatrixLayoutCreate(
                byref(layout), dtype, c_uint64(first), c_uint64(second), c_int64(leading)
            )
            _check(made, "layout")
        self._algorithm = self._find(kind)

    def _describe(self, attribute: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        done = self._lib.cublasLtMatmulDescSetAttribute(self._description, attribute, byref(value), size)
        _check(done, f"attribute {attribute}")

    def _find(self, kind: DenseKind) -> _Heuristic:
        preference, found, count = c_void_p(), _Heuristic(), c_int()
        _check(self._lib.cublasLtMatmulPreferenceCreate(byref(preference)), "preference")
        try:
            of_weight, of_rows, of_result, _ = kind.alignments
            settings: dict[int, Any] = {_PREF_MAX_WORKSPACE_BYTES: c_uint64(0)}
            for number, each in enumerate((of_weight, of_rows, of_result, of_result)):
                settings[_PREF_ALIGNMENT_A + number] = c_uint32(each)
            for attribute, value in settings.items():
                size = c_size_t(ctypes.sizeof(value))
                done = self._lib.cublasLtMatmulPreferenceSetAttribute(preference, attribute, byref(value), size)
                _check(done, f"preference {attribute}")
            weight, rows, result = self._layouts
            done = self._lib.cublasLtMatmulAlgoGetHeuristic(
                self._handle, self._description, weight, rows, result, result, preference, 1, byref(found), byref(count)
            )
            _check(done, "heuristic")
        finally:
            self._lib.cublasLtMatmulPreferenceDestroy(preference)
        if count.value < 1:
            raise Refused("cuBLASLt has no kernel without a workspace")
        _check(found.state, "kernel")
        return found

    def run(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        adds: bool = False,
    ) -> None:
        """Begin to write the product of tensors of its kind into ``out``, in the order of the current stream.

        ``adds``: to what ``out`` holds; GELU is of the sum.
        """
        if bias is not None:
            self._describe(_DESC_BIAS_POINTER, c_void_p(bias.data_ptr()))
        of_weight, of_rows, of_result = self._layouts
        result = c_void_p(out.data_ptr())
        done = self._lib.cublasLtMatmul(
            self._handle, self._description, byref(_ONE),
            c_void_p(weight.data_ptr()), of_weight, c_void_p(rows.data_ptr()), of_rows, byref(_ONE if adds else _ZERO),
            result, of_result, result, of_result,
            byref(self._algorithm.algorithm), None, c_size_t(0),
            c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
        )  # fmt: skip
        _check(done, "product")


def _destroy(lib: Any, description: c_void_p, layouts: Sequence[c_void_p]) -> None:
    for layout in layouts:
        lib.cublasLtMatrixLayoutDestroy(layout)
    lib.cublasLtMatmulDescDestroy(description)


_ONE: Final = c_float(1.0)
_ZERO: Final = c_float(0.0)


def alignment(tensor: torch.Tensor) -> int:
    """Return the largest power of two that divides a tensor's address, at most 256."""
    address = tensor.data_ptr() | MAX_ALIGNMENT
    return address & -address


@cache
def _library() -> tuple[Any, c_void_p]:
    """Return the library that torch has loaded, and a handle for the life of the process.

    Raises:
        Refused: torch has none.
    """
    version = torch.version.cuda
    if version is None:
        raise Refused("this torch has no CUDA")
    try:
        lib = ctypes.CDLL(f"libcublasLt.so.{version.split('.')[0]}")
    except OSError as error:
        raise Refused(str(error)) from error
    handle = c_void_p()
    _check(lib.cublasLtCreate(byref(handle)), "handle")
    return lib, handle


def _check(status: int, what: str) -> None:
    if status:
        raise Refused(f"cuBLASLt: {what}: status {status}")
