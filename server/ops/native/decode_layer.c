/* A decoder layer of Llama's kind, in a step that only decodes: all of it in one call.

   Owns the order of what is done, and where it lies in between. Knows nothing of arithmetic, nor of who chose how a
   weight is multiplied. Activations are bfloat16. */

#include "kernels.h"
#include "vectors.h"

enum { BY_VECTORS, BY_PAIRS, ON_UNIT };
enum { PROJECTIONS, OUT, GATE_UP, DOWN, NUM_PRODUCTS };

/* The linears of a group, as the product functions want them. */
struct product {
    int64_t way;
    const void *plain;
    const uint32_t *codes;
    const float *scales, *levels, *bias;
    int64_t num_tiles, width, block;
};

struct norm {
    const float *weight;
    double eps;
};

struct layer {
    struct product products[NUM_PRODUCTS];
    struct norm before_attention, before_mlp;
    int64_t num_heads, num_kv_heads, head_width, window;
    double scaling, softcap;
};

/* What is the same for all layers. Of the room, each piece is for all tokens and the widest layer. */
struct step {
    int64_t num_tokens, num_threads, cache_dtype, block_size;
    const float *cos, *sin;
    const int64_t *own_blocks, *offsets, *lengths, *firsts, *blocks;
    void *read, *wide, *inner, *other, *turned;
};

INLINE int64_t outputs(const struct product *product) { return product->num_tiles * LANES; }

/* x (tokens, width) -> y (tokens, outputs), both dense, with the edits of the group, null for none. `scaled` is room for
   another x. */
static void multiply(const struct product *p, const struct step *step, const struct joint *joint, const void *unscaled,
                     void *scaled, void *y) {
    int64_t num = step->num_tokens, threads = step->num_threads, d_out = outputs(p);
    const void *x = joint ? joint_scaled(joint, unscaled, scaled, num, BFLOAT16) : unscaled;
    if (p->way == ON_UNIT)
        graft_unit_product(p->plain, p->codes, p->scales, p->levels, p->bias, p->num_tiles, p->width, p->block, x,
                           p->width, num, y, d_out, threads);
    else if (p->way == BY_PAIRS)
        graft_pair_product(p->plain, p->codes, p->scales, p->levels, p->bias, p->num_tiles, p->width, p->block, x,
                           p->width, num, step->turned, y, d_out, threads);
    else
        graft_four_bit(p->codes, p->scales, p->levels, p->bias, p->num_tiles, p->width, p->block, x, p->width,
                       BFLOAT16, num, step->turned, y, d_out, threads);
    if (joint) graft_joint(joint, unscaled, p->width, y, d_out, BFLOAT16);
}

/* x (tokens, hidden) -> y, both dense. `joints`: the edits of the four products. */
void graft_decode_layer(const struct step *step, const struct layer *layer, const struct joint *const *joints,
                        void *key_cache, void *value_cache, const void *x, void *y) {
    const struct product *products = layer->products;
    int64_t num = step->num_tokens, threads = step->num_threads, hidden = products[PROJECTIONS].width;
    struct norm norm = layer->before_attention;
    graft_rms_norm(x, hidden, step->read, BFLOAT16, norm.weight, num, hidden, norm.eps, threads);
    multiply(&products[PROJECTIONS], step, joints[PROJECTIONS], step->read, step->inner, step->wide);

    int64_t stride = outputs(&products[PROJECTIONS]), width = layer->head_width;
    const void *keys = at(step->wide, layer->num_heads * width, BFLOAT16);
    const void *values = at(keys, layer->num_kv_heads * width, BFLOAT16);
    graft_rotary_decode(step->wide, stride, keys, stride, values, stride, BFLOAT16, step->cos, step->sin, step->inner,
                        key_cache, value_cache, step->cache_dtype, step->own_blocks, step->offsets, num,
                        layer->num_heads, layer->num_kv_heads, step->block_size, width, step->lengths, step->firsts,
                        step->blocks, layer->scaling, layer->window, layer->softcap, threads);
    multiply(&products[OUT], step, joints[OUT], step->inner, step->wide, step->other);

    norm = layer->before_mlp;
    graft_add_rms_norm(x, step->other, y, step->read, BFLOAT16, norm.weight, num, hidden, norm.eps, threads);
    multiply(&products[GATE_UP], step, joints[GATE_UP], step->read, step->inner, step->wide);
    int64_t gates = outputs(&products[GATE_UP]) / 2;
    graft_gated(step->wide, at(step->wide, gates, BFLOAT16), 2 * gates, step->inner, BFLOAT16, num, gates, threads);
    multiply(&products[DOWN], step, joints[DOWN], step->inner, step->wide, step->other);
    for (int64_t n = 0; n < num * hidden; n += LANES) {
        int64_t left = num * hidden - n;
        store(y, n, left, load(y, n, left, BFLOAT16) + load(step->other, n, left, BFLOAT16), BFLOAT16);
    }
}
