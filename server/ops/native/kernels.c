/* The ops on a processor: the meaning of `reference.py`, reading rank rows where they lie, as the Triton kernels
   do.

   Owns the arithmetic. Knows nothing about who fills the sheets or cuts the runs, nor about Python.

   Numbers are float32 or bfloat16 in memory and float32 in every sum. The sums of one token have the same order
   whatever shares its batch, so an answer does not depend on its neighbours. Strides are in elements; the last
   dimension is dense. */

#include <math.h>

#include "kernels.h"
#include "vectors.h"

/* As sheets.py has them. */
enum { RANK, DOWN, UP, MID_SCALE, MID_SHIFT, IN_SCALE, UP_SCALE, OUT_SCALE, OUT_SHIFT, NUM_FIELDS };
enum { SITE, WIDTH, COLUMN, ROW_STRIDE, VECTOR_STRIDE, NUM_COLUMNS };

/* e^x within two units in the last place: e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its series to r^7. What is
   below 2^-126 becomes 0, and what is no number stays none. */
INLINE floats exponential(floats x) {
    floats bounded = chosen(x > 88.7f, all(88.7f), chosen(x < -87.3f, all(-87.3f), x));
    floats shifted = bounded * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum is rounded to a whole number */
    floats n = shifted - 12582912.0f;
    floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f; /* ln(2) in two parts (Cody and Waite 1980) */
    floats series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r * r + r + 1.0f;
    words power = ((words)shifted - 0x4b400000u + 127u) << 23;
    return chosen(x != x, x, chosen(x < -87.3f, all(0), series * (floats)power));
}

/* The adapters' tables. */

struct run {
    int64_t first, num;   /* tokens order[first] ... */
    const int32_t *sheet; /* of the first, whose rows are those of all */
    const int32_t *fields;
    int64_t rank;
};

INLINE const int32_t *sheet_of(const int64_t *addresses, int64_t slot) { return (const int32_t *)addresses[slot]; }

INLINE const int32_t *fields_of(const int32_t *sheet, const int32_t *members, int64_t member) {
    return sheet + (int64_t)members[member * NUM_COLUMNS + SITE] * NUM_FIELDS;
}

INLINE struct run run_of(int64_t number, int64_t member, const int64_t *addresses, const int32_t *members,
                         const int64_t *slots, const int64_t *order, const int64_t *starts) {
    struct run run = {starts[number], starts[number + 1] - starts[number], 0, 0, 0};
    if (run.num) {
        run.sheet = sheet_of(addresses, slots[order[run.first]]);
        run.fields = fields_of(run.sheet, members, member);
        run.rank = run.fields[RANK];
    }
    return run;
}

/* Shrink. */

INLINE void add_products(int num_x, int num_rows, const char *const *x, const char *const *rows, int64_t k, int64_t n,
                         floats sums[4][8], int x_dtype, int dtype) {
    floats inputs[4];
    for (int t = 0; t < num_x; t++) inputs[t] = load(x[t], k, n, x_dtype);
    for (int i = 0; i < num_rows; i++) {
        floats row = load(rows[i], k, n, dtype);
        for (int t = 0; t < num_x; t++) sums[t][i] += inputs[t] * row;
    }
}

INLINE void dots(int num_x, int num_rows, const char *const *x, const char *const *rows, int64_t width, float *const *h,
                 int x_dtype, int dtype) {
    floats sums[4][8];
    for (int t = 0; t < num_x; t++)
        for (int i = 0; i < num_rows; i++) sums[t][i] = all(0);
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) add_products(num_x, num_rows, x, rows, k, LANES, sums, x_dtype, dtype);
    if (k < width) add_products(num_x, num_rows, x, rows, k, width - k, sums, x_dtype, dtype);
    for (int t = 0; t < num_x; t++)
        for (int i = 0; i < num_rows; i++) h[t][i] = total(sums[t][i]);
}

INLINE void shrink_run(struct run run, const void *x, int64_t x_stride, const void *buffer, int64_t stride,
                       const int64_t *order, float *h, int64_t h_stride, int64_t width, int x_dtype, int dtype) {
    const int32_t *numbers = run.sheet + run.fields[DOWN];
    for (int64_t first = 0; first < run.num;) {
        int num_x = run.num - first >= 4 ? 4 : 1;
        const char *inputs[4];
        float *outputs[4];
        for (int t = 0; t < num_x; t++) {
            int64_t token = order[run.first + first + t];
            inputs[t] = at(x, token * x_stride, x_dtype);
            outputs[t] = h + token * h_stride;
        }
        for (int64_t i = 0; i < run.rank;) {
            int64_t left = run.rank - i;
            int num_rows = num_x == 1 && left >= 8 ? 8 : left >= 4 ? 4 : 1;
            const char *rows[8];
            for (int r = 0; r < num_rows; r++) rows[r] = at(buffer, numbers[i + r] * stride, dtype);
            if (num_rows == 8) dots(1, 8, inputs, rows, width, outputs, x_dtype, dtype);
            else if (num_x == 4 && num_rows == 4) dots(4, 4, inputs, rows, width, outputs, x_dtype, dtype);
            else if (num_x == 4) dots(4, 1, inputs, rows, width, outputs, x_dtype, dtype);
            else if (num_rows == 4) dots(1, 4, inputs, rows, width, outputs, x_dtype, dtype);
            else dots(1, 1, inputs, rows, width, outputs, x_dtype, dtype);
            for (int t = 0; t < num_x; t++) outputs[t] += num_rows;
            i += num_rows;
        }
        first += num_x;
    }
}

