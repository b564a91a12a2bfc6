"""The GPU that the tests of CUDA tensors use: where it is emulated, it does as a real one does."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpurms.torch import tensors
from tests.device.ptx import Fault
from tests.with_torch.cuda_tensors import DTYPES, Gpu, bits, coo, emulated, gaps, on_gpu, random

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: x.add_(x).mul_(0.5),
    "new": lambda x: x + x * 2.0 - 1,
    "of another type": lambda x: x.to(torch.float64),
    "comparison": lambda x: x > 0,
    "reduction": lambda x: x.sum(0),
    "several results": lambda x: torch.stack(x.unbind(0)),
    "resized output": lambda x: torch.isfinite(x),
    "view": lambda x: x.t()[1:, ::2].contiguous(),
    "written view": lambda x: (x[1].fill_(7), x)[1],
    "neither": lambda x: torch.empty_like(x).copy_(x.t().contiguous().t()),
    "list": lambda x: (torch._foreach_add_([x, x], torch.ones((), device=x.device), alpha=2.0), x)[1],
    "empty": lambda x: torch.zeros_like(x[:0]) + 1,
    "sparse": lambda x: coo(torch.zeros(1, 2, dtype=torch.int64, device=x.device), x[:2], x.shape).to_dense(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation: str, dtype: torch.dtype, gpu: Gpu):
    x = random((4, 6)).mul(4).round().to(dtype)  # exact, in any order of sums
    found = OPERATIONS[operation](on_gpu(x))
    wanted = OPERATIONS[operation](x)
    assert found.is_cuda
    assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert bits(found) == bits(wanted)


def test_layout_and_address(gpu: Gpu):
    x = gaps(random((3, 4)))
    found = on_gpu(x)
    assert (found.device, found.stride(), found.storage_offset()) == (torch.device("cuda:0"), x.stride(), 0)
    assert found[1].data_ptr() == found.data_ptr() + 4 * x.stride(0)
    assert bits(found) == bits(x)


def test_devices_do_not_mix():
    with emulated(2):
        x, y = on_gpu(torch.ones(3)), on_gpu(torch.ones(3), 1)
        for other in (y, torch.ones(3)):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                x + other
        assert (x + torch.ones(())).tolist() == [2, 2, 2]
        assert y.to("cuda:0").add_(x).tolist() == [2, 2, 2]


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x[0]),
    "to the host": Tensor.cpu,
    "to the device": lambda x: x.copy_(torch.zeros(x.shape)),
    "shape": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("what", WAITING)
def test_waiting_is_an_error_when_it_is_asked_for(what: str, gpu: Gpu):
    x = on_gpu(torch.ones(3))
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"), gpu.nothing_waited_for():
        WAITING[what](x)
    WAITING[what](x)


def test_waiting_of_cupy_is_seen_too():
    with emulated() as gpu:
        cupy = pytest.importorskip("cupy")
        with pytest.raises(AssertionError), gpu.nothing_waited_for():
            cupy.zeros(3).get()


def test_memory_of_cupy_is_seen(gpu: Gpu):
    cupy = pytest.importorskip("cupy")
    with gpu.no_memory_from_cupy():
        torch.zeros(3, device="cuda:0")
    with pytest.raises(AssertionError), gpu.no_memory_from_cupy():
        cupy.zeros(3)


# ------------------------------------------------------------------------------------------------------------ streams


def outcomes(action: Callable[[], float]) -> set[float]:
    """Under many orders of the same work."""
    found = set()
    for seed in range(12):
        with emulated(2, deferred=True, seed=seed):
            found.add(action())
    return found


def on_two_streams(wait: bool) -> float:
    x, side = torch.zeros(3, device="cuda:0"), torch.cuda.Stream()
    torch.cuda.synchronize()
    x.add_(1)
    if wait:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.mul_(10)
    torch.cuda.synchronize()
    return x[0].item()


def test_streams_are_ordered_by_events():
    assert outcomes(lambda: on_two_streams(True)) == {10}
    assert outcomes(lambda: on_two_streams(False)) == {1, 10}


def test_a_copy_between_devices_is_ordered_with_both():
    def action() -> float:
        x, y = torch.zeros(3, device="cuda:0"), torch.zeros(3, device="cuda:1")
        x.add_(1)
        y.add_(5)
        y.copy_(x)
        y.mul_(10)
        x.fill_(7)
        return y[0].item()

    assert outcomes(action) == {10}


def test_memory_is_freed_in_the_order_of_its_stream():
    """Another stream that reads it must be waited for; torch has `record_stream` for that."""

    def is_fault(seed: int) -> bool:
        try:
            with emulated(deferred=True, seed=seed):
                x, y = torch.ones(3, device="cuda:0"), torch.zeros(3, device="cuda:0")
                torch.cuda.synchronize()
                with torch.cuda.stream(torch.cuda.Stream()):
                    y.add_(x)
                del x
        except Fault:
            return True
        return False

    assert {is_fault(seed) for seed in range(12)} == {False, True}


# ------------------------------------------------------------------------------------------------------------- graphs


def test_a_graph_has_its_own_memory(gpu: Gpu):
    x = torch.ones(3, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2.0
        x.copy_(y + 1)
        del y
    assert x.tolist() == [1, 1, 1]
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [15, 15, 15]


def test_the_memory_of_a_graph_ends_with_it():
    with emulated() as gpu:
        x, graph = torch.ones(3, device="cuda:0"), torch.cuda.CUDAGraph()
        used = gpu.machine.heap.used[0]
        with torch.cuda.graph(graph):
            x.add_(x.mul(2))
        assert gpu.machine.heap.used[0] > used
        graph.reset()
        del graph
        gc.collect()
        assert gpu.machine.heap.used[0] == used


def test_a_graph_may_not_outlive_what_it_reads():
    with emulated():
        x, y, graph = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:0"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.add_(x)
        del x
        with pytest.raises(Fault, match="was freed before the work that uses it ran"):
            graph.replay()


@pytest.mark.parametrize("forbidden", ["item", "to the host", "to the device", "cupy"])
def test_what_may_not_be_captured(forbidden: str):
    """CuPy may have to ask the driver for memory."""
    with emulated():
        x, cupy = torch.ones(3, device="cuda:0"), pytest.importorskip("cupy")
        what = WAITING.get(forbidden, lambda _: cupy.empty(3))
        with torch.cuda.graph(torch.cuda.CUDAGraph()), tensors.streams([x]):
            x.add_(1)
            assert torch.cuda.is_current_stream_capturing()
            with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported"):
                what(x)
        assert not torch.cuda.is_current_stream_capturing()
