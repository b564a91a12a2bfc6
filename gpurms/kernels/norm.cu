// Sums of squares and clip factors, in the order of `square_sum` and `fold` in numpy.py, so with the same bits.
//
// In front of this text: storage.cuh, rmsprop.cuh (for `load` with clipvalue), grad_t, CAPACITY. VECTOR is 4.

constexpr int LANES = 1024;
constexpr int CHUNK = 1 << 16;
constexpr int THREADS = LANES / 4;  // each thread has four lanes

struct Gradient {
    const grad_t* data;
    int64 n;
    int64 first_tile;  // a tile is a chunk
    int64 place;  // of its sum among the sums of the call
};

struct Gradients {
    Gradient entries[CAPACITY];
};

// The upper half of the lanes onto the lower, down to one; the sum ends in lanes[0].
__device__ __forceinline__ void halve(double* lanes)
{
    for (int half = LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int lane = threadIdx.x; lane < half; lane += THREADS)
            lanes[lane] += lanes[lane + half];
    }
}

__device__ __forceinline__ bool is_single(const Gradient& gradient) { return gradient.n <= CHUNK; }

// One block per chunk of 65,536 elements: its sum of squares, which is the whole sum of a gradient of one chunk.
extern "C" __global__ void __launch_bounds__(THREADS) square_sums(
    const Scalars scalars, int count, double* chunk_sums, double* sums, GRID_CONSTANT const Gradients table)
{
    __shared__ double lanes[LANES];
    const Gradient& gradient = find(table.entries, count, blockIdx.x);
    int64 start = (blockIdx.x - gradient.first_tile) * CHUNK;
    const grad_t* g = gradient.data + start;
    int n = gradient.n - start < CHUNK ? (int)(gradient.n - start) : CHUNK;
    double sum[LANES / THREADS] = {};
#pragma unroll 4
    for (int left = threadIdx.x; left < n; left += LANES)
        for (int k = 0; k < LANES / THREADS; k++)
            if (left + k * THREADS < n) {
                double x = load(widen(g[left + k * THREADS]), 1, scalars);
                sum[k] = sum[k] + x * x;
            }
    for (int k = 0; k < LANES / THREADS; k++)
        lanes[k * THREADS + threadIdx.x] = sum[k];
    halve(lanes);
    if (threadIdx.x == 0)
        *(is_single(gradient) ? sums + gradient.place : chunk_sums + blockIdx.x) = lanes[0];
}

// One block per gradient of several chunks: the sum of their sums.
extern "C" __global__ void __launch_bounds__(THREADS) fold(
    const double* chunk_sums, double* sums, GRID_CONSTANT const Gradients table)
{
    __shared__ double lanes[LANES];
    const Gradient& gradient = table.entries[blockIdx.x];
    if (is_single(gradient))
        return;
    int64 n = (gradient.n + CHUNK - 1) / CHUNK;
    for (int lane = threadIdx.x; lane < LANES; lane += THREADS) {
        double sum = 0;
        for (int64 i = lane; i < n; i += LANES)
            sum = sum + chunk_sums[gradient.first_tile + i];
        lanes[lane] = sum;
    }
    halve(lanes);
    if (threadIdx.x == 0)
        sums[gradient.place] = lanes[0];
}

// clip / max(norm, clip) of each gradient, or for all the one of the root of their sum, added from left to right; in
// both compute types. One block.
extern "C" __global__ void __launch_bounds__(THREADS) clip_factors(
    const double* sums, int n, double clip, int over_all, float* factors, double* double_factors)
{
    __shared__ double part[THREADS];
    __shared__ double total;
    if (over_all) {
        double sum = 0;
        for (int left = 0; left < n; left += THREADS) {
            if (left + threadIdx.x < n)
                part[threadIdx.x] = sums[left + threadIdx.x];
            __syncthreads();
            if (threadIdx.x == 0)
                for (int i = 0; i < THREADS && left + i < n; i++)
                    sum = sum + part[i];
            __syncthreads();
        }
        if (threadIdx.x == 0)
            total = sum;
        __syncthreads();
    }
    for (int i = threadIdx.x; i < n; i += THREADS) {
        double norm = sqrt(over_all ? total : sums[i]);
        double factor = norm <= clip ? 1 : clip / norm;  // NaN where the norm is
        factors[i] = (float)factor;
        double_factors[i] = factor;
    }
}
