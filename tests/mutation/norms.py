"""Sums of squares and clip factors."""

from typing import Any

import numpy as np

from gpurms.kernels import numpy as reference
from gpurms.kernels.rule import FLOAT32, FLOAT64, Flags, compute_dtype
from tests.cuda_support import assert_bits, rule
from tests.device import ptx
from tests.device.ptx.memory import zeroed
from tests.device_support import cupy
from tests.mutation.machine import device

from gpurms.kernels import cuda_norm  # isort: skip - it imports CuPy


def norms(sizes: list[int], clipvalue: float | None, over_all: bool, dtype: Any = FLOAT32) -> None:
    """Factors of gradients; some have a norm below the limit, one of NaN."""
    grads = [np.random.default_rng(n).standard_normal(n).astype(dtype) for n in sizes]
    grads[-1][:] = np.nan if not over_all else 1
    compute = compute_dtype(np.dtype(dtype))
    limit = 1.3
    with device():
        found = cuda_norm.square_sums([cupy.array(g) for g in grads], [compute] * len(grads), clipvalue)
        factors, double_factors, _ = cuda_norm.clip_factors(found, limit, over_all)[0]
        sums = found[0].array.get()
        the_rule = rule(Flags(clip_value=clipvalue is not None), compute)
        the_rule.scalars[-1] = clipvalue or 0
        want = []
        for g in grads:
            loaded = reference.load(g, the_rule, None)
            parts = [reference.square_sum(loaded[i : i + cuda_norm.CHUNK]) for i in range(0, max(g.size, 1), 1 << 16)]
            want.append(parts[0] if len(parts) == 1 else reference.fold(np.array(parts)))
        assert_bits(sums, np.array(want))
        total = np.float64(0)
        for each in want:
            total = total + each
        norm = np.sqrt(np.full(len(want), total) if over_all else np.array(want))
        expected = np.where(norm <= limit, 1.0, limit / np.where(norm > 0, norm, np.where(norm != norm, norm, 1)))
        assert_bits(double_factors.get(), expected)
        assert_bits(factors.get(), expected.astype(np.float32))


def norms_of_many() -> None:
    norms([5, 1, 0, 1023, 1025, 2, 1] + [3] * 600, None, True)


def norms_of_each() -> None:
    norms([70_000, 1, 0, 1030, 65_536, 2, 1] + [2] * 300 + [4], 0.8, False)


def norms_of_float64() -> None:
    norms([1500, 3], None, False, FLOAT64)


def norm_of_one_chunk() -> None:
    norms([cuda_norm.CHUNK, 3], None, True)


def norm_of_many_chunks() -> None:
    """Thousands of chunks, of which only the sums are added; a gradient of one chunk stands between."""
    sizes = [2500 * cuda_norm.CHUNK + 1, 3, 1030 * cuda_norm.CHUNK]
    rng = np.random.default_rng(8)
    rooms = [zeroed(4 * n).view(np.float32) for n in sizes]
    rooms[1][:] = 2
    chunks = [rng.random(-(-n // cuda_norm.CHUNK)) for n in sizes]
    with device() as machine:
        arrays = []
        for room in rooms:
            machine.heap.kernel_memory[0].add(room.ctypes.data, room.nbytes, "gradient")
            memory = cupy.cuda.UnownedMemory(room.ctypes.data, room.nbytes, room, 0)
            arrays.append(cupy.ndarray(room.shape, room.dtype, cupy.cuda.MemoryPointer(memory, 0)))
        run = machine.execute

        def execute(kernel: ptx.Kernel, grid: Any, block: Any, arguments: Any, memory: Any, **options: Any) -> None:
            if kernel.name == "square_sums":
                place = int(np.frombuffer(arguments[2], np.uint64)[0])
                machine.heap.block_at(place).contents.view(np.float64)[:] = np.concatenate(chunks)
                options["blocks"] = [len(chunks[0])]
            run(kernel, grid, block, arguments, memory, **options)

        machine.execute = execute
        (sums,) = cuda_norm.square_sums(arrays, [FLOAT32] * 3, None)
        assert_bits(sums.array.get(), np.array([reference.fold(chunks[0]), 12.0, reference.fold(chunks[2])]))