/* x (tokens, width) -> h (tokens, members, max_rank) float32: dot(down[i], x[t]), where a token's adapter has rows.
   Runs of more than `longest` tokens are left out, here and in `graft_expand`: a library's product is better for
   those. */
void graft_shrink(const void *x, int64_t x_stride, int64_t x_dtype, const void *buffer, int64_t dtype, int64_t stride,
                  const int64_t *addresses, const int32_t *members, int64_t num_members, const int64_t *slots,
                  const int64_t *order, const int64_t *starts, int64_t num_runs, float *h, int64_t max_rank,
                  int64_t width, int64_t longest, int64_t num_threads) {
    int64_t num_items = num_runs * num_members, h_stride = num_members * max_rank;
    (void)num_threads;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_items * width >= WORTH_A_THREAD)
    for (int64_t item = 0; item < num_items; item++) {
        int64_t member = item % num_members;
        struct run run = run_of(item / num_members, member, addresses, members, slots, order, starts);
        if (!run.rank || run.num > longest) continue;
        float *own = h + member * max_rank;
        if (x_dtype == BFLOAT16 && dtype == BFLOAT16)
            shrink_run(run, x, x_stride, buffer, stride, order, own, h_stride, width, BFLOAT16, BFLOAT16);
        else if (x_dtype == FLOAT32 && dtype == FLOAT32)
            shrink_run(run, x, x_stride, buffer, stride, order, own, h_stride, width, FLOAT32, FLOAT32);
        else
            shrink_run(run, x, x_stride, buffer, stride, order, own, h_stride, width, x_dtype, dtype);
    }
}

/* The same for an embedding, whose input is a one-hot row: ids (tokens,) -> h (tokens, max_rank). */
void graft_embed(const int64_t *ids, const void *buffer, int64_t dtype, int64_t stride, const int64_t *addresses,
                 const int32_t *members, const int64_t *slots, const int64_t *order, const int64_t *starts,
                 int64_t num_runs, float *h, int64_t max_rank) {
    for (int64_t number = 0; number < num_runs; number++) {
        struct run run = run_of(number, 0, addresses, members, slots, order, starts);
        if (!run.rank) continue;
        const int32_t *numbers = run.sheet + run.fields[DOWN];
        for (int64_t place = run.first; place < run.first + run.num; place++)
            for (int64_t i = 0; i < run.rank; i++)
                h[order[place] * max_rank + i] = load(buffer, numbers[i] * stride + ids[order[place]], 1, dtype)[0];
    }
}

/* Expand. */

struct token {
    char *y;
    const float *h, *mid_scale, *mid_shift, *up_scale, *out_scale, *out_shift; /* null for the identity */
};

INLINE const float *vector_of(const void *buffer, const int32_t *fields, int field, int64_t stride) {
    return fields[field] < 0 ? 0 : (const float *)buffer + fields[field] * stride;
}

INLINE struct token token_of(const int32_t *sheet, const int32_t *fields, const void *buffer, int64_t stride) {
    struct token token = {
        .mid_scale = fields[MID_SCALE] < 0 ? 0 : (const float *)(sheet + fields[MID_SCALE]),
        .mid_shift = fields[MID_SHIFT] < 0 ? 0 : (const float *)(sheet + fields[MID_SHIFT]),
        .up_scale = vector_of(buffer, fields, UP_SCALE, stride),
        .out_scale = vector_of(buffer, fields, OUT_SCALE, stride),
        .out_shift = vector_of(buffer, fields, OUT_SHIFT, stride),
    };
    return token;
}

/* What comes after the low-rank part of `num` outputs from n on. */
INLINE void finish(const struct token *token, floats low, int64_t n, int64_t num, int y_dtype) {
    if (token->up_scale) low *= load(token->up_scale, n, num, FLOAT32);
    floats value = load(token->y, n, num, y_dtype) + low;
    if (token->out_scale) value *= load(token->out_scale, n, num, FLOAT32);
    if (token->out_shift) value += load(token->out_shift, n, num, FLOAT32);
    store(token->y, n, num, value, y_dtype);
}

