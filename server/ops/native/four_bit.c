/* Products with weights of 4 bits on whatever vectors a processor has.

   Owns which sums are made at once. Nothing is rounded on the way: levels, scales and sums are float32. The sum of an
   output runs over its inputs in their order, whatever shares its batch and however many threads there are. */

#include "kernels.h"
#include "four_bit.h"

/* As many sums as registers hold: tokens at once, and tiles at once where tokens are few. */
#ifdef __AVX512F__
enum { MOST_TOKENS = 16, MOST_TILES = 4 };
INLINE int tiles_at_once(int num_tokens) { return num_tokens <= 4 ? 4 : 1; }
#else
enum { MOST_TOKENS = 4, MOST_TILES = 4 };
INLINE int tiles_at_once(int num_tokens) { return MOST_TOKENS / num_tokens; }
#endif

/* y[t] of `num_tiles` tiles, for `num` of the `num_tokens` tokens in x (width, num_tokens). */
INLINE void product(const struct weight *weight, int64_t tile, int num_tiles, int num_tokens, int64_t num,
                    const float *x, void *y, int64_t y_stride, int dtype) {
    floats sums[MOST_TILES][MOST_TOKENS];
    for (int i = 0; i < num_tiles; i++)
        for (int t = 0; t < num_tokens; t++) sums[i][t] = all(0);
    for (int64_t first = 0; first < weight->width; first += weight->block) {
        floats scales[MOST_TILES];
        for (int i = 0; i < num_tiles; i++) scales[i] = scales_of(weight, tile + i, first);
        for (int64_t k = first; k < first + weight->block; k += CODES)
            for (int i = 0; i < num_tiles; i++) {
                words codes = codes_of(weight, tile + i, k);
                for (int j = 0; j < CODES; j++, codes >>= 4) {
                    floats row = looked_up(weight->levels, codes) * scales[i];
                    for (int t = 0; t < num_tokens; t++) sums[i][t] += row * x[(k + j) * num_tokens + t];
                }
            }
    }
    for (int i = 0; i < num_tiles; i++) {
        int64_t n = (tile + i) * LANES;
        floats bias = bias_of(weight, tile + i);
        for (int t = 0; t < num_tokens; t++) /* of known length, so that the sums stay in registers */
            if (t < num) store(y, t * y_stride + n, LANES, sums[i][t] + bias, dtype);
    }
}

INLINE void products(const struct weight *weight, int64_t tile, int64_t last, int num_tokens, int64_t num,
                     const float *x, void *y, int64_t y_stride, int dtype) {
    int at_once = tiles_at_once(num_tokens);
    for (; tile + at_once <= last; tile += at_once)
        product(weight, tile, at_once, num_tokens, num, x, y, y_stride, dtype);
    for (; tile < last; tile++) product(weight, tile, 1, num_tokens, num, x, y, y_stride, dtype);
}

INLINE void products_of_any(const struct weight *weight, int64_t tile, int64_t last, int64_t num, const float *x,
                            void *y, int64_t y_stride, int dtype) {
    switch (rounded_up(num)) {
    case 1: products(weight, tile, last, 1, num, x, y, y_stride, dtype); break;
    case 2: products(weight, tile, last, 2, num, x, y, y_stride, dtype); break;
    case 4: products(weight, tile, last, 4, num, x, y, y_stride, dtype); break;
#if defined(__AVX512F__)
    case 8: products(weight, tile, last, 8, num, x, y, y_stride, dtype); break;
    default: products(weight, tile, last, 16, num, x, y, y_stride, dtype);
#endif
    }
}

/* x (num, width) -> turned (width, the next power of two) float32, zeros behind the last token. */
INLINE void turn(const void *x, int64_t x_stride, int dtype, int64_t num, int64_t width, float *turned) {
    int64_t num_tokens = rounded_up(num);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t k = 0; k < width; k++)
            turned[k * num_tokens + t] = t < num ? load(x, t * x_stride + k, 1, dtype)[0] : 0;
}

/* x (tokens, width) -> y (tokens, num_tiles * LANES): x W^T + bias, rounded once. `turned` is room for as many
   float32 numbers as x has, the tokens rounded up to a multiple of MOST_TOKENS. */
void graft_four_bit(const uint32_t *codes, const float *scales, const float *levels, const float *bias,
                    int64_t num_tiles, int64_t width, int64_t block, const void *x, int64_t x_stride, int64_t dtype,
                    int64_t num_tokens, float *turned, void *y, int64_t y_stride, int64_t num_threads) {
    struct weight weight = {codes, scales, levels, bias, width, block};
    int64_t num_items = (num_tiles + MOST_TILES - 1) / MOST_TILES;
    for (int64_t first = 0; first < num_tokens; first += MOST_TOKENS)
        turn(at(x, first * x_stride, dtype), x_stride, dtype, least(MOST_TOKENS, num_tokens - first), width,
             turned + first * width);
    (void)num_threads;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) \
    if (num_tiles * width * LANES >= WEIGHTS_WORTH_A_THREAD)
    for (int64_t item = 0; item < num_items; item++) {
        int64_t tile = item * MOST_TILES, last = least(tile + MOST_TILES, num_tiles);
        for (int64_t first = 0; first < num_tokens; first += MOST_TOKENS) {
            int64_t num = least(MOST_TOKENS, num_tokens - first);
            void *place = at(y, first * y_stride, dtype);
            if (dtype == BFLOAT16)
                products_of_any(&weight, tile, last, num, turned + first * width, place, y_stride, BFLOAT16);
            else
                products_of_any(&weight, tile, last, num, turned + first * width, place, y_stride, FLOAT32);
        }
    }
}

/* The weights themselves, as a matrix of the inputs' rows: (width, num_tiles * LANES), dense, rounded once. */
void graft_four_bit_weight(const uint32_t *codes, const float *scales, const float *levels, int64_t num_tiles,
                           int64_t width, int64_t block, void *matrix, int64_t dtype, int64_t num_threads) {
    struct weight weight = {codes, scales, levels, 0, width, block};
    int64_t num_items = (num_tiles + MOST_TILES - 1) / MOST_TILES;
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) \
    if (num_tiles * width * LANES >= WEIGHTS_WORTH_A_THREAD)
    for (int64_t item = 0; item < num_items; item++)
        for (int64_t k = 0; k < width; k += CODES)
            for (int64_t tile = item * MOST_TILES; tile < least((item + 1) * MOST_TILES, num_tiles); tile++) {
                words of_inputs = codes_of(&weight, tile, k);
                floats scale = scales_of(&weight, tile, k);
                for (int j = 0; j < CODES; j++, of_inputs >>= 4)
                    store(matrix, ((k + j) * num_tiles + tile) * LANES, LANES, looked_up(levels, of_inputs) * scale,
                          dtype);
            }
}
