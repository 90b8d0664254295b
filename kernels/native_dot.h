/* The low-rank products of native_passes.h over bf16 tensors by AVX512_BF16, whose dot products take two elements at a time.

   Factors are rounded to bf16, as products in bf16 round theirs. Sums are in fp32. */

/* Up to 32 elements of a row, zeros in place of those that are not among the `lanes`. */
INLINE __m512i dot_load(const void *memory, int64_t at, __mmask32 lanes) {
    return _mm512_maskz_loadu_epi16(lanes, (const uint16_t *)memory + at);
}

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

INLINE __mmask32 dot_lanes(int64_t count) { return count < 32 ? (1u << count) - 1 : ~0u; }

/* The bits of a mask for `count` lanes from element `at` on. */
INLINE __mmask32 dot_bits(const uint8_t *mask, int64_t at, int count) {
    if (count < 32) return (uint32_t)bits_of(mask, at, count) & dot_lanes(count);
    const int first = (int)(at & 7);
    uint32_t bits;
    memcpy(&bits, mask + at / 8, sizeof bits);
    return (uint32_t)((bits | (uint64_t)(first ? mask[at / 8 + 4] : 0) << 32) >> first);
}

INLINE __mmask16 half_lanes(int64_t count) { return (__mmask16)(count < 0 ? 0 : count < 16 ? (1u << count) - 1 : 0xffff); }

/* 16 elements of a row in fp32, and the reverse, which rounds to nearest, ties to even, and makes zeros of subnormal numbers. */
INLINE __m512 half_load(const void *memory, int64_t at, __mmask16 lanes) {
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)memory + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE __m256i half_narrow(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

INLINE void half_store(void *memory, int64_t at, __mmask16 lanes, __m256i halves) {
    _mm256_mask_storeu_epi16((uint16_t *)memory + at, lanes, halves);
}

/* Rows of factors in bf16, every 32 columns together. */
static void pack_rows(uint16_t *tiles, const float *factors, float scale, const float *gain, int64_t count, int64_t rank,
                      int transposed) {
    float tile[32 * MAX_RANK] = {0};
    for (int64_t start = 0; start < count; start += 32) {
        if (start + 32 > count) memset(tile, 0, sizeof tile);
        pack_tile(tile, factors, scale, gain, start, count, rank, transposed);
        for (int64_t k = 0; k < 32 * rank; k += 16)
            half_store(tiles, start * rank + k, 0xffff, half_narrow(_mm512_loadu_ps(tile + k)));
    }
}

/* Pairs of rows of factors in bf16, element by element beside each other; rows `first` .. of a matrix with so many `pairs`. */
static void pack_pairs(uint16_t *tiles, int64_t pairs, int64_t first, const float *factors, float scale, int64_t count, int64_t rank,
                       int transposed) {
    float tile[32 * MAX_RANK] = {0};
    for (int64_t start = 0; start < count; start += 32) {
        if (start + 32 > count) memset(tile, 0, sizeof tile);
        pack_tile(tile, factors, scale, NULL, start, count, rank, transposed);
        for (int64_t q = 0; q < rank; ++q)
            for (int64_t k = 0; k < 32; k += 16) {
                uint16_t *const pair = tiles + 2 * (start * pairs + (first + q) / 2 * 32 + k);
                const __m512i wide = _mm512_cvtepu16_epi32(half_narrow(_mm512_loadu_ps(tile + 32 * q + k)));
                const __m512i before = _mm512_loadu_si512(pair);
                _mm512_storeu_si512(pair, _mm512_or_si512(before, (first + q) % 2 ? _mm512_slli_epi32(wide, 16) : wide));
            }
    }
}

/* What up to 32 features add to columns q .. of rows i .. of ``(x mask) Fᵀ``. */
INLINE void shrunk_dot_step(const Shrunk *p, int64_t i, const int rows, int64_t c, const int count, int64_t q, const int ranks,
                            const int masked, __m512 (*sums)[8]) {
    const uint16_t *factors = (const uint16_t *)p->factors + c * p->rank + 32 * q;
    __m512i x[3];
    for (int k = 0; k < rows; ++k) {
        const int64_t at = (i + k) * p->features + c;
        x[k] = dot_load(p->x, at, masked ? dot_bits(p->mask, at, count) : dot_lanes(count));
    }
    for (int r = 0; r < ranks; ++r) {
        const __m512i f = _mm512_loadu_si512(factors + 32 * r);
        for (int k = 0; k < rows; ++k) sums[k][r] = dot(sums[k][r], x[k], f);
    }
}

/* The last features, from c on, and the sums over the lanes. */
EDGE shrunk_dot_edge(const Shrunk *p, int64_t i, int rows, int64_t c, int64_t q, int ranks, __m512 (*sums)[8]) {
    const int count = (int)(p->features - c);
    if (count) shrunk_dot_step(p, i, rows, c, count, q, ranks, p->mask != NULL, sums);
    for (int k = 0; k < rows; ++k)
        for (int r = 0; r < ranks; ++r)
            ((uint16_t *)p->h)[(i + k) * p->stride + q + r] = narrowed(_mm512_reduce_add_ps(sums[k][r]));
}

INLINE void shrunk_dot_tile(const Shrunk *p, int64_t i, const int rows, int64_t q, const int ranks, const int masked) {
    __m512 sums[3][8], done[3][8]; /* the first have no address, so that they stay in registers */
    for (int k = 0; k < rows; ++k)
        for (int r = 0; r < ranks; ++r) sums[k][r] = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + 32 <= p->features; c += 32) shrunk_dot_step(p, i, rows, c, 32, q, ranks, masked, sums);
    for (int k = 0; k < rows; ++k)
        for (int r = 0; r < ranks; ++r) done[k][r] = sums[k][r];
    shrunk_dot_edge(p, i, rows, c, q, ranks, done);
}

