"""torch's operations on tensors of the emulated device: its CPU kernels on the same memory, in the order of streams.

An operation is registered for CUDA under its own name where torch has one for the CPU. Each is submitted to torch's
current stream of the device like a kernel; what needs a result on the host waits for the stream, which can be
forbidden. Memory comes in the order of the stream, too, and a captured graph keeps what was allocated for it.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from cupy.cuda.runtime import CUDARuntimeError
from torch import Tensor

from tests.device.operations import CAPTURE_UNSUPPORTED, Launch, Operation
from tests.with_torch import cuda_runtime
from tests.with_torch.cuda_memory import Place, allocate

aten = torch.ops.aten
CPU, SPARSE_CPU = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in ("CPU", "SparseCPU"))
SET = ("set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor")
VIEWS = ("_reshape_alias", "as_strided", "is_set_to", "view", *SET)
"""These look at no element, and their CPU kernels take tensors of any device."""
NEW_SPARSE = ("_sparse_coo_tensor_with_dims", "_sparse_coo_tensor_with_dims_and_tensors")
OF_SPARSE = (
    "_coalesced_",
    "_indices",
    "_nnz",
    "_values",
    "dense_dim",
    "indices",
    "is_coalesced",
    "sparse_dim",
    "values",
)
WAITING = ("_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_dim", "_unique", "_unique2")


def register() -> torch.library.Library:
    """Registered until the library that is returned is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    special: dict[str, Callable[..., Any]] = {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        **{name: partial(redispatch, name, CPU) for name in VIEWS},
        **{name: partial(wait_for, name) for name in WAITING},
    }
    with_kernels = torch._C._dispatch_get_registrations_for_dispatch_key
    foreach = {name for name in with_kernels("CompositeExplicitAutograd") if name.startswith("aten::_foreach_")}
    for qualified in sorted(foreach.union(with_kernels("CPU"))):
        namespace, name = qualified.split("::")
        if namespace == "aten" and not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
            library.impl(name, special.get(name) or partial(run, name), "CUDA")
    library.impl("copy_", copy_, "CUDA")
    for name in NEW_SPARSE:
        library.impl(name, partial(new_sparse, name), "SparseCUDA")
    for name in OF_SPARSE:
        library.impl(name, partial(redispatch, name, SPARSE_CPU), "SparseCUDA")
    library.impl("_to_dense", sparse_to_dense, "SparseCUDA")
    library.impl("clone", sparse_clone, "SparseCUDA")
    return library


@cache
def operator(name: str) -> Any:
    """By its name in the dispatcher: ``add.Tensor``."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def redispatch(name: str, keys: Any, *args: Any, **kwargs: Any) -> Any:
    return operator(name).redispatch(keys, *args, **kwargs)


# ------------------------------------------------------------------------------------------------------- allocation


def empty(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    like = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format)
    return new_like(like, cuda_runtime.index(device))


def empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Tensor:
    return new_like(torch.empty_strided(size, stride, dtype=dtype, device="meta"), cuda_runtime.index(device))


def new_like(sample: Tensor, device: int) -> Tensor:
    """On the device, for its current stream."""
    with cuda_runtime.on(device) as (machine, queue):
        tensor, memory = allocate(machine, queue, sample.size(), sample.stride(), sample.dtype)
        if queue.capture is not None:
            cuda_runtime.keep(queue.capture, memory)
        return tensor


# ------------------------------------------------------------------------------------------------------- operations


def replace(kind: Any, function: Callable[[Any], Any], value: Any) -> Any:
    """With the things of a kind replaced, in lists, tuples and dicts too."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(replace(kind, function, item) for item in value)
    if isinstance(value, dict):
        return {key: replace(kind, function, item) for key, item in value.items()}
    return value