INLINE float middle(const struct token *token, int64_t i) {
    float scale = token->mid_scale ? token->mid_scale[i] : 1, shift = token->mid_shift ? token->mid_shift[i] : 0;
    return fmaf(token->h[i], scale, shift); /* one rounding, whatever else the compiler joins */
}

/* The outputs from `first` on of a few tokens with the same rows: `num_vectors` vectors of `num` numbers each. */
INLINE void expand_tile(int num_tokens, int num_vectors, const struct token *tokens, const void *buffer,
                        const int32_t *numbers, int64_t rank, int64_t stride, int64_t first, int64_t num, float gain,
                        int y_dtype, int dtype) {
    floats sums[4][8];
    for (int t = 0; t < num_tokens; t++)
        for (int v = 0; v < num_vectors; v++) sums[t][v] = all(0);
    for (int64_t i = 0; i < rank; i++) {
        float g[4];
        for (int t = 0; t < num_tokens; t++) g[t] = middle(&tokens[t], i);
        for (int v = 0; v < num_vectors; v++) {
            int64_t n = first + v * LANES;
            floats row = load(buffer, numbers[i] * stride + n, num, dtype);
            __builtin_prefetch(at(buffer, numbers[i] * stride + n + num_vectors * LANES, dtype));
            for (int t = 0; t < num_tokens; t++) sums[t][v] += g[t] * row;
        }
    }
    for (int t = 0; t < num_tokens; t++)
        for (int v = 0; v < num_vectors; v++) finish(&tokens[t], sums[t][v] * gain, first + v * LANES, num, y_dtype);
}

INLINE void expand_columns(int num_tokens, const struct token *tokens, const void *buffer, const int32_t *numbers,
                           int64_t rank, int64_t stride, int64_t first, int64_t last, float gain, int y_dtype,
                           int dtype) {
    int num_vectors = num_tokens == 1 ? 8 : 4;
    int64_t n = first;
    for (; n + num_vectors * LANES <= last; n += num_vectors * LANES)
        expand_tile(num_tokens, num_vectors, tokens, buffer, numbers, rank, stride, n, LANES, gain, y_dtype, dtype);
    for (; n + LANES <= last; n += LANES)
        expand_tile(num_tokens, 1, tokens, buffer, numbers, rank, stride, n, LANES, gain, y_dtype, dtype);
    if (n < last) expand_tile(num_tokens, 1, tokens, buffer, numbers, rank, stride, n, last - n, gain, y_dtype, dtype);
}

enum { COLUMNS_AT_ONCE = 1024 };

/* What all calls of one expand share. */
struct expand {
    void *y;
    int64_t y_stride;
    const float *h;
    int64_t num_members, max_rank;
    const void *buffer;
    const int64_t *addresses;
    const int32_t *members;
    const int64_t *slots, *order;
    float gain;
};

INLINE void expand_run(const struct expand *all, struct run run, int64_t member, int64_t first_column, int64_t first,
                       int64_t last, int y_dtype, int dtype) {
    const int32_t *columns = all->members + member * NUM_COLUMNS, *numbers = run.sheet + run.fields[UP];
    for (int64_t done = 0; done < run.num;) {
        int num_tokens = run.num - done >= 4 ? 4 : 1;
        struct token tokens[4];
        for (int t = 0; t < num_tokens; t++) {
            int64_t token = all->order[run.first + done + t];
            const int32_t *sheet = sheet_of(all->addresses, all->slots[token]);
            tokens[t] = token_of(sheet, fields_of(sheet, all->members, member), all->buffer, columns[VECTOR_STRIDE]);
            tokens[t].y = at(all->y, token * all->y_stride + first_column, y_dtype);
            tokens[t].h = all->h + (token * all->num_members + member) * all->max_rank;
        }
        if (num_tokens == 4)
            expand_columns(4, tokens, all->buffer, numbers, run.rank, columns[ROW_STRIDE], first, last, all->gain,
                           y_dtype, dtype);
        else
            expand_columns(1, tokens, all->buffer, numbers, run.rank, columns[ROW_STRIDE], first, last, all->gain,
                           y_dtype, dtype);
        done += num_tokens;
    }
}

/* y (tokens, outputs) of members [first_member, last_member), in place and rounded once:
   out_scale * (y + gain * up_scale * sum((mid_scale * h + mid_shift)[i] * up[i])) + out_shift. With `is_joint` the
   members' outputs lie side by side, each from its own column on. */
