// Rows of a table: the values of each row summed in the contract's order, then the rule on the row.
//
// The ids are sorted: keys, rising, and order, the places of their values, equal keys in order of occurrence. The
// occurrences of a row are a segment; each run of up to 32 of them is added from left to right. A segment of one run
// is updated at once (`update_rows`). The sums of a longer one go to `sums`, and `combine_sums` adds those 32 at a
// time, launch after launch, until one is left. Nobody has to know how many rows or runs there are: each warp takes 32
// sorted places, times a slab of columns where rows are long, and finds the runs that begin there.
//
// With ADD_ROWS the sums are added to the rows instead: a gradient of which a part is sparse.
//
// In front of this text: storage.cuh, rmsprop.cuh, var_t, grad_t, rms_t, mom_t, mg_t, key_t, PACKED, DIMS, WARPS, ADD_ROWS.

constexpr uint32 ALL_LANES = 0xffffffff;
constexpr int FAN_IN = 32;
constexpr int MIN_BLOCKS = sizeof(compute_t) == 8 ? 2 : 3;  // leaves the registers that keep all in them (measured)

// A table whose rows begin `stride` elements apart. Rows that are not contiguous have DIMS strides of their own.
template <typename T> struct Rows {
    T* data;
    int64 stride;
    int64 strides[DIMS + 1];  // the last is unused: arrays have no length 0
};

struct Table {
    Rows<var_t> var;
#if !ADD_ROWS
    Rows<rms_t> rms;
#endif
#if HAS_MOMENTUM
    Rows<mom_t> mom;
#endif
#if CENTERED
    Rows<mg_t> mg;
#endif
    int64 n_rows;
    int64 row_size;
    int64 shape[DIMS + 1];  // of a row
};

struct Sorted {
    const key_t* keys;
    const int* order;
    int n;
};

// A run that begins in the places of this warp, as the launch at hand sees it: `count` values or sums.
struct Run {
    int start;
    int count;
    int slot;  // of its sum, or of the first that it adds
    bool whole;  // all there is of its row
};

// The first place in [low, high] whose key is not below `key`, or high; asked by a whole warp.
__device__ __forceinline__ int search(const key_t* keys, key_t key, int low, int high)
{
    int lane = threadIdx.x % 32;
    while (low < high) {
        int step = (high - low + 31) / 32;
        int probe = low + step * (lane + 1) - 1;
        int below = __popc(__ballot_sync(ALL_LANES, probe < high && keys[probe] < key));
        int next = low + step * (below + 1) - 1;
        low += step * below;
        high = next < high ? next : high;
    }
    return low;
}

// Where this lane's run of values ends: at the next head, after FAN_IN places, or at the end.
__device__ __forceinline__ int end_nearby(const Sorted& sorted, int place, uint32 heads)
{
    int lane = threadIdx.x % 32, beyond = place + 32;
    uint32 outside = __ballot_sync(ALL_LANES, place >= sorted.n);
    bool edge = beyond >= sorted.n || sorted.keys[beyond] != sorted.keys[beyond - 1];
    uint64 edges = (uint64)__ballot_sync(ALL_LANES, edge) << 32 | heads | outside;
    int distance = __ffsll(edges >> lane >> 1);
    return place + (distance && distance < FAN_IN ? distance : FAN_IN);
}

// Where the runs of sums end that begin at the lanes `found` (two at most: such rows occur more than 32 times).
__device__ __forceinline__ int end_beyond(const Sorted& sorted, int first, uint32 found, key_t key, int span)
{
    int lane = threadIdx.x % 32, end = 0;
    for (; found; found &= found - 1) {
        int at = __ffs(found) - 1;
        int start = first + at, reach = FAN_IN * span;
        int limit = sorted.n - start > reach ? start + reach : sorted.n;
        int stop = search(sorted.keys, __shfl_sync(ALL_LANES, key, at) + 1, start, limit);
        if (lane == at)
            end = stop;
    }
    return end;
}

