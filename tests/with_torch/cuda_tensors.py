"""The GPU of the tests of `gpurms.torch`: a real one, or torch and CuPy on the emulated device.

Either way a test writes `torch.zeros(3, device="cuda:0")`, `torch.cuda.Stream()` and `torch.cuda.graph(...)`. On the
emulated device tensors are plain tensors of torch on `cuda:0` with an address in its memory; torch's operations are
those of its CPU build, in the order of torch's streams. Autograd's engine is not emulated: tests set gradients.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpurms.torch import RMSprop
from tests import engines

GPUS = ("cuda-on-cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True, "alpha": 0.9},
    "l2": {"weight_decay": 0.1, "maximize": True},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.5},
    "tensorflow": {"momentum": 0.9, "eps_in_sqrt": True, "lr_in_momentum": True, "eps": 1e-3},
    "everything": {"momentum": 0.7, "centered": True, "nesterov": True, "weight_decay": 0.05, "maximize": True},
}


class Gpu:
    """Where the CUDA tensors of a test live; an emulated one has a record of all that was asked of it."""

    def __init__(self, machine: Any = None) -> None:
        self.machine = machine

    @contextmanager
    def nothing_waited_for(self) -> Iterator[None]:
        """Within the block, a host that waits for the device is an error."""
        waited = [] if self.machine is None else list(self.machine.synchronisations)
        with warnings.catch_warnings(action="ignore"):  # of a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert self.machine is None or self.machine.synchronisations == waited

    @contextmanager
    def no_memory_from_cupy(self) -> Iterator[None]:
        """Within the block, CuPy allocates nothing."""
        cupy, asked = sys.modules["cupy"], []
        allocate = cupy.cuda.get_allocator()
        with cupy.cuda.using_allocator(lambda n_bytes: asked.append(n_bytes) or allocate(n_bytes)):
            yield
        assert asked == []


@contextmanager
def emulated(n_devices: int = 1, **options: Any) -> Iterator[Gpu]:
    """torch and CuPy on the same emulated devices; for the options see `cupy_on_cpu`."""
    if torch.version.cuda is not None:
        pytest.skip("this build of torch has CUDA kernels of its own; the emulation takes a build without")
    with engines.emulated(n_devices, **options) as machine:
        from tests.with_torch.cuda_operations import register
        from tests.with_torch.cuda_runtime import torch_cuda_on

        library = register()
        try:
            with torch_cuda_on(machine), torch.no_grad():  # autograd asks for a device when it records
                yield Gpu(machine)
        finally:
            library._destroy()


@contextmanager
def running(name: str) -> Iterator[Gpu]:
    """The real device or the emulated one; skips the test where it cannot be had."""
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        with engines.running("cupy"):
            yield Gpu()
    elif torch.cuda.is_available():
        pytest.skip("the tests run on the real device")
    else:
        with emulated() as gpu:
            yield gpu


def on_gpu(tensor: Tensor, device: int = 0) -> Tensor:
    """A copy on a device, in the same layout, gaps included."""
    if tensor.layout is torch.sparse_coo:
        return coo(on_gpu(tensor._indices(), device), on_gpu(tensor._values(), device), tensor.shape)
    tensor = tensor.detach()
    n = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((n,), (1,), 0).to(f"cuda:{device}")
    return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def coo(indices: Tensor, values: Tensor, shape: Any) -> Tensor:
    """A sparse gradient as it is given, in any order and with repetitions."""
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)


class Twins:
    """The same optimizer on a device and on the CPU, which is the reference."""

    def __init__(self, tensors: Iterable[Tensor], device: int = 0, **options: Any) -> None:
        tensors = list(tensors)
        self.mine = [on_gpu(tensor, device).requires_grad_() for tensor in tensors]
        self.others = [on_cpu(tensor).requires_grad_() for tensor in tensors]
        self.opt = RMSprop(self.mine, **options)
        self.reference = RMSprop(self.others, **{**options, "lr": float(options.get("lr", 0.01))})

    def set_grads(self, grads: Iterable[Tensor]) -> None:
        """On both sides, in the layout given."""
        for mine, other, grad in zip(self.mine, self.others, grads, strict=True):
            mine.grad, other.grad = on_gpu(grad, mine.device.index), grad

    def step(self, grads: Iterable[Tensor]) -> None:
        """On both sides."""
        self.set_grads(grads)
        self.opt.step()
        self.reference.step()

    def check(self) -> None:
        """The same bits."""
        assert_same(self.opt, self.reference)


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in the same layout, gaps included."""
    tensor = tensor.detach()
    n = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((n,), (1,), 0).clone()
    return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def bits(tensor: Tensor) -> bytes:
    """Of every element, from the device."""
    raw = tensor.detach().cpu().contiguous()
    return raw.view(getattr(torch, f"int{8 * raw.element_size()}")).numpy().tobytes()


def assert_same(got: Any, want: Any) -> None:
    """Parameters and all state of two optimizers, to the bit."""
    pairs = list(zip(parameters(got), parameters(want), strict=True))
    for i, (mine, others) in enumerate(pairs):
        assert bits(mine) == bits(others), f"parameter {i}: {mine.detach().cpu()} and {others.detach().cpu()}"
        states = got.state[mine], want.state[others]
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            assert bits(states[0][name]) == bits(states[1][name]), f"parameter {i}: {name}"


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a step can change."""
    every = parameters(optimizer)
    return [(bits(each), {name: bits(slot) for name, slot in optimizer.state.get(each, {}).items()}) for each in every]


def random(shape: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed numbers."""
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).standard_normal(shape))).to(dtype)


def like(tensors: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Random numbers of the same shapes and types."""
    return [random(tensor.shape, tensor.dtype, seed + 100 * i) for i, tensor in enumerate(tensors)]


def gaps(x: Tensor) -> Tensor:
    """Every second column of a wider tensor."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]
