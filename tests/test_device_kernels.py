"""Whole kernels on the PTX interpreter: what NVRTC compiles gives the right results."""

import mmap
from typing import Any

import numpy as np
import pytest

from tests.device import ptx
from tests.ptx_support import INDEX, assert_bits, compute, kernel, launch


def numbers(count: int, dtype: Any = np.float32) -> np.ndarray:
    return (np.arange(count) * 7 % 101 - 50).astype(dtype)


@pytest.mark.parametrize("count", [1, 31, 32, 255, 257, 9000])
def test_elementwise(count: int) -> None:
    k = kernel("const float* x, float* y, float a, long long n", INDEX + "if (i >= n) return; y[i] = a * x[i] + 1.f;")
    x, y = numbers(count), np.full(count, np.nan, np.float32)
    launch(k, -(-count // 256), 256, x, y, np.float32(0.3), np.int64(count))
    assert y.tolist() == (np.float32(0.3) * x + np.float32(1)).tolist()


def test_batches_of_blocks_are_one_launch() -> None:
    k = kernel("u32* where", "if (threadIdx.x == 0) where[blockIdx.x] = blockIdx.x;")
    where = np.zeros(300, np.uint32)
    launch(k, 300, 64, where)
    assert where.tolist() == list(range(300))


def test_grids_and_blocks_of_three_dimensions() -> None:
    body = """
      u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
      u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      out[block * blockDim.x * blockDim.y * blockDim.z + thread] = threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x
        + 1000 * (blockIdx.z * 100 + blockIdx.y * 10 + blockIdx.x);"""
    out = np.zeros(24 * 30, np.uint32)
    memory = ptx.Memory()
    memory.add(out.ctypes.data, out.nbytes, "out")
    ptx.run(kernel("u32* out", body), (2, 3, 4), (5, 3, 2), [np.uint64(out.ctypes.data).tobytes()], memory)
    names = [z * 100 + y * 10 + x for z in range(2) for y in range(3) for x in range(5)]
    blocks = [z * 100 + y * 10 + x for z in range(4) for y in range(3) for x in range(2)]
    assert out.tolist() == [1000 * b + t for b in blocks for t in names]


REDUCTION = """
  __shared__ double parts[32]; double sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[i] * x[i];
  for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  {barrier}
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;"""


def reduction(barrier: str) -> ptx.Kernel:
    return kernel("const float* x, double* out, int n", REDUCTION.replace("{barrier}", barrier))


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_reduction_by_shuffles_and_shared_memory(threads: int) -> None:
    x, out = numbers(5000), np.zeros(3)
    launch(reduction("__syncthreads();"), 3, threads, x, out, np.int32(5000))
    assert out.tolist() == [(x.astype(np.float64) ** 2).sum()] * 3


def test_ballots_matches_and_shuffles() -> None:
    body = """
      u32 i = threadIdx.x; u32 v = i * 5 % 7;
      out[i] = __ballot_sync(~0u, v > 2); out[64 + i] = __match_any_sync(~0u, v);
      out[128 + i] = __shfl_up_sync(~0u, v, 3, 8); out[192 + i] = __shfl_sync(~0u, v, i + 1, 16);
      out[256 + i] = __any_sync(~0u, v == i) * 2 + __all_sync(~0u, v < 7); out[320 + i] = __reduce_add_sync(~0u, v);"""
    out = np.zeros(384, np.uint32)
    launch(kernel("u32* out", body), 1, 64, out)
    v = np.arange(64) * 5 % 7
    warps = v.reshape(2, 32)
    ballots = [sum(1 << i for i in range(32) if w[i] > 2) for w in warps]
    matches = [sum(1 << i for i in range(32) if w[i] == w[j]) for w in warps for j in range(32)]
    assert out[:64].tolist() == np.repeat(ballots, 32).tolist()
    assert out[64:128].tolist() == matches
    assert out[128:192].tolist() == [v[i - 3] if i % 8 >= 3 else v[i] for i in range(64)]
    assert out[192:256].tolist() == [v[i // 16 * 16 + (i + 1) % 16] for i in range(64)]
    assert out[256:320].tolist() == [
        2 * int((w == np.arange(32) + 32 * n).any()) + 1 for n, w in enumerate(warps) for _ in w
    ]
    assert out[320:].tolist() == np.repeat(warps.sum(1), 32).tolist()


def test_shuffle_from_a_lane_that_takes_no_part_gives_nan() -> None:
    out = np.zeros(20, np.float32)
    launch(kernel("float* out", "out[threadIdx.x] = __shfl_down_sync(~0u, (float)threadIdx.x, 16);"), 1, 20, out)
    assert out[:4].tolist() == [16, 17, 18, 19]
    assert np.isnan(out[4:16]).all()


def test_halves_of_a_warp_with_masks_of_their_own() -> None:
    body = """
      u32 lower = threadIdx.x < 16, mask = lower ? 0xffffu : 0xffff0000u; u32 v = threadIdx.x;
      if (lower) v += __shfl_xor_sync(mask, v, 8); else v += __shfl_xor_sync(mask, v, 1) * 100;
      out[threadIdx.x] = v;"""
    out = np.zeros(32, np.uint32)
    launch(kernel("u32* out", body), 1, 32, out)
    assert out.tolist() == [i + (i ^ 8) if i < 16 else i + (i ^ 1) * 100 for i in range(32)]


def test_lanes_that_leave_a_loop_early_are_waited_for() -> None:
    body = """
      u32 v = threadIdx.x;
      for (u32 i = 0; i < n[threadIdx.x]; i++) v = v * 3 + 1;
      out[threadIdx.x] = v + __shfl_sync(~0u, v, 31 - threadIdx.x);"""
    n, out = numbers(64, np.uint32) % 9, np.zeros(64, np.uint32)
    v = list(range(64))
    for i in range(64):
        for _ in range(n[i]):
            v[i] = (v[i] * 3 + 1) % 2**32
    launch(kernel("const u32* n, u32* out", body), 1, 64, n, out)
    assert out.tolist() == [(v[i] + v[i // 32 * 32 + 31 - i % 32]) % 2**32 for i in range(64)]


def test_count_at_a_barrier() -> None:
    body = """
      int count = __syncthreads_count(threadIdx.x % 3 == 0), any = __syncthreads_or(threadIdx.x == blockIdx.x);
      out[threadIdx.x] = count + 100 * any;"""
    out = np.zeros(70, np.int32)
    launch(kernel("int* out", body), 1, 70, out)
    assert out.tolist() == [124] * 70


DIVERGENT = """
  int i = threadIdx.x, v = 0;
  if (i == 5) return;
  if (i % 2) {
    if (i % 3) { for (int j = 0; j < i; j++) { if (j % 5 == 4) continue; v += j; if (v > 40) break; } }
    else v = -i;
  } else {
    int j = i; while (j != 1 && j) { j = j % 2 ? 3 * j + 1 : j / 2; v++; }
  }
  out[i] = v + 1;"""


def divergent(i: int) -> int:
    v = 0
    if i % 2 and i % 3:
        for j in range(i):
            if j % 5 != 4:
                v += j
                if v > 40:
                    break
    elif i % 2:
        v = -i
    else:
        while i not in (0, 1):
            i = 3 * i + 1 if i % 2 else i // 2
            v += 1
    return v + 1


def test_nested_divergence_loops_and_early_return() -> None:
    out = np.zeros(128, np.int32)
    launch(kernel("int* out", DIVERGENT), 1, 128, out)
    assert out.tolist() == [0 if i == 5 else divergent(i) for i in range(128)]


TABLE = """struct Table { float* data[40]; long long size[40]; unsigned char flag[40]; float scale; };"""


@pytest.mark.parametrize("access", ["t.data[v]", "*(&t.data[0] + v)"])
def test_structure_by_value_indexed_by_the_block(access: str) -> None:
    body = f"""
      int v = blockIdx.x; float* data = {access};
      for (long long i = threadIdx.x; i < t.size[v]; i += blockDim.x) data[i] = data[i] * t.scale + t.flag[v];"""
    table = np.zeros(
        (), np.dtype([("data", "u8", 40), ("size", "i8", 40), ("flag", "u1", 40), ("scale", "f4")], align=True)
    )
    arrays = [numbers(n * n) for n in range(1, 41)]
    want = [a * np.float32(0.5) + np.float32(n * 3 % 11) for n, a in enumerate(arrays)]
    table["data"] = [a.ctypes.data for a in arrays]
    table["size"] = [a.size for a in arrays]
    table["flag"] = np.arange(40) * 3 % 11
    table["scale"] = 0.5
    memory = ptx.Memory()
    for n, a in enumerate(arrays):
        memory.add(a.ctypes.data, a.nbytes, f"array {n}")
    ptx.run(kernel("const __grid_constant__ Table t", body, TABLE), (40,), (96,), [table.tobytes()], memory)
    assert [a.tolist() for a in arrays] == [w.tolist() for w in want]


def test_index_past_the_end_of_a_structure() -> None:
    k = kernel("const __grid_constant__ Table t, float* out", "out[threadIdx.x] = t.size[threadIdx.x + 40];", TABLE)
    table = np.zeros((), f"V{k.parameters[0].nbytes}")
    with pytest.raises(ptx.Fault, match=r"thread \(6, 0, 0\) .*8-byte load out of bounds, offset 688 of parameter 0"):
        launch(k, 1, 64, table, np.zeros(64, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
def test_sixteen_bytes_at_once(dtype: Any) -> None:
    k = kernel("const uint4* x, uint4* y", "uint4 v = x[threadIdx.x]; v.x ^= v.w; y[threadIdx.x] = v;")
    raw = np.zeros(128 * 16 + 16, np.uint8)
    x = raw[-raw.ctypes.data % 16 :][: 64 * 16].view(np.uint32).reshape(64, 4)
    y = x.base[-raw.ctypes.data % 16 + 64 * 16 :][: 64 * 16].view(np.uint32).reshape(64, 4)
    x[...] = numbers(256, np.int32).reshape(64, 4).view(np.uint32)
    launch(k, 1, 64, x, y)
    assert y[:, 1:].tolist() == x[:, 1:].tolist()
    assert y[:, 0].tolist() == (x[:, 0] ^ x[:, 3]).tolist()


def test_templates() -> None:
    before = """
      template <typename T, int N> struct Sum {
        static __device__ T of(const T* x) { return *x + Sum<T, N - 1>::of(x + 1); }
      };
      template <typename T> struct Sum<T, 0> { static __device__ T of(const T*) { return 0; } };"""
    x, y = numbers(70, np.float64), np.zeros(64)
    launch(
        kernel("const double* x, double* y", "y[threadIdx.x] = Sum<double, 4>::of(x + threadIdx.x);", before),
        1,
        64,
        x,
        y,
    )
    assert y.tolist() == [x[i : i + 4].sum() for i in range(64)]


def test_halves_by_inline_assembly() -> None:
    body = """
      int i = threadIdx.x; float f; asm("{cvt.f32.f16 %0, %1;}" : "=f"(f) : "h"(x[i])); f = f / 3.f;
      asm("{ .reg .f32 t; add.rn.f32 t, %1, %1; cvt.rn.f16.f32 %0, t; }" : "=h"(y[i]) : "f"(f));"""
    x, y = numbers(64, np.float16), np.zeros(64, np.float16)
    launch(kernel("const u16* x, u16* y", body), 1, 64, x, y)
    third = x.astype(np.float32) / np.float32(3)
    assert y.tolist() == (third + third).astype(np.float16).tolist()


def test_labels_of_inline_assembly_are_its_own() -> None:
    block = 'asm volatile("{ .reg .pred p; setp.gt.u32 p, %0, 9; @p bra done; add.u32 %0, %0, 10; done: }" : "+r"(v));'
    out = np.zeros(32, np.uint32)
    launch(kernel("u32* out", f"u32 v = threadIdx.x; {block} {block} out[threadIdx.x] = v;"), 1, 32, out)
    assert out.tolist() == [i if i > 9 else i + 10 for i in range(32)]


def test_local_constant_and_global_arrays() -> None:
    body = """
      int a[8]; for (int j = 0; j < 8; j++) a[j] = j * threadIdx.x; a[threadIdx.x % 8] += weights[threadIdx.x % 4];
      int s = 0; for (int j = 0; j < 8; j++) s = s * 2 + a[(j + threadIdx.x) % 8];
      out[threadIdx.x] = s; atomicAdd(&total, s);"""
    k = kernel("int* out", body, "__constant__ int weights[4] = {5, 7, 11, 13}; __device__ int total = 3;")

    def expected(t: int) -> int:
        a = [j * t for j in range(8)]
        a[t % 8] += (5, 7, 11, 13)[t % 4]
        s = 0
        for j in range(8):
            s = s * 2 + a[(j + t) % 8]
        return s

    out = np.zeros(64, np.int32)
    launch(k, 1, 64, out)
    assert out.tolist() == [expected(t) for t in range(64)]
    assert k.module.storage["total"].view(np.int32).tolist() == [3 + out.sum()]


ATOMICS = {
    "atomicAdd(p, v)": lambda old, v: old + v,
    "atomicSub(p, v)": lambda old, v: old - v,
    "atomicMin(p, v)": min,
    "atomicMax(p, v)": max,
    "atomicExch(p, v)": lambda old, v: v,
    "atomicOr(p, v)": lambda old, v: old | v,
    "atomicAnd(p, v)": lambda old, v: old & v,
    "atomicXor(p, v)": lambda old, v: old ^ v,
    "atomicCAS(p, (T)9, v)": lambda old, v: v if old == 9 else old,
}


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize(
    ("atomic", "kind"), [(a, k) for a in ATOMICS for k in ("int", "u32", "u64") if (a, k) != ("atomicSub(p, v)", "u64")]
)
def test_atomics_take_turns(atomic: str, returns: bool, kind: str) -> None:
    dtype = {"int": np.int32, "u32": np.uint32, "u64": np.uint64}[kind]
    body = f"T* p = bins + threadIdx.x % 5; T v = x[threadIdx.x]; {'out[threadIdx.x] = ' if returns else ''}{atomic};"
    k = kernel("T* bins, const T* x, T* out", body, f"typedef {kind} T;")
    x, bins, out = (numbers(96) % 17).astype(dtype), np.full(5, 9, dtype), np.zeros(96, dtype)
    state, want = [9] * 5, []
    for i in range(96):
        want.append(state[i % 5])
        state[i % 5] = int(np.array(ATOMICS[atomic](state[i % 5], int(x[i]))).astype(dtype))
    launch(k, 1, 96, bins, x, out)
    assert bins.tolist() == state
    assert out.tolist() == (want if returns else [0] * 96)


def test_histogram_in_dynamic_shared_memory() -> None:
    body = """
      extern __shared__ u32 bins[]; __shared__ u32 rank[256];
      if (threadIdx.x < 16) bins[threadIdx.x] = 0;
      __syncthreads();
      rank[threadIdx.x] = atomicAdd(&bins[x[blockIdx.x * 256 + threadIdx.x] & 15], 1u);
      __syncthreads();
      ranks[blockIdx.x * 256 + threadIdx.x] = rank[threadIdx.x];
      if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], bins[threadIdx.x]);"""
    x, ranks, counts = numbers(20 * 256, np.uint32), np.zeros(20 * 256, np.uint32), np.zeros(16, np.uint32)
    launch(kernel("const u32* x, u32* ranks, u32* counts", body), 20, 256, x, ranks, counts, shared_bytes=64)
    assert counts.tolist() == np.bincount(x & 15, minlength=16).tolist()
    for block in range(20):
        digits = (x[block * 256 :][:256] & 15).tolist()
        assert ranks[block * 256 :][:256].tolist() == [digits[:i].count(d) for i, d in enumerate(digits)]


def test_generic_pointers_to_shared_and_global_memory() -> None:
    body = """
      __shared__ float s[64]; int i = threadIdx.x; s[i] = 2 * i; __syncthreads();
      const float* p = i % 2 ? s : x; out[i] = p[63 - i];"""
    x, out = numbers(64), np.zeros(64, np.float32)
    launch(kernel("const float* x, float* out", body), 1, 64, x, out)
    assert out.tolist() == [2 * (63 - i) if i % 2 else x[63 - i] for i in range(64)]


def test_shared_memory_starts_as_nan() -> None:
    out = np.zeros(32, np.float32)
    launch(kernel("float* out", "volatile __shared__ float s[32]; out[threadIdx.x] = s[threadIdx.x];"), 1, 32, out)
    assert np.isnan(out).all()


HUGE = 2**31 + 1000


def huge() -> np.ndarray:
    """Address space, of which only touched pages take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, 4 * HUGE, flags=flags), np.float32)


@pytest.mark.parametrize("races", [True, False])
@pytest.mark.parametrize("index", ["long long", "int"])
def test_chosen_blocks_of_a_launch_past_2_31_elements(index: str, races: bool) -> None:
    body = f"{index} i = ({index})blockIdx.x * blockDim.x + threadIdx.x; if (i < n) y[i] = x[i] + 1.f;"
    x, y = huge(), huge()
    last = -(-HUGE // 256)
    options = {"blocks": [0, last // 2, last - 2, last - 1], "races": races}
    if index == "int":
        with pytest.raises(ptx.Fault, match=r"4-byte (load|store) out of bounds"):
            launch(kernel("const float* x, float* y, long long n", body), last, 256, x, y, np.int64(HUGE), **options)
    else:
        launch(kernel("const float* x, float* y, long long n", body), last, 256, x, y, np.int64(HUGE), **options)
        tail = HUGE - (last - 2) * 256
        assert y[-tail - 2 :].tolist() == [0, 0] + [1] * tail
        assert y[:258].tolist() == [1] * 256 + [0, 0]


def test_float64_to_float32_toward_zero() -> None:
    """The step of a kernel that rounds to bfloat16 only once."""
    a = np.array([1 + 2.0**-24 + 2.0**-40, 1 - 2.0**-40, -1 - 2.0**-23, -2 + 2.0**-40, 1e300, -np.inf, -1e-300])
    largest, below_two = np.finfo(np.float32).max, 2 - 2.0**-23
    want = [1.0, 1 - 2.0**-24, -1 - 2.0**-23, -below_two, largest, -np.inf, -0.0]
    assert_bits(compute("cvt.rz.f32.f64 y, x0;", "f4", a), np.array(want, np.float32))
