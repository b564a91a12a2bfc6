"""Kernels compiled by NVRTC and run in the PTX interpreter: RawKernel and ElementwiseKernel."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy._core import _carray, _kernel, _scalar, core

from tests.device import nvrtc, ptx
from tests.device.machine import Machine, active
from tests.device.operations import Launch, Operation
from tests.device.streams import COMPUTE_CAPABILITY

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
SHARED_BYTES, SHARED_BYTES_OPT_IN = 49152, 232448

_RawKernel = cupy.RawKernel
_ElementwiseKernel = cupy.ElementwiseKernel


class DriverError(cupy.cuda.driver.CUDADriverError):
    """CuPy's error; its own constructor asks the driver for the text."""

    def __init__(self, text: str) -> None:
        RuntimeError.__init__(self, text)
        self.status = 1


@functools.cache
def _module(source: str, options: tuple[str, ...]) -> ptx.Module:
    return ptx.Module(nvrtc.compile(source, options, arch=COMPUTE_CAPABILITY))


def check_device(array: cupy.ndarray) -> None:
    """CuPy refuses an array of a device that the current one cannot reach.

    Raises:
        ValueError: the array is on another device than the current one.
    """
    here, there = active().thread.device, array.data.device_id
    if here != there:
        raise ValueError(
            f"The device where the array resides ({there}) is different from the current device ({here})."
            " Peer access is unavailable between these devices."
        )


def pack(machine: Machine, argument: Any) -> bytes:
    """The bytes of one RawKernel argument, by CuPy's rules.

    Raises:
        TypeError: CuPy does not take arguments of this type.
        Fault: the array is on another device.
    """
    if argument is None:
        return bytes(8)
    if isinstance(argument, cupy.ndarray):
        here, there = machine.thread.device, argument.data.device_id
        if here != there:
            raise ptx.Fault(f"a kernel on device {here} was given an array of device {there}")
        return np.uint64(argument.data.ptr).tobytes()
    if isinstance(argument, cupy.cuda.MemoryPointer):
        return np.uint64(argument.ptr).tobytes()
    if isinstance(argument, np.ndarray):
        if argument.size != 1:
            raise TypeError(
                f"You are trying to pass a numpy.ndarray of shape {argument.shape} as a kernel parameter. Only"
                " numpy.ndarrays of size one can be passed by value. If you meant to pass a pointer to __global__"
                " memory, you need to pass a cupy.ndarray instead."
            )
        return argument.tobytes()
    return _bytes(_scalar.CScalar(argument))


def _bytes(scalar: _scalar.CScalar) -> bytes:
    """Python numbers have 8 bytes (bool 1, complex 16), NumPy scalars their own size."""
    return ctypes.string_at(scalar.ptr, np.dtype(scalar.get_numpy_type()).itemsize)


def _launch(
    machine: Machine,
    kernel: ptx.Kernel,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: Sequence[bytes],
    *,
    shared_bytes: int = 0,
    stream: Any = None,
) -> None:
    """Submit a launch; its arguments are those of now, the memory they point to is that of the time it runs."""
    if any(n > limit for n, limit in zip(grid, MAX_GRID)) or any(n > limit for n, limit in zip(block, MAX_BLOCK)):
        raise DriverError(f"CUDA_ERROR_INVALID_VALUE: invalid argument: grid {grid}, block {block}")
    if np.prod(block) > MAX_THREADS:
        raise DriverError(f"CUDA_ERROR_INVALID_VALUE: invalid argument: {np.prod(block)} threads in a block")
    device, queue = machine.thread.device, machine.queue(stream)
    if queue.device != device:
        raise DriverError(f"CUDA_ERROR_INVALID_HANDLE: a stream of device {queue.device}, the current one is {device}")
    memory = machine.heap.kernel_memory[device]

    def run() -> None:
        machine.execute(kernel, grid, block, arguments, memory, shared_bytes=shared_bytes)

    launch = Launch(kernel.name, grid, block, device)
    machine.submit(queue, Operation(kernel.name, run, launch=launch))


class RawKernel(_RawKernel):
    """A RawKernel whose calls are interpreted."""

    _dynamic_shared = SHARED_BYTES

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f"grid and block must be tuples, got {type(grid).__name__}, {type(block).__name__}")
        if shared_mem > self._dynamic_shared:
            raise DriverError(f"CUDA_ERROR_INVALID_VALUE: invalid argument: {shared_mem} bytes of shared memory")
        machine = active()
        _launch(
            machine,
            self._interpreted(),
            _three(grid),
            _three(block),
            [pack(machine, argument) for argument in args],
            shared_bytes=shared_mem,
            stream=stream,
        )

    def compile(self, log_stream: Any = None) -> None:
        self._interpreted()

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._dynamic_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        if nbytes > SHARED_BYTES_OPT_IN:
            raise DriverError("CUDA_ERROR_INVALID_VALUE: invalid argument: max_dynamic_shared_size_bytes")
        self._dynamic_shared = nbytes

    def _interpreted(self) -> ptx.Kernel:
        kernels = _module(self.code, tuple(self.options)).kernels
        if self.name not in kernels:
            raise DriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
        return kernels[self.name]


def _three(counts: tuple[int, ...]) -> tuple[int, ...]:
    """CuPy launches at least one of everything."""
    return tuple(max(1, int(n)) for n in (*counts, 1, 1)[:3])


class ElementwiseKernel(_ElementwiseKernel):
    """An ElementwiseKernel whose calls are interpreted."""

    def __call__(self, *args: Any, size: int = -1, block_size: int = 128, stream: Any = None) -> Any:
        return elementwise(self, args, size=size, block_size=block_size, stream=stream)


