// Row ids of a sparse gradient: the check of their range, and a stable radix sort of ids with their positions.
//
// A library sort would do, but those that CuPy brings wait for the stream, which neither a step without
// synchronisation nor a captured graph may. Digits of 8 bits, lowest first; only as many as the number of rows has.
// In front of this text: storage.cuh, key_t (uint32 or uint64, holds n_rows), id_t (int or int64), THREADS 256, ITEMS.

constexpr int DIGITS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int TILE = THREADS * ITEMS;
constexpr uint32 ALL_LANES = 0xffffffff;

// What a pass reads: the ids with their places in the first pass, then what the pass before has written.
struct Items {
    const id_t* ids;  // null after the first pass
    const key_t* keys;
    const int* order;
    key_t n_rows;

    // An id out of range, a negative one too, becomes n_rows: sorted to the end and updating nothing.
    __device__ __forceinline__ key_t key(int i) const
    {
        if (!ids)
            return keys[i];
        uint64 id = (uint64)(int64)ids[i];
        return id < n_rows ? (key_t)id : n_rows;
    }

    __device__ __forceinline__ int position(int i) const { return ids ? i : order[i]; }
};

__device__ __forceinline__ int digit_of(key_t key, int shift) { return (int)(key >> shift) & (DIGITS - 1); }

// Sum of x over the threads before this one, and over all of them, in blocks of THREADS.
__device__ __forceinline__ int exclusive_sum(int x, int& total)
{
    __shared__ int of_warp[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = x;
    for (int distance = 1; distance < 32; distance *= 2) {
        int before = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane >= distance)
            sum += before;
    }
    if (lane == 31)
        of_warp[warp] = sum;
    __syncthreads();
    int warps_before = 0;
    total = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w == warp)
            warps_before = total;
        total += of_warp[w];
    }
    __syncthreads();
    return warps_before + sum - x;
}

// The lanes, of those that are valid, whose digit is this lane's.
__device__ __forceinline__ uint32 peers(int digit, bool valid)
{
    uint32 same = __ballot_sync(ALL_LANES, valid);
    for (int bit = 1; bit < DIGITS; bit *= 2) {
        uint32 vote = __ballot_sync(ALL_LANES, digit & bit);
        same &= digit & bit ? vote : ~vote;
    }
    return same;
}

// Ranks of a tile's items among those of the same digit in the same warp; counts[warp][digit] ends as their number.
// Each warp has ITEMS * 32 neighbours, in order: item i of a lane is the (32 * i + lane)-th.
__device__ __forceinline__ void rank_in_warp(
    const Items& from, int first, int n, int shift, int (*counts)[DIGITS], key_t (&keys)[ITEMS], int (&ranks)[ITEMS])
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = threadIdx.x; i < WARPS * DIGITS; i += THREADS)
        counts[0][i] = 0;
    __syncthreads();
    for (int i = 0; i < ITEMS; i++) {
        int at = first + 32 * i + lane;
        bool valid = at < n;
        keys[i] = valid ? from.key(at) : 0;
        int digit = digit_of(keys[i], shift);
        uint32 same = peers(digit, valid);
        int before = __popc(same & ((1u << lane) - 1));
        ranks[i] = valid ? counts[warp][digit] + before : 0;
        __syncwarp();
        if (valid && before == 0)
            counts[warp][digit] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
}

// Writes a tile's items where they belong: `base`, of thread d, is the place of the tile's first item with digit d.
__device__ __forceinline__ void scatter(
    const Items& from, int first, int n, int shift, int base, int (*counts)[DIGITS],
    const key_t (&keys)[ITEMS], const int (&ranks)[ITEMS], key_t* keys_out, int* order_out)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int w = 0; w < WARPS; w++) {
        int count = counts[w][threadIdx.x];
        counts[w][threadIdx.x] = base;
        base += count;
    }
    __syncthreads();
    for (int i = 0; i < ITEMS; i++) {
        int at = first + 32 * i + lane;
        if (at < n) {
            int to = counts[warp][digit_of(keys[i], shift)] + ranks[i];
            keys_out[to] = keys[i];
            order_out[to] = from.position(at);
        }
    }
}