INLINE void shrunk_dot_rows(const Shrunk *p, int64_t i, const int rows, const int masked) {
    int64_t q = 0;
    for (; q + 8 <= p->rank; q += 8) shrunk_dot_tile(p, i, rows, q, 8, masked);
    if (p->rank & 4) shrunk_dot_tile(p, i, rows, q, 4, masked), q += 4;
    if (p->rank & 2) shrunk_dot_tile(p, i, rows, q, 2, masked), q += 2;
    if (p->rank & 1) shrunk_dot_tile(p, i, rows, q, 1, masked);
}

EDGE shrunk_dot_rest(const Shrunk *p, int64_t i, int rows) { shrunk_dot_rows(p, i, rows, p->mask != NULL); }

static void shrunk_dot(const void *pass, int64_t first, int64_t last) {
    const Shrunk *p = pass;
    int64_t i = first;
    if (p->mask) for (; i + 3 <= last; i += 3) shrunk_dot_rows(p, i, 3, 1);
    else for (; i + 3 <= last; i += 3) shrunk_dot_rows(p, i, 3, 0);
    if (i < last) shrunk_dot_rest(p, i, (int)(last - i));
}

/* 16 columns of rows i .. of ``y + h Fᵀ``, masked, or of ``g (y + h Fᵀ) + (1 - g) b``, from ``h Fᵀ``. */
INLINE void expanded_dot_half(const Expanded *p, int64_t i, const int rows, int64_t c, __mmask16 lanes, const __m512 *sums) {
    if (!p->gain) {
        for (int k = 0; k < rows; ++k) {
            const int64_t at = (i + k) * p->out + c;
            const int count = p->out - c < 16 ? (int)(p->out - c) : 16;
            const __m512 sum = p->mask ? _mm512_maskz_mov_ps((__mmask16)bits_of(p->mask, at, count), sums[k]) : sums[k];
            half_store(p->y, at, lanes, half_narrow(_mm512_add_ps(half_load(p->y, at, lanes), sum)));
        }
        return;
    }
    const __m512 gain = _mm512_maskz_loadu_ps(lanes, p->gain + c);
    __m512 rest = _mm512_setzero_ps();
    if (p->bias) rest = _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(1), gain), _mm512_maskz_loadu_ps(lanes, p->bias + c));
    for (int k = 0; k < rows; ++k) {
        const int64_t at = (i + k) * p->out + c;
        const __m512 inner = _mm512_add_ps(half_load(p->y, at, lanes), sums[k]);
        half_store(p->y, at, lanes, half_narrow(_mm512_fmadd_ps(gain, inner, rest)));
    }
}

