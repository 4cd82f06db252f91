"""Places of a job's tensors in its blocks: one of host memory, and for large tensors of calls one of device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xditd.ipc import limits
from xditd.ipc.field_types import DType
from xditd.ipc.tensors import IoTensor
from xditd.ipc.transports.tensor_views import align, dtype_name

if TYPE_CHECKING:
    import torch

FINGERPRINTED_BYTES: Final = 4096
"""The bytes at the start of a block that workers verify: ``SAMPLE_BYTES`` of ``ipc/transports/fingerprints.py``, which
is not imported, since it needs hashlib and few programs do."""


class IoPlaces:
    """Offsets of a job's tensors in its block: inputs first, outputs after them, each at a multiple of 256 bytes.

    The first ``start_bytes`` of the block are not used.
    """

    def __init__(self, start_bytes: int = 0) -> None:
        self._end = start_bytes
        self._has_outputs = False

    @property
    def size_bytes(self) -> int:
        return max(self._end, FINGERPRINTED_BYTES)

    def add_input(self, tensor: torch.Tensor) -> IoTensor:
        """Reserve room for an input of this dtype and shape. All inputs come before the first output."""
        if self._has_outputs:
            raise ValueError("inputs come before outputs")
        return self._reserve(dtype_name(tensor.dtype), tuple(tensor.shape))

    def add_output(self, dtype: torch.dtype, shape: tuple[int, ...]) -> IoTensor:
        """Reserve room for an output."""
        self._begin_outputs()
        return self._reserve(dtype_name(dtype), shape)

    def add_room(self, size_bytes: int) -> int:
        """Reserve room for outputs whose offsets the workers choose; returns the offset of the room."""
        self._begin_outputs()
        offset = align(self._end)
        self._end = offset + size_bytes
        return offset

    def _begin_outputs(self) -> None:
        if not self._has_outputs:
            # A worker verifies the first bytes of a block when it maps it. A faster rank that already writes its
            # outputs must not change them.
            self._end = max(self._end, FINGERPRINTED_BYTES)
            self._has_outputs = True

    def _reserve(self, dtype: DType, shape: tuple[int, ...]) -> IoTensor:
        offset = align(self._end)
        spec = IoTensor(offset_bytes=offset, dtype=dtype, shape=shape)
        self._end = offset + spec.size_bytes
        return spec


class DevicePlaces(IoPlaces):
    """Offsets of a call's large tensors in its block of device memory; ``index`` is that of its GPU, once there is one.

    All are on the GPU of the first.
    """

    def __init__(self) -> None:
        super().__init__(FINGERPRINTED_BYTES)
        self.index: int | None = None

    def takes(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor goes into device memory. If it is the first one, it decides on the GPU."""
        if not tensor.is_cuda or tensor.nbytes < limits.DEVICE_IO_FROM_BYTES:
            return False
        if self.index is None:
            self.index = tensor.device.index
        return tensor.device.index == self.index

    def reserves_on(self, device: torch.device) -> bool:
        """Return whether results on ``device`` have room here: that of the inputs, or any GPU if there are none."""
        if device.type != "cuda":
            return False
        if self.index is None:
            import torch

            self.index = torch.cuda.current_device() if device.index is None else device.index
        return device.index in (None, self.index)