void graft_expand(void *y, int64_t y_stride, int64_t y_dtype, const float *h, const void *buffer, int64_t dtype,
                  const int64_t *addresses, const int32_t *members, int64_t num_members, int64_t first_member,
                  int64_t last_member, int64_t is_joint, const int64_t *slots, const int64_t *order,
                  const int64_t *starts, int64_t num_runs, int64_t max_rank, int64_t max_width, double gain,
                  int64_t has_vectors, int64_t longest, int64_t num_threads) {
    struct expand all = {y, y_stride, h, num_members, max_rank, buffer, addresses, members, slots, order, gain};
    int64_t num_parts = (max_width + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    int64_t per_run = num_parts * (last_member - first_member), num_items = num_runs * per_run;
    (void)num_threads;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) \
    if (num_runs * (last_member - first_member) * max_width >= WORTH_A_THREAD)
    for (int64_t item = 0; item < num_items; item++) {
        int64_t member = first_member + item % per_run / num_parts, first = item % num_parts * COLUMNS_AT_ONCE;
        const int32_t *columns = members + member * NUM_COLUMNS;
        int64_t last = least(first + COLUMNS_AT_ONCE, columns[WIDTH]);
        struct run run = run_of(item / per_run, member, addresses, members, slots, order, starts);
        if (first >= last || !run.num || run.num > longest || (!run.rank && !has_vectors)) continue;
        int64_t column = is_joint ? columns[COLUMN] : 0;
        if (y_dtype == BFLOAT16 && dtype == BFLOAT16)
            expand_run(&all, run, member, column, first, last, BFLOAT16, BFLOAT16);
        else if (y_dtype == FLOAT32 && dtype == FLOAT32)
            expand_run(&all, run, member, column, first, last, FLOAT32, FLOAT32);
        else
            expand_run(&all, run, member, column, first, last, y_dtype, dtype);
    }
}

/* Both for all members of a group that read one input: x (tokens, d_in), y (tokens, all outputs). The struct is
   what stays from step to step; h (tokens, members, max_rank) is its own. */
struct joint {
    const void *buffer;
    int64_t dtype;
    const int64_t *addresses;
    const int32_t *members;
    int64_t num_members;
    const int64_t *slots, *down_order, *down_starts;
    int64_t num_down;
    const int64_t *up_order, *up_starts;
    int64_t num_up;
    float *h;
    int64_t max_rank, d_in, down_stride, in_stride, max_width, has_rows, has_vectors, scales, num_threads;
};

void graft_joint(const struct joint *j, const void *x, int64_t x_stride, void *y, int64_t y_stride, int64_t dtype) {
    if (j->has_rows)
        graft_shrink(x, x_stride, dtype, j->buffer, j->dtype, j->down_stride, j->addresses, j->members, j->num_members,
                     j->slots, j->down_order, j->down_starts, j->num_down, j->h, j->max_rank, j->d_in, INT64_MAX,
                     j->num_threads);
    graft_expand(y, y_stride, dtype, j->h, j->buffer, j->dtype, j->addresses, j->members, j->num_members, 0,
                 j->num_members, 1, j->slots, j->up_order, j->up_starts, j->num_up, j->max_rank, j->max_width, 1,
                 j->has_vectors, INT64_MAX, j->num_threads);
}

/* What the base reads instead of x (num_tokens, d_in), dense: `scaled`, or x where no token's adapter scales it. Of a
   group of one member. */
const void *joint_scaled(const struct joint *j, const void *x, void *scaled, int64_t num_tokens, int64_t dtype) {
    if (!j->scales) return x;
    graft_scale(x, j->d_in, scaled, dtype, j->buffer, j->in_stride, j->addresses, j->members, 0, j->slots, num_tokens,
                j->d_in);
    return scaled;
}

/* For runs that a library multiplies: their rows in one matrix, and what comes before and after the product with
   `up`. */

/* The rows that a slot has at a member, `list` being DOWN or UP, into rows (rank, width), dense; returns the rank.
   Without `rows` it only returns that. */
int64_t graft_rows(const void *buffer, int64_t dtype, int64_t stride, const int64_t *addresses, const int32_t *members,
                   int64_t member, int64_t slot, int64_t list, void *rows, int64_t width) {
    const int32_t *sheet = sheet_of(addresses, slot), *fields = fields_of(sheet, members, member);
    for (int64_t i = 0; rows && i < fields[RANK]; i++)
        memcpy(at(rows, i * width, dtype), at(buffer, sheet[fields[list] + i] * stride, dtype),
               bytes_of(width, dtype));
    return fields[RANK];
}

/* g (num, rank), dense, of the tokens order[0], ... of one run: mid_scale * h + mid_shift. */
void graft_middle(const float *h, int64_t num_members, int64_t max_rank, const int64_t *addresses,
                  const int32_t *members, int64_t member, const int64_t *slots, const int64_t *order, int64_t num,
                  void *g, int64_t dtype, int64_t rank) {
    for (int64_t place = 0; place < num; place++) {
        const int32_t *sheet = sheet_of(addresses, slots[order[place]]);
        struct token token = token_of(sheet, fields_of(sheet, members, member), 0, 0);
        token.h = h + (order[place] * num_members + member) * max_rank;
        for (int64_t i = 0; i < rank; i++) store(g, place * rank + i, 1, all(middle(&token, i)), dtype);
    }
}

