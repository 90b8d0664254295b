/* Products of bf16 rows with W by AVX512_BF16, and in the same sums what a layer adds to them.

   A panel holds what 64 columns of the result are multiplied by, two numbers that meet in one dot product side by side: first the
   low-rank factors, then the weights, all in bf16. It is packed once, and stays in cache while the rows pass by, 6 at a time,
   whose sums are 24 registers from the first product to the last. Nothing is rounded on the way. */

#define WIDE 64
#define TALL 6
#define LOOP _Pragma("GCC unroll 16") /* so that arrays become registers */

/* 16 pairs of bf16, the first of each pair from `low`. */
INLINE __m512i dot_pairs(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* The factors of all layers, in columns start .. of a panel. */
static void pack_factors(uint32_t *panel, const Product *p, int64_t start) {
    float tile[32 * (MAX_RANK + 1)];
    for (int64_t c = start; c < start + WIDE; c += 32) {
        memset(tile, 0, sizeof *tile * 32 * (p->rank + 1));
        for (int64_t k = 0, first = 0; c < p->columns && k < p->count; first += p->ranks[k++])
            pack_tile(tile + 32 * first, p->factors[k], p->scale, NULL, c, p->columns, p->ranks[k], p->transposed);
        for (int64_t q = 0; q < p->rank; q += 2)
            for (int64_t k = 0; k < 32; k += 16) {
                const float *const row = tile + 32 * q + k;
                const __m512i pairs = dot_pairs(half_narrow(_mm512_loadu_ps(row)), half_narrow(_mm512_loadu_ps(row + 32)));
                _mm512_store_si512(panel + WIDE / 2 * q + c - start + k, pairs);
            }
    }
}

/* 16 weights as bf16, times a gain. */
INLINE __m256i weight_half(const Term *t, int64_t at, __mmask16 lanes, float gain) {
    if (t->bf16 && !t->magnitude) return _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)t->weight + at);
    const __m512 value = t->bf16 ? half_load(t->weight, at, lanes) : _mm512_maskz_loadu_ps(lanes, (const float *)t->weight + at);
    return half_narrow(_mm512_mul_ps(value, _mm512_set1_ps(gain)));
}

/* Columns start .. of ``g W (inner, columns)``. */
static void pack_straight(uint32_t *panel, const Term *t, int64_t start, int64_t columns) {
    for (int64_t i = 0; i < t->inner; i += 2) {
        const float low = t->magnitude ? t->magnitude[i] / t->norm[i] : 1;
        const float high = t->magnitude ? t->magnitude[i + 1] / t->norm[i + 1] : 1;
        for (int64_t k = 0; k < WIDE; k += 16) {
            const __mmask16 lanes = half_lanes(columns - start - k);
            const int64_t at = i * columns + start + k;
            _mm512_store_si512(panel + WIDE / 2 * i + k,
                               dot_pairs(weight_half(t, at, lanes, low), weight_half(t, at + columns, lanes, high)));
        }
    }
}

/* 32 weights as bf16. */
INLINE __m512i weight_load(const Term *t, int64_t at, __mmask32 lanes) {
    if (t->bf16) return dot_load(t->weight, at, lanes);
    const float *const weight = (const float *)t->weight + at;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps((__mmask16)(lanes >> 16), weight + 16),
                                        _mm512_maskz_loadu_ps((__mmask16)lanes, weight));
}

