"""Tensors of torch in the memory of the emulated device: with its address and on it, only torch's kernels are missing.

A build of torch without CUDA makes such tensors from DLPack capsules, which is the way in for memory of any library.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tests.device.machine import Machine, active
from tests.device.memory import Allocation
from tests.device.operations import Queue
from tests.device.ptx import Fault

CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
CUDA_DEVICE = 2


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Exported(np.ndarray):
    """Device memory as an array that keeps the allocation; NumPy's capsules keep the array."""

    memory: Allocation


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def allocate(
    machine: Machine, queue: Queue, size: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Allocation]:
    """A new tensor, full of garbage; its end releases the memory in the order of the stream, unless that is kept."""
    memory = machine.reserve(reach(size, strides, dtype.itemsize), queue)
    contents = np.empty(0, np.uint8) if memory.block is None else memory.block.contents
    steps = [dtype.itemsize * step for step in strides]
    array = _Exported(tuple(size), np.dtype(f"u{dtype.itemsize}"), contents, 0, steps)
    array.memory = memory
    capsule = array.__dlpack__()
    described = _DLTensor.from_address(_pointer(capsule, b"dltensor"))
    described.device_type, described.device_id = CUDA_DEVICE, queue.device
    described.code = CODES[str(dtype).removeprefix("torch.").rstrip("0123456789")]
    return torch.utils.dlpack.from_dlpack(capsule), memory


def reach(size: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element to behind the last."""
    return itemsize * (1 + sum((n - 1) * step for n, step in zip(size, strides))) if 0 not in size else 0


class Place:
    """A tensor as queued work sees it: a place in memory that may have been freed by the time it is used."""

    def __init__(self, tensor: Tensor) -> None:
        self._block = None
        if tensor.numel() == 0:
            self._view = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
            return
        address, n_bytes = tensor.data_ptr(), reach(tensor.size(), tensor.stride(), tensor.element_size())
        block = active().heap.block_at(address)
        if block is None or not block.live:
            raise Fault(f"a tensor at {address:#x}, which is no live device memory")
        if block.device != tensor.device.index:
            raise Fault(f"a tensor of {tensor.device} in the memory of device {block.device}")
        contents = torch.from_numpy(block.view((n_bytes,), np.dtype(np.uint8), address, (1,)))
        self._block = block
        self._view = contents.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())

    def host(self) -> Tensor:
        """The memory as a tensor of the CPU, when the work runs."""
        if self._block is not None:
            self._block.check()
        return self._view
