"""The PTX interpreter finds planted faults, and raises no false alarm."""

from typing import Any

import numpy as np
import pytest

from tests.device import ptx
from tests.ptx_support import INDEX, find_nvrtc, kernel, launch

# What is planted in the body of a kernel, and the message. The buffers are x of 100 and y of 128 floats.
FAULTS = {
    "load past the end": (
        INDEX + "y[i % 64] = x[i + 37];",
        r"thread \(63, 0, 0\) of block \(0, 0, 0\): 4-byte load out of bounds, 4 bytes past the end of buffer 'a0'",
    ),
    "store before the start": (INDEX + "y[i - 3] = 1.f;", r"thread \(0, 0, 0\) .*4-byte store out of bounds, .*'a1'"),
    "null pointer": ("((volatile float*)0)[threadIdx.x] = 1.f;", "4-byte store out of bounds"),
    "store to read-only": (
        "if (threadIdx.x < 9) x[threadIdx.x] = 1.f;",
        r"thread \(0, 0, 0\).*store to read-only buffer 'a0' at byte 0",
    ),
    "misaligned vector": (
        "if (threadIdx.x == 0) *(float4*)(y + 1) = make_float4(1, 2, 3, 4);",
        "misaligned 16-byte store, address 4 past a multiple of 16",
    ),
    "misaligned scalar": (
        "if (threadIdx.x == 0) y[0] = *(double*)((char*)x + 12);",
        "misaligned 8-byte load, address 4 past a multiple of 8",
    ),
    "two threads write one element": (
        "y[threadIdx.x / 2] = x[threadIdx.x];",
        r"thread \(0, 0, 0\) .*: race on buffer 'a1' at byte 0, which thread \(1, 0, 0\) of block .* has written",
    ),
    "two blocks write one element": (
        "if (threadIdx.x == 0) y[0] = x[0];",
        r"of block \(0, 0, 0\): race on buffer 'a1' at byte 0, which .*block \(1, 0, 0\) has written",
    ),
    "two blocks, a barrier does not help": (
        "if (blockIdx.x == 0) y[threadIdx.x] = 1; __syncthreads(); if (blockIdx.x == 1) y[64] = y[threadIdx.x];",
        r"of block \(1, 0, 0\): race on buffer 'a1'",
    ),
    "store after another thread's load": (
        INDEX + "float v = y[(i + 1) % 128]; y[i] = v;",
        r"race on buffer 'a1' at byte 0, which thread .* has read",
    ),
    "store to what another block has read": (
        "float v = y[0]; __syncthreads(); if (blockIdx.x == 1 && threadIdx.x == 0) y[0] = v + 1;",
        r"of block \(1, 0, 0\): race on buffer 'a1' at byte 0, which .* of block \(0, 0, 0\) has read",
    ),
    "shared memory without a barrier": (
        "__shared__ float s[64]; s[threadIdx.x] = 1; y[blockIdx.x * 64 + threadIdx.x] = s[63 - threadIdx.x];",
        r"race on shared variable .* at byte 252, which thread \(63, 0, 0\) of block \(0, 0, 0\) has written",
    ),
    "shared memory, a warp's barrier does not reach": (
        """__shared__ float s[64]; s[threadIdx.x] = 1; __syncwarp();
           y[blockIdx.x * 64 + threadIdx.x] = s[63 - threadIdx.x];""",
        "race on shared variable .* at byte 252",
    ),
    "shared memory, the warp's other half has not synchronised": (
        """__shared__ float s[64]; s[threadIdx.x] = 1; if (threadIdx.x % 32 < 16) return; __syncwarp(0xffff0000u);
           y[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x - 16];""",
        r"race on shared variable .* at byte 0, which thread \(0, 0, 0\) .* has written",
    ),
    "shared memory rewritten too early": (
        """__shared__ float s[64]; s[threadIdx.x] = 1; __syncthreads(); float v = s[63 - threadIdx.x];
           s[threadIdx.x] = v + 1; y[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];""",
        r"race on shared variable .* at byte .*has read",
    ),
    "atomic beside a plain store": (
        "atomicAdd((u32*)y, 1u); if (threadIdx.x == 5) y[0] = 1;",
        r"thread \(5, 0, 0\) of block \(0, 0, 0\): race on buffer 'a1' at byte 0, which .* has written",
    ),
    "read-only cache of what the launch writes": (
        INDEX + "y[i] = 1; __syncthreads(); y[i] = __ldg(y + i) + 1;",
        "race on buffer 'a1' at byte 0, which .* has written .ld.global.nc",
    ),
    "store to what the read-only cache holds": (
        INDEX + "float v = __ldg(y + i); y[i] = v + 1;",
        r"race on buffer 'a1' at byte 0, which thread \(0, 0, 0\) of block \(0, 0, 0\) has read",
    ),
    "store to what the read-only cache holds, and others have read since": (
        INDEX + "float v = __ldg(y + i); __syncthreads(); v += y[i ^ 1]; __syncthreads(); y[i] = v;",
        r"race on buffer 'a1' at byte 0, which .* has read",
    ),
    "shared memory misaligned": (
        "__shared__ float s[64]; if (threadIdx.x == 9) *(volatile double*)(s + 1) = 1; __syncthreads(); y[0] = s[0];",
        r"thread \(9, 0, 0\) .*misaligned 8-byte store, address 4 past a multiple of 8",
    ),
    "shared memory out of bounds": (
        "__shared__ float s[60]; s[threadIdx.x] = 1; __syncthreads(); y[threadIdx.x] = s[0];",
        r"thread \(60, 0, 0\) .*out of bounds, offset 240 of shared variable .* of 240 bytes",
    ),
    "from one shared array into the next": (
        """__shared__ float s[64], t[64]; s[threadIdx.x] = t[threadIdx.x] = 1; __syncthreads();
           y[threadIdx.x] = s[threadIdx.x + (int)x[0]] + t[0];""",
        r"thread \(63, 0, 0\) .*out of bounds, offset 256 of shared variable .* of 256 bytes",
    ),
    "dynamic shared memory that was not asked for": (
        "extern __shared__ float s[]; s[threadIdx.x] = 1; __syncthreads(); y[threadIdx.x] = s[0];",
        r"thread \(0, 0, 0\) .*out of bounds, offset 0 of shared variable 's' of 0 bytes",
    ),
    "local array out of bounds": (
        """float a[9]; for (int i = 0; i < 9; i++) a[i] = x[i] + threadIdx.x;
           y[threadIdx.x] = a[(int)a[threadIdx.x % 9]];""",
        r"thread \(8, 0, 0\) .*out of bounds, offset 36 of local variable .* of 36 bytes",
    ),
    "trap": ('if (threadIdx.x == 7) asm volatile("trap;"); y[threadIdx.x] = 1;', r"thread \(7, 0, 0\) .*gives up"),
    "barrier in a branch": (
        "if (threadIdx.x < 40) __syncthreads(); y[threadIdx.x + 64 * blockIdx.x] = 1;",
        r"thread \(0, 0, 0\) .*waits for thread \(40, 0, 0\) of block \(0, 0, 0\), which has exited .bar",
    ),
    "exit before a barrier": (
        "if (threadIdx.x == 63) return; __syncthreads(); y[threadIdx.x + 64 * blockIdx.x] = 1;",
        r"waits for thread \(63, 0, 0\) of block \(0, 0, 0\), which has exited",
    ),
    "different barriers": (
        """if (threadIdx.x < 32) { __syncthreads(); y[0] = 1; } else { __syncthreads(); y[1] = 2; }
           y[64 + threadIdx.x] = 1;""",
        r"waits for thread \(32, 0, 0\) .*which waits at bar",
    ),
    "lane outside of its mask": (
        "y[threadIdx.x] = __shfl_sync(0xfffffffeu, x[threadIdx.x], 1);",
        "lane 0 is not in its own mask 0xfffffffe",
    ),
    "mask names lanes in another branch": (
        """if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
           else { __syncthreads(); y[threadIdx.x] = 1; }""",
        r"waits for thread \(16, 0, 0\) of block \(0, 0, 0\), which waits at bar",
    ),
    "masks that differ": (
        "y[threadIdx.x] = __shfl_sync(threadIdx.x % 2 ? ~0u : 0x7fffffffu, x[threadIdx.x], 0);",
        "another lane of its mask .* has given a different mask",
    ),
    "endless loop": (
        "while (((volatile float*)x)[0] == ((volatile float*)x)[0]); y[0] = 1;",
        "is this an endless loop?",
    ),
    "division by zero": (
        "y[threadIdx.x] = 7 / ((int)threadIdx.x - 3);",
        r"thread \(3, 0, 0\) .*integer division by zero",
    ),
}