def on_device(name: str, value: Any) -> tuple[Any, int]:
    """The arguments with places for the tensors, and their device.

    Raises:
        RuntimeError: they are not all on one; of the host torch takes only numbers.
    """
    devices = set()

    def place(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            devices.add(tensor.device)
            return Place(tensor)
        if tensor.ndim:
            devices.add(tensor.device)
        return tensor

    placed = replace(Tensor, place, value)
    devices |= {device for device in (value[1].get("device"),) if device is not None}
    if len(devices) != 1:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {devices}")
    return placed, cuda_runtime.index(devices.pop())


def host(value: Any) -> Any:
    """The arguments on the CPU, when the work runs."""
    return replace(torch.device, lambda _: torch.device("cpu"), replace(Place, Place.host, value))


def _meta(value: Any) -> Any:
    def meta(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")

    return replace(torch.device, lambda _: torch.device("meta"), replace(Tensor, meta, value))


@torch.no_grad()
def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """Submit the CPU's kernel to the device's current stream, and return its results at once."""
    op = operator(name)
    (places, named), device = on_device(name, (args, kwargs))
    written = [
        argument.name for argument in op._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    if written:
        if op._schema.arguments[-1].is_out:
            _resize(op, args, kwargs)
            (places, named), device = on_device(name, (args, kwargs))
        submit(name, device, lambda: op(*host(places), **host(named)))
        given = dict(zip((argument.name for argument in op._schema.arguments), args)) | kwargs
        returned = [given[name] for name in written][: len(op._schema.returns)]
        return returned[0] if len(returned) == 1 else tuple(returned) or None
    samples = op(*_meta(args), **_meta(kwargs))
    results = replace(Tensor, partial(new_like, device=device), samples)
    targets = replace(Tensor, Place, results)

    def work() -> None:
        found = op(*host(places), **host(named))
        for target, result in zip(listed(host(targets)), listed(found), strict=True):
            target.copy_(result)

    submit(name, device, work)
    return results


def _resize(op: Any, args: Any, kwargs: Any) -> None:
    """Give outputs the shapes of the results, as operations with ``out`` do."""
    metas = _meta(kwargs)
    op(*_meta(args), **metas)
    for name, meta in metas.items():
        if isinstance(meta, Tensor) and meta.size() != kwargs[name].size():
            redispatch("set_.source_Tensor", CPU, kwargs[name], new_like(meta, kwargs[name].device.index))


def listed(result: Any) -> Sequence[Any]:
    """One result or several."""
    return result if isinstance(result, (list, tuple)) else [result]


def submit(name: str, device: int, work: Callable[[], Any]) -> None:
    """Submit it to the current stream of the device."""
    with cuda_runtime.on(device) as (machine, queue):
        machine.submit(queue, Operation(name, torch.no_grad()(work), launch=Launch(f"torch.{name}", device=device)))


@torch.no_grad()
def wait_for(name: str, *args: Any, **kwargs: Any) -> Any:
    """An operation whose result is needed on the host, or has a shape that depends on the values."""
    (places, named), device = on_device(name, (args, kwargs))
    wait(name, device)
    return replace(Tensor, lambda result: result.to(f"cuda:{device}"), operator(name)(*host(places), **host(named)))


def wait(name: str, device: int) -> None:
    with cuda_runtime.on(device) as (machine, queue):
        cuda_runtime.forbid_waiting(f"torch.{name}")
        machine.synchronise(f"torch.{name}", [queue])


def new_sparse(name: str, *args: Any, device: Any, **kwargs: Any) -> Tensor:
    """On the device that is current, which is torch's own way."""
    with cuda_runtime.on(cuda_runtime.index(device)):
        return redispatch(name, SPARSE_CPU, *args, device=device, **kwargs)


def sparse_clone(grad: Tensor, *, memory_format: Any = None) -> Tensor:
    """Of indices and values, as they are."""
    parts = grad._indices().clone(), grad._values().clone()
    return torch.sparse_coo_tensor(*parts, grad.size(), check_invariants=False)


def sparse_to_dense(grad: Tensor, dtype: torch.dtype | None = None, masked_grad: bool | None = None) -> Tensor:
    dense = torch.zeros(grad.size(), dtype=dtype or grad.dtype, device=grad.device)
    if grad.sparse_dim() == 0:
        return dense.add_(grad._values().sum(0))
    return dense.index_put_(tuple(grad._indices()), grad._values().to(dense.dtype), accumulate=True)


# ------------------------------------------------------------------------------------------------------------ copies


@torch.no_grad()
def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Within a device, between devices, and from and to the host, which waits unless asked not to."""
    source = source.expand(target.size())
    if target.is_cuda and source.is_cuda:
        _copy_on_devices(target, source)
    elif target.is_cuda:
        place, staged = Place(target), source.clone()
        _refuse_capture(target)
        submit_copy("host to device", target, lambda: place.host().copy_(staged))
        if not non_blocking:
            wait("copy_ to the device", target.device.index)
    else:
        place = Place(source)
        _refuse_capture(source)
        submit_copy("device to host", source, lambda: target.copy_(place.host()))
        wait("copy_ to the host", source.device.index)  # pageable memory: the driver waits in any case
    return target


def _copy_on_devices(target: Tensor, source: Tensor) -> None:
    """On the stream of the source, behind and before the work of the target's."""
    places = Place(target), Place(source)
    here, there = (torch.cuda.current_stream(tensor.device) for tensor in (source, target))
    if source.device != target.device:
        here.wait_stream(there)
    submit_copy("device to device", source, lambda: places[0].host().copy_(places[1].host()))
    if source.device != target.device:
        there.wait_stream(here)


def _refuse_capture(tensor: Tensor) -> None:
    with cuda_runtime.on(tensor.device.index) as (_, queue):
        if queue.capture is not None:
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED)


def submit_copy(name: str, tensor: Tensor, work: Callable[[], Any]) -> None:
    with cuda_runtime.on(tensor.device.index) as (machine, queue):
        machine.submit(queue, Operation(name, torch.no_grad()(work), copy=True))
