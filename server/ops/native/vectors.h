/* Vectors of numbers and how they lie in memory, for all kernels of this folder.

   Owns the two dtypes, their rounding, and what is asked of a compiler (GCC or Clang): vectors of its own kind, of
   which it makes what the processor has. Knows nothing about what is computed. */

#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16 };

/* Numbers read below which a second thread costs more than it brings. */
enum { WORTH_A_THREAD = 8192 };

/* Small functions vanish in their callers, and with them the choice of a dtype or a tile that the caller knows. */
#define INLINE static inline __attribute__((always_inline))

/* Vectors, and numbers in memory. `n` numbers are there from the index on; what lies behind them is another's. */

enum { LANES = 16 };
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));

INLINE floats all(float value) { return (floats){0} + value; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t bytes_of(int64_t n, int dtype) { return n * (dtype == BFLOAT16 ? 2 : 4); }

INLINE char *at(const void *base, int64_t index, int dtype) { return (char *)base + bytes_of(index, dtype); }

INLINE floats widened(halves half) { return (floats)(__builtin_convertvector(half, words) << 16); }

/* To the nearest, ties to even, as PyTorch rounds; what is no number stays none. */
INLINE halves narrowed(floats value) {
    words bits = (words)value, is_nan = (words)(value != value);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), halves);
}

/* Copies of a size that the compiler knows are one instruction; the others are few. */
INLINE void copy(void *to, const void *from, int64_t n, int64_t size) {
    if (n >= LANES) memcpy(to, from, LANES * size);
    else memcpy(to, from, n * size);
}

INLINE floats load(const void *from, int64_t index, int64_t n, int dtype) {
    if (dtype == BFLOAT16) {
        halves half = {0};
        copy(&half, at(from, index, dtype), n, sizeof half[0]);
        return widened(half);
    }
    floats value = {0};
    copy(&value, at(from, index, dtype), n, sizeof value[0]);
    return value;
}

INLINE void store(void *to, int64_t index, int64_t n, floats value, int dtype) {
    if (dtype == BFLOAT16) {
        halves half = narrowed(value);
        copy(at(to, index, dtype), &half, n, sizeof half[0]);
    } else {
        copy(at(to, index, dtype), &value, n, sizeof value[0]);
    }
}

INLINE float total(floats value) {
    eight a[2];
    four b[2];
    memcpy(a, &value, sizeof a);
    a[0] += a[1];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

#if defined(__AVX512F__) && !defined(__clang__)
/* Half of the lanes of two vectors, `step` of the one beside `step` of the other, those from `first` on. */
#define HALVES(step, first)                                                                                      \
    {                                                                                                            \
        LANE(0, step, first), LANE(1, step, first), LANE(2, step, first), LANE(3, step, first),                  \
        LANE(4, step, first), LANE(5, step, first), LANE(6, step, first), LANE(7, step, first),                  \
        LANE(8, step, first), LANE(9, step, first), LANE(10, step, first), LANE(11, step, first),                \
        LANE(12, step, first), LANE(13, step, first), LANE(14, step, first), LANE(15, step, first)               \
    }
#define LANE(n, step, first) ((n) / (2 * (step)) * 2 * (step) + (n) % (step) + (first) + ((n) / (step) % 2 ? LANES : 0))

/* One step of `totals`: half as many vectors, in each the sums of two. */
#define FOLD(values, num, step)                                                                                  \
    for (int i = 0; i < (num); i++)                                                                              \
        values[i] = __builtin_shuffle(values[2 * i], values[2 * i + 1], (ints)HALVES(step, 0)) +                 \
                    __builtin_shuffle(values[2 * i], values[2 * i + 1], (ints)HALVES(step, step));
#endif

/* The totals of LANES vectors, which are used up. */
INLINE floats totals(floats values[LANES]) {
#ifdef FOLD
    FOLD(values, 8, 1)
    FOLD(values, 4, 2)
    FOLD(values, 2, 4)
    FOLD(values, 1, 8)
    return values[0];
#else
    floats found;
    for (int i = 0; i < LANES; i++) found[i] = total(values[i]);
    return found;
#endif
}

INLINE floats chosen(ints condition, floats yes, floats no) {
    return (floats)(((words)yes & (words)condition) | ((words)no & ~(words)condition));
}
