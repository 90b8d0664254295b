/* The passes of native.c for one instruction set. Included once for each; NAME(x) tells the copies apart.

   Sums run over 16 lanes in every copy, in an order that depends on the shapes alone. */

typedef float NAME(Vector) __attribute__((vector_size(64)));
typedef float NAME(AnyVector) __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t NAME(Words) __attribute__((vector_size(64)));
typedef uint16_t NAME(Halves) __attribute__((vector_size(32)));
typedef uint16_t NAME(AnyHalves) __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint64_t NAME(Longs) __attribute__((vector_size(64)));
#define V NAME(Vector)

/* Elements `at` .. `at + 15` of bf16 or fp32 memory; of the last `count` < 16 the rest is zero. */
INLINE V NAME(load)(const void *memory, int64_t at, int count, int bf16) {
    uint16_t halves[16] = {0};
    float floats[16] = {0};
    if (bf16) {
        const uint16_t *source = (const uint16_t *)memory + at;
        if (count < 16) {
            for (int k = 0; k < count; ++k) halves[k] = source[k];
            source = halves;
        }
        NAME(Words) words = __builtin_convertvector((NAME(Halves))*(const NAME(AnyHalves) *)source, NAME(Words));
        return (V)(words << 16);
    }
    const float *source = (const float *)memory + at;
    if (count < 16) {
        for (int k = 0; k < count; ++k) floats[k] = source[k];
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

INLINE float NAME(total)(V value) {
    for (int half = 8; half; half /= 2)
        for (int k = 0; k < half; ++k) value[k] += value[k + half];
    return value[0];
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

/* Columns c .. of rows j .. of ``g (W + s B A)``, or what they add to the squares of the rows of ``W + s B A``. */
INLINE void NAME(updated_tile)(const Updated *p, int64_t j, const int rows, int64_t c, const int first, const int second,
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
    for (int i = 0; i < rows; ++i) {
        if (p->norm) {
            squares[i] += low[i] * low[i] + high[i] * high[i];
            continue;
        }
        NAME(store)(p->whole, (j + i) * p->in + c, first, 0, p->gain[j + i] * low[i]);
        NAME(store)(p->whole, (j + i) * p->in + c + 16, second, 0, p->gain[j + i] * high[i]);
    }
}

INLINE void NAME(updated_rows)(const Updated *p, int64_t j, const int rows, const int bf16) {
    float factors[4][MAX_RANK];
    V squares[4];
    for (int i = 0; i < rows; ++i) {
        for (int64_t q = 0; q < p->rank; ++q) factors[i][q] = p->scale * p->b[(j + i) * p->rank + q];
        squares[i] = (V){0};
    }
    int64_t c = 0;
    for (; c + 32 <= p->in; c += 32) NAME(updated_tile)(p, j, rows, c, 16, 16, bf16, factors, squares);
    if (c < p->in) NAME(updated_tile)(p, j, rows, c, FIRST(p->in - c), SECOND(p->in - c), bf16, factors, squares);
    if (p->norm)
        for (int i = 0; i < rows; ++i) p->norm[j + i] = sqrtf(NAME(total)(squares[i]));
}

static void NAME(updated)(const void *pass, int64_t first, int64_t last) {
    const Updated *p = pass;
    int64_t j = first;
    if (p->bf16) {
        for (; j + 4 <= last; j += 4) NAME(updated_rows)(p, j, 4, 1);
        for (; j < last; ++j) NAME(updated_rows)(p, j, 1, 1);
    } else {
        for (; j + 4 <= last; j += 4) NAME(updated_rows)(p, j, 4, 0);
        for (; j < last; ++j) NAME(updated_rows)(p, j, 1, 0);
    }
}

/* Columns c .. of rows i .. of ``g (y + h Fᵀ) + (1 - g) b``. */
INLINE void NAME(expanded_tile)(const Expanded *p, int64_t i, const int rows, int64_t c, const int low, const int high,
                                const int bf16, float (*inner)[MAX_RANK]) {
    const float *factors = p->factors + c * p->rank;
    V sums[4][2];
    for (int k = 0; k < rows; ++k) sums[k][0] = sums[k][1] = (V){0};
    for (int64_t q = 0; q < p->rank; ++q, factors += 32)
        for (int k = 0; k < rows; ++k) {
            sums[k][0] += inner[k][q] * NAME(load)(factors, 0, 16, 0);
            sums[k][1] += inner[k][q] * NAME(load)(factors, 16, 16, 0);
        }
    for (int half = 0; half < 2; ++half) {
        const int count = half ? high : low;
        const int64_t start = c + 16 * half;
        if (!count) break;
        const V gain = NAME(load)(p->gain, start, count, 0);
        const V rest = p->bias ? (1.0f - gain) * NAME(load)(p->bias, start, count, 0) : (V){0};
        for (int k = 0; k < rows; ++k) {
            const int64_t at = (i + k) * p->out + start;
            NAME(store)(p->y, at, count, bf16, gain * (NAME(load)(p->y, at, count, bf16) + sums[k][half]) + rest);
        }
    }
}

INLINE void NAME(expanded_rows)(const Expanded *p, int64_t i, const int rows, const int bf16) {
    float inner[4][MAX_RANK];
    NAME(gather)(p->h, i, rows, p->rank, p->stride, bf16, inner);
    int64_t c = 0;
    for (; c + 32 <= p->out; c += 32) NAME(expanded_tile)(p, i, rows, c, 16, 16, bf16, inner);
    if (c < p->out) NAME(expanded_tile)(p, i, rows, c, FIRST(p->out - c), SECOND(p->out - c), bf16, inner);
}

static void NAME(expanded)(const void *pass, int64_t first, int64_t last) {
    const Expanded *p = pass;
    int64_t i = first;
    if (p->bf16) {
        for (; i + 4 <= last; i += 4) NAME(expanded_rows)(p, i, 4, 1);
        for (; i < last; ++i) NAME(expanded_rows)(p, i, 1, 1);
    } else {
        for (; i + 4 <= last; i += 4) NAME(expanded_rows)(p, i, 4, 0);
        for (; i < last; ++i) NAME(expanded_rows)(p, i, 1, 0);
    }
}

/* What rows i .. add, in columns c .., to the sums over rows: ``Σ h dy`` or, for DoRA, ``Σ h D`` beside those of `Columns`. */
INLINE void NAME(column_tile)(const Columns *p, int64_t i, const int rows, int64_t first, int64_t c, const int count,
                              const int bf16, const int gained, float (*sums)[COLUMNS], float (*h)[MAX_RANK]) {
    V dy[4], y[4];
    for (int k = 0; k < rows; ++k) { /* all before the first store: the processor takes one for another 4 KiB apart */
        const int64_t at = (i + k) * p->columns + first + c;
        dy[k] = NAME(load)(p->dy, at, count, bf16);
        if (gained) y[k] = NAME(load)(p->y, at, count, bf16);
    }
    if (gained) {
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
    for (int64_t q = 0; q < p->rank; ++q) {
        V sum = NAME(load)(sums[3 + q], c, 16, 0);
        for (int k = 0; k < rows; ++k) sum += h[k][q] * dy[k];
        NAME(store)(sums[3 + q], c, 16, 0, sum);
    }
}

INLINE void NAME(column_rows)(const Columns *p, int64_t i, const int rows, int64_t first, int64_t width, const int bf16,
                              const int gained, float (*sums)[COLUMNS]) {
    float h[4][MAX_RANK];
    NAME(gather)(p->h, i, rows, p->rank, p->stride, bf16, h);
    int64_t c = 0;
    for (; c + 16 <= width; c += 16) NAME(column_tile)(p, i, rows, first, c, 16, bf16, gained, sums, h);
    if (c < width) NAME(column_tile)(p, i, rows, first, c, (int)(width - c), bf16, gained, sums, h);
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
        for (; i < stop; ++i) NAME(column_rows)(p, i, 1, first, width, bf16, gained, part);
        for (int64_t s = gained ? 0 : 3; s < 3 + p->rank; ++s)
            for (int64_t c = 0; c < width; ++c) total[s][c] += part[s][c];
    }
    if (gained) memcpy(p->product + first, total[0], width * sizeof(float));
    if (gained) memcpy(p->sizes + first, total[1], width * sizeof(float));
    if (gained == SUMMED) memcpy(p->around + first, total[2], width * sizeof(float));
    for (int64_t q = 0; q < p->rank; ++q)
        for (int64_t c = 0; c < width; ++c)
            p->shrunk[p->transposed ? q * p->columns + first + c : (first + c) * p->rank + q] = p->scale * total[3 + q][c];
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
    uint16_t bits = p->mask[2 * run];
    if (count > 8) bits |= (uint16_t)(p->mask[2 * run + 1] << 8);
    const NAME(Words) lanes = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const NAME(Words) stays = (NAME(Words))((((NAME(Words)){0} + bits) & lanes) != 0);
    V kept = (V)((NAME(Words))NAME(load)(p->x, 16 * run, count, bf16) & stays);
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
