"""Launches past 2**31 elements: a few blocks of them run, on address space of which only touched pages are memory."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpurms.kernels import numpy as reference
from gpurms.kernels.rule import FLOAT32, Flags, Update
from tests.cuda_support import assert_bits, rule, update_on_cpu, update_on_gpu
from tests.device import ptx
from tests.device.machine import Machine
from tests.device.ptx.memory import zeroed
from tests.device_support import cupy

from gpurms.kernels import cuda, cuda_norm, cuda_rows  # isort: skip - they import CuPy

HUGE = 2**31 + 9000
FLAGS = Flags(has_momentum=True)
TALL = 2**31 // 64 + 10
TALL_IDS = [TALL - 1, 5, 2**31 // 64, 2**31 // 64 - 1, 5, TALL - 1, TALL, -1, 2**40]


class Space:
    """Zeros on the device, and the same memory as a NumPy array."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], dtype: Any, past: int = 0) -> None:
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        room = zeroed(nbytes + 16)[past * dtype.itemsize :][:nbytes]
        address = room.ctypes.data
        machine.heap.kernel_memory[0].add(address, nbytes, f"{dtype} array of shape {shape}")
        pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, nbytes, room, 0), 0)
        self.array = cupy.ndarray(shape, dtype, pointer)
        self.host = room.view(dtype).reshape(shape)


def run_blocks(machine: Machine, chosen: dict[str, Callable[[int], Sequence[int]]]) -> None:
    """Of some kernels, run only the blocks chosen when the length of the grid is known."""

    run = machine.execute

    def execute(kernel: ptx.Kernel, grid: Any, *launch: Any, **options: Any) -> None:
        blocks = chosen[kernel.name](grid[0]) if kernel.name in chosen else None
        run(kernel, grid, *launch, blocks=blocks, **options)

    machine.execute = execute


