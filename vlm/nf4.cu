// Products of few rows with NF4 weights, and the weights written out. nf4.py packs and launches.
//
// y (M, N) = x (M, K) W (N, K)^T. The weights are the first operand of the matrix instruction
// (16 outputs x 16 of K), the rows of x the second (16 of K x 8 rows). A warp computes 16 TILES
// outputs, a block of threads WARPS times as many, over a part of K in stages of 64 BLOCKS. After
// every 64 a scale ends.
//
// - A byte holds two neighbours along K, and so does one register of the first operand. A table of
//   all 256 pairs turns a byte into that register with one load from shared memory. The table is
//   there 32 times, once for each bank, so that the threads of a warp never wait for each other.
//   Arithmetic on the nibbles instead takes three instructions a weight (H100: 3.3 ms, not 2.4).
// - The scale multiplies the float32 sum of its 64 products: exact, and cheaper than each weight.
// - Where K is split into parts, the last block of threads to finish adds all parts in their order.
//   A row's sums depend on no chance, on no other row and not on the number of rows. Clusters that
//   add in shared memory were slower (H100: 10 to 20 %), and so were weights loaded to registers.
//
// Given with -D: HALF (x is float16, else bfloat16), ROWS (of x, in eights), TILES, WARPS, BLOCKS,
// STAGES, LEAST (blocks of threads that a multiprocessor must have registers for).

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int THREADS = 32 * WARPS;
constexpr int PAIRS = 256 * 32 * 4;              // bytes of the table
// Bytes of a stage: weights, scales, x. A row of x starts 16 bytes further along the banks than the
// one before, so that reading 8 rows at once never meets in a bank.
constexpr int WORDS = WARPS * TILES * BLOCKS * 512, SCALES = WARPS * TILES * BLOCKS * 32;
constexpr int PADDED = BLOCKS * 128 + 16, STAGE = WORDS + SCALES + 8 * ROWS * PADDED;

__device__ __forceinline__ void copy_16(u32 to, const void* from, bool wanted) {
    int bytes = wanted ? 16 : 0;                 // the others of the 16 become zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    u32 address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }"
        : "=r"(address) : "l"(pointer));
    return address;
}

#if HALF
#define KIND "f16.f16"
#else
#define KIND "bf16.bf16"
#endif

