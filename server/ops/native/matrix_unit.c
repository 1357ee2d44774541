/* Products in bfloat16 on Intel's matrix unit (AMX), where the processor has one.

   Owns the unit's registers and the way there. Sums are float32; weights of 4 bits are rounded to bfloat16. The unit
   multiplies every token for itself, over the inputs in their order, so a token's sums are the same to the bit in any
   batch and with any number of threads. */

#include "kernels.h"
#include "pairs.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A register of the unit: rows of bytes. Of inputs a row is a token's, of weights it is two inputs' for a tile. */
enum { UNIT_ROWS = 16, UNIT_BYTES = 64, UNIT_INPUTS = 32, UNIT_TOKENS = 4 * UNIT_ROWS };

/* Of inputs that are read again for every tile: they stay in the second level's cache. */
enum { BYTES_KEPT = 1 << 20 };

/* The registers, sums in the first four; the compiler's macros take literal numbers. */
#define WEIGHTS 4
#define INPUTS 5
#define LAST_INPUTS 6
#define LAST_SUMS 7
#define NUM_REGISTERS 8

/* Those macros do not tell the compiler that they read memory: what they will read is to be there. */
INLINE void finish_writing(void) { __asm__ volatile("" ::: "memory"); }

/* Sums of UNIT_ROWS tokens are in the registers 0 to 3, those of `num_last` tokens, fewer than that, in the last
   (Intel SDM, volume 1, section 18.3.1). */
INLINE void cut_registers(int64_t num_last) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } cut = {.palette = 1};
    for (int i = 0; i < NUM_REGISTERS; i++) {
        cut.row_bytes[i] = UNIT_BYTES;
        cut.rows[i] = UNIT_ROWS;
    }
    if (num_last) cut.rows[LAST_INPUTS] = cut.rows[LAST_SUMS] = num_last;
    finish_writing();
    _tile_loadconfig(&cut);
}

/* Two weights of each output as bfloat16, to the nearest, the first in the lower half. */
INLINE words paired(floats first, floats second) {
    return ((words)first + 0x8000u) >> 16 | (((words)second + 0x8000u) & 0xffff0000u);
}

/* The weights of UNIT_INPUTS inputs from k on, two inputs in a row. */
INLINE void decode(const struct weight *weight, int64_t tile, int64_t k, words rows[UNIT_ROWS]) {
    floats scale = scales_of(weight, tile, k);
    for (int i = 0; i < UNIT_INPUTS / CODES; i++) {
        words codes = codes_of(weight, tile, k + i * CODES);
        for (int j = 0; j < CODES / 2; j++, codes >>= 8)
            rows[i * CODES / 2 + j] =
                paired(looked_up(weight->levels, codes) * scale, looked_up(weight->levels, codes >> 4) * scale);
    }
}

struct tokens {
    const char *x;
    int64_t x_stride;
    char *y;
    int64_t y_stride;
};

INLINE struct tokens tokens_from(struct tokens tokens, int64_t first) {
    tokens.x = at(tokens.x, first * tokens.x_stride, BFLOAT16);
    tokens.y = at(tokens.y, first * tokens.y_stride, BFLOAT16);
    return tokens;
}

#define ADD_PRODUCT(sums)                                                               \
    if (num_whole > sums) {                                                             \
        _tile_loadd(INPUTS, inputs + sums * UNIT_ROWS * row_bytes, row_bytes);          \
        _tile_dpbf16ps(sums, INPUTS, WEIGHTS);                                          \
    }

#define STORE_SUMS(number) \
    if (num_whole > number) _tile_stored(number, sums + number * UNIT_ROWS, UNIT_BYTES);

