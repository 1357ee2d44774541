/* The functions of this folder that others of it call. Their meaning is with their definitions. */

#include <stdint.h>

struct joint;

void graft_joint(const struct joint *j, const void *x, int64_t x_stride, void *y, int64_t y_stride, int64_t dtype);

const void *joint_scaled(const struct joint *j, const void *x, void *scaled, int64_t num_tokens, int64_t dtype);

void graft_scale(const void *x, int64_t x_stride, void *y, int64_t x_dtype, const void *buffer, int64_t in_stride,
                 const int64_t *addresses, const int32_t *members, int64_t member, const int64_t *slots,
                 int64_t num_tokens, int64_t width);

void graft_rms_norm(const void *x, int64_t x_stride, void *y, int64_t dtype, const float *weight, int64_t num_rows,
                    int64_t width, double eps, int64_t num_threads);

void graft_add_rms_norm(const void *x, const void *other, void *sum, void *y, int64_t dtype, const float *weight,
                        int64_t num_rows, int64_t width, double eps, int64_t num_threads);

void graft_gated(const void *gate, const void *up, int64_t stride, void *y, int64_t dtype, int64_t num_rows,
                 int64_t width, int64_t num_threads);

void graft_rotary_decode(const void *query, int64_t query_stride, const void *keys, int64_t key_stride,
                         const void *values, int64_t value_stride, int64_t dtype, const float *cos, const float *sin,
                         void *out, void *key_cache, void *value_cache, int64_t cache_dtype, const int64_t *own_blocks,
                         const int64_t *offsets, int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads,
                         int64_t block_size, int64_t width, const int64_t *lengths, const int64_t *firsts,
                         const int64_t *blocks, double scaling, int64_t window, double softcap, int64_t num_threads);

void graft_four_bit(const uint32_t *codes, const float *scales, const float *levels, const float *bias,
                    int64_t num_tiles, int64_t width, int64_t block, const void *x, int64_t x_stride, int64_t dtype,
                    int64_t num_tokens, float *turned, void *y, int64_t y_stride, int64_t num_threads);

void graft_unit_product(const void *plain, const uint32_t *codes, const float *scales, const float *levels,
                        const float *bias, int64_t num_tiles, int64_t width, int64_t block, const void *x,
                        int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int64_t num_threads);

void graft_pair_product(const void *plain, const uint32_t *codes, const float *scales, const float *levels,
                        const float *bias, int64_t num_tiles, int64_t width, int64_t block, const void *x,
                        int64_t x_stride, int64_t num_tokens, uint32_t *turned, void *y, int64_t y_stride,
                        int64_t num_threads);
