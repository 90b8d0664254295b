/* The passes of DoRA and of dropout that ATen has no single call for, on CPU, in fp32 and bf16. See native.py.

   Every entry point is plain C over pointers, so that nothing here depends on a version of Python or torch. What it computes
   does not depend on the number of threads: they share out rows or columns, and none of them adds to another's sums. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANK 64  /* native.py asks for no more */
#define COLUMNS 384  /* a stripe whose sums stay in cache */
#define GAINED 1
#define SUMMED 2
#define PARALLEL 32768 /* elements: below, starting threads takes longer than the work */

/* Of `left` columns, up to 32, those in the first vector of 16 and those in the second. */
#define FIRST(left) ((left) < 16 ? (int)(left) : 16)
#define SECOND(left) ((left) > 16 ? (int)(left) - 16 : 0)

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const void *weight;
    const float *a, *b, *gain;
    float *whole, *norm; /* one of them */
    int64_t in, rank;
    float scale;
    int bf16;
} Updated;

typedef struct {
    void *y;
    const void *h;
    const float *factors, *gain, *bias;
    int64_t rows, out, rank, stride;
    int bf16;
} Expanded;

typedef struct {
    const void *dy, *y, *residual, *h;
    const float *gain, *bias;
    void *scaled;
    float *product, *sizes, *around, *shrunk;
    int64_t rows, columns, rank, stride;
    float keep, scale;
    int transposed, gained, bf16; /* gained: 0, GAINED or SUMMED; an empty y has no address */
} Columns;

typedef struct {
    const void *x;
    const uint8_t *mask;
    void *out;
    int64_t elements;
    int add, bf16;
} Masked;

typedef struct {
    uint32_t *words;
    uint64_t seed, drops;
} Drawn;

typedef void Range(const void *pass, int64_t first, int64_t last);

INLINE float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define NAME(x) x##_any
#include "native_passes.h"
#undef NAME

#if defined(__x86_64__) && defined(__GNUC__)
#define BY_INSTRUCTION_SET
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define NAME(x) x##_avx2
#include "native_passes.h"
#undef NAME
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define NAME(x) x##_avx512
#include "native_passes.h"
#undef NAME
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static int widest = 2; /* lowered by the tests alone */

/* Use no instruction set beyond `set`; the one that is used then: 0, 1 or 2 for none in particular, AVX2 and AVX-512. */
int peftlite_instruction_set(int set) {
    widest = set;
#ifdef BY_INSTRUCTION_SET
    if (widest >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (widest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

#ifdef BY_INSTRUCTION_SET
#define BEST(pass) (Range *[]){pass##_any, pass##_avx2, pass##_avx512}[peftlite_instruction_set(widest)]
#else
#define BEST(pass) pass##_any
#endif

/* Run `range` over [0, count), shared out among threads in runs of a multiple of `grain`. */
static void share(Range *range, const void *pass, int64_t count, int64_t grain, int64_t elements, int threads) {
    const int64_t grains = (count + grain - 1) / grain;
    if (elements < PARALLEL) threads = 1;
    if (grains < threads) threads = (int)grains;
    if (threads < 1) return;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t first = grains * t / threads * grain, last = grains * (t + 1) / threads * grain;
        range(pass, first, last < count ? last : count);
    }
}

/* Factors `(rank, count)`, or `(count, rank)` where they are `transposed`, times `scale`, every 32 of `count` together and padded
   with zeros: rows that lie a power of two apart would drive each other out of the cache. NULL without memory. */
static float *packed(const float *factors, float scale, int64_t count, int64_t rank, int transposed) {
    const int64_t tiles = (count + 31) / 32;
    float *const tile = calloc(32 * (tiles * rank + 1), sizeof(float));
    if (!tile) return NULL;
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t q = 0; q < rank; ++q)
            for (int64_t k = 0, at = 32 * t; k < 32 && at < count; ++k, ++at)
                tile[32 * (t * rank + q) + k] = scale * factors[transposed ? at * rank + q : q * count + at];
    return tile;
}

/* ``n = ‖W + s B A‖_row`` or, where `norm` is NULL, ``g (W + s B A)`` into `whole`. */
int peftlite_updated(const void *weight, int bf16, const float *a, const float *b, float scale, const float *gain, int64_t out,
                     int64_t in, int64_t rank, float *whole, float *norm, int threads) {
    float *const tiles = packed(a, 1, in, rank, 0);
    if (!tiles) return -1;
    const Updated pass = {weight, tiles, b, gain, whole, norm, in, rank, scale, bf16};
    share(BEST(updated), &pass, out, 4, out * in, threads);
    free(tiles);
    return 0;
}

/* ``y = g (y + s h Bᵀ) + (1 - g) b`` in place. 1 if a |g| exceeds `limit`. */
int peftlite_expanded(void *y, const void *h, int bf16, const float *b, float scale, const float *gain, const float *bias,
                      float limit, int64_t rows, int64_t out, int64_t rank, int64_t stride, int threads) {
    float *const tiles = packed(b, scale, out, rank, 1);
    if (!tiles) return -1;
    const Expanded pass = {y, h, tiles, gain, bias, rows, out, rank, stride, bf16};
    share(BEST(expanded), &pass, rows, 4, rows * out, threads);
    free(tiles);
    for (int64_t j = 0; j < out; ++j)
        if (!(fabsf(gain[j]) <= limit)) return 1;
    return 0;
}

/* ``s dyᵀ h``, its transpose where that is asked for; nothing where `rank` is 0. Where `gained` is not 0 dy is made ``D = g dy``
   before, which goes to `scaled` unless that is NULL; and ``dm = Σ_i dy (y - b) / m``, where y is ``keep (y - residual)`` if
   `gained` is SUMMED. `lost` says of each column whether too few digits of ``y - b`` are left for that; the result is how many are. */
int64_t peftlite_columns(const void *dy, const void *h, int bf16, float scale, int transposed, int64_t rows, int64_t columns,
                         int64_t rank, int64_t stride, float *shrunk, int gained, const void *y, const void *residual, float keep,
                         const float *gain, const float *bias, const float *magnitude, float limit, void *scaled, float *dm,
                         float *sizes, float *around, uint8_t *lost, int threads) {
    const Columns pass = {dy,    y,      residual, h,       gain, bias,   scaled, dm,    sizes,
                          around, shrunk, rows,     columns, rank, stride, keep,   scale, transposed, gained, bf16};
    share(BEST(columns), &pass, columns, 16, rows * columns, threads);
    int64_t found = 0;
    for (int64_t j = 0; gained && j < columns; ++j) {
        const float swamping = gained == SUMMED ? around[j] : bias ? fabsf(bias[j]) * (float)rows : 0.0f;
        dm[j] /= magnitude[j];
        lost[j] = !(swamping <= limit * sizes[j]) || !isfinite(dm[j]);
        found += lost[j];
    }
    return found;
}

/* ``x mask`` into `out`, or added to it; bit k of byte j of the mask is for element 8 j + k. */
int peftlite_masked(const void *x, int bf16, const uint8_t *mask, int64_t elements, int add, void *out, int threads) {
    const Masked pass = {x, mask, out, elements, add, bf16};
    share(BEST(masked), &pass, (elements + 15) / 16, 64, elements, threads);
    return 0;
}

/* One bit for each of 32 `words` elements: 1 unless a draw of 16 bits is below `drops`. */
int peftlite_drawn(uint32_t *words, int64_t count, uint64_t seed, uint64_t drops, int threads) {
    const Drawn pass = {words, seed, drops};
    share(BEST(drawn), &pass, count, 256, 32 * count, threads);
    return 0;
}
