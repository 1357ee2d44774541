/* Products in bfloat16 by vectors that multiply pairs (AVX512-BF16), where the processor has such.

   Owns which sums are made at once. Sums are float32. Of 4-bit weights the levels are rounded to bfloat16, and the sum
   of a block is multiplied by its scale. A token's sum runs over the inputs in their order, by itself, so it is the same
   to the bit in any batch and with any number of threads. */

#include "kernels.h"
#include "pairs.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>

/* As many sums as registers hold: tokens at once, and tiles at once where tokens are few. */
enum { MOST_TOKENS = 16, MOST_TILES = 4 };
INLINE int tiles_at_once(int num_tokens) { return num_tokens == 1 ? 2 : 1; }

/* A tile's sums with the products of two inputs of one token added. */
INLINE floats added(floats sums, words weights, uint32_t inputs) {
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(inputs));
}

/* The levels in bfloat16, twice over, so that the lookup below need not clear the bit behind a code. */
INLINE words rounded_levels(const float *levels) {
    words table;
    halves once = narrowed(load(levels, 0, LEVELS, FLOAT32));
    memcpy(&table, &once, sizeof once);
    memcpy((char *)&table + sizeof once, &once, sizeof once);
    return table;
}

/* Of the codes of eight inputs, the levels of the pair `number`: its codes are moved to the low bits of both halves. */
INLINE words pair_of(words table, words codes, int number) {
    int up = 12 - 8 * number;
    words first = codes >> (8 * number), second = up > 0 ? codes << up : codes >> -up;
    __m512i index = _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)first, (__m512i)second);
    return (words)_mm512_permutexvar_epi16(index, (__m512i)table);
}

/* Adds the products of the inputs [first, last) to `sums`, x (width / 2, num_tokens) in pairs. */
INLINE void add_products(const struct source *source, words table, int64_t tile, int num_tiles, int num_tokens,
                         int64_t first, int64_t last, const uint32_t *x, int is_plain,
                         floats sums[MOST_TILES][MOST_TOKENS]) {
    for (int64_t k = first; k < last; k += CODES)
        for (int i = 0; i < num_tiles; i++) {
            const char *place = plain_place(source, tile + i, k);
            words codes = {0};
            if (!is_plain) codes = codes_of(&source->weight, tile + i, k);
            for (int j = 0; j < CODES / 2; j++) {
                words pair;
                if (is_plain) {
                    memcpy(&pair, place + j * sizeof pair, sizeof pair);
                    __builtin_prefetch(place + j * sizeof pair + 4096);
                } else {
                    pair = pair_of(table, codes, j);
                }
                for (int t = 0; t < num_tokens; t++)
                    sums[i][t] = added(sums[i][t], pair, x[(k / 2 + j) * num_tokens + t]);
            }
        }
}

/* y[t] of `num_tiles` tiles, for `num` of the `num_tokens` tokens in x. */
INLINE void product(const struct source *source, words table, int64_t tile, int num_tiles, int num_tokens, int64_t num,
                    const uint32_t *x, void *y, int64_t y_stride, int is_plain) {
    const struct weight *weight = &source->weight;
    floats sums[MOST_TILES][MOST_TOKENS];
    for (int i = 0; i < num_tiles; i++)
        for (int t = 0; t < num_tokens; t++) sums[i][t] = all(0);
    if (is_plain) {
        add_products(source, table, tile, num_tiles, num_tokens, 0, weight->width, x, 1, sums);
    } else {
        for (int64_t first = 0; first < weight->width; first += weight->block) {
            floats parts[MOST_TILES][MOST_TOKENS];
            for (int i = 0; i < num_tiles; i++)
                for (int t = 0; t < num_tokens; t++) parts[i][t] = all(0);
            add_products(source, table, tile, num_tiles, num_tokens, first, first + weight->block, x, 0, parts);
            for (int i = 0; i < num_tiles; i++) {
                floats scales = scales_of(weight, tile + i, first);
                for (int t = 0; t < num_tokens; t++) sums[i][t] += parts[i][t] * scales;
            }
        }
    }
    for (int i = 0; i < num_tiles; i++) {
        floats bias = bias_of(weight, tile + i);
        for (int t = 0; t < num_tokens; t++) /* of known length, so that the sums stay in registers */
            if (t < num) store(y, t * y_stride + (tile + i) * LANES, LANES, sums[i][t] + bias, BFLOAT16);
    }
}