/* y of one tile for UNIT_ROWS tokens `num_whole` times, at most four, and `num_last` more. */
INLINE void unit_product(const struct source *source, int64_t tile, int64_t num_whole, int64_t num_last,
                         struct tokens tokens) {
    const struct weight *weight = &source->weight;
    int64_t row_bytes = bytes_of(tokens.x_stride, BFLOAT16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(LAST_SUMS);
    for (int64_t k = 0; k < weight->width; k += UNIT_INPUTS) {
        const char *inputs = tokens.x + bytes_of(k, BFLOAT16);
        if (source->plain) {
            const char *place = plain_place(source, tile, k);
            for (int i = 0; i < UNIT_ROWS; i++) __builtin_prefetch(place + 4096 + i * UNIT_BYTES);
            _tile_loadd(WEIGHTS, place, UNIT_BYTES);
        } else {
            words rows[UNIT_ROWS];
            decode(weight, tile, k, rows);
            finish_writing();
            _tile_loadd(WEIGHTS, rows, UNIT_BYTES);
        }
        ADD_PRODUCT(0)
        ADD_PRODUCT(1)
        ADD_PRODUCT(2)
        ADD_PRODUCT(3)
        if (num_last) {
            _tile_loadd(LAST_INPUTS, inputs + num_whole * UNIT_ROWS * row_bytes, row_bytes);
            _tile_dpbf16ps(LAST_SUMS, LAST_INPUTS, WEIGHTS);
        }
    }
    floats sums[UNIT_TOKENS + UNIT_ROWS], bias = bias_of(weight, tile);
    STORE_SUMS(0)
    STORE_SUMS(1)
    STORE_SUMS(2)
    STORE_SUMS(3)
    if (num_last) _tile_stored(LAST_SUMS, sums + num_whole * UNIT_ROWS, UNIT_BYTES);
    for (int64_t t = 0; t < num_whole * UNIT_ROWS + num_last; t++)
        store(tokens.y, t * tokens.y_stride + tile * LANES, LANES, sums[t] + bias, BFLOAT16);
}

INLINE void tile_product(const struct source *source, int64_t tile, int64_t num, struct tokens tokens) {
    for (int64_t first = 0; first < num; first += UNIT_TOKENS) {
        int64_t left = num - first, num_whole = least(left, UNIT_TOKENS) / UNIT_ROWS;
        int64_t num_last = left < UNIT_TOKENS ? left % UNIT_ROWS : 0;
        unit_product(source, tile, num_whole, num_last, tokens_from(tokens, first));
    }
}

/* Chunks of tokens whose inputs are kept near; within them, tiles for all threads. */
static void unit_products(const struct source *source, int64_t num_tiles, int64_t num_tokens, struct tokens tokens,
                          int64_t num_threads) {
    int64_t width = source->weight.width, kept = BYTES_KEPT / bytes_of(width, BFLOAT16) / UNIT_TOKENS * UNIT_TOKENS;
    int64_t chunk = kept > UNIT_TOKENS ? kept : UNIT_TOKENS;
    (void)num_threads;
#pragma omp parallel num_threads(num_threads) if (num_tiles * width * LANES >= WEIGHTS_WORTH_A_THREAD)
    {
        cut_registers(num_tokens % UNIT_ROWS);
        for (int64_t first = 0; first < num_tokens; first += chunk) {
            struct tokens part = tokens_from(tokens, first);
#pragma omp for schedule(dynamic) nowait
            for (int64_t tile = 0; tile < num_tiles; tile++)
                tile_product(source, tile, least(chunk, num_tokens - first), part);
        }
        _tile_release();
    }
}
#endif

/* Whether there is a unit that this process may use: Linux lends it to those who ask (arch_prctl(2),
   ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA). */
int64_t graft_has_matrix_unit(void) {
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

/* x (tokens, width) -> y (tokens, num_tiles * LANES), both bfloat16: x W^T + bias, rounded once. The weight is `plain`,
   or, where that is null, one of 4 bits, whose blocks must be multiples of UNIT_INPUTS. Not to be called without a
   unit. */
void graft_unit_product(const void *plain, const uint32_t *codes, const float *scales, const float *levels,
                        const float *bias, int64_t num_tiles, int64_t width, int64_t block, const void *x,
                        int64_t x_stride, int64_t num_tokens, void *y, int64_t y_stride, int64_t num_threads) {
#ifdef __AMX_BF16__
    struct source source = {{codes, scales, levels, bias, width, block}, plain};
    unit_products(&source, num_tiles, num_tokens, (struct tokens){x, x_stride, y, y_stride}, num_threads);
#else
    (void)plain, (void)codes, (void)scales, (void)levels, (void)bias, (void)num_tiles, (void)width, (void)block;
    (void)x, (void)x_stride, (void)num_tokens, (void)y, (void)y_stride, (void)num_threads;
#endif
}
