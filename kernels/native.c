/* What LoRA, DoRA and dropout do beside the products with W, on CPU, in fp32 and bf16, in fewer passes than ATen's. See native.py.

   Every entry point is plain C over pointers, so that nothing here depends on a version of Python or torch. What it computes
   does not depend on the number of threads: they share out rows or columns, and none of them adds to another's sums. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANK 64  /* native.py asks for no more */
#define COLUMNS 384 /* a stripe whose sums stay in cache */
#define EPS 1e-12f /* a row of zeros has norm 0 */
#define GAINED 1
#define SUMMED 2
#define PARALLEL 32768 /* elements: below, starting threads takes longer than the work */

/* Of `left` columns, up to 32, those in the first vector of 16 and those in the second. */
#define FIRST(left) ((left) < 16 ? (int)(left) : 16)
#define SECOND(left) ((left) > 16 ? (int)(left) - 16 : 0)

#define INLINE static inline __attribute__((always_inline))
#define EDGE static __attribute__((noinline)) void /* any number of rows and columns, for the last of a matrix */

typedef struct {
    const void *weight;
    const float *a, *b;
    float *norm;
    int64_t in, rank;
    float scale;
    int bf16;
} Normed;

typedef struct {
    const void *x;
    const uint8_t *mask;
    const void *factors; /* packed: fp32, or bf16 for the passes of native_dot.h */
    void *h;
    int64_t features, rank, stride;
    int bf16;
} Shrunk;

typedef struct {
    void *y;
    const void *h;
    const uint8_t *mask;
    const void *factors;
    const float *gain, *bias;
    int64_t out, rank, stride;
    int bf16;
} Expanded;

typedef struct {
    const void *dy, *y, *residual, *h;
    const uint8_t *mask;
    const float *gain, *bias;
    void *scaled;
    float *product, *sizes, *around, *shrunk;
    int64_t rows, columns, rank, stride;
    float keep, scale;
    int transposed, gained, bf16; /* gained: 0, GAINED or SUMMED; an empty y has no address */
} Columns;

typedef struct {
    const void *x, *weight;
    const float *magnitude, *norm; /* g = magnitude / norm for each row of weights that lie straight, or NULL */
    int64_t inner;
    int bf16; /* the weights; x is bf16 */
} Term;

/* Rows of ``Σ (x g) W`` or, transposed, ``Σ x Wᵀ``, over the terms; ``h F`` is added, masked, then they get a gain and a bias. */
typedef struct {
    const Term *terms;
    void *y;
    const void *h;
    const uint8_t *mask;
    const float *const *factors;
    const int64_t *ranks;
    const Normed *normed; /* what measures the rows of W for the gain, unless it is there already */
    const float *magnitude, *bias;
    float *gain;
    int64_t rows, columns, rank, stride, parts;
    float scale;
    int count, transposed; /* as many terms as factors, of `rank` in all */
} Product;

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

static Range measured;

INLINE float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To bf16: to nearest, ties to even; every NaN stays one. */
INLINE uint16_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Columns start .. of factors `(rank, count)`, or `(count, rank)` where they are `transposed`, times `scale`, and gain unless that is
   NULL: a tile `(rank, 32)`. */
INLINE void pack_tile(float *tile, const float *factors, float scale, const float *gain, int64_t start, int64_t count, int64_t rank,
                      int transposed) {
    const int64_t width = start + 32 < count ? 32 : count - start;
    for (int64_t k = 0; transposed && k < width; ++k)
        for (int64_t q = 0; q < rank; ++q) tile[32 * q + k] = scale * factors[(start + k) * rank + q];
    for (int64_t q = 0; q < rank; ++q) {
        for (int64_t k = 0; !transposed && k < width; ++k) tile[32 * q + k] = scale * factors[q * count + start + k];
        for (int64_t k = 0; gain && k < width; ++k) tile[32 * q + k] *= gain[start + k];
    }
}

/* Bits `at` .. of a mask, one for each of `count` elements. */
INLINE uint64_t bits_of(const uint8_t *mask, int64_t at, int count) {
    uint64_t bits = 0;
    const int first = (int)(at & 7), bytes = (first + count + 7) / 8;
    mask += at / 8;
    if (count == 16) bits = (uint64_t)mask[0] | (uint64_t)mask[1] << 8 | (uint64_t)(first ? mask[2] : 0) << 16;
    else for (int k = 0; k < bytes; ++k) bits |= (uint64_t)mask[k] << (8 * k);
    return bits >> first;
}

/* Add the sums over some rows to those over all. */
INLINE void column_add(float (*total)[COLUMNS], float (*part)[COLUMNS], int64_t rank, int64_t width) {
    for (int64_t s = 0; s < 3 + rank; ++s)
        for (int64_t c = 0; c < width; ++c) total[s][c] += part[s][c];
}

/* Write the sums over all rows to where they were asked for. */
INLINE void column_put(const Columns *p, int64_t first, int64_t width, float (*total)[COLUMNS]) {
    if (p->gained) memcpy(p->product + first, total[0], width * sizeof(float));
    if (p->gained) memcpy(p->sizes + first, total[1], width * sizeof(float));
    if (p->gained == SUMMED) memcpy(p->around + first, total[2], width * sizeof(float));
    for (int64_t q = 0; q < p->rank; ++q)
        for (int64_t c = 0; c < width; ++c)
            p->shrunk[p->transposed ? q * p->columns + first + c : (first + c) * p->rank + q] = p->scale * total[3 + q][c];
}

#define SHRUNK_ROWS 2 /* as many as the sums of 8 columns each find registers for */
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
#undef SHRUNK_ROWS
#define SHRUNK_ROWS 3
#define NAME(x) x##_avx512
#include "native_passes.h"
#undef NAME
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(__clang__) || __GNUC__ >= 11
#define BY_DOT_PRODUCTS
#include <cpuid.h>
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#include "native_dot.h"
#include "native_product.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif

static int widest = 3; /* lowered by the tests alone */

/* Use no instruction set beyond `set`; the one that is used then: 0, 1, 2 or 3 for none in particular, AVX2, AVX-512, and that with
   AVX512_BF16. */
int peftlite_instruction_set(int set) {
    widest = set;
#ifdef BY_INSTRUCTION_SET
    if (widest >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#ifdef BY_DOT_PRODUCTS
        if (widest >= 3 && __builtin_cpu_supports("avx512bf16")) return 3;
#endif
        return 2;
    }
    if (widest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

#ifdef BY_INSTRUCTION_SET
#define BEST(pass) (Range *[]){pass##_any, pass##_avx2, pass##_avx512, pass##_avx512}[peftlite_instruction_set(widest)]
#else
#define BEST(pass) pass##_any
#endif

/* Whether the low-rank products of these tensors are those of native_dot.h. */
static int by_dots(int bf16) { return bf16 && peftlite_instruction_set(widest) == 3; }

#ifndef BY_DOT_PRODUCTS
#define shrunk_dot NULL
#define expanded_dot NULL
#define columns_dot NULL
#define pack_rows(...) (void)0
#define pack_pairs(...) (void)0
#define product(...) (void)0
#define WIDE 64
#endif

/* Whether products with W belong here: AMX, which ATen has, is several times as fast. */
int peftlite_multiplies(void) {
#ifdef BY_DOT_PRODUCTS
    unsigned a, b, c, d;
    return by_dots(1) && !(__get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1);
#else
    return 0;
#endif
}

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

/* Memory for `rank` rows of factors, every 32 of `count` columns together: rows that lie a power of two apart would drive each
   other out of the cache. NULL without memory. */
static void *tiles_for(int64_t count, int64_t rank) { return calloc(32 * ((count + 31) / 32 * rank + 1), sizeof(float)); }

/* Every tile of some factors, as `pack_tile` writes them, into rows `first` .. of tiles with `whole` rows. */
static void pack(float *tiles, int64_t whole, int64_t first, const float *factors, float scale, const float *gain, int64_t count,
                 int64_t rank, int transposed) {
    for (int64_t start = 0; start < count; start += 32)
        pack_tile(tiles + start * whole + 32 * first, factors, scale, gain, start, count, rank, transposed);
}

/* ``h = (x mask) (g F)ᵀ``; `pass` lacks its factors. -1 without memory. */
static int shrink(Shrunk pass, const float *factors, float scale, const float *gain, int transposed, int64_t rows, int threads) {
    void *const tiles = tiles_for(pass.features, pass.rank);
    const int dots = by_dots(pass.bf16);
    if (!tiles) return -1;
    if (dots) pack_rows(tiles, factors, scale, gain, pass.features, pass.rank, transposed);
    else pack(tiles, pass.rank, 0, factors, scale, gain, pass.features, pass.rank, transposed);
    pass.factors = tiles;
    share(dots ? shrunk_dot : BEST(shrunk), &pass, rows, 12, rows * pass.features, threads);
    free(tiles);
    return 0;
}

/* ``y += h F``, masked or with a gain, for the factors of `count` layers one below the other; `pass` lacks them. -1 without
   memory. */
static int expand(Expanded pass, const float *const *factors, const int64_t *ranks, int count, float scale, int transposed,
                  int64_t rows, int threads) {
    void *const tiles = tiles_for(pass.out, pass.rank + 1); /* pairs of rows */
    const int dots = by_dots(pass.bf16);
    if (!tiles) return -1;
    for (int64_t k = 0, first = 0; k < count; first += ranks[k++]) {
        if (dots) pack_pairs(tiles, (pass.rank + 1) / 2, first, factors[k], scale, pass.out, ranks[k], transposed);
        else pack(tiles, pass.rank, first, factors[k], scale, NULL, pass.out, ranks[k], transposed);
    }
    pass.factors = tiles;
    share(dots ? expanded_dot : BEST(expanded), &pass, rows, 4, rows * pass.out, threads);
    free(tiles);
    return 0;
}

/* ``n = max(n, EPS)`` and ``g = m / n``. */
static void divide(float *gain, const float *magnitude, float *norm, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
        if (norm[j] < EPS) norm[j] = EPS;
        gain[j] = magnitude[j] / norm[j];
    }
}

/* n and g of columns first .. of a product. */
static void measured(const void *pass, int64_t first, int64_t last) {
    const Product *p = pass;
    BEST(normed)(p->normed, first, last);
    divide(p->gain, p->magnitude, p->normed->norm, first, last);
}

/* Several runs of rows for each thread, so that all end at about the same time. -1 without memory. */
static int multiply(Product pass, int threads) {
    const int64_t panels = (pass.columns + WIDE - 1) / WIDE;
    int64_t pairs = (pass.rank + 1) / 2;
    for (int k = 0; k < pass.count; ++k) pairs += pass.terms[k].inner / 2;
    pass.parts = (4 * threads + panels - 1) / panels;
    if (pass.parts > pass.rows / 96) pass.parts = pass.rows / 96;
    if (pass.parts < 1) pass.parts = 1;
    if (pass.normed && (pass.parts > 1 || !pass.rows)) { /* once for all parts */
        share(measured, &pass, pass.columns, 4, pass.columns * pass.normed->in, threads);
        pass.normed = NULL;
    }
    const int64_t parts = pass.rows ? panels * pass.parts : 0;
    if (2 * pairs * pass.columns < PARALLEL) threads = 1;
    if (parts < threads) threads = (int)parts;
    if (threads < 1) return 0;
    const size_t size = pairs * WIDE;
    uint32_t *const memory = aligned_alloc(64, threads * size * sizeof *memory);
    if (!memory) return -1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; ++t) product(&pass, memory + t * size, parts * t / threads, parts * (t + 1) / threads);
    free(memory);
    return 0;
}

static const void *element(const void *memory, int64_t at, int bf16) { return (const char *)memory + at * (bf16 ? 2 : 4); }

/* fp32 copies of bf16 parameters, or the parameters themselves. */
static void widen(float *copy, const void *values, int bf16, int64_t count) {
    if (!bf16) memcpy(copy, values, count * sizeof(float));
    for (int64_t k = 0; bf16 && k < count; ++k) copy[k] = widened(((const uint16_t *)values)[k]);
}

/* Whether all values are zero; the first that is not ends the search. */
int peftlite_is_zero(const float *values, int64_t count, int threads) {
    (void)threads;
    for (int64_t k = 0; k < count; ++k)
        if (values[k] != 0) return 0;
    return 1;
}

/* A packed for `normed`. NULL without memory. */
static float *packed_for_norm(const float *a, int64_t in, int64_t rank) {
    float *const tiles = tiles_for(in, rank);
    if (tiles) pack(tiles, rank, 0, a, 1, NULL, in, rank, 0);
    return tiles;
}

/* ``n = ‖W + s B A‖_row``. */
int peftlite_row_norm(const void *weight, int bf16, const float *a, const float *b, float scale, int64_t out, int64_t in,
                      int64_t rank, float *norm, int threads) {
    float *const tiles = packed_for_norm(a, in, rank);
    if (!tiles) return -1;
    const Normed pass = {weight, tiles, b, norm, in, rank, scale, bf16};
    share(BEST(normed), &pass, out, 4, out * in, threads);
    free(tiles);
    return 0;
}

/* Behind the product y = x Wᵀ + b, or with it where it `multiplies`; then y is bf16. ``h = (x mask) Aᵀ`` if it `shrinks`, else h is
   given; then ``y += s h Bᵀ``. With a magnitude y becomes ``g (y + s h Bᵀ) + (1 - g) b``, ``g = m / n``, and the result is 1 if a
   |g| exceeds `limit` where b was inside y; ``n = max(‖W + s B A‖_row, EPS)`` is computed if it `measures`, else given. h is columns
   `start` .. of a matrix whose rows lie `stride` elements apart. */
int peftlite_adapt_output(void *y, const void *x, void *h, int bf16, const uint8_t *mask, const float *a, const float *b,
                          float scale, int64_t rows, int64_t in, int64_t out, int64_t rank, int64_t start, int64_t stride,
                          int shrinks, int multiplies, const void *weight, int bf16_weight, const void *bias, int bf16_bias,
                          const float *magnitude, float *norm, float limit, int measures, float norm_scale, int threads) {
    const int adapts = magnitude != NULL;
    float *const memory = malloc((2 * out + 1) * sizeof(float)), *const gain = memory, *const shift = memory + out;
    float *const tiles = measures ? packed_for_norm(a, in, rank) : NULL;
    int result = -1;
    h = (void *)element(h, start, bf16);
    const Shrunk inner = {x, mask, NULL, h, in, rank, stride, bf16};
    const Normed normed = {weight, tiles, b, norm, in, rank, norm_scale, bf16_weight};
    const Term term = {x, weight, NULL, NULL, in, bf16_weight};
    const Product whole = {.terms = &term, .y = y, .h = h, .factors = &b, .ranks = &rank, .normed = measures ? &normed : NULL,
                           .magnitude = magnitude, .bias = bias ? shift : NULL, .gain = adapts ? gain : NULL, .rows = rows,
                           .columns = out, .rank = rank, .stride = stride, .scale = scale, .count = 1, .transposed = 1};
    if (!memory || (measures && !tiles) || (shrinks && shrink(inner, a, 1, NULL, 0, rows, threads))) goto end;
    if (bias) widen(shift, bias, bf16_bias, out);
    if (measures && !multiplies) share(measured, &whole, out, 4, out * in, threads);
    if (adapts && !measures) divide(gain, magnitude, norm, 0, out);
    if (multiplies) {
        result = multiply(whole, threads);
    } else {
        const Expanded outer = {y, h, NULL, NULL, whole.gain, adapts ? whole.bias : NULL, out, rank, stride, bf16};
        result = expand(outer, &b, &rank, 1, scale, 1, rows, threads);
        for (int64_t j = 0; adapts && !result && j < out; ++j) result = !(fabsf(gain[j]) <= limit);
    }
end:
    free(memory);
    free(tiles);
    return result;
}

/* Before the product with W, from dy: ``u = s D B`` and ``db = s Dᵀ h`` where they have an address, ``D = dy``. With a magnitude
   ``D = g dy`` is written to `scaled`, unless that is NULL, and ``dm = Σ_i dy (y - b) / m``, where y is ``keep (y - residual)``
   if there is a residual. `lost` says of each column whether too few digits of ``y - b`` are left for that; the result is how
   many are. h and u are columns of matrices, as in the forward pass. */
int64_t peftlite_output_gradients(const void *dy, int bf16, const float *b, float scale, int64_t rows, int64_t out, int64_t rank,
                                  const void *h, int64_t h_start, int64_t h_stride, void *u, int64_t u_start, int64_t u_stride,
                                  float *db, const void *y, const void *residual, float keep, const void *bias, int bf16_bias,
                                  const float *magnitude, const float *norm, float limit, void *scaled, float *dm, uint8_t *lost,
                                  int threads) {
    const int adapts = magnitude != NULL, summed = residual != NULL;
    float *const memory = malloc((4 * out + 1) * sizeof(float));
    float *const gain = memory, *const sizes = memory + out, *const around = memory + 2 * out, *const shift = memory + 3 * out;
    int64_t found = 0;
    if (!memory) return -1;
    for (int64_t j = 0; adapts && j < out; ++j) gain[j] = magnitude[j] / norm[j];
    if (adapts && bias) widen(shift, bias, bf16_bias, out);
    if (adapts || db) {
        const Columns pass = {.dy = dy, .y = y, .residual = residual, .h = db ? element(h, h_start, bf16) : NULL,
                              .gain = gain, .bias = adapts && bias ? shift : NULL, .scaled = scaled, .product = dm,
                              .sizes = sizes, .around = around, .shrunk = db, .rows = rows, .columns = out,
                              .rank = db ? rank : 0, .stride = h_stride, .keep = keep, .scale = scale,
                              .gained = !adapts ? 0 : summed ? SUMMED : GAINED, .bf16 = bf16};
        share(by_dots(bf16) ? columns_dot : BEST(columns), &pass, out, 32, rows * out, threads);
    }
    for (int64_t j = 0; adapts && j < out; ++j) {
        const float swamping = summed ? around[j] : bias ? fabsf(shift[j]) * (float)rows : 0.0f;
        dm[j] /= magnitude[j];
        lost[j] = !(swamping <= limit * sizes[j]) || !isfinite(dm[j]);
        found += lost[j];
    }
    if (u) {
        const Shrunk inner = {dy, NULL, NULL, (void *)element(u, u_start, bf16), out, rank, u_stride, bf16};
        if (shrink(inner, b, scale, adapts ? gain : NULL, 1, rows, threads)) found = -1;
    }
    free(memory);
    return found;
}

/* Behind the product dx = Σ D W, or with it where there are `terms`; then dx is bf16. ``dx += (u A) mask`` and
   ``da = uᵀ (x mask)`` where they have an address, for the A of `count` layers one below the other. */
int peftlite_input_gradients(void *dx, const void *x, int bf16, const uint8_t *mask, const void *u, const float *const *as,
                             const int64_t *ranks, int count, int64_t rows, int64_t in, float *da, const Term *terms, int threads) {
    int64_t rank = 0;
    for (int k = 0; k < count; ++k) rank += ranks[k];
    if (da) {
        const Columns pass = {.dy = x, .h = u, .mask = mask, .shrunk = da, .rows = rows, .columns = in, .rank = rank,
                              .stride = rank, .scale = 1, .transposed = 1, .bf16 = bf16};
        share(by_dots(bf16) ? columns_dot : BEST(columns), &pass, in, 32, rows * in, threads);
    }
    if (!dx) return 0;
    if (terms) {
        const Product whole = {.terms = terms, .y = dx, .h = u, .mask = mask, .factors = as, .ranks = ranks, .rows = rows,
                               .columns = in, .rank = rank, .stride = rank, .scale = 1, .count = count};
        return multiply(whole, threads);
    }
    const Expanded outer = {dx, u, mask, NULL, NULL, NULL, in, rank, rank, bf16};
    return expand(outer, as, ranks, count, 1, 0, rows, threads);
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