__device__ __forceinline__ int first_item(int tile) { return tile * TILE + threadIdx.x / 32 * (ITEMS * 32); }

// A whole sort of up to TILE ids, by one block. The passes write the two buffers in turn.
extern "C" __global__ void __launch_bounds__(THREADS) sort_tile(
    const id_t* ids, int n, key_t n_rows, int n_passes, key_t* keys_a, int* order_a, key_t* keys_b, int* order_b)
{
    __shared__ int counts[WARPS][DIGITS];
    key_t keys[ITEMS];
    int ranks[ITEMS];
    Items from = {ids, nullptr, nullptr, n_rows};
    for (int pass = 0; pass < n_passes; pass++) {
        key_t* keys_out = pass % 2 ? keys_b : keys_a;
        int* order_out = pass % 2 ? order_b : order_a;
        rank_in_warp(from, first_item(0), n, 8 * pass, counts, keys, ranks);
        int count = 0, total;
        for (int w = 0; w < WARPS; w++)
            count += counts[w][threadIdx.x];
        int base = exclusive_sum(count, total);
        scatter(from, first_item(0), n, 8 * pass, base, counts, keys, ranks, keys_out, order_out);
        __syncthreads();
        from = {nullptr, keys_out, order_out, n_rows};
    }
}

// First of three kernels per pass: counts[digit][tile], how many of a tile's items have each digit.
extern "C" __global__ void __launch_bounds__(THREADS) count_digits(
    const id_t* ids, const key_t* keys, int n, key_t n_rows, int shift, int* counts)
{
    __shared__ int count[DIGITS];
    Items from = {ids, keys, nullptr, n_rows};
    count[threadIdx.x] = 0;
    __syncthreads();
    for (int i = 0; i < ITEMS; i++) {
        int64 at = (int64)blockIdx.x * TILE + i * THREADS + threadIdx.x;
        if (at < n)
            atomicAdd(&count[digit_of(from.key((int)at), shift)], 1);
    }
    __syncthreads();
    counts[(int64)threadIdx.x * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// Second: block d turns counts[d] into the number of items of that digit in the tiles before, and sums them up.
extern "C" __global__ void __launch_bounds__(THREADS) sum_counts(int* counts, int n_tiles, int* totals)
{
    int* row = counts + (int64)blockIdx.x * n_tiles;
    int sum = 0, total;
    for (int left = 0; left < n_tiles; left += THREADS) {
        int tile = left + threadIdx.x;
        int before = exclusive_sum(tile < n_tiles ? row[tile] : 0, total);
        if (tile < n_tiles)
            row[tile] = sum + before;
        sum += total;
    }
    if (threadIdx.x == 0)
        totals[blockIdx.x] = sum;
}

// Third: each item to its place.
extern "C" __global__ void __launch_bounds__(THREADS) scatter_items(
    const id_t* ids, const key_t* keys_in, const int* order_in, int n, key_t n_rows, int shift,
    const int* counts, const int* totals, key_t* keys_out, int* order_out)
{
    __shared__ int in_warp[WARPS][DIGITS];
    key_t keys[ITEMS];
    int ranks[ITEMS], total;
    Items from = {ids, keys_in, order_in, n_rows};
    int base = exclusive_sum(totals[threadIdx.x], total) + counts[(int64)threadIdx.x * gridDim.x + blockIdx.x];
    rank_in_warp(from, first_item(blockIdx.x), n, shift, in_warp, keys, ranks);
    scatter(from, first_item(blockIdx.x), n, shift, base, in_warp, keys, ranks, keys_out, order_out);
}

// The offset of the first id outside [0, n_rows) goes to *found, unless that holds a lower one.
extern "C" __global__ void __launch_bounds__(THREADS) find_outside(
    const id_t* ids, int64 n, uint64 n_rows, uint64* found)
{
    for (int64 i = (int64)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64)gridDim.x * THREADS)
        if ((uint64)(int64)ids[i] >= n_rows)
            atomicMin(found, (uint64)i);
}