/* Rows of 16 words become columns. */
INLINE void transpose(__m512i *rows) {
    __m512i next[16];
    LOOP for (int k = 0; k < 16; k += 2) {
        next[k] = _mm512_unpacklo_epi32(rows[k], rows[k + 1]);
        next[k + 1] = _mm512_unpackhi_epi32(rows[k], rows[k + 1]);
    }
    LOOP for (int k = 0; k < 16; k += 4) {
        rows[k] = _mm512_unpacklo_epi64(next[k], next[k + 2]);
        rows[k + 1] = _mm512_unpackhi_epi64(next[k], next[k + 2]);
        rows[k + 2] = _mm512_unpacklo_epi64(next[k + 1], next[k + 3]);
        rows[k + 3] = _mm512_unpackhi_epi64(next[k + 1], next[k + 3]);
    }
    LOOP for (int k = 0; k < 4; ++k) {
        next[k] = _mm512_shuffle_i32x4(rows[k], rows[k + 4], 0x88);
        next[k + 4] = _mm512_shuffle_i32x4(rows[k], rows[k + 4], 0xdd);
        next[k + 8] = _mm512_shuffle_i32x4(rows[k + 8], rows[k + 12], 0x88);
        next[k + 12] = _mm512_shuffle_i32x4(rows[k + 8], rows[k + 12], 0xdd);
    }
    LOOP for (int k = 0; k < 8; ++k) {
        rows[k] = _mm512_shuffle_i32x4(next[k], next[k + 8], 0x88);
        rows[k + 8] = _mm512_shuffle_i32x4(next[k], next[k + 8], 0xdd);
    }
}

/* Columns start .. of the transpose of ``W (columns, inner)``. */
static void pack_transposed(uint32_t *panel, const Term *t, int64_t start, int64_t columns) {
    for (int64_t k = 0; k < WIDE; k += 16)
        for (int64_t i = 0; i < t->inner; i += 32) {
            const int pairs = t->inner - i < 32 ? (int)(t->inner - i) / 2 : 16;
            __m512i rows[16];
            LOOP for (int r = 0; r < 16; ++r) {
                const int64_t row = start + k + r;
                rows[r] = row < columns ? weight_load(t, row * t->inner + i, dot_lanes(2 * pairs)) : _mm512_setzero_si512();
            }
            transpose(rows);
            LOOP for (int r = 0; r < 16; ++r) if (r < pairs) _mm512_store_si512(panel + WIDE * (i / 2 + r) + k, rows[r]);
        }
}

static void pack_panel(uint32_t *panel, const Product *p, int64_t start) {
    pack_factors(panel, p, start);
    panel += (p->rank + 1) / 2 * WIDE;
    for (const Term *t = p->terms; t < p->terms + p->count; panel += t++->inner / 2 * WIDE)
        if (p->transposed) pack_transposed(panel, t, start, p->columns);
        else pack_straight(panel, t, start, p->columns);
}

/* What `pairs` of numbers in rows of x, `stride` numbers apart, add to the sums of a tile. */
INLINE void product_add(__m512 (*sums)[WIDE / 16], const int rows, const uint16_t *x, int64_t stride, int64_t pairs,
                        const uint32_t *panel) {
    for (int64_t q = 0; q < pairs; ++q, panel += WIDE) {
        __m512i factors[WIDE / 16];
        LOOP for (int k = 0; k < WIDE / 16; ++k) factors[k] = _mm512_load_si512(panel + 16 * k);
        LOOP for (int r = 0; r < rows; ++r) {
            int pair;
            memcpy(&pair, x + r * stride + 2 * q, sizeof pair);
            LOOP for (int k = 0; k < WIDE / 16; ++k) sums[r][k] = dot(sums[r][k], _mm512_set1_epi32(pair), factors[k]);
        }
    }
}

/* Of the sums of a tile those that dropout keeps, and zeros. */
EDGE product_mask(const Product *p, int64_t i, int64_t start, int rows, __m512 (*sums)[WIDE / 16]) {
    for (int64_t c = start, k = 0; k < WIDE / 16 && c < p->columns; c += 16, ++k)
        for (int r = 0; r < rows; ++r) {
            const uint64_t bits = bits_of(p->mask, (i + r) * p->columns + c, p->columns - c < 16 ? (int)(p->columns - c) : 16);
            sums[r][k] = _mm512_maskz_mov_ps((__mmask16)bits, sums[r][k]);
        }
}

