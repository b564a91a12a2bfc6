"""CuPy's own kernels, computed by NumPy on the same memory, and submitted to the streams like kernels.

CuPy asks `__cupy_override_elementwise_kernel__` of its arguments before it turns to the device: ufuncs, casts and
copies are CuPy's own code up to that point. Reductions and a list of functions reach the driver another way; those
are replaced by NumPy's of the same name.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from tests.device.launch import check_device, elementwise
from tests.device.machine import active
from tests.device.operations import Launch, Operation
from tests.device.ptx import Fault

_ndarray = cupy.ndarray


class Operand:
    """An array as queued work sees it: a place in memory that may have been freed by the time it is used."""

    def __init__(self, array: cupy.ndarray) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._block = None
        if array.size == 0:
            self._view = np.empty(array.shape, array.dtype)
            return
        block = getattr(array.data.mem, "block", None) or active().heap.block_at(array.data.ptr)
        if block is None or not block.live:
            raise Fault(f"an array at {array.data.ptr:#x}, which is no live device memory")
        self._block = block
        self._view = block.view(array.shape, array.dtype, array.data.ptr, array.strides)

    def host(self) -> np.ndarray:
        """The memory as a NumPy array, when the work runs."""
        if self._block is not None:
            self._block.check()
        return self._view

    def like(self) -> np.ndarray:
        """Zeros of the same shape and type, to learn what a function returns."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)


def bind(value: Any) -> Any:
    """Replace arrays by operands, in lists and tuples too.

    Raises:
        TypeError: a NumPy array, which CuPy does not move to the device by itself.
        ValueError: an array of another device.
    """
    if isinstance(value, _ndarray):
        check_device(value)
        return Operand(value)
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return _map(bind, value)


def host(value: Any) -> Any:
    """Replace operands by their NumPy arrays, when the work runs."""
    return value.host() if isinstance(value, Operand) else _map(host, value)


def _like(value: Any) -> Any:
    return value.like() if isinstance(value, Operand) else _map(_like, value)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(function(item) for item in value)
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    return value


def submit(name: str, work: Callable[[], None]) -> None:
    """Submit one of CuPy's kernels to the current stream."""

    def quietly() -> None:
        with np.errstate(all="ignore"):  # a GPU raises no floating-point warnings
            work()

    machine = active()
    machine.submit(machine.queue(), Operation(name, quietly, launch=Launch(name, device=machine.thread.device)))


def store(result: Any, target: Operand) -> None:
    np.copyto(target.host(), result, casting="unsafe")


def compute(name: str, function: Callable[..., Any], args: Any, kwargs: Any, out: Any = None) -> Any:
    """Submit a NumPy function of device arrays as one kernel, and return its device arrays at once."""
    args, kwargs = bind(tuple(args)), bind(kwargs)
    with np.errstate(all="ignore"):
        sample = function(*_like(args), **_like(kwargs))
    several = isinstance(sample, (list, tuple))
    samples = [np.asarray(one) for one in (sample if several else [sample])]
    outputs = list(out) if isinstance(out, tuple) else [out] * len(samples)
    for i, one in enumerate(samples):
        if outputs[i] is None:
            outputs[i] = cupy.empty(one.shape, one.dtype)
        else:
            _check_output(name, one, outputs[i])
    targets = bind(outputs)

    def work() -> None:
        results = function(*host(args), **host(kwargs))
        for result, target in zip(results if several else [results], targets, strict=True):
            store(result, target)

    submit(name, work)
    return tuple(outputs) if several else outputs[0]


def _check_shape(source: Any, output: cupy.ndarray) -> None:
    shapes = getattr(source, "shape", ()), output.shape
    try:
        fits = np.broadcast_shapes(*shapes) == output.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("operands could not be broadcast together with shapes {} {}".format(*shapes))


def _check_output(name: str, sample: np.ndarray, output: Any) -> None:
    if not isinstance(output, _ndarray):
        raise TypeError(f"Unsupported type {type(output)}")
    _check_shape(sample, output)
    if not np.can_cast(sample.dtype, output.dtype, "same_kind"):
        raise TypeError(
            f"Cannot cast {name} output from {sample.dtype!r} to {output.dtype!r} with casting rule 'same_kind'"
        )


def _arange(start: Any, step: Any, out: np.ndarray) -> np.ndarray:
    return start + np.arange(out.size) * step


INTO_OUTPUT = {"cupy_copy": lambda source, out: source, "cupy_arange": _arange}
NOT_UFUNCS = {"cupy_clip": np.clip, "cupy_fix": np.fix, "cupy_where": np.where}


def override_elementwise(self: cupy.ndarray, kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """CuPy's hook: run one of its ufuncs, or an ElementwiseKernel object of any origin.

    Raises:
        NotImplementedError: NumPy has no ufunc of that name.
    """
    if not isinstance(kernel, cupy.ufunc):
        return elementwise(kernel, args, **kwargs)
    inputs = args[: kernel.nin]
    outputs = kwargs.pop("out", ()) if len(args) == kernel.nin else args[kernel.nin :]
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    if kernel.name in INTO_OUTPUT:
        (output,) = outputs
        _check_shape(inputs[0], output)
        operands, target, function = bind(inputs), bind(output), INTO_OUTPUT[kernel.name]
        submit(kernel.name, lambda: store(function(*host(operands), target.host()), target))
        return output
    function = NOT_UFUNCS.get(kernel.name) or getattr(np, kernel.name.removeprefix("cupy_"), None)
    if kernel.name not in NOT_UFUNCS and not isinstance(function, np.ufunc):
        raise NotImplementedError(f"NumPy has no ufunc for CuPy's {kernel.name}")
    return compute(kernel.name, function, inputs, kwargs, outputs or None)


def method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of cupy.ndarray, computed by NumPy's function."""
    signature = inspect.signature(function)

    @functools.wraps(getattr(_ndarray, name))
    def call(self: cupy.ndarray, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dtype", ...) is None:  # not all of NumPy's functions have it
            del kwargs["dtype"]
        return _compute_bound(name, function, signature.bind(self, *args, **kwargs))

    return call


def device_function(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the `cupy` module, with CuPy's parameters, computed by NumPy."""
    signature = inspect.signature(getattr(cupy, name))

    @functools.wraps(getattr(cupy, name))
    def call(*args: Any, **kwargs: Any) -> Any:
        return _compute_bound(name, function, signature.bind(*args, **kwargs))

    return call


def _compute_bound(name: str, function: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    def call(arguments: dict[str, Any]) -> Any:
        values = inspect.BoundArguments(bound.signature, arguments)
        return function(*values.args, **values.kwargs)

    out = bound.arguments.pop("out", None)
    return compute(f"cupy_{name}", call, (bound.arguments,), {}, out)


def synchronising(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose result has a shape that depends on the data: CuPy waits for it, and so does this."""

    def call(*args: Any, **kwargs: Any) -> Any:
        machine = active()
        operands = bind(args)
        machine.synchronise(name, [machine.queue()])
        result = function(*host(operands), **kwargs)
        return tuple(cupy.array(one) for one in result) if isinstance(result, tuple) else cupy.array(result)

    return functools.wraps(getattr(cupy, name))(call)