INLINE void products(const struct source *source, int64_t tile, int64_t last, int num_tokens, int64_t num,
                     const uint32_t *x, void *y, int64_t y_stride, int is_plain) {
    words table = {0};
    if (!is_plain) table = rounded_levels(source->weight.levels);
    int at_once = tiles_at_once(num_tokens);
    for (; tile + at_once <= last; tile += at_once)
        product(source, table, tile, at_once, num_tokens, num, x, y, y_stride, is_plain);
    for (; tile < last; tile++) product(source, table, tile, 1, num_tokens, num, x, y, y_stride, is_plain);
}

INLINE void products_of_any(const struct source *source, int64_t tile, int64_t last, int64_t num, const uint32_t *x,
                            void *y, int64_t y_stride, int is_plain) {
    switch (rounded_up(num)) {
    case 1: products(source, tile, last, 1, num, x, y, y_stride, is_plain); break;
    case 2: products(source, tile, last, 2, num, x, y, y_stride, is_plain); break;
    case 4: products(source, tile, last, 4, num, x, y, y_stride, is_plain); break;
    case 8: products(source, tile, last, 8, num, x, y, y_stride, is_plain); break;
    default: products(source, tile, last, 16, num, x, y, y_stride, is_plain);
    }
}

/* x (num, width) -> turned (width / 2, the next power of two): pairs, zeros behind the last token. */
INLINE void turn(const char *x, int64_t x_stride, int64_t num, int64_t width, uint32_t *turned) {
    int64_t num_tokens = rounded_up(num);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t k = 0; k < width / 2; k++) {
            uint32_t pair = 0;
            if (t < num) memcpy(&pair, at(x, t * x_stride + 2 * k, BFLOAT16), sizeof pair);
            turned[k * num_tokens + t] = pair;
        }
}

/* Of a weight that lies as rows: sums of one token and output are in one vector, for so many at once. */
enum { ROW_TOKENS = 8, PAIRS = 2 * LANES };
INLINE int rows_at_once(int num_tokens) { return num_tokens <= 4 ? 4 : 2; }

/* y[t] of at most LANES outputs, for `num_tokens` tokens. */
INLINE void rows_product(const char *rows, int64_t num_rows, const float *bias, int num_tokens, const char *x,
                         int64_t x_stride, int64_t width, void *y, int64_t y_stride) {
    floats products[ROW_TOKENS][LANES];
    int at_once = rows_at_once(num_tokens);
    for (int64_t row = 0; row < LANES; row += at_once) {
        floats sums[4][ROW_TOKENS];
        for (int i = 0; i < at_once; i++)
            for (int t = 0; t < num_tokens; t++) sums[i][t] = all(0);
        for (int64_t k = 0; k < width; k += PAIRS)
            for (int i = 0; i < at_once; i++) {
                if (row + i >= num_rows) continue;
                const char *place = at(rows, (row + i) * width + k, BFLOAT16);
                __m512bh weights = (__m512bh)_mm512_loadu_si512(place);
                __builtin_prefetch(place + at_once * 2048);
                for (int t = 0; t < num_tokens; t++)
                    sums[i][t] = (floats)_mm512_dpbf16_ps(
                        (__m512)sums[i][t], weights, (__m512bh)_mm512_loadu_si512(at(x, t * x_stride + k, BFLOAT16)));
            }
        for (int i = 0; i < at_once; i++)
            for (int t = 0; t < num_tokens; t++) products[t][row + i] = sums[i][t];
    }
    for (int t = 0; t < num_tokens; t++) {
        floats sums = totals(products[t]);
        if (bias) sums += load(bias, 0, num_rows, FLOAT32);
        store(y, t * y_stride, num_rows, sums, BFLOAT16);
    }
}

