// Element types in memory, and how they become and come from compute_t, in which all arithmetic is done.
//
// CuPy's wheels bring no CUDA headers, so nothing is included: float16 is converted by PTX instructions, bfloat16 by
// integer operations. Every conversion rounds once, to nearest even. In front of this text: compute_t, VECTOR.

typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

#if __CUDA_ARCH__ >= 700
#define GRID_CONSTANT __grid_constant__  // a table among the parameters is read where it is, and not copied
#else
#define GRID_CONSTANT
#endif

struct float16_t { unsigned short bits; };
struct bfloat16_t { unsigned short bits; };

__device__ __forceinline__ compute_t widen(float x) { return (compute_t)x; }
__device__ __forceinline__ compute_t widen(double x) { return (compute_t)x; }

__device__ __forceinline__ compute_t widen(float16_t x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return (compute_t)y;
}

__device__ __forceinline__ compute_t widen(bfloat16_t x) { return (compute_t)__uint_as_float((uint32)x.bits << 16); }

__device__ __forceinline__ unsigned short float16_bits(float x)
{
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned short float16_bits(double x)
{
    unsigned short y;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(y) : "d"(x));
    return y;
}

__device__ __forceinline__ unsigned short bfloat16_bits(float x)
{
    uint32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000)  // NaN, which rounding could turn into infinity
        return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Through float rounded to odd: two roundings to nearest are not one.
__device__ __forceinline__ unsigned short bfloat16_bits(double x)
{
    float toward_zero = __double2float_rz(x);
    if ((double)toward_zero != x)
        toward_zero = __uint_as_float(__float_as_uint(toward_zero) | 1);
    return bfloat16_bits(toward_zero);
}

__device__ __forceinline__ void narrow(compute_t x, float& y) { y = (float)x; }
__device__ __forceinline__ void narrow(compute_t x, double& y) { y = (double)x; }
__device__ __forceinline__ void narrow(compute_t x, float16_t& y) { y.bits = float16_bits(x); }
__device__ __forceinline__ void narrow(compute_t x, bfloat16_t& y) { y.bits = bfloat16_bits(x); }

// The VECTOR elements of a line that belong to one of n_threads threads. packed: neighbours, moved 16 bytes at a time;
// the line must be aligned to 16 bytes, and all of them exist. Else every n_threads-th, one at a time, those below n.

template <typename T> struct alignas(16) Packet {
    T elements[16 / sizeof(T)];
};

template <typename T> __device__ __forceinline__ uint4 words(const Packet<T>& packet)  // of 16-bit elements
{
    const T* e = packet.elements;
    return make_uint4(
        e[0].bits | (uint32)e[1].bits << 16, e[2].bits | (uint32)e[3].bits << 16,
        e[4].bits | (uint32)e[5].bits << 16, e[6].bits | (uint32)e[7].bits << 16);
}

__device__ __forceinline__ uint4 words(const Packet<float>& packet)
{
    const float* e = packet.elements;
    return make_uint4(__float_as_uint(e[0]), __float_as_uint(e[1]), __float_as_uint(e[2]), __float_as_uint(e[3]));
}

__device__ __forceinline__ uint4 words(const Packet<double>& packet)
{
    const double* e = packet.elements;
    return make_uint4(__double2loint(e[0]), __double2hiint(e[0]), __double2loint(e[1]), __double2hiint(e[1]));
}

// In PTX, because the compiler splits some of these stores.
template <typename T> __device__ __forceinline__ void store(const Packet<T>& packet, Packet<T>* to)
{
    uint4 w = words(packet);
    uint64 address = __cvta_generic_to_global(to);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"l"(address), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}

template <bool packed, typename T>
__device__ __forceinline__ void read(const T* line, int64 n, int thread, int n_threads, compute_t (&x)[VECTOR])
{
    constexpr int WIDTH = 16 / sizeof(T);
    if (packed) {
        const Packet<T>* packets = reinterpret_cast<const Packet<T>*>(line + thread * VECTOR);
#pragma unroll
        for (int i = 0; i < VECTOR; i += WIDTH) {
            Packet<T> packet = packets[i / WIDTH];
            for (int j = 0; j < WIDTH; j++)
                x[i + j] = widen(packet.elements[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            x[i] = thread + i * n_threads < n ? widen(line[thread + i * n_threads]) : compute_t(0);
    }
}

template <bool packed, typename T>
__device__ __forceinline__ void write(T* line, int64 n, int thread, int n_threads, const compute_t (&x)[VECTOR])
{
    constexpr int WIDTH = 16 / sizeof(T);
    if (packed) {
        Packet<T>* packets = reinterpret_cast<Packet<T>*>(line + thread * VECTOR);
#pragma unroll
        for (int i = 0; i < VECTOR; i += WIDTH) {
            Packet<T> packet;
            for (int j = 0; j < WIDTH; j++)
                narrow(x[i + j], packet.elements[j]);
            store(packet, packets + i / WIDTH);
        }
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            if (thread + i * n_threads < n)
                narrow(x[i], line[thread + i * n_threads]);
    }
}

// The last entry of a table whose first tile is not behind `tile`.
template <typename Entry> __device__ __forceinline__ const Entry& find(const Entry* entries, int count, int64 tile)
{
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (entries[middle].first_tile <= tile)
            low = middle;
        else
            high = middle;
    }
    return entries[low];
}