/* What `graft_expand` does with y once it has the product low (num, width), dense; null for none. */
void graft_finish(void *y, int64_t y_stride, int64_t y_dtype, int64_t first_column, const void *low, const void *buffer,
                  int64_t dtype, const int64_t *addresses, const int32_t *members, int64_t member, const int64_t *slots,
                  const int64_t *order, int64_t num, double gain, int64_t num_threads) {
    const int32_t *columns = members + member * NUM_COLUMNS;
    int64_t width = columns[WIDTH];
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num * width >= WORTH_A_THREAD)
    for (int64_t place = 0; place < num; place++) {
        const int32_t *sheet = sheet_of(addresses, slots[order[place]]);
        struct token token = token_of(sheet, fields_of(sheet, members, member), buffer, columns[VECTOR_STRIDE]);
        token.y = at(y, order[place] * y_stride + first_column, y_dtype);
        for (int64_t n = 0; n < width; n += LANES) {
            floats value = low ? load(low, place * width + n, width - n, dtype) * (float)gain : all(0);
            finish(&token, value, n, width - n, y_dtype);
        }
    }
}

/* x (tokens, width) -> y, dense: in_scale[slots[t]] * x[t], x[t] where the slot has no in_scale. */
void graft_scale(const void *x, int64_t x_stride, void *y, int64_t x_dtype, const void *buffer, int64_t in_stride,
                 const int64_t *addresses, const int32_t *members, int64_t member, const int64_t *slots,
                 int64_t num_tokens, int64_t width) {
    for (int64_t t = 0; t < num_tokens; t++) {
        const float *scale =
            vector_of(buffer, fields_of(sheet_of(addresses, slots[t]), members, member), IN_SCALE, in_stride);
        for (int64_t n = 0; n < width; n += LANES) {
            floats value = load(x, t * x_stride + n, width - n, x_dtype);
            if (scale) value *= load(scale, n, width - n, FLOAT32);
            store(y, t * width + n, width - n, value, x_dtype);
        }
    }
}

/* Attention over the paged cache: blocks (blocks, kv_heads, block_size, width), both caches of one layout. */

INLINE void store_finite(void *cache, int64_t to, const void *values, int64_t from, int64_t width, int dtype,
                         int cache_dtype) {
    floats highest = all(dtype == BFLOAT16 || cache_dtype == BFLOAT16 ? 0x1.fep127f : 0x1.fffffep127f);
    for (int64_t d = 0; d < width; d += LANES) {
        floats value = load(values, from + d, width - d, dtype);
        value = chosen(value > highest, highest, chosen(value < -highest, -highest, value));
        store(cache, to + d, width - d, chosen(value == value, value, all(0)), cache_dtype);
    }
}

/* key_cache[blocks[t], :, offsets[t]] = keys[t], values likewise and made finite, as `reference.store_kv` says why. */
void graft_store_kv(const void *keys, int64_t key_stride, int64_t key_head, const void *values, int64_t value_stride,
                    int64_t value_head, int64_t dtype, void *key_cache, void *value_cache, int64_t cache_dtype,
                    int64_t num_heads, int64_t block_size, int64_t width, const int64_t *blocks, const int64_t *offsets,
                    int64_t num_tokens) {
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t head = 0; head < num_heads; head++) {
            int64_t to = ((blocks[t] * num_heads + head) * block_size + offsets[t]) * width;
            for (int64_t d = 0; d < width; d += LANES) {
                floats key = load(keys, t * key_stride + head * key_head + d, width - d, dtype);
                store(key_cache, to + d, width - d, key, cache_dtype);
            }
            store_finite(value_cache, to, values, t * value_stride + head * value_head, width, dtype, cache_dtype);
        }
}

enum { TOKENS_AT_ONCE = 64, MAX_WIDTH = 512 };

struct cache {
    const void *keys, *values;
    int64_t num_heads, block_size, width;
    const int64_t *blocks; /* of this sequence */
};

/* Where `num` tokens from position `first` on lie; a division for each of them would take longer than its product. */
INLINE void find_places(const struct cache *cache, int64_t first, int64_t num, int64_t head, int64_t *places) {
    int64_t block = first / cache->block_size, offset = first % cache->block_size;
    for (int64_t i = 0; i < num; block++, offset = 0) {
        int64_t start = (cache->blocks[block] * cache->num_heads + head) * cache->block_size;
        for (; offset < cache->block_size && i < num; offset++, i++) places[i] = (start + offset) * cache->width;
    }
}