def misused(body: str, **options: Any) -> None:
    raw = np.ones(300, np.float32)
    aligned = raw[-raw.ctypes.data % 16 // 4 :]
    launch(kernel("float* x, float* y", body), 2, 64, aligned[:100], aligned[120:248], read_only={0}, **options)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str) -> None:
    body, message = FAULTS[fault]
    with pytest.raises(ptx.Fault, match=rf"kernel 'k', .*{message}"):
        misused(body, step_limit=5000)


SOUND = {
    "reads shared by all": INDEX + "y[i] = x[0] + x[99];",
    "own element again": INDEX + "y[i] = 1; y[i] += 2; y[i] += x[0];",
    "after a barrier": INDEX + "y[i] = i; __syncthreads(); float v = y[i ^ 63]; __syncthreads(); y[i] = v;",
    "after a warp's barrier": INDEX + "y[i] = i; __syncwarp(); float v = y[i ^ 31]; __syncwarp(); y[i] = v;",
    "one lane writes what its warp has read": INDEX
    + "float v = y[i & ~31]; __syncwarp(); if (i % 32 == 0) y[i] = v + 1; else y[i] = v;",
    "atomics of all": "atomicAdd((u32*)y, 1u); atomicMax((u32*)y, threadIdx.x);",
    "a barrier in a uniform branch": INDEX + "if (blockIdx.x) { y[i] = 1; __syncthreads(); y[i ^ 63] = 2; }",
    "read-only and other buffers in one load": INDEX
    + "y[i] = (threadIdx.x % 2 ? x : y)[threadIdx.x % 2 ? 64 - threadIdx.x : i];",
    "a mask that names exited lanes": """if (threadIdx.x % 32 > 15) return;
        y[blockIdx.x * 64 + threadIdx.x] = __shfl_xor_sync(0x1ffffu, x[threadIdx.x], 8);""",
    "shuffles with exited lanes in the mask": """if (threadIdx.x % 32 > 15) return;
        y[blockIdx.x * 64 + threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 8);""",
}


