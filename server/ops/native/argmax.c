/* The most likely token of each row of logits. Owns the order in which equals are taken: the first. */

#include <math.h>

#include "vectors.h"

/* logits (rows, width) -> found (rows,): where the largest number is, 0 where there is none above minus infinity. What
   is no number is passed over. */
void graft_argmax(const void *logits, int64_t stride, int64_t dtype, int64_t num_rows, int64_t width, int64_t *found,
                  int64_t num_threads) {
    ints lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * width >= 4 * WORTH_A_THREAD)
    for (int64_t row = 0; row < num_rows; row++) {
        floats most = all(-INFINITY);
        ints places = {0}, numbers = lanes;
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES, numbers += LANES) {
            floats values = dtype == BFLOAT16 ? load(logits, row * stride + k, LANES, BFLOAT16)
                                              : load(logits, row * stride + k, LANES, FLOAT32);
            ints is_more = values > most;
            most = chosen(is_more, values, most);
            places = (numbers & is_more) | (places & ~is_more);
        }
        float best = -INFINITY;
        int64_t place = 0;
        for (int lane = 0; lane < LANES; lane++)
            if (most[lane] > best || (most[lane] == best && best > -INFINITY && places[lane] < place)) {
                best = most[lane];
                place = places[lane];
            }
        for (; k < width; k++) {
            float value = load(logits, row * stride + k, 1, dtype)[0];
            if (value > best) {
                best = value;
                place = k;
            }
        }
        found[row] = place;
    }
}