// c (16 x 8) += a (16 x 16) b (16 x 8).
__device__ __forceinline__ void multiply(float (&c)[4], const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two float32 -> two 16-bit values in a word, the first in the low half.
__device__ __forceinline__ u32 narrow(float low, float high) {
    u32 both;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// Two float16 -> two float32.
__device__ __forceinline__ float2 widen_half(u32 both) {
    float2 wide;
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(wide.x), "=f"(wide.y) : "r"(both));
    return wide;
}

__device__ __forceinline__ float widen(u16 value) {
#if HALF
    return widen_half(value).x;
#else
    return __uint_as_float((u32)value << 16);
#endif
}

// Grid: (rows of x / (8 ROWS), outputs / (16 TILES WARPS), parts of K).
// words (N/16, K/64, 32 threads) and scales (N/16, K/64, 16) float16 as nf4.py packs them; pairs
// (256): the table; bias (N) or null; partial: room for the sums of all parts; arrived: a zero for
// each (x, y) of the grid, and zero again afterwards; part: blocks of 64 in a part of K.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) product(
    const u16* __restrict__ x, const uint4* __restrict__ words, const uint4* __restrict__ scales,
    const u32* __restrict__ pairs, const u16* __restrict__ bias, u16* __restrict__ y,
    float4* __restrict__ partial, int* __restrict__ arrived, int M, int N, int K, int part,
    float factor) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int count = K / 64, first = blockIdx.z * part, end = min(first + part, count);
    const int tile = (blockIdx.y * WARPS + warp) * TILES, row0 = blockIdx.x * 8 * ROWS;
    const u32 base = shared_address(memory + PAIRS);

    // ------------------------------------------------------------ from memory to a stage
    // What is not `wanted` lies outside the matrix or outside this part of K.
    const uint4* my_words = words + (size_t)tile * count * 32 + lane;
    const uint4* my_scales = scales + (size_t)tile * count * 2 + lane % 2;
    const u16* my_x = x + (size_t)(row0 + threadIdx.x / (BLOCKS * 8)) * K
        + threadIdx.x % (BLOCKS * 8) * 8;
    auto load = [&](int stage, int block) {
        u32 to = base + stage * STAGE;
#pragma unroll
        for (int i = 0; i < TILES * BLOCKS; i++) {
            int from = i / BLOCKS * count + block + i % BLOCKS;
            bool wanted = (tile + i / BLOCKS < N / 16) & (block + i % BLOCKS < end);
            copy_16(to + ((warp * TILES * BLOCKS + i) * 32 + lane) * 16,
                    my_words + (wanted ? from * 32 : 0), wanted);
        }
        to += WORDS;
        if (lane < TILES * BLOCKS * 2) {
            int i = lane / 2, from = i / BLOCKS * count + block + i % BLOCKS;
            bool wanted = (tile + i / BLOCKS < N / 16) & (block + i % BLOCKS < end);
            copy_16(to + (warp * TILES * BLOCKS * 2 + lane) * 16,
                    my_scales + (wanted ? from * 2 : 0), wanted);
        }
        to += SCALES;
#pragma unroll
        for (int i = 0; i < (64 * ROWS * BLOCKS + THREADS - 1) / THREADS; i++) {
            constexpr int STEP = THREADS / (BLOCKS * 8);
            int row = threadIdx.x / (BLOCKS * 8) + i * STEP, at = threadIdx.x % (BLOCKS * 8);
            if (row >= 8 * ROWS) break;
            bool wanted = (row0 + row < M) & (block + at / 8 < end);
            copy_16(to + row * PADDED + at * 16,
                    my_x + (wanted ? i * STEP * K + block * 64 : 0), wanted);
        }
    };

    int next = first;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++, next += BLOCKS) {
        if (next < end) load(stage, next);
        asm volatile("cp.async.commit_group;");
    }
    for (int i = threadIdx.x; i < PAIRS / 16; i += THREADS) {
        u32 pair = pairs[i / 8];
        ((uint4*)memory)[i] = make_uint4(pair, pair, pair, pair);
    }

    // ------------------------------------------------------------------ stage after stage
    float sums[TILES][ROWS][4] = {};
    const unsigned char* table = memory + lane * 4;
    int stage = 0;
    for (int block = first; block < end; block += BLOCKS) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2));
        __syncthreads();
        if (next < end) load(stage == 0 ? STAGES - 1 : stage - 1, next);   // over the stage before
        asm volatile("cp.async.commit_group;");
        next += BLOCKS;
        const unsigned char* here = memory + PAIRS + stage * STAGE;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            u32 weights[TILES][16];
            float2 scale[TILES];
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                int slot = (warp * TILES + n) * BLOCKS + b;
                uint4 packed = ((const uint4*)here)[slot * 32 + lane];
                scale[n] = widen_half(((const u32*)(here + WORDS))[slot * 8 + g]);
                const u32 four[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
                for (int s = 0; s < 4; s++) {                 // byte * 128: its place in the table
                    weights[n][4 * s] = *(const u32*)(table + (four[s] << 7 & 0x7f80));
                    weights[n][4 * s + 1] = *(const u32*)(table + (four[s] >> 1 & 0x7f80));
                    weights[n][4 * s + 2] = *(const u32*)(table + (four[s] >> 9 & 0x7f80));
                    weights[n][4 * s + 3] = *(const u32*)(table + (four[s] >> 17 & 0x7f80));
                }
            }
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                const unsigned char* row = here + WORDS + SCALES + (m * 8 + g) * PADDED;
                uint4 low = *(const uint4*)(row + b * 128 + t * 32);
                uint4 high = *(const uint4*)(row + b * 128 + t * 32 + 16);
                const u32 xs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    float sum[4] = {};
