"""Tensors as arrays on the same memory: NumPy's on the CPU, CuPy's on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gpurms.torch.memory import reach

TYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The types of parameters, and in which the update of each is computed."""


_device = attrgetter("device")


@cache
def array_type(dtype: torch.dtype) -> np.dtype[Any]:
    """The NumPy type of the same name; bfloat16 is that of ml_dtypes."""
    if dtype is torch.bfloat16:
        try:
            import ml_dtypes
        except ImportError as error:
            raise RuntimeError("bfloat16 tensors need ml_dtypes: pip install ml_dtypes") from error
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    found: np.dtype[Any] = np.dtype(str(dtype).removeprefix("torch."))
    return found


def array(tensor: Tensor) -> Any:
    """A plain strided tensor's memory as an array, which keeps it alive."""
    shape, dtype = tuple(tensor.shape), array_type(tensor.dtype)
    strides = tuple(tensor.element_size() * step for step in tensor.stride())
    if tensor.is_cuda:
        import cupy

        memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), reach(tensor), tensor, tensor.device.index)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)
    if tensor.numel() == 0:
        return np.empty(shape, dtype)
    return np.asarray(_Bits(tensor, shape, strides)).view(dtype)


class _Bits:
    """A tensor as NumPy takes memory of others. ``Tensor.numpy`` would keep its storage from ever being resized."""

    def __init__(self, tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.tensor = tensor.detach()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "shape": shape,
            "strides": strides,
        }


def flat(tensor: Tensor) -> Tensor:
    """The elements in the order of memory, of a tensor that is ``dense``."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def is_dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, in any order of its dimensions."""
    if tensor.is_contiguous():
        return True
    steps = sorted((step, n) for step, n in zip(tensor.stride(), tensor.shape) if n != 1)
    return steps[0][0] == 1 and all(step * n == following for (step, n), (following, _) in pairwise(steps))


def steps(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have any: where one has a length of 1, nothing depends on it."""
    return [step for step, n in zip(tensor.stride(), tensor.shape) if n != 1]


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, as in an expanded tensor; some intricate cases are not found."""
    return tensor.numel() > 0 and any(step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape))


def local(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of distributed tensors the parts that this rank holds."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not any(issubclass(kind, distributed.DTensor) for kind in set(map(type, tensors))):
        return tensors
    return [tensor.to_local() if isinstance(tensor, distributed.DTensor) else tensor for tensor in tensors]


def has_own_memory(tensor: Tensor) -> bool:
    """Not so a subclass that wraps others; of a distributed tensor it is this rank's part that has it."""
    return not is_traceable_wrapper_subclass(local([tensor])[0])


def gradients(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Their gradients; of distributed ones this rank's parts, laid out over the ranks as the parameters are."""
    grads: Sequence[Any] = [parameter.grad for parameter in parameters]
    if local(parameters) is parameters and local(grads) is grads:
        return grads
    return local([_like(grad, parameter) for grad, parameter in zip(grads, parameters)])


def spread(tensor: Any) -> tuple[Any, Any]:
    """Mesh and placements of a distributed tensor, which say what each rank holds of it; of others (None, None)."""
    return getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


def _like(grad: Any, parameter: Any) -> Any:
    mesh, placements = spread(parameter)
    of_grad = spread(grad)
    if of_grad == (mesh, placements):
        return grad
    if mesh is None or of_grad[0] is None:
        kinds = " and ".join(type(each).__name__ for each in (parameter, grad))
        raise RuntimeError(f"a parameter and its gradient: expected both as DTensors, or none; got {kinds}")
    return grad.redistribute(mesh, placements)


def rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Values and row numbers of a sparse COO gradient; several sparse dimensions count as one, see ``table``.

    Of those, an index outside of its dimension makes the row -1.
    """
    indices, values = grad._indices(), grad._values()
    if indices.shape[0] == 1:
        return values, indices[0]
    lengths = grad.shape[: indices.shape[0]]
    numbers = torch.zeros_like(indices[0])
    outside = torch.zeros_like(numbers, dtype=torch.bool)
    for index, length in zip(indices, lengths):
        outside |= (index < 0) | (index >= length)
        numbers = numbers * length + index
    return values, numbers.masked_fill_(outside, -1)


def table(tensor: Tensor, n_sparse: int) -> Tensor:
    """A view in which the first ``n_sparse`` dimensions are one."""
    tensor = tensor.detach()
    if n_sparse == 1:
        return tensor
    try:
        return tensor.view(-1, *tensor.shape[n_sparse:])
    except RuntimeError as error:
        raise RuntimeError(
            f"a gradient with {n_sparse} sparse dimensions needs a parameter in which these are as one in memory; "
            f"got shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        ) from error


def is_capturing(parameters: Iterable[Tensor]) -> bool:
    """Whether their step is being recorded in a graph instead of running.

    Raises:
        RuntimeError: a part of it is, and the rest would run now, and never again.
    """
    capturing = {}
    for device in set(map(_device, parameters)):
        if device.type == "cuda":
            with torch.cuda.device(device):
                capturing[device] = torch.cuda.is_current_stream_capturing()
        else:
            capturing[device] = False
    if any(capturing.values()) and not all(capturing.values()):
        running = ", ".join(sorted(str(device) for device, recorded in capturing.items() if not recorded))
        raise RuntimeError(
            f"a step can be captured in a graph only as a whole; its part on {running} would run at once"
        )
    return any(capturing.values())


@contextmanager
def streams(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make torch's current streams on the parameters' GPUs CuPy's."""
    devices = {device.index for device in set(map(_device, parameters)) if device.type == "cuda"}
    with ExitStack() as stack:
        for device in sorted(devices):
            import cupy

            with cupy.cuda.Device(device):
                handle = torch.cuda.current_stream(device).cuda_stream
                stream = cupy.cuda.Stream.from_external(_Stream(handle)) if handle else cupy.cuda.Stream.null
            stack.enter_context(cupy.cuda.Device(device))
            stack.enter_context(stream)
        yield


class _Stream:
    """A stream as CuPy takes those of other libraries: protocol version and handle."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle
