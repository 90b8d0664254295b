/* The passes of native.c for one instruction set. Included once for each; NAME(x) tells the copies apart.

   Sums run over 16 lanes in every copy, in an order that depends on the shapes alone. */

typedef float NAME(Vector) __attribute__((vector_size(64)));
typedef float NAME(AnyVector) __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t NAME(Words) __attribute__((vector_size(64)));
typedef uint16_t NAME(Halves) __attribute__((vector_size(32)));
typedef uint16_t NAME(AnyHalves) __attribute__((vector_size(32), aligned(2), may_alias));
typedef float NAME(Eight) __attribute__((vector_size(32)));
typedef float NAME(Four) __attribute__((vector_size(16)));
typedef uint64_t NAME(Longs) __attribute__((vector_size(64)));
#define V NAME(Vector)

/* Elements `at` .. `at + 15` of bf16 or fp32 memory; of the last `count` < 16 the rest is zero. */
INLINE V NAME(load)(const void *memory, int64_t at, int count, int bf16) {
    uint16_t halves[16] = {0};
    float floats[16] = {0};
    if (bf16) {
        const uint16_t *source = (const uint16_t *)memory + at;
        if (count < 16) {
            memcpy(halves, source, count * sizeof *halves);
            source = halves;
        }
        NAME(Words) words = __builtin_convertvector((NAME(Halves))*(const NAME(AnyHalves) *)source, NAME(Words));
        return (V)(words << 16);
    }
    const float *source = (const float *)memory + at;
    if (count < 16) {
        memcpy(floats, source, count * sizeof *floats);
        source = floats;
    }
    return (V)*(const NAME(AnyVector) *)source;
}

/* The reverse; to bf16 it rounds to nearest, ties to even, and keeps every NaN one. */
INLINE void NAME(store)(void *memory, int64_t at, int count, int bf16, V value) {
    if (bf16) {
        NAME(Words) bits = (NAME(Words))value;
        NAME(Words) rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        NAME(Words) nan = (NAME(Words))(value != value);
        NAME(Halves) halves = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), NAME(Halves));
        uint16_t *target = (uint16_t *)memory + at;
        if (count == 16) *(NAME(AnyHalves) *)target = halves;
        else for (int k = 0; k < count; ++k) target[k] = halves[k];
        return;
    }
    float *target = (float *)memory + at;
    if (count == 16) *(NAME(AnyVector) *)target = value;
    else for (int k = 0; k < count; ++k) target[k] = value[k];
}

INLINE V NAME(size)(V value) { return (V)((NAME(Words))value & 0x7fffffff); }

/* The sum of all lanes, the upper half added to the lower one until one is left. */
INLINE float NAME(total)(V value) {
    NAME(Eight) eight[2];
    NAME(Four) four[2];
    memcpy(eight, &value, sizeof value);
    eight[0] += eight[1];
    memcpy(four, eight, sizeof four);
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

/* value where its bit is 1, and 0 elsewhere. */
INLINE V NAME(where)(uint32_t bits, V value) {
    const NAME(Words) lanes = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (V)((NAME(Words))value & (NAME(Words))((((NAME(Words)){0} + bits) & lanes) != 0));
}

INLINE void NAME(put)(void *memory, int64_t at, int bf16, float value) {
    if (bf16) ((uint16_t *)memory)[at] = narrowed(value);
    else ((float *)memory)[at] = value;
}

/* Rows i .. of a matrix with so many columns, `stride` elements apart. */
INLINE void NAME(gather)(const void *memory, int64_t i, const int rows, int64_t columns, int64_t stride, const int bf16,
                         float (*out)[MAX_RANK]) {
    for (int k = 0; k < rows; ++k)
        for (int64_t q = 0; q < columns; ++q) {
            const int64_t at = (i + k) * stride + q;
            out[k][q] = bf16 ? widened(((const uint16_t *)memory)[at]) : ((const float *)memory)[at];
        }
}

/* What columns c .. of rows j .. of ``W + s B A`` add to the squares of the rows. */
INLINE void NAME(normed_tile)(const Normed *p, int64_t j, const int rows, int64_t c, const int first, const int second,
                              const int bf16, float (*factors)[MAX_RANK], V *squares) {
    const float *a = p->a + c * p->rank;
    V low[4], high[4];
    for (int i = 0; i < rows; ++i) {
        low[i] = NAME(load)(p->weight, (j + i) * p->in + c, first, bf16);
        high[i] = NAME(load)(p->weight, (j + i) * p->in + c + 16, second, bf16);
    }
    for (int64_t q = 0; q < p->rank; ++q, a += 32)
        for (int i = 0; i < rows; ++i) {
            low[i] += factors[i][q] * NAME(load)(a, 0, 16, 0);
            high[i] += factors[i][q] * NAME(load)(a, 16, 16, 0);
        }
    for (int i = 0; i < rows; ++i) squares[i] += low[i] * low[i] + high[i] * high[i];
}

EDGE NAME(normed_edge)(const Normed *p, int64_t j, int rows, int64_t c, int first, int second, float (*factors)[MAX_RANK],
                       V *squares) {
    NAME(normed_tile)(p, j, rows, c, first, second, p->bf16, factors, squares);
}

INLINE void NAME(normed_rows)(const Normed *p, int64_t j, const int rows, const int bf16) {
    float factors[4][MAX_RANK];
    V squares[4], done[4]; /* the first have no address, so that they stay in registers */
    for (int i = 0; i < rows; ++i) {
        for (int64_t q = 0; q < p->rank; ++q) factors[i][q] = p->scale * p->b[(j + i) * p->rank + q];
        squares[i] = (V){0};
    }
    int64_t c = 0;
    for (; c + 32 <= p->in; c += 32) NAME(normed_tile)(p, j, rows, c, 16, 16, bf16, factors, squares);
    for (int i = 0; i < rows; ++i) done[i] = squares[i];
    if (c < p->in) NAME(normed_edge)(p, j, rows, c, FIRST(p->in - c), SECOND(p->in - c), factors, done);
    for (int i = 0; i < rows; ++i) p->norm[j + i] = sqrtf(NAME(total)(done[i]));
}

EDGE NAME(normed_rest)(const Normed *p, int64_t j, int rows) { NAME(normed_rows)(p, j, rows, p->bf16); }

static void NAME(normed)(const void *pass, int64_t first, int64_t last) {
    const Normed *p = pass;
    int64_t j = first;
    if (p->bf16) for (; j + 4 <= last; j += 4) NAME(normed_rows)(p, j, 4, 1);
    else for (; j + 4 <= last; j += 4) NAME(normed_rows)(p, j, 4, 0);
    if (j < last) NAME(normed_rest)(p, j, (int)(last - j));
}

/* 16 columns of rows i .. of ``y + h Fᵀ``, masked, or of ``g (y + h Fᵀ) + (1 - g) b``, from ``h Fᵀ``. */
INLINE void NAME(expanded_half)(const Expanded *p, int64_t i, const int rows, int64_t c, const int count, const int bf16,
                                const V *sums) {
    if (!p->gain) {
        for (int k = 0; k < rows; ++k) {
            const int64_t at = (i + k) * p->out + c;
            const V sum = p->mask ? NAME(where)((uint32_t)bits_of(p->mask, at, count), sums[k]) : sums[k];
            NAME(store)(p->y, at, count, bf16, NAME(load)(p->y, at, count, bf16) + sum);
        }
        return;
    }
    const V gain = NAME(load)(p->gain, c, count, 0);
    const V rest = p->bias ? (1.0f - gain) * NAME(load)(p->bias, c, count, 0) : (V){0};
    for (int k = 0; k < rows; ++k) {
        const int64_t at = (i + k) * p->out + c;
        NAME(store)(p->y, at, count, bf16, gain * (NAME(load)(p->y, at, count, bf16) + sums[k]) + rest);
    }
}

INLINE void NAME(expanded_tile)(const Expanded *p, int64_t i, const int rows, int64_t c, const int low, const int high,
                                const int bf16, float (*inner)[MAX_RANK]) {
    const float *factors = (const float *)p->factors + c * p->rank;
    V left[4], right[4];
    for (int k = 0; k < rows; ++k) left[k] = right[k] = (V){0};
    for (int64_t q = 0; q < p->rank; ++q, factors += 32)
        for (int k = 0; k < rows; ++k) {
            left[k] += inner[k][q] * NAME(load)(factors, 0, 16, 0);
            right[k] += inner[k][q] * NAME(load)(factors, 16, 16, 0);
        }
    NAME(expanded_half)(p, i, rows, c, low, bf16, left);
    if (high) NAME(expanded_half)(p, i, rows, c + 16, high, bf16, right);
}

EDGE NAME(expanded_edge)(const Expanded *p, int64_t i, int rows, int64_t c, int low, int high, float (*inner)[MAX_RANK]) {
    NAME(expanded_tile)(p, i, rows, c, low, high, p->bf16, inner);
}

INLINE void NAME(expanded_rows)(const Expanded *p, int64_t i, const int rows, const int bf16) {
    float inner[4][MAX_RANK];
    NAME(gather)(p->h, i, rows, p->rank, p->stride, bf16, inner);
    int64_t c = 0;
    for (; c + 32 <= p->out; c += 32) NAME(expanded_tile)(p, i, rows, c, 16, 16, bf16, inner);
    if (c < p->out) NAME(expanded_edge)(p, i, rows, c, FIRST(p->out - c), SECOND(p->out - c), inner);
}

EDGE NAME(expanded_rest)(const Expanded *p, int64_t i, int rows) { NAME(expanded_rows)(p, i, rows, p->bf16); }

static void NAME(expanded)(const void *pass, int64_t first, int64_t last) {
    const Expanded *p = pass;
    int64_t i = first;
    if (p->bf16) for (; i + 4 <= last; i += 4) NAME(expanded_rows)(p, i, 4, 1);
    else for (; i + 4 <= last; i += 4) NAME(expanded_rows)(p, i, 4, 0);
    if (i < last) NAME(expanded_rest)(p, i, (int)(last - i));
}

/* What 16 features add to columns q .. of rows i .. of ``(x mask) Fᵀ``. */
INLINE void NAME(shrunk_step)(const Shrunk *p, int64_t i, const int rows, int64_t c, const int count, int64_t q, const int ranks,
                              const int bf16, const int masked, V (*sums)[8]) {
    const float *factors = (const float *)p->factors + (c / 32 * p->rank + q) * 32 + c % 32;
    V x[SHRUNK_ROWS];
    for (int k = 0; k < rows; ++k) {
        const int64_t at = (i + k) * p->features + c;
        x[k] = NAME(load)(p->x, at, count, bf16);
        if (masked) x[k] = NAME(where)((uint32_t)bits_of(p->mask, at, count), x[k]);
    }
    for (int r = 0; r < ranks; ++r)
        for (int k = 0; k < rows; ++k) sums[k][r] += x[k] * NAME(load)(factors, 32 * r, 16, 0);
}

/* The last features, from c on, and the sums over the lanes. */
EDGE NAME(shrunk_edge)(const Shrunk *p, int64_t i, int rows, int64_t c, int64_t q, int ranks, V (*sums)[8]) {
    const int count = (int)(p->features - c);
    if (count) NAME(shrunk_step)(p, i, rows, c, count, q, ranks, p->bf16, p->mask != NULL, sums);
    for (int k = 0; k < rows; ++k)
        for (int r = 0; r < ranks; ++r) NAME(put)(p->h, (i + k) * p->stride + q + r, p->bf16, NAME(total)(sums[k][r]));
}

INLINE void NAME(shrunk_tile)(const Shrunk *p, int64_t i, const int rows, int64_t q, const int ranks, const int bf16,
                              const int masked) {
    V sums[SHRUNK_ROWS][8], done[SHRUNK_ROWS][8]; /* the first have no address, so that they stay in registers */
    for (int k = 0; k < rows; ++k)
        for (int r = 0; r < ranks; ++r) sums[k][r] = (V){0};
    int64_t c = 0;
    for (; c + 16 <= p->features; c += 16) NAME(shrunk_step)(p, i, rows, c, 16, q, ranks, bf16, masked, sums);
    for (int k = 0; k < rows; ++k)
        for (int r = 0; r < ranks; ++r) done[k][r] = sums[k][r];
    NAME(shrunk_edge)(p, i, rows, c, q, ranks, done);
}

INLINE void NAME(shrunk_rows)(const Shrunk *p, int64_t i, const int rows, const int bf16, const int masked) {
    int64_t q = 0;
    for (; q + 8 <= p->rank; q += 8) NAME(shrunk_tile)(p, i, rows, q, 8, bf16, masked);
    if (p->rank & 4) NAME(shrunk_tile)(p, i, rows, q, 4, bf16, masked), q += 4;
    if (p->rank & 2) NAME(shrunk_tile)(p, i, rows, q, 2, bf16, masked), q += 2;
    if (p->rank & 1) NAME(shrunk_tile)(p, i, rows, q, 1, bf16, masked);
}

EDGE NAME(shrunk_rest)(const Shrunk *p, int64_t i, int rows) { NAME(shrunk_rows)(p, i, rows, p->bf16, p->mask != NULL); }

static void NAME(shrunk)(const void *pass, int64_t first, int64_t last) {
    const Shrunk *p = pass;
    int64_t i = first;
    if (p->bf16 && p->mask) for (; i + SHRUNK_ROWS <= last; i += SHRUNK_ROWS) NAME(shrunk_rows)(p, i, SHRUNK_ROWS, 1, 1);
    else if (p->bf16) for (; i + SHRUNK_ROWS <= last; i += SHRUNK_ROWS) NAME(shrunk_rows)(p, i, SHRUNK_ROWS, 1, 0);
    else if (p->mask) for (; i + SHRUNK_ROWS <= last; i += SHRUNK_ROWS) NAME(shrunk_rows)(p, i, SHRUNK_ROWS, 0, 1);
    else for (; i + SHRUNK_ROWS <= last; i += SHRUNK_ROWS) NAME(shrunk_rows)(p, i, SHRUNK_ROWS, 0, 0);
    if (i < last) NAME(shrunk_rest)(p, i, (int)(last - i));
}

/* What 16 columns of rows i .. add to the sums of `Columns` over rows; ``D = g dy``, or dy as the mask leaves it. */
INLINE void NAME(column_half)(const Columns *p, int64_t i, const int rows, int64_t first, int64_t c, const int count,
                              const int bf16, const int gained, float (*sums)[COLUMNS], V *dy) {
    V y[4];
    for (int k = 0; k < rows; ++k) { /* all before the first store: the processor takes one for another 4 KiB apart */
        const int64_t at = (i + k) * p->columns + first + c;
        dy[k] = NAME(load)(p->dy, at, count, bf16);
        if (gained) y[k] = NAME(load)(p->y, at, count, bf16);
        else if (p->mask) dy[k] = NAME(where)((uint32_t)bits_of(p->mask, at, count), dy[k]);
    }
    if (!gained) return;
    const V gain = NAME(load)(p->gain, first + c, count, 0);
    const V bias = p->bias ? NAME(load)(p->bias, first + c, count, 0) : (V){0};
    V products = NAME(load)(sums[0], c, 16, 0), sizes = NAME(load)(sums[1], c, 16, 0), around = NAME(load)(sums[2], c, 16, 0);
    for (int k = 0; k < rows; ++k) {
        const int64_t at = (i + k) * p->columns + first + c;
        V size;
        if (gained == SUMMED) {
            const V sum = y[k];
            y[k] = p->keep * (sum - NAME(load)(p->residual, at, count, bf16));
            around += NAME(size)(y[k]) + NAME(size)(sum);
            size = (V)((NAME(Words))NAME(size)(y[k] - bias) & (NAME(Words))(y[k] != 0)); /* what was dropped tells nothing */
        } else {
            size = NAME(size)(y[k] - bias);
        }
        products += dy[k] * (y[k] - bias);
        sizes += size;
        dy[k] *= gain;
        if (p->scaled) NAME(store)(p->scaled, at, count, bf16, dy[k]);
    }
    NAME(store)(sums[0], c, 16, 0, products);
    NAME(store)(sums[1], c, 16, 0, sizes);
    if (gained == SUMMED) NAME(store)(sums[2], c, 16, 0, around);
}

/* The same for columns c .., up to 32, and what they add to ``Σ h dy`` or, with a gain, ``Σ h D``. */
INLINE void NAME(column_tile)(const Columns *p, int64_t i, const int rows, int64_t first, int64_t c, const int low, const int high,
                              const int bf16, const int gained, float (*sums)[COLUMNS], float (*h)[MAX_RANK]) {
    V left[4], right[4];
    NAME(column_half)(p, i, rows, first, c, low, bf16, gained, sums, left);
    for (int k = 0; k < rows; ++k) right[k] = (V){0};
    if (high) NAME(column_half)(p, i, rows, first, c + 16, high, bf16, gained, sums, right);
    for (int64_t q = 0; q < p->rank; ++q) {
        V lower = NAME(load)(sums[3 + q], c, 16, 0), upper = NAME(load)(sums[3 + q], c + 16, 16, 0);
        for (int k = 0; k < rows; ++k) lower += h[k][q] * left[k], upper += h[k][q] * right[k];
        NAME(store)(sums[3 + q], c, 16, 0, lower);
        NAME(store)(sums[3 + q], c + 16, 16, 0, upper);
    }
}

EDGE NAME(column_edge)(const Columns *p, int64_t i, int rows, int64_t first, int64_t c, int low, int high, float (*sums)[COLUMNS],
                       float (*h)[MAX_RANK]) {
    NAME(column_tile)(p, i, rows, first, c, low, high, p->bf16, p->gained, sums, h);
}

INLINE void NAME(column_rows)(const Columns *p, int64_t i, const int rows, int64_t first, int64_t width, const int bf16,
                              const int gained, float (*sums)[COLUMNS]) {
    float h[4][MAX_RANK];
    NAME(gather)(p->h, i, rows, p->rank, p->stride, bf16, h);
    int64_t c = 0;
    for (; c + 32 <= width; c += 32) NAME(column_tile)(p, i, rows, first, c, 16, 16, bf16, gained, sums, h);
    if (c < width) NAME(column_edge)(p, i, rows, first, c, FIRST(width - c), SECOND(width - c), sums, h);
}

EDGE NAME(column_rest)(const Columns *p, int64_t i, int rows, int64_t first, int64_t width, float (*sums)[COLUMNS]) {
    NAME(column_rows)(p, i, rows, first, width, p->bf16, p->gained, sums);
}

INLINE void NAME(column_stripe)(const Columns *p, int64_t first, int64_t last, const int bf16, const int gained) {
    float part[3 + MAX_RANK][COLUMNS], total[3 + MAX_RANK][COLUMNS];
    const int64_t width = last - first;
    const size_t used = sizeof(float) * COLUMNS * (3 + p->rank);
    memset(total, 0, used);
    for (int64_t start = 0; start < p->rows; start += 64) { /* sums of sums: of many rows they would lose digits one by one */
        const int64_t stop = start + 64 < p->rows ? start + 64 : p->rows;
        memset(part, 0, used);
        int64_t i = start;
        for (; i + 4 <= stop; i += 4) NAME(column_rows)(p, i, 4, first, width, bf16, gained, part);
        if (i < stop) NAME(column_rest)(p, i, (int)(stop - i), first, width, part);
        column_add(total, part, p->rank, width);
    }
    column_put(p, first, width, total);
}

static void NAME(columns)(const void *pass, int64_t first, int64_t last) {
    const Columns *p = pass;
    for (; first < last; first += COLUMNS) {
        const int64_t stop = first + COLUMNS < last ? first + COLUMNS : last;
        if (p->bf16) {
            if (p->gained == SUMMED) NAME(column_stripe)(p, first, stop, 1, SUMMED);
            else if (p->gained) NAME(column_stripe)(p, first, stop, 1, GAINED);
            else NAME(column_stripe)(p, first, stop, 1, 0);
        } else {
            if (p->gained == SUMMED) NAME(column_stripe)(p, first, stop, 0, SUMMED);
            else if (p->gained) NAME(column_stripe)(p, first, stop, 0, GAINED);
            else NAME(column_stripe)(p, first, stop, 0, 0);
        }
    }
}

/* Runs of 16 elements of ``x mask``, or of ``out + x mask``. */
INLINE void NAME(masked_run)(const Masked *p, int64_t run, const int count, const int bf16) {
    V kept = NAME(where)((uint32_t)bits_of(p->mask, 16 * run, count), NAME(load)(p->x, 16 * run, count, bf16));
    if (p->add) kept += NAME(load)(p->out, 16 * run, count, bf16);
    NAME(store)(p->out, 16 * run, count, bf16, kept);
}

static void NAME(masked)(const void *pass, int64_t first, int64_t last) {
    const Masked *p = pass;
    const int64_t whole = p->elements / 16 < last ? p->elements / 16 : last;
    int64_t run = first;
    if (p->bf16) for (; run < whole; ++run) NAME(masked_run)(p, run, 16, 1);
    else for (; run < whole; ++run) NAME(masked_run)(p, run, 16, 0);
    if (run < last) NAME(masked_run)(p, run, (int)(p->elements - 16 * run), p->bf16);
}

/* Bytes of the mask: eight draws of SplitMix64 (Steele, Lea and Flood 2014) at a time decide on 32 elements, 4 bytes. */
static void NAME(drawn)(const void *pass, int64_t first, int64_t last) {
    const Drawn *p = pass;
    for (int64_t word = first; word < last; ++word) {
        NAME(Longs) z = (NAME(Longs)){0, 1, 2, 3, 4, 5, 6, 7} + (uint64_t)word * 8 + 1;
        z = p->seed + z * 0x9e3779b97f4a7c15ULL;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
        z ^= z >> 31;
        NAME(Longs) bits = {0};
        for (int k = 0; k < 4; ++k) {
            const NAME(Longs) kept = (NAME(Longs))(((z >> (16 * k)) & 0xffff) >= p->drops);
            bits |= kept & (uint64_t)(1 << k);
        }
        uint32_t all = 0;
        for (int k = 0; k < 8; ++k) all |= (uint32_t)bits[k] << (4 * k);
        p->words[word] = all;
    }
}

#undef V