INLINE void expanded_dot_tile(const Expanded *p, int64_t i, const int rows, int64_t c, const __mmask16 low, const __mmask16 high,
                              uint32_t (*inner)[MAX_RANK / 2]) {
    const int64_t pairs = (p->rank + 1) / 2;
    const uint16_t *factors = (const uint16_t *)p->factors + 2 * c * pairs;
    __m512 left[4], right[4];
    for (int k = 0; k < rows; ++k) left[k] = right[k] = _mm512_setzero_ps();
    for (int64_t q = 0; q < pairs; ++q, factors += 64) {
        const __m512i first = _mm512_loadu_si512(factors), second = _mm512_loadu_si512(factors + 32);
        for (int k = 0; k < rows; ++k) {
            const __m512i h = _mm512_set1_epi32((int)inner[k][q]);
            left[k] = dot(left[k], h, first);
            right[k] = dot(right[k], h, second);
        }
    }
    expanded_dot_half(p, i, rows, c, low, left);
    if (high) expanded_dot_half(p, i, rows, c + 16, high, right);
}

INLINE void expanded_dot_rows(const Expanded *p, int64_t i, const int rows) {
    uint32_t inner[4][MAX_RANK / 2];
    for (int k = 0; k < rows; ++k) {
        const uint16_t *h = (const uint16_t *)p->h + (i + k) * p->stride;
        for (int64_t q = 0; q < p->rank; q += 2) inner[k][q / 2] = h[q] | (q + 1 < p->rank ? (uint32_t)h[q + 1] << 16 : 0);
    }
    int64_t c = 0;
    for (; c + 32 <= p->out; c += 32) expanded_dot_tile(p, i, rows, c, 0xffff, 0xffff, inner);
    if (c < p->out) expanded_dot_tile(p, i, rows, c, half_lanes(p->out - c), half_lanes(p->out - c - 16), inner);
}

EDGE expanded_dot_rest(const Expanded *p, int64_t i, int rows) { expanded_dot_rows(p, i, rows); }

static void expanded_dot(const void *pass, int64_t first, int64_t last) {
    const Expanded *p = pass;
    int64_t i = first;
    for (; i + 4 <= last; i += 4) expanded_dot_rows(p, i, 4);
    if (i < last) expanded_dot_rest(p, i, (int)(last - i));
}

/* ``D = g dy`` of 16 columns of rows i .., rounded, and what they add to the sums of `Columns` over rows. */
INLINE void gained_dot_half(const Columns *p, int64_t i, const int rows, int64_t first, int64_t c, __mmask16 lanes, const int gained,
                            float (*sums)[COLUMNS], __m256i *scaled) {
    const __m512 gain = _mm512_maskz_loadu_ps(lanes, p->gain + first + c);
    const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(lanes, p->bias + first + c) : _mm512_setzero_ps();
    __m512 products = _mm512_loadu_ps(sums[0] + c), sizes = _mm512_loadu_ps(sums[1] + c), around = _mm512_loadu_ps(sums[2] + c);
    for (int k = 0; k < rows; ++k) {
        const int64_t at = (i + k) * p->columns + first + c;
        const __m512 dy = half_load(p->dy, at, lanes);
        __m512 y = half_load(p->y, at, lanes);
        __mmask16 counted = 0xffff;
        if (gained == SUMMED) {
            const __m512 sum = y;
            y = _mm512_mul_ps(_mm512_set1_ps(p->keep), _mm512_sub_ps(sum, half_load(p->residual, at, lanes)));
            around = _mm512_add_ps(around, _mm512_add_ps(_mm512_abs_ps(y), _mm512_abs_ps(sum)));
            counted = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NEQ_UQ); /* what was dropped tells nothing */
        }
        const __m512 inner = _mm512_sub_ps(y, bias);
        products = _mm512_fmadd_ps(dy, inner, products);
        sizes = _mm512_add_ps(sizes, _mm512_maskz_mov_ps(counted, _mm512_abs_ps(inner)));
        scaled[k] = half_narrow(_mm512_mul_ps(dy, gain));
        if (p->scaled) half_store(p->scaled, at, lanes, scaled[k]);
    }
    _mm512_storeu_ps(sums[0] + c, products);
    _mm512_storeu_ps(sums[1] + c, sizes);
    _mm512_storeu_ps(sums[2] + c, around);
}

/* What 32 columns of up to 8 rows add to the sums; `h` holds pairs of rows. Of 32 sums of `shrunk` the first 16 are those of columns
   8 l .. 8 l + 3, the others those of columns 8 l + 4 .. 8 l + 7, as the rows of a pair come to lie beside each other. */