def elementwise(
    kernel: _ElementwiseKernel, args: Sequence[Any], *, size: int = -1, block_size: int = 128, stream: Any = None
) -> Any:
    """Call an ElementwiseKernel: CuPy's own source for these arguments, compiled and interpreted.

    Raises:
        TypeError, ValueError: as CuPy's kernels raise them.
    """
    if len(args) not in (kernel.nin, kernel.nargs):
        raise TypeError(
            f"Wrong number of arguments for {kernel.name!r}. It must be either {kernel.nin} or {kernel.nargs} "
            f"(with outputs), but given {len(args)}."
        )
    machine = active()
    for argument in args:
        if isinstance(argument, cupy.ndarray):
            check_device(argument)
        elif not isinstance(argument, (bool, int, float, complex, np.generic)):
            raise TypeError(f"Unsupported type {type(argument)}")

    shape = _loop_shape(kernel, args, size)
    types = [a.dtype.type if isinstance(a, cupy.ndarray) else None for a in args]
    in_types, out_types, type_map = kernel._decide_params_type(tuple(types[: kernel.nin]), tuple(types[kernel.nin :]))
    outputs = list(args[kernel.nin :]) or _new_outputs(kernel, out_types, shape, size)
    _check_outputs(kernel, outputs, shape, size)
    returned = outputs[0] if kernel.nout == 1 and not kernel.return_tuple else tuple(outputs)
    if 0 not in shape:
        operands = [*args[: kernel.nin], *outputs]
        source, arguments = _source(kernel, operands, (*in_types, *out_types), type_map, shape)
        count = int(np.prod(shape))
        options = tuple(kernel.kwargs.get("options", ()))
        _launch(
            machine,
            _module(source, options).kernels[kernel.name],
            (min(2**31 - 1, -(-count // block_size)), 1, 1),
            (min(block_size, count), 1, 1),
            arguments,
            stream=stream,
        )
    return None if kernel.no_return else returned


def _loop_shape(kernel: _ElementwiseKernel, args: Sequence[Any], size: int) -> tuple[int, ...]:
    looped = [a.shape for a, p in zip(args, kernel.params) if isinstance(a, cupy.ndarray) and not p.raw]
    if size != -1:
        if looped:
            raise ValueError("Specified 'size' can be used only if all of the ndarray are 'raw'.")
        return (size,)
    if not looped:
        raise ValueError("Loop size is undecided.")
    try:
        return np.broadcast_shapes(*looped)
    except ValueError:
        shapes = " ".join(map(str, looped))
        raise ValueError(f"operands could not be broadcast together with shapes {shapes}") from None


def _new_outputs(kernel: _ElementwiseKernel, types: Sequence[type], shape: tuple[int, ...], size: int) -> list[Any]:
    if size == -1 and any(parameter.raw for parameter in kernel.out_params):
        raise ValueError("Output array size is Undecided")
    return [cupy.empty(shape, dtype) for dtype in types]


def _check_outputs(kernel: _ElementwiseKernel, outputs: Sequence[Any], shape: tuple[int, ...], size: int) -> None:
    for output, parameter in zip(outputs, kernel.out_params):
        if not isinstance(output, cupy.ndarray):
            raise TypeError(f"Output arguments type must be cupy.ndarray, got {type(output)}")
        if not parameter.raw and output.shape != shape:
            raise ValueError(f"Out shape is mismatched: {output.shape} for a loop of shape {shape}")


def _source(
    kernel: _ElementwiseKernel, operands: Sequence[Any], types: Sequence[type], type_map: Any, shape: tuple[int, ...]
) -> tuple[str, list[bytes]]:
    """The CUDA source CuPy generates, and its packed arguments. The only place with CuPy's private kernel API."""
    looped = [
        cupy.broadcast_to(a, shape) if isinstance(a, cupy.ndarray) and not p.raw else a
        for a, p in zip(operands, kernel.params)
    ]
    arrays = [a for a, p in zip(looped, kernel.params) if isinstance(a, cupy.ndarray) and not p.raw]
    if all(a.flags.c_contiguous for a in arrays):  # CuPy then loops over one axis, and so does its source
        shape = (int(np.prod(shape)),)
        looped = [a.reshape(shape) if any(a is b for b in arrays) else a for a in looped]
    array_kind, indexer_kind, scalar_kind = 1, 2, 3
    infos, packed = [], []
    for operand, dtype in zip(looped, types):
        if isinstance(operand, cupy.ndarray):
            layout = (operand.ndim, operand.flags.c_contiguous, operand._index_32_bits)
            infos.append(_kernel._ArgInfo(array_kind, cupy.ndarray, operand.dtype.type, *layout))
            fields = [operand.data.ptr, operand.size, *operand.shape, *operand.strides]
            packed.append(np.array(fields, np.int64).tobytes())
        else:
            infos.append(_kernel._ArgInfo(scalar_kind, _scalar.CScalar, dtype, 0, True, True))
            scalar = _scalar.CScalar(operand)
            scalar.apply_dtype(dtype)
            packed.append(_bytes(scalar))
    small = int(np.prod(shape)) < 2**31
    infos.append(_kernel._ArgInfo(indexer_kind, _carray.Indexer, None, len(shape), True, small))
    packed.append(np.array([np.prod(shape), *shape, *[0] * len(shape)], np.int64).tobytes())
    names = (kernel.params, kernel.operation, kernel.name, kernel.preamble)
    code = _kernel._get_elementwise_kernel_code(tuple(infos), type_map, *names, **kernel.kwargs)
    headers = "".join(f"#include <{header}>\n" for header in core._cupy_header_list)
    return headers + code, packed