// Runs of up to FAN_IN items of `span` occurrences that begin at places first .. first + 31, of rows that exist;
// returns their number.
__device__ __forceinline__ int find_runs(const Sorted& sorted, int64 n_rows, int first, int span, Run* runs)
{
    const key_t* keys = sorted.keys;
    int lane = threadIdx.x % 32, place = first + lane, n = sorted.n, reach = FAN_IN * span;
    bool valid = place < n;
    key_t key = valid ? keys[place] : 0;
    bool head = valid && (place == 0 || keys[place - 1] != key);
    uint32 heads = __ballot_sync(ALL_LANES, head);

    // Where the segment began that reaches into these places from before, if its next run can begin here.
    int began = first;
    int earlier = first + 31 - reach;
    bool continues = !(heads & 1) && (span == 1 || (earlier >= 0 && keys[earlier] == __shfl_sync(ALL_LANES, key, 0)));
    if (continues)
        began = search(keys, __shfl_sync(ALL_LANES, key, 0), 0, first);
    uint32 heads_before = heads & (ALL_LANES >> (31 - lane));
    if (heads_before)
        began = first + 31 - __clz(heads_before);
    int rank = place - began;
    bool begins = valid && key < n_rows && rank % reach == 0 && (heads_before || continues);
    if (span > 1 && rank == 0)
        begins = begins && place + span < n && keys[place + span] == key;

    uint32 found = __ballot_sync(ALL_LANES, begins);
    int end = span == 1 ? end_nearby(sorted, place, heads) : end_beyond(sorted, first, found, key, span);
    if (begins) {
        bool last = end == n || keys[end] != key;
        runs[__popc(found & ((1u << lane) - 1))] =
            {place, (end - place + span - 1) / span, began / 16 + rank / FAN_IN, rank == 0 && last};
    }
    return __popc(found);
}

// ---------------------------------------------------------------------------------------------- elements of rows

#if DIMS
template <typename T>
__device__ __forceinline__ T* element(const Rows<T>& rows, const Table& table, int64 row, int64 column)
{
    T* at = rows.data + row * rows.stride;
    for (int axis = DIMS - 1; axis >= 0; axis--) {
        at += column % table.shape[axis] * rows.strides[axis];
        column /= table.shape[axis];
    }
    return at;
}
#endif

// The elements of a row, from column `left` on, that belong to a thread.
template <typename T>
__device__ __forceinline__ void read_row(
    const Rows<T>& rows, const Table& table, int64 row, int64 left, int thread, int n_threads, compute_t (&x)[VECTOR])
{
#if DIMS == 0
    read<PACKED>(rows.data + row * rows.stride + left, table.row_size - left, thread, n_threads, x);
#else
    for (int i = 0; i < VECTOR; i++) {
        int64 column = left + thread + i * n_threads;
        x[i] = column < table.row_size ? widen(*element(rows, table, row, column)) : compute_t(0);
    }
#endif
}