/* Query heads that read the same keys and values, as many as there are registers for; tokens whose keys are asked for
   before they are read. */
enum { MOST_HEADS = 4, AHEAD = 16 };

/* How far the heads of a group have come, with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867). */
struct attention {
    float queries[MOST_HEADS][MAX_WIDTH]; /* times the scaling */
    floats sums[MOST_HEADS][MAX_WIDTH / LANES];
    float tops[MOST_HEADS], weights[MOST_HEADS];
};

/* Scores of the LANES tokens from `first` on, those behind `num` minus infinity. */
INLINE void score(const struct cache *cache, const struct attention *state, int num_heads, const int64_t *places,
                  int64_t first, int64_t num, float softcap, int dtype, int64_t width,
                  float scores[MOST_HEADS][TOKENS_AT_ONCE]) {
    floats products[MOST_HEADS][LANES];
    for (int64_t i = 0; i < LANES; i++) {
        for (int h = 0; h < num_heads; h++) products[h][i] = all(0);
        if (first + i >= num) continue;
        int64_t place = places[first + i];
        for (int64_t n = 0; n < width; n += 2 * LANES) { /* a line of bfloat16 */
            __builtin_prefetch(at(cache->keys, place + AHEAD * width + n, dtype));
            __builtin_prefetch(at(cache->values, place + n, dtype));
        }
        for (int64_t n = 0; n < width; n += LANES) {
            floats keys = load(cache->keys, place + n, width - n, dtype);
            for (int h = 0; h < num_heads; h++)
                products[h][i] += load(state->queries[h], n, width - n, FLOAT32) * keys;
        }
    }
    for (int h = 0; h < num_heads; h++) {
        floats found = totals(products[h]);
        for (int i = 0; softcap && i < LANES; i++) found[i] = softcap * tanhf(found[i] / softcap);
        store(scores[h], first, LANES, found, FLOAT32);
        for (int64_t i = num; i < first + LANES; i++) scores[h][i] = -INFINITY;
    }
}

/* Scores become weights, and what was summed before is measured by the new maximum. */
INLINE void weigh(struct attention *state, int h, float scores[TOKENS_AT_ONCE], int64_t num, int64_t width) {
    floats highest = all(state->tops[h]);
    for (int64_t i = 0; i < num; i += LANES) {
        floats found = load(scores, i, LANES, FLOAT32);
        highest = chosen(~(found <= highest), found, highest); /* NaN too, so that it reaches the answer */
    }
    float top = state->tops[h];
    for (int i = 0; i < LANES; i++)
        if (!(highest[i] <= top)) top = highest[i];
    float shrunk = expf(state->tops[h] - top);
    state->tops[h] = top;
    state->weights[h] *= shrunk;
    for (int64_t n = 0; n < width; n += LANES) state->sums[h][n / LANES] *= shrunk;
    for (int64_t i = 0; i < num; i += LANES) {
        floats weights = exponential(load(scores, i, LANES, FLOAT32) - top);
        store(scores, i, LANES, weights, FLOAT32);
        state->weights[h] += total(weights);
    }
}

/* The heads whose queries are in `state` over positions [start, stop) of one head of the cache. */
INLINE void attend(struct attention *state, int num_heads, const struct cache *cache, void *out, int dtype,
                   int64_t head, int64_t start, int64_t stop, float softcap, const float *sinks, int cache_dtype,
                   int64_t width) {
    for (int h = 0; h < num_heads; h++) {
        state->tops[h] = sinks ? sinks[h] : -INFINITY;
        state->weights[h] = sinks ? 1 : 0;
        for (int64_t n = 0; n < width; n += LANES) state->sums[h][n / LANES] = all(0);
    }
    for (int64_t first = start; first < stop; first += TOKENS_AT_ONCE) {
        int64_t num = least(TOKENS_AT_ONCE, stop - first), places[TOKENS_AT_ONCE];
        float scores[MOST_HEADS][TOKENS_AT_ONCE];
        find_places(cache, first, num, head, places);
        for (int64_t i = 0; i < num; i += LANES)
            score(cache, state, num_heads, places, i, num, softcap, cache_dtype, width, scores);
        for (int h = 0; h < num_heads; h++) weigh(state, h, scores[h], num, width);
        for (int64_t n = 0; n < width; n += LANES) {
            floats sums[MOST_HEADS];
            for (int h = 0; h < num_heads; h++) sums[h] = state->sums[h][n / LANES];
            for (int64_t i = 0; i < num; i++) {
                floats values = load(cache->values, places[i] + n, width - n, cache_dtype);
                for (int h = 0; h < num_heads; h++) sums[h] += scores[h][i] * values;
            }
            for (int h = 0; h < num_heads; h++) state->sums[h][n / LANES] = sums[h];
        }
    }
    for (int h = 0; h < num_heads; h++)
        for (int64_t n = 0; n < width; n += LANES)
            store(out, h * width + n, width - n, state->sums[h][n / LANES] / state->weights[h], dtype);
}

