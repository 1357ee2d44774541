/* Weights of 4 bits as bitsandbytes quantizes them (Dettmers et al. 2023, arXiv:2305.14314): a weight is one of sixteen
   levels times the scale of its block, which is a part of one output's row.

   Owns how they lie. Knows nothing about how a weight was quantized, nor what it is multiplied with.

   Outputs lie in tiles of LANES. For every eight inputs a tile has a vector of words, an output's eight codes in each,
   the first in the lowest bits; for every block of inputs it has a vector of scales. So codes become weights by a
   lookup within a register. */

#include "vectors.h"

enum { CODES = 8, LEVELS = 16 }; /* in a word; that there are */

/* Weights below which a second thread costs more than it brings. */
enum { WEIGHTS_WORTH_A_THREAD = 8 * WORTH_A_THREAD };

struct weight {
    const uint32_t *codes;
    const float *scales, *levels, *bias; /* bias: null for none */
    int64_t width, block;
};

/* levels[code], the code in the lowest four bits of each word. */
INLINE floats looked_up(const float *levels, words codes) {
#if defined(__AVX512F__) && !defined(__clang__)
    return __builtin_shuffle(load(levels, 0, LEVELS, FLOAT32), (ints)codes); /* which reads no more than they */
#else
    floats found;
    codes &= 15;
    for (int lane = 0; lane < LANES; lane++) found[lane] = levels[codes[lane]];
    return found;
#endif
}

INLINE words codes_of(const struct weight *weight, int64_t tile, int64_t k) {
    const uint32_t *place = weight->codes + (tile * weight->width + k) / CODES * LANES;
    words codes;
    memcpy(&codes, place, sizeof codes);
    __builtin_prefetch(place + 16 * LANES);
    return codes;
}

INLINE floats scales_of(const struct weight *weight, int64_t tile, int64_t k) {
    return load(weight->scales, (tile * weight->width + k) / weight->block * LANES, LANES, FLOAT32);
}

INLINE floats bias_of(const struct weight *weight, int64_t tile) {
    return weight->bias ? load(weight->bias, tile * LANES, LANES, FLOAT32) : all(0);
}

/* For how many tokens a product is made that must be one of `num`: the next power of two. */
INLINE int64_t rounded_up(int64_t num) {
    int64_t tokens = 1;
    while (tokens < num) tokens *= 2;
    return tokens;
}