INLINE void column_dot_tile(const Columns *p, int64_t i, const int rows, int64_t first, int64_t c, const int count, const int gained,
                            float (*sums)[COLUMNS], uint32_t (*h)[MAX_RANK]) {
    __m512i d[8], even[4], odd[4];
    if (gained) {
        __m256i low[8], high[8];
        gained_dot_half(p, i, rows, first, c, half_lanes(count), gained, sums, low);
        gained_dot_half(p, i, rows, first, c + 16, half_lanes(count - 16), gained, sums, high);
        for (int k = 0; k < rows; ++k) d[k] = _mm512_inserti64x4(_mm512_castsi256_si512(low[k]), high[k], 1);
    } else {
        for (int k = 0; k < rows; ++k) {
            const int64_t at = (i + k) * p->columns + first + c;
            d[k] = dot_load(p->dy, at, p->mask ? dot_bits(p->mask, at, count) : dot_lanes(count));
        }
    }
    for (int k = 0; k < rows; k += 2) {
        const __m512i next = k + 1 < rows ? d[k + 1] : _mm512_setzero_si512();
        even[k / 2] = _mm512_unpacklo_epi16(d[k], next);
        odd[k / 2] = _mm512_unpackhi_epi16(d[k], next);
    }
    for (int64_t q = 0; q < p->rank; ++q) {
        __m512 lower = _mm512_loadu_ps(sums[3 + q] + c), upper = _mm512_loadu_ps(sums[3 + q] + c + 16);
        for (int k = 0; k < rows; k += 2) {
            const __m512i pair = _mm512_set1_epi32((int)h[k / 2][q]);
            lower = dot(lower, pair, even[k / 2]);
            upper = dot(upper, pair, odd[k / 2]);
        }
        _mm512_storeu_ps(sums[3 + q] + c, lower);
        _mm512_storeu_ps(sums[3 + q] + c + 16, upper);
    }
}

INLINE void column_dot_rows(const Columns *p, int64_t i, const int rows, int64_t first, int64_t width, const int gained,
                            float (*sums)[COLUMNS]) {
    uint32_t pairs[4][MAX_RANK];
    const uint16_t *h = (const uint16_t *)p->h + i * p->stride;
    for (int k = 0; k < rows; k += 2)
        for (int64_t q = 0; q < p->rank; ++q)
            pairs[k / 2][q] = h[k * p->stride + q] | (k + 1 < rows ? (uint32_t)h[(k + 1) * p->stride + q] << 16 : 0);
    int64_t c = 0;
    for (; c + 32 <= width; c += 32) column_dot_tile(p, i, rows, first, c, 32, gained, sums, pairs);
    if (c < width) column_dot_tile(p, i, rows, first, c, (int)(width - c), gained, sums, pairs);
}

EDGE column_dot_rest(const Columns *p, int64_t i, int rows, int64_t first, int64_t width, float (*sums)[COLUMNS]) {
    column_dot_rows(p, i, rows, first, width, p->gained, sums);
}

INLINE void column_dot_stripe(const Columns *p, int64_t first, int64_t last, const int gained) {
    float part[3 + MAX_RANK][COLUMNS], total[3 + MAX_RANK][COLUMNS];
    const int64_t width = last - first;
    const size_t used = sizeof(float) * COLUMNS * (3 + p->rank);
    memset(total, 0, used);
    for (int64_t start = 0; start < p->rows; start += 64) {
        const int64_t stop = start + 64 < p->rows ? start + 64 : p->rows;
        memset(part, 0, used);
        int64_t i = start;
        for (; i + 8 <= stop; i += 8) column_dot_rows(p, i, 8, first, width, gained, part);
        if (i < stop) column_dot_rest(p, i, (int)(stop - i), first, width, part);
        column_add(total, part, p->rank, (width + 31) / 32 * 32);
    }
    for (int64_t q = 0; q < p->rank; ++q) /* back into the order of the columns */
        for (int64_t c = 0; c < width; c += 32) {
            float *const sums = total[3 + q] + c, row[32];
            for (int k = 0; k < 32; ++k) row[k] = sums[k / 8 * 4 + k % 4 + k % 8 / 4 * 16];
            memcpy(sums, row, sizeof row);
        }
    column_put(p, first, width, total);
}

static void columns_dot(const void *pass, int64_t first, int64_t last) {
    const Columns *p = pass;
    for (; first < last; first += COLUMNS) {
        const int64_t stop = first + COLUMNS < last ? first + COLUMNS : last;
        if (p->gained == SUMMED) column_dot_stripe(p, first, stop, SUMMED);
        else if (p->gained) column_dot_stripe(p, first, stop, GAINED);
        else column_dot_stripe(p, first, stop, 0);
    }
}