@pytest.mark.parametrize("case", SOUND)
def test_no_false_alarm(case: str) -> None:
    misused(SOUND[case])


def test_races_between_batches_of_blocks() -> None:
    k = kernel("u32* out", "if (threadIdx.x == 0) out[blockIdx.x % 199] = blockIdx.x;")
    with pytest.raises(
        ptx.Fault, match=r"block \(199, 0, 0\): race on buffer 'a0' at byte 0, which .*block \(0, 0, 0\)"
    ):
        launch(k, 200, 64, np.zeros(199, np.uint32))
    launch(k, 200, 64, np.zeros(199, np.uint32), races=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([b"12345678"], "2 parameters, 1 arguments"),
        ([b"12345678", b"12345678"], "parameter 1 has 4 bytes, the argument 8 bytes"),
    ],
)
def test_wrong_arguments(arguments: list[bytes], message: str) -> None:
    with pytest.raises(ptx.Fault, match=message):
        ptx.run(kernel("float* x, float a", "x[0] = a;"), (1,), (1,), arguments, ptx.Memory())


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "message"),
    [
        ((0,), (32,), 0, "grid"),
        ((1, 65536), (32,), 0, "grid"),
        ((1,), (1025,), 0, "block"),
        ((1,), (256,), 0, "256 threads a block, allowed are 128"),
        ((1,), (32,), 49153, "49153 bytes of shared memory"),
    ],
)
def test_impossible_launches(grid: Any, block: Any, shared_bytes: int, message: str) -> None:
    k = kernel("", "", "")
    k.max_threads = 128
    with pytest.raises(ptx.Fault, match=message):
        ptx.run(k, grid, block, [], ptx.Memory(), shared_bytes=shared_bytes)


def test_launch_bounds_are_read() -> None:
    source = 'extern "C" __global__ void __launch_bounds__(96, 2) k() {}'
    assert ptx.Module(find_nvrtc().compile(source)).kernels["k"].max_threads == 96


def test_memory_can_be_frozen_and_removed() -> None:
    k, x, memory = kernel("float* x", "x[threadIdx.x] = 1;"), np.zeros(32, np.float32), ptx.Memory()
    address = x.ctypes.data
    memory.add(address, x.nbytes, "x")
    memory.freeze(address)
    with pytest.raises(ptx.Fault, match="store to read-only buffer 'x'"):
        ptx.run(k, (1,), (32,), [np.uint64(address).tobytes()], memory)
    memory.thaw(address)
    ptx.run(k, (1,), (32,), [np.uint64(address).tobytes()], memory)
    memory.remove(address)
    with pytest.raises(ptx.Fault, match="out of bounds, there are no buffers"):
        ptx.run(k, (1,), (32,), [np.uint64(address).tobytes()], memory)


def test_buffers_do_not_overlap() -> None:
    memory = ptx.Memory()
    memory.add(4096, 100, "first")
    with pytest.raises(ValueError, match="buffer 'second' overlaps buffer 'first'"):
        memory.add(4195, 1, "second")
    with pytest.raises(ValueError, match="buffer 'empty': a size above 0 expected, got 0"):
        memory.add(0, 0, "empty")