/* For any number of tokens up to ROW_TOKENS. */
INLINE void rows_product_of_any(const char *rows, int64_t num_rows, const float *bias, int64_t num_tokens,
                                const char *x, int64_t x_stride, int64_t width, void *y, int64_t y_stride) {
    while (num_tokens > 0) {
        int64_t num = num_tokens >= 8 ? 8 : num_tokens >= 4 ? 4 : num_tokens >= 2 ? 2 : 1;
        switch (num) {
        case 8: rows_product(rows, num_rows, bias, 8, x, x_stride, width, y, y_stride); break;
        case 4: rows_product(rows, num_rows, bias, 4, x, x_stride, width, y, y_stride); break;
        case 2: rows_product(rows, num_rows, bias, 2, x, x_stride, width, y, y_stride); break;
        default: rows_product(rows, num_rows, bias, 1, x, x_stride, width, y, y_stride);
        }
        num_tokens -= num;
        x = at(x, num * x_stride, BFLOAT16);
        y = at(y, num * y_stride, BFLOAT16);
    }
}
#endif

int64_t graft_has_pair_vectors(void) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    return 1;
#else
    return 0;
#endif
}

/* x (tokens, width) -> y (tokens, num_tiles * LANES), both bfloat16: x W^T + bias, rounded once. The weight is as
   `graft_unit_product` has it. `turned` is room for as many numbers as x has, the tokens rounded up to a multiple of
   16. Not to be called without such vectors. */
void graft_pair_product(const void *plain, const uint32_t *codes, const float *scales, const float *levels,
                        const float *bias, int64_t num_tiles, int64_t width, int64_t block, const void *x,
                        int64_t x_stride, int64_t num_tokens, uint32_t *turned, void *y, int64_t y_stride,
                        int64_t num_threads) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    struct source source = {{codes, scales, levels, bias, width, block}, plain};
    int64_t num_items = (num_tiles + MOST_TILES - 1) / MOST_TILES;
    for (int64_t first = 0; first < num_tokens; first += MOST_TOKENS)
        turn(at(x, first * x_stride, BFLOAT16), x_stride, least(MOST_TOKENS, num_tokens - first), width,
             turned + first * width / 2);
    (void)num_threads;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) \
    if (num_tiles * width * LANES >= WEIGHTS_WORTH_A_THREAD)
    for (int64_t item = 0; item < num_items; item++) {
        int64_t tile = item * MOST_TILES, last = least(tile + MOST_TILES, num_tiles);
        for (int64_t first = 0; first < num_tokens; first += MOST_TOKENS) {
            int64_t num = least(MOST_TOKENS, num_tokens - first);
            const uint32_t *inputs = turned + first * width / 2;
            void *place = at(y, first * y_stride, BFLOAT16);
            if (plain) products_of_any(&source, tile, last, num, inputs, place, y_stride, 1);
            else products_of_any(&source, tile, last, num, inputs, place, y_stride, 0);
        }
    }
#else
    (void)plain, (void)codes, (void)scales, (void)levels, (void)bias, (void)num_tiles, (void)width, (void)block;
    (void)x, (void)x_stride, (void)num_tokens, (void)turned, (void)y, (void)y_stride, (void)num_threads;
#endif
}

/* The same for a weight that lies as it is trained, (d_out, width) in bfloat16, whose width is a multiple of 32. */
void graft_rows_product(const void *weight, const float *bias, int64_t d_out, int64_t width, const void *x,
                        int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int64_t num_threads) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (d_out * width >= WEIGHTS_WORTH_A_THREAD)
    for (int64_t row = 0; row < d_out; row += LANES)
        rows_product_of_any(at(weight, row * width, BFLOAT16), least(LANES, d_out - row), bias ? bias + row : 0,
                            num_tokens, x, x_stride, width, at(y, row, BFLOAT16), y_stride);
#else
    (void)weight, (void)bias, (void)d_out, (void)width, (void)x, (void)x_stride, (void)num_tokens, (void)y;
    (void)y_stride, (void)num_threads;
#endif
}