def dense(machine: Machine, dtype: Any, past: int) -> None:
    """A small variable and a huge one in one launch; of that the tiles around 2**31 elements and at its ends run."""
    dtype = np.dtype(dtype)
    vector = 16 // dtype.itemsize
    tile = cuda.THREADS * vector
    last = -(-HUGE // tile) - 1
    tiles = sorted({0, 2**31 // tile - 1, 2**31 // tile, last - 1, last})
    spaces = {
        "var": Space(machine, (HUGE,), dtype, past),
        "grad": Space(machine, (HUGE,), dtype, past),
        "rms": Space(machine, (HUGE,), FLOAT32, past),
        "mom": Space(machine, (HUGE,), FLOAT32, past),
    }
    rng = np.random.default_rng(past)
    parts = []
    for number in tiles:
        at = slice(number * tile, min((number + 1) * tile, HUGE))
        for name, space in spaces.items():
            values = rng.standard_normal(at.stop - at.start)
            space.host[at] = abs(values) if name == "rms" else values
        parts.append((at, {name: space.host[at].copy() for name, space in spaces.items()}))
    small = {name: cupy.zeros(3 * tile, space.array.dtype) for name, space in spaces.items()}
    huge = {name: space.array for name, space in spaces.items()}
    the_rule = rule(FLAGS, np.float32)
    run_blocks(machine, {"multi": lambda n_blocks: [3 + number for number in tiles]})
    update_on_gpu([Update(**arrays, mg=None, rule=the_rule) for arrays in (small, huge)])
    for at, arrays in parts:
        update_on_cpu([Update(**arrays, mg=None, rule=the_rule)])
        for name in ("var", "rms", "mom"):
            assert_bits(spaces[name].host[at], arrays[name])


def sparse(machine: Machine, shape: tuple[int, ...], ids: list[int], dtype: Any = np.float32, **options: Any) -> None:
    """A step on a huge table against the same on the rows that the ids name; out of range, an id names none."""
    indices = np.array(ids, np.int64)
    rng = np.random.default_rng(0)
    var, rms = (Space(machine, shape, dtype, options.get("past", 0)) for _ in range(2))
    values = rng.standard_normal((len(ids), *shape[1:])).astype(dtype)
    inside = (indices >= 0) & (indices < shape[0])
    rows, places = np.unique(indices[inside], return_inverse=True)
    columns = options.get("columns", slice(None))
    views = [space.array[:, columns] if len(shape) > 1 else space.array for space in (var, rms)]
    hosts = [space.host[:, columns] if len(shape) > 1 else space.host for space in (var, rms)]
    values = np.ascontiguousarray(values[:, columns]) if len(shape) > 1 else values
    hosts[0][rows] = rng.standard_normal(hosts[0][rows].shape)
    hosts[1][rows] = abs(rng.standard_normal(hosts[1][rows].shape))
    want = [host[rows].copy() for host in hosts]
    the_rule = rule(Flags(), np.float32)
    update_on_gpu([Update(*views, None, None, the_rule, cupy.array(values), cupy.array(indices))])
    update_on_cpu([Update(*want, None, None, the_rule, values[inside], places.astype(np.int64))])
    for host, expected in zip(hosts, want):
        assert_bits(host[rows].ravel(), expected.ravel())


def _ends(n: int, n_columns: int) -> list[int]:
    """The blocks for the first 512 and the last 64 columns of all places, which warps take 32 at a time."""
    parts, n_slabs = -(-n // 32), -(-n_columns // (32 * 4))
    units = {part * n_slabs + at for part in range(parts) for at in (0, 1, 2, 3, n_slabs - 2, n_slabs - 1)}
    return sorted({unit // cuda_rows.WARPS for unit in units})


def long_rows(machine: Machine, n: int = 32, n_columns: int = 2**26 + 64, step: int = 1) -> None:
    """More than 2**31 values of n long rows, of which the first and the last columns are summed."""
    var, values = Space(machine, (2, step * n_columns), np.float32), Space(machine, (n, n_columns), np.float32)
    rms = Space(machine, (2, step * n_columns), np.float32)
    hosts, views = ([space.host[:, ::step] for space in (var, rms)], [space.array[:, ::step] for space in (var, rms)])
    indices = np.arange(n) % 2
    places = (slice(0, 512), slice(n_columns - 64, n_columns))
    for at in places:
        values.host[:, at] = np.random.default_rng(0).standard_normal((n, at.stop - at.start))
    wanted = [(at, [host[:, at].copy() for host in hosts]) for at in places]
    the_rule = rule(Flags(), np.float32)
    run_blocks(machine, dict.fromkeys(("update_rows", "combine_sums"), lambda n_blocks: _ends(n, n_columns)))
    update_on_gpu([Update(*views, None, None, the_rule, values.array, cupy.array(indices))])
    for at, want in wanted:
        update_on_cpu([Update(*want, None, None, the_rule, values.host[:, at].copy(), indices)])
        for host, expected in zip(hosts, want):
            assert_bits(host[:, at].ravel(), expected.ravel())


def check_of_ids(machine: Machine, dtype: Any, n: int = HUGE) -> None:
    """Of many ids, one near the end is out of range."""
    ids = Space(machine, (n,), dtype)
    ids.host[-20:] = [3] * 15 + [-1] + [3] * 4
    run_blocks(machine, {"find_outside": lambda n_blocks: [0, (n - 1) // cuda_rows.THREADS % n_blocks]})
    assert cuda_rows.find_outside([(ids.array, 4)]) == [n - 5]


class Reserved:
    """The workspace of a sparse step as address space."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def parts(self, sizes: Sequence[int]) -> tuple[Any, list[int]]:
        self.spaces = [Space(self.machine, (size,), np.uint8) for size in sizes]
        return self.spaces, [space.array.data.ptr for space in self.spaces]


def many_ids(machine: Machine, n: int) -> None:
    """The last blocks of a step with n ids, of which the last 100 name row 1 once and row 2 often."""
    var, rms = Space(machine, (5, 1), np.float32), Space(machine, (5, 1), np.float32)
    indices, values = Space(machine, (n,), np.int32), Space(machine, (n, 1), np.float32)
    values.host[-100:] = np.random.default_rng(0).standard_normal((100, 1))
    workspace = Reserved(machine)
    the_rule = rule(Flags(), np.float32)
    update = Update(var.array, rms.array, None, None, the_rule, values.array, indices.array)
    planned = cuda_rows.plan(update, cuda_rows.Tables(update), None, None, workspace)
    keys = workspace.spaces[0].host.view(np.uint32)
    order = workspace.spaces[1].host.view(np.int32)
    keys[-100:], order[-100:] = [1] + [2] * 9 + [3] * 90, np.arange(n - 100, n)

    run = machine.execute

    def execute(kernel: ptx.Kernel, grid: Any, *launch: Any, **options: Any) -> None:
        if kernel.name in ("update_rows", "combine_sums"):
            run(kernel, grid, *launch, blocks=[grid[0] - 2, grid[0] - 1], races=False, **options)

    machine.execute = execute
    planned()
    want = [np.zeros((5, 1), np.float32) for _ in range(2)]
    update_on_cpu([Update(*want, None, None, the_rule, values.host[-100:].copy(), keys[-100:].astype(np.int64))])
    assert_bits(var.host[1:].ravel(), want[0][1:].ravel())


def norm(machine: Machine, dtype: Any) -> None:
    """The chunks around 2**31 elements and at the ends are summed; all others are zeros."""
    grad = Space(machine, (HUGE,), dtype)
    chunk = cuda_norm.CHUNK
    n_chunks = -(-HUGE // chunk)
    chosen = [0, 2**31 // chunk - 1, n_chunks - 1]
    rng = np.random.default_rng(0)
    want = np.zeros(n_chunks)
    for number in chosen:
        part = grad.host[number * chunk : (number + 1) * chunk]
        part[...] = rng.standard_normal(part.size)
        want[number] = reference.square_sum(part.astype(np.float32))

    run = machine.execute

    def execute(kernel: ptx.Kernel, grid: Any, block: Any, arguments: Any, *rest: Any, **options: Any) -> None:
        blocks = None
        if kernel.name == "square_sums":
            assert grid[0] == n_chunks
            sums = int(np.frombuffer(arguments[2], np.uint64)[0])
            machine.heap.block_at(sums).contents[...] = 0
            blocks = chosen
        run(kernel, grid, block, arguments, *rest, blocks=blocks, **options)

    machine.execute = execute
    (sums,) = cuda_norm.square_sums([grad.array], [FLOAT32], None)
    assert_bits(sums.array.get(), reference.fold(want).reshape(1))
