/* Weights in bfloat16 as processors multiply them: a tile of LANES outputs, two inputs of each side by side.

   Owns how they lie, and what a product in bfloat16 reads. Knows nothing about which instruction multiplies. */

#include "four_bit.h"

/* Of 4 bits, or, where `plain` is not null, bfloat16: (tiles, width / 2, LANES, 2). */
struct source {
    struct weight weight;
    const char *plain;
};

INLINE const char *plain_place(const struct source *source, int64_t tile, int64_t k) {
    return source->plain + bytes_of((tile * source->weight.width + k) * LANES, BFLOAT16);
}
