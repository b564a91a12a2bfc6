// Dense variables: all that share types and rule, in one launch.
//
// The table of arrays is a kernel parameter, so a launch needs no copy, no staging memory and no device memory of its
// own, and a graph can capture it. Blocks take tiles of THREADS * VECTOR elements, tensor after tensor.
// In front of this text: storage.cuh, rmsprop.cuh, var_t, grad_t, rms_t, mom_t, mg_t, THREADS, CAPACITY.

struct Tensor {
    var_t* var;
    const grad_t* grad;
    rms_t* rms;
#if HAS_MOMENTUM
    mom_t* mom;
#endif
#if CENTERED
    mg_t* mg;
#endif
#if HAS_FACTOR
    const compute_t* factor;
#endif
    int64 n;
    int64 first_tile;
};

struct Table {
    Tensor tensors[CAPACITY];
};

// All reads stand before the first write, so that they are in flight together.
template <bool PACKED> __device__ __forceinline__ void update_tile(const Tensor& t, int64 start, const Scalars& s)
{
    int64 n = t.n - start;
    compute_t var[VECTOR], g[VECTOR], rms[VECTOR], mom[VECTOR], mg[VECTOR], factor = 1;
    read<PACKED>(t.var + start, n, threadIdx.x, THREADS, var);
    read<PACKED>(t.grad + start, n, threadIdx.x, THREADS, g);
    read<PACKED>(t.rms + start, n, threadIdx.x, THREADS, rms);
#if HAS_MOMENTUM
    read<PACKED>(t.mom + start, n, threadIdx.x, THREADS, mom);
#endif
#if CENTERED
    read<PACKED>(t.mg + start, n, threadIdx.x, THREADS, mg);
#endif
#if HAS_FACTOR
    factor = *t.factor;
#endif

#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        update(load(g[i], factor, s), var[i], rms[i], mom[i], mg[i], s);

    write<PACKED>(t.var + start, n, threadIdx.x, THREADS, var);
    write<PACKED>(t.rms + start, n, threadIdx.x, THREADS, rms);
#if HAS_MOMENTUM
    write<PACKED>(t.mom + start, n, threadIdx.x, THREADS, mom);
#endif
#if CENTERED
    write<PACKED>(t.mg + start, n, threadIdx.x, THREADS, mg);
#endif
}

__device__ __forceinline__ bool aligned(const Tensor& t)
{
    uint64 bits = (uint64)t.var | (uint64)t.grad | (uint64)t.rms;
#if HAS_MOMENTUM
    bits |= (uint64)t.mom;
#endif
#if CENTERED
    bits |= (uint64)t.mg;
#endif
    return bits % 16 == 0;
}

// `live`, if given, holds the scalars on the device, where a replayed graph finds those of its step. `skip`, if given,
// is where the device knows whether the step is left out: if it holds anything but 0.
extern "C" __global__ void __launch_bounds__(THREADS) multi(
    const Scalars scalars, const Scalars* live, const float* skip, int count, GRID_CONSTANT const Table table)
{
    if (skip && *skip != 0)
        return;
    const Tensor& t = find(table.tensors, count, blockIdx.x);
    const Scalars s = live ? *live : scalars;
    int64 start = (blockIdx.x - t.first_tile) * (THREADS * VECTOR);
    if (aligned(t) && t.n - start >= THREADS * VECTOR)
        update_tile<true>(t, start, s);
    else
        update_tile<false>(t, start, s);
}