/* `attend` for whatever dtype and width; for those of most bases its loops are made for themselves. */
INLINE void attend_of(struct attention *state, int num_heads, const struct cache *cache, void *out, int dtype,
                      int64_t head, int64_t start, int64_t stop, float softcap, const float *sinks, int cache_dtype) {
    if (cache_dtype == BFLOAT16 && cache->width == 64)
        attend(state, num_heads, cache, out, dtype, head, start, stop, softcap, sinks, BFLOAT16, 64);
    else if (cache_dtype == BFLOAT16 && cache->width == 128)
        attend(state, num_heads, cache, out, dtype, head, start, stop, softcap, sinks, BFLOAT16, 128);
    else
        attend(state, num_heads, cache, out, dtype, head, start, stop, softcap, sinks, cache_dtype, cache->width);
}

static void attend_any(struct attention *state, int64_t num_heads, const struct cache *cache, void *out, int dtype,
                       int64_t head, int64_t start, int64_t stop, float softcap, const float *sinks, int cache_dtype) {
    switch (num_heads) {
    case 4: attend_of(state, 4, cache, out, dtype, head, start, stop, softcap, sinks, cache_dtype); break;
    case 3: attend_of(state, 3, cache, out, dtype, head, start, stop, softcap, sinks, cache_dtype); break;
    case 2: attend_of(state, 2, cache, out, dtype, head, start, stop, softcap, sinks, cache_dtype); break;
    default: attend_of(state, 1, cache, out, dtype, head, start, stop, softcap, sinks, cache_dtype);
    }
}

/* query (sequences, heads, width) -> out, dense: softmax(cap(scaling * query . keys) ++ sinks) @ values over the last
   `window` of each sequence's cached tokens, 0 for all of them. softcap 0 is none, sinks null for none. */
void graft_decode_attention(const void *query, int64_t query_stride, int64_t query_head, void *out, int64_t dtype,
                            const void *key_cache, const void *value_cache, int64_t cache_dtype, int64_t num_sequences,
                            int64_t num_heads, int64_t num_kv_heads, int64_t block_size, int64_t width,
                            const int64_t *lengths, const int64_t *firsts, const int64_t *blocks, double scaling,
                            int64_t window, double softcap, const float *sinks, int64_t num_threads) {
    int64_t num_items = num_sequences * num_kv_heads, group = num_heads / num_kv_heads;
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_items * group * width >= WORTH_A_THREAD)
    for (int64_t item = 0; item < num_items; item++) {
        int64_t s = item / num_kv_heads, kv_head = item % num_kv_heads, stop = lengths[s];
        struct cache cache = {key_cache, value_cache, num_kv_heads, block_size, width, blocks + firsts[s]};
        int64_t start = window && window < stop ? stop - window : 0;
        for (int64_t first = 0; first < group; first += MOST_HEADS) {
            int64_t head = kv_head * group + first, num = least(MOST_HEADS, group - first);
            struct attention state;
            for (int64_t h = 0; h < num; h++)
                for (int64_t n = 0; n < width; n += LANES) {
                    int64_t place = s * query_stride + (head + h) * query_head + n;
                    floats value = load(query, place, width - n, dtype) * (float)scaling;
                    store(state.queries[h], n, width - n, value, FLOAT32);
                }
            attend_any(&state, num, &cache, at(out, (s * num_heads + head) * width, dtype), dtype, kv_head, start, stop,
                       softcap, sinks ? sinks + head : 0, cache_dtype);
        }
    }
}

/* One vector of each half of a head, turned by the angles whose cosines and sines are given, the first half of the
   sines negated: y[i] = cos[i] * x[i] + sin[i] * x[(i + width / 2) % width] (Su et al. 2021, arXiv:2104.09864). */
INLINE void turn(const void *x, int64_t from, const float *cos, const float *sin, int64_t half, int64_t n, int dtype,
                 floats *first, floats *last) {
    floats low = load(x, from, n, dtype), high = load(x, from + half, n, dtype);
    *first = load(cos, 0, n, FLOAT32) * low + load(sin, 0, n, FLOAT32) * high;
    *last = load(cos, half, n, FLOAT32) * high + load(sin, half, n, FLOAT32) * low;
}

/* A step of decodes as Llama has it: query (sequences, heads, width), keys and values (sequences, kv_heads, width)
   as the projections gave them, each head dense. Turns queries and keys, stores keys and values, and attends to all
   of them; cos and sin (sequences, width). */