#pragma unroll
                    for (int s = 0; s < 4; s++)
                        multiply(sum, weights[n] + 4 * s, xs[2 * s], xs[2 * s + 1]);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sums[n][m][i] += sum[i] * (i < 2 ? scale[n].x : scale[n].y);
                }
            }
        }
    }

    // ---------------------------------------------------------------- parts to an output
    // Fragment i of a warp: outputs of its tile i / ROWS, rows i % ROWS of x in eights.
    auto write = [&](int i, float4 sum) {
        const float four[4] = {sum.x, sum.y, sum.z, sum.w};
        int from = ((blockIdx.y * WARPS + warp) * TILES + i / ROWS) * 16;
        if (from >= N) return;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = row0 + i % ROWS * 8 + 2 * t + j % 2, output = from + g + j / 2 * 8;
            if (row >= M) continue;
            float value = four[j] * factor + (bias ? widen(bias[output]) : 0.f);
            y[(size_t)row * N + output] = (u16)narrow(value, 0.f);
        }
    };
    auto sum_of = [&](int i) {
        const float* sum = sums[i / ROWS][i % ROWS];
        return make_float4(sum[0], sum[1], sum[2], sum[3]);
    };
    constexpr int FRAGMENTS = TILES * ROWS, ALL = WARPS * FRAGMENTS;
    if (gridDim.z == 1) {
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) write(i, sum_of(i));
        return;
    }
    const size_t size = (size_t)gridDim.y * gridDim.x * ALL * 32;
    float4* own = partial + (size_t)(blockIdx.y * gridDim.x + blockIdx.x) * ALL * 32
        + warp * FRAGMENTS * 32 + lane;
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) __stcg(own + blockIdx.z * size + i * 32, sum_of(i));
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    __syncthreads();
    int* counter = arrived + blockIdx.y * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) *(int*)memory = atomicAdd(counter, 1);
    __syncthreads();
    if (*(int*)memory + 1 < gridDim.z) return;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    if (threadIdx.x == 0) *counter = 0;
    // Up to 16 loads of a thread run at once, for each of them takes long.
    constexpr int GROUP = FRAGMENTS % 3 == 0 && FRAGMENTS % 4 ? 3 : FRAGMENTS < 4 ? FRAGMENTS : 4;
    constexpr bool EVEN = FRAGMENTS % GROUP == 0;
    constexpr int AT_ONCE = GROUP < 3 ? 8 : 4;
#pragma unroll 1
    for (int i = 0; i < FRAGMENTS; i += GROUP) {
        float4 total[GROUP] = {}, more[AT_ONCE][GROUP];
#pragma unroll 1
        for (int from = 0; from < gridDim.z; from += AT_ONCE) {
#pragma unroll
            for (int z = 0; z < AT_ONCE; z++)
#pragma unroll
                for (int j = 0; j < GROUP; j++)
                    more[z][j] = from + z < gridDim.z && (EVEN || i + j < FRAGMENTS)
                        ? __ldcg(own + (from + z) * size + (i + j) * 32) : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int z = 0; z < AT_ONCE; z++)
#pragma unroll
                for (int j = 0; j < GROUP; j++)
                    total[j].x += more[z][j].x, total[j].y += more[z][j].y,
                        total[j].z += more[z][j].z, total[j].w += more[z][j].w;
        }
#pragma unroll
        for (int j = 0; j < GROUP; j++)
            if (EVEN || i + j < FRAGMENTS) write(i + j, total[j]);
    }
}

// All weights, rounded as bitsandbytes rounds them: out (N, K), code (16) float32. 16 x 64 a warp.
extern "C" __global__ void __launch_bounds__(THREADS) dequantise(
    const uint4* __restrict__ words, const u32* __restrict__ scales, const float* __restrict__ code,
    u16* __restrict__ out, int N, int K, float factor) {
    __shared__ float values[16];
    if (threadIdx.x < 16) values[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, count = K / 64;
    const size_t slot = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (slot >= (size_t)(N / 16) * count) return;
    const uint4 packed = words[slot * 32 + lane];
    const u32 four[4] = {packed.x, packed.y, packed.z, packed.w};
    float2 scale = widen_half(scales[slot * 8 + g]);
    const size_t row = slot / count * 16 + g;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float size = factor * (h ? scale.y : scale.x);
        u32 pairs[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {      // pair i of row g + 8 h: byte 2 (i % 2) + h of a word
            u32 byte = four[i / 2] >> (16 * (i % 2) + 8 * h) & 255;
            pairs[i] = narrow(values[byte >> 4] * size, values[byte & 15] * size);
        }
        uint4* to = (uint4*)(out + (row + 8 * h) * K + slot % count * 64 + t * 16);
        to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    }
}