/* Columns start .. of rows i .., from their panel. */
INLINE void product_tile(const Product *p, const uint32_t *panel, int64_t i, int64_t start, const int rows) {
    __m512 sums[TALL][WIDE / 16];
    LOOP for (int r = 0; r < rows; ++r) LOOP for (int k = 0; k < WIDE / 16; ++k) sums[r][k] = _mm512_setzero_ps();
    if (p->rank) { /* first, so that the mask of dropout is for these sums alone */
        uint16_t h[TALL][MAX_RANK];
        for (int r = 0; r < rows; ++r)
            for (int64_t q = 0; q < p->rank; q += 32)
                _mm512_storeu_si512(h[r] + q, dot_load(p->h, (i + r) * p->stride + q, dot_lanes(p->rank - q)));
        product_add(sums, rows, *h, MAX_RANK, (p->rank + 1) / 2, panel);
        panel += (p->rank + 1) / 2 * WIDE;
    }
    if (p->mask) {
        __m512 kept[TALL][WIDE / 16]; /* the others have no address, so that they stay in registers */
        LOOP for (int r = 0; r < rows; ++r) LOOP for (int k = 0; k < WIDE / 16; ++k) kept[r][k] = sums[r][k];
        product_mask(p, i, start, rows, kept);
        LOOP for (int r = 0; r < rows; ++r) LOOP for (int k = 0; k < WIDE / 16; ++k) sums[r][k] = kept[r][k];
    }
    for (const Term *t = p->terms; t < p->terms + p->count; panel += t++->inner / 2 * WIDE)
        product_add(sums, rows, (const uint16_t *)t->x + i * t->inner, t->inner, t->inner / 2, panel);
    LOOP for (int k = 0; k < WIDE / 16; ++k) {
        const int64_t c = start + 16 * k;
        const __mmask16 lanes = half_lanes(p->columns - c);
        const __m512 gain = p->gain ? _mm512_maskz_loadu_ps(lanes, p->gain + c) : _mm512_set1_ps(1);
        const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(lanes, p->bias + c) : _mm512_setzero_ps();
        LOOP for (int r = 0; r < rows; ++r)
            half_store(p->y, (i + r) * p->columns + c, lanes, half_narrow(_mm512_fmadd_ps(gain, sums[r][k], bias)));
    }
}

EDGE product_tall(const Product *p, const uint32_t *panel, int64_t i, int64_t start) { product_tile(p, panel, i, start, TALL); }

EDGE product_rest(const Product *p, const uint32_t *panel, int64_t i, int64_t start, int64_t rows) {
    if (rows == 5) product_tile(p, panel, i, start, 5);
    if (rows == 4) product_tile(p, panel, i, start, 4);
    if (rows == 3) product_tile(p, panel, i, start, 3);
    if (rows == 2) product_tile(p, panel, i, start, 2);
    if (rows == 1) product_tile(p, panel, i, start, 1);
}

/* Parts first .. of the result: `parts` runs of rows of one panel, then those of the next. */
static void product(const Product *p, uint32_t *panel, int64_t first, int64_t last) {
    const int64_t tiles = (p->rows + TALL - 1) / TALL;
    for (int64_t at = first; at < last; ++at) {
        const int64_t start = at / p->parts * WIDE, part = at % p->parts;
        const int64_t end = tiles * (part + 1) / p->parts * TALL, stop = end < p->rows ? end : p->rows;
        if (p->normed) measured(p, start, start + WIDE < p->columns ? start + WIDE : p->columns); /* then they are in cache */
        if (at == first || !part) pack_panel(panel, p, start);
        int64_t i = tiles * part / p->parts * TALL;
        for (; i + TALL <= stop; i += TALL) product_tall(p, panel, i, start);
        if (i < stop) product_rest(p, panel, i, start, stop - i);
    }
}