void graft_rotary_decode(const void *query, int64_t query_stride, const void *keys, int64_t key_stride,
                         const void *values, int64_t value_stride, int64_t dtype, const float *cos, const float *sin,
                         void *out, void *key_cache, void *value_cache, int64_t cache_dtype, const int64_t *own_blocks,
                         const int64_t *offsets, int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads,
                         int64_t block_size, int64_t width, const int64_t *lengths, const int64_t *firsts,
                         const int64_t *blocks, double scaling, int64_t window, double softcap, int64_t num_threads) {
    int64_t num_items = num_sequences * num_kv_heads, group = num_heads / num_kv_heads, half = width / 2;
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_items * group * width >= WORTH_A_THREAD)
    for (int64_t item = 0; item < num_items; item++) {
        int64_t s = item / num_kv_heads, kv_head = item % num_kv_heads, stop = lengths[s];
        int64_t to = ((own_blocks[s] * num_kv_heads + kv_head) * block_size + offsets[s]) * width;
        const float *c = cos + s * width, *d = sin + s * width;
        floats first, last;
        for (int64_t n = 0; n < half; n += LANES) {
            turn(keys, s * key_stride + kv_head * width + n, c + n, d + n, half, half - n, dtype, &first, &last);
            store(key_cache, to + n, half - n, first, cache_dtype);
            store(key_cache, to + half + n, half - n, last, cache_dtype);
        }
        store_finite(value_cache, to, values, s * value_stride + kv_head * width, width, dtype, cache_dtype);
        struct cache cache = {key_cache, value_cache, num_kv_heads, block_size, width, blocks + firsts[s]};
        int64_t start = window && window < stop ? stop - window : 0;
        for (int64_t from = 0; from < group; from += MOST_HEADS) {
            int64_t head = kv_head * group + from, num = least(MOST_HEADS, group - from);
            struct attention state;
            for (int64_t h = 0; h < num; h++)
                for (int64_t n = 0; n < half; n += LANES) {
                    int64_t place = s * query_stride + (head + h) * width + n;
                    turn(query, place, c + n, d + n, half, half - n, dtype, &first, &last);
                    store(state.queries[h], n, half - n, first * (float)scaling, FLOAT32);
                    store(state.queries[h], half + n, half - n, last * (float)scaling, FLOAT32);
                }
            attend_any(&state, num, &cache, at(out, (s * num_heads + head) * width, dtype), dtype, kv_head, start, stop,
                       softcap, 0, cache_dtype);
        }
    }
}

/* What stands between the products of a model. */

/* One row of `width`: weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467). */
INLINE void norm_row(const void *x, void *y, int dtype, const float *weight, int64_t width, float eps) {
    floats squares = {0};
    for (int64_t n = 0; n < width; n += LANES) {
        floats value = load(x, n, width - n, dtype);
        squares += value * value;
    }
    float factor = 1 / sqrtf(total(squares) / width + eps);
    for (int64_t n = 0; n < width; n += LANES) {
        floats value = load(x, n, width - n, dtype) * factor;
        store(y, n, width - n, value * load(weight, n, width - n, FLOAT32), dtype);
    }
}

/* x (rows, width) -> y, dense. */
void graft_rms_norm(const void *x, int64_t x_stride, void *y, int64_t dtype, const float *weight, int64_t num_rows,
                    int64_t width, double eps, int64_t num_threads) {
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * width >= 8 * WORTH_A_THREAD)
    for (int64_t row = 0; row < num_rows; row++)
        norm_row(at(x, row * x_stride, dtype), at(y, row * width, dtype), dtype, weight, width, eps);
}

/* x + other -> sum, rounded; its norm -> y; all (rows, width) and dense. */
void graft_add_rms_norm(const void *x, const void *other, void *sum, void *y, int64_t dtype, const float *weight,
                        int64_t num_rows, int64_t width, double eps, int64_t num_threads) {
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * width >= 8 * WORTH_A_THREAD)
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t start = row * width;
        for (int64_t n = 0; n < width; n += LANES) {
            floats value = load(x, start + n, width - n, dtype) + load(other, start + n, width - n, dtype);
            store(sum, start + n, width - n, value, dtype);
        }
        norm_row(at(sum, start, dtype), at(y, start, dtype), dtype, weight, width, eps);
    }
}

/* gate, up (rows, width) of one stride -> y, dense: silu(gate) * up (Shazeer 2020, arXiv:2002.05202). */
void graft_gated(const void *gate, const void *up, int64_t stride, void *y, int64_t dtype, int64_t num_rows,
                 int64_t width, int64_t num_threads) {
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * width >= WORTH_A_THREAD)
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t n = 0; n < width; n += LANES) {
            floats value = load(gate, row * stride + n, width - n, dtype);
            floats other = load(up, row * stride + n, width - n, dtype);
            store(y, row * width + n, width - n, value / (1.0f + exponential(-value)) * other, dtype);
        }
}