template <typename T>
__device__ __forceinline__ void write_row(
    const Rows<T>& rows, const Table& table, int64 row, int64 left, int thread, int n_threads,
    const compute_t (&x)[VECTOR])
{
#if DIMS == 0
    write<PACKED>(rows.data + row * rows.stride + left, table.row_size - left, thread, n_threads, x);
#else
    for (int i = 0; i < VECTOR; i++) {
        int64 column = left + thread + i * n_threads;
        if (column < table.row_size)
            narrow(x[i], *element(rows, table, row, column));
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- kernels

// One run over the columns of one thread. Rows are read before the values are summed: all reads in flight together.
template <typename Add>
__device__ __forceinline__ void take_run(
    const Run& run, int64 row, int64 left, int thread, int n_threads, const Table& table, const Scalars& s,
    compute_t* sums, Add add)
{
    compute_t g[VECTOR], var[VECTOR], rms[VECTOR], mom[VECTOR], mg[VECTOR];
    if (run.whole) {
        read_row(table.var, table, row, left, thread, n_threads, var);
#if !ADD_ROWS
        read_row(table.rms, table, row, left, thread, n_threads, rms);
#endif
#if HAS_MOMENTUM
        read_row(table.mom, table, row, left, thread, n_threads, mom);
#endif
#if CENTERED
        read_row(table.mg, table, row, left, thread, n_threads, mg);
#endif
    }
    add(g);
    if (!run.whole) {
        compute_t* sum = sums + run.slot * table.row_size + left;
        write<PACKED>(sum, table.row_size - left, thread, n_threads, g);
        return;
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        if (ADD_ROWS)
            var[i] = var[i] + g[i];
        else
            update(g[i], var[i], rms[i], mom[i], mg[i], s);
    write_row(table.var, table, row, left, thread, n_threads, var);
#if !ADD_ROWS
    write_row(table.rms, table, row, left, thread, n_threads, rms);
#endif
#if HAS_MOMENTUM
    write_row(table.mom, table, row, left, thread, n_threads, mom);
#endif
#if CENTERED
    write_row(table.mg, table, row, left, thread, n_threads, mg);
#endif
}

// Calls take(run, left) for all runs of `span` at all columns, each by `group` threads (a power of two up to 32).
template <typename Take>
__device__ __forceinline__ void for_runs(const Sorted& sorted, const Table& table, int span, int group, Take take)
{
    __shared__ Run shared_runs[WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Run* runs = shared_runs[warp];
    int64 slab = group * VECTOR;
    int64 n_slabs = (table.row_size + slab - 1) / slab;
    int64 n_units = ((int64)sorted.n + 31) / 32 * n_slabs;
    for (int64 unit = (int64)blockIdx.x * WARPS + warp; unit < n_units; unit += (int64)gridDim.x * WARPS) {
        int n_runs = find_runs(sorted, table.n_rows, (int)(unit / n_slabs) * 32, span, runs);
        int64 left = unit % n_slabs * slab;
        __syncwarp();
        if (left + (lane % group) * (PACKED ? VECTOR : 1) >= table.row_size)
            n_runs = 0;
        for (int i = lane / group; i < n_runs; i += 32 / group)
            take(runs[i], left);
        __syncwarp();
    }
}

// The first launch: sums of values; rows that occur up to 32 times are done. The values are clipped here, before they
// are summed; `clipped` are scalars and `factor` for that.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) update_rows(
    const Scalars scalars, const Scalars* live, const float* skip, const compute_t* factor, const grad_t* values,
    const key_t* keys, const int* order, int n, int group, compute_t* sums, GRID_CONSTANT const Table table)
{
    if (skip && *skip != 0)
        return;
    const Scalars s = live ? *live : scalars;
    const compute_t f = factor ? *factor : compute_t(1);
    int64 row_size = table.row_size;
    int thread = threadIdx.x % group;
    for_runs({keys, order, n}, table, 1, group, [&](const Run& run, int64 left) {
        take_run(run, keys[run.start], left, thread, group, table, s, sums, [&](compute_t (&g)[VECTOR]) {
            compute_t x[VECTOR];
            for (int k = 0; k < run.count; k++) {
                const grad_t* value = values + order[run.start + k] * row_size + left;
                read<PACKED>(value, row_size - left, thread, group, x);
                for (int i = 0; i < VECTOR; i++)
                    g[i] = k ? g[i] + load(x[i], f, s) : load(x[i], f, s);
            }
        });
    });
}

// The launches after that, with span = 32, 32 * 32, ...: sums of sums; rows of up to 32 * span occurrences are done.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) combine_sums(
    const Scalars scalars, const Scalars* live, const float* skip, const key_t* keys, int n, int span, int group,
    compute_t* sums, GRID_CONSTANT const Table table)
{
    if (skip && *skip != 0)
        return;
    const Scalars s = live ? *live : scalars;
    int64 row_size = table.row_size;
    int thread = threadIdx.x % group;
    for_runs({keys, nullptr, n}, table, span, group, [&](const Run& run, int64 left) {
        take_run(run, keys[run.start], left, thread, group, table, s, sums, [&](compute_t (&g)[VECTOR]) {
            compute_t x[VECTOR];
            for (int k = 0; k < run.count; k++) {
                const compute_t* sum = sums + (run.slot + k * (span / FAN_IN)) * row_size + left;
                read<PACKED>(sum, row_size - left, thread, group, x);
                for (int i = 0; i < VECTOR; i++)
                    g[i] = k ? g[i] + x[i] : x[i];
            }
        });
    });
}
