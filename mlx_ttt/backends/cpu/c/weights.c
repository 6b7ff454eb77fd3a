/* Products with weights as they lie in memory, unpacked in registers.

   A register has WIDTH lanes. Each lane gets 32 bits of a row that hold whole numbers: eight of 4 bits, four of 8, and
   so on. The numbers at the same place in all lanes are taken out by one mask, and stay where they are: converted to
   float, they are 2^place times too large, so x is divided by that once. x is arranged in the same order. So a number
   costs a mask, a conversion and a multiplication, and no shuffle.

   An element is scale q + bias, and a group of a row shares both. So the products with q are summed first, and x itself
   is summed by lane once, for the biases. */

#include "weights.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

#ifndef WIDTH /* a test may choose another one */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#endif

typedef float wide __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t iwide __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t uwide __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t shorts __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

enum {
    AHEAD = 2048, /* bytes from which on memory is asked for early */
    BLOCK = 1024  /* scales that are widened at a time */
};

static inline wide load_wide(const float *p) { return *(const wide *)p; }

static inline wide splat(float x) { return x - (wide){0}; }

static inline float sum_wide(wide v)
{
    float lanes[WIDTH];
    *(wide *)lanes = v;
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            lanes[i] += lanes[i + n];
    return lanes[0];
}

/* ---- Half precision ----------------------------------------------------------------------------------------------- */

static inline wide widen_bfloat16(const void *p)
{
    return (wide)(__builtin_convertvector(*(const shorts *)p, uwide) << 16);
}

static inline wide widen_float16(const void *p)
{
#if defined(__AVX512F__) && WIDTH == 16
    return (wide)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif defined(__F16C__) && WIDTH == 8
    return (wide)_mm256_cvtph_ps(_mm_loadu_si128(p));
#else
    const uwide h = __builtin_convertvector(*(const shorts *)p, uwide);
    const wide magnitude = (wide)((h & 0x7fff) << 13) * 0x1p112f; /* of a smaller exponent bias */
    const uwide endless = (uwide)((h & 0x7c00) == 0x7c00) & 0x7f800000;
    return (wide)((uwide)magnitude | endless | (h & 0x8000) << 16);
#endif
}

static inline wide widen(enum kind kind, const void *p)
{
    return kind == FLOAT16 ? widen_float16(p) : kind == BFLOAT16 ? widen_bfloat16(p) : *(const wide *)p;
}

static inline size_t size_of(enum kind kind) { return kind == FLOAT32 ? 4 : 2; }

/* y [n] = numbers first ... first + n - 1. */
static void widen_all(enum kind kind, const void *numbers, size_t first, size_t n, float *y)
{
    const size_t size = size_of(kind);
    const char *p = (const char *)numbers + first * size;
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        *(wide *)(y + i) = widen(kind, p + i * size);
    if (i < n) {
        char rest[4 * WIDTH] = {0};
        memcpy(rest, p + i * size, (n - i) * size);
        const wide last = widen(kind, rest);
        memcpy(y + i, &last, (n - i) * sizeof *y);
    }
}

/* ---- Numbers of a few bits ---------------------------------------------------------------------------------------- */

/* How many numbers a lane holds. In 24 bits there are whole numbers of 3 and 6 bits, in 20 of 5. */
static inline size_t numbers_of(int bits) { return bits == 2 ? 16 : bits == 3 || bits == 4 ? 8 : 4; }

static inline uint32_t word_at(const uint8_t *p)
{
    uint32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

#if defined(__AVX2__)
/* Eight lanes of 24 bits. What the highest byte of a lane holds does not matter. */
static inline __m256i lanes_of_24(const uint8_t *p)
{
    const __m256i order = _mm256_setr_epi8(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, /* from byte 0 */
                                           4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12, 13, 14, 15, 15 /* from byte 8 */);
    return _mm256_shuffle_epi8(_mm256_loadu2_m128i((const __m128i *)(p + 8), (const __m128i *)p), order);
}

/* Eight lanes of 20 bits. What the others hold does not matter. */
static inline __m256i lanes_of_20(const uint8_t *p)
{
    const __m256i order = _mm256_setr_epi8(0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, /* from byte 0 */
                                           6, 7, 8, 9, 7, 8, 9, 10, 11, 12, 13, 14, 12, 13, 14, 15 /* from byte 4 */);
    const __m256i words = _mm256_loadu2_m128i((const __m128i *)(p + 4), (const __m128i *)p);
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(words, order), _mm256_setr_epi32(0, 12, 0, 12, 0, 12, 0, 12));
}
#endif

/* The next WIDTH lanes of a row. */
static inline uwide lanes_at(const uint8_t *p, int bits)
{
    if (32 % bits == 0)
        return *(const uwide *)p;
#if defined(__AVX2__) && WIDTH == 8
    return (uwide)(bits == 5 ? lanes_of_20(p) : lanes_of_24(p));
#elif defined(__AVX512F__) && WIDTH == 16
    const __m256i low = bits == 5 ? lanes_of_20(p) : lanes_of_24(p);
    const __m256i high = bits == 5 ? lanes_of_20(p + 20) : lanes_of_24(p + 24);
    return (uwide)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    uwide lanes;
    for (int i = 0; i < WIDTH; i++) /* reads no byte behind them */
        if (bits == 5)
            lanes[i] = i % 2 ? word_at(p + i / 2 * 5 + 1) >> 12 : word_at(p + i / 2 * 5);
        else
            lanes[i] = i < WIDTH - 1 ? word_at(p + 3 * i) : word_at(p + 3 * i - 1) >> 8;
    return lanes;
#endif
}

/* Number t of each lane, times 2^(bits t) unless it is the topmost of 32 bits. */
static inline wide number(uwide lanes, int bits, int t)
{
    const int place = bits * t;
    if (place + bits == 32) /* where a mask would leave it negative */
        return __builtin_convertvector((iwide)(lanes >> place), wide);
    return __builtin_convertvector((iwide)lanes & (int32_t)(((1u << bits) - 1) << place), wide);
}

/* ---- The order of x ----------------------------------------------------------------------------------------------- */

/* Blocks of a row: WIDTH lanes each. The last one may not be whole. */
static inline size_t numbers_in_lane(const struct weights *w) { return w->bits ? numbers_of(w->bits) : 1; }

static inline size_t blocks_of(size_t k, size_t numbers) { return (k + WIDTH * numbers - 1) / (WIDTH * numbers); }

size_t arranged_size(const struct weights *w, size_t k)
{
    const size_t numbers = numbers_in_lane(w);
    return blocks_of(k, numbers) * WIDTH * (numbers + (w->bits > 0));
}

/* A block of a quantized row is number 0 of all lanes, number 1, ..., and the sums of the lanes. */
void arrange(const struct weights *w, size_t m, size_t k, const float *x, float *arranged)
{
    const size_t numbers = numbers_in_lane(w), size = arranged_size(w, k);
    memset(arranged, 0, m * size * sizeof *arranged); /* behind the last number */
    for (size_t i = 0; i < m; i++, x += k, arranged += size) {
        if (!w->bits) {
            memcpy(arranged, x, k * sizeof *x);
            continue;
        }
        for (size_t lane = 0, j = 0; j < k; lane++) {
            float *to = arranged + lane / WIDTH * WIDTH * (numbers + 1) + lane % WIDTH, sum = 0, factor = 1;
            for (size_t t = 0; t < numbers; t++, to += WIDTH, factor /= 1 << w->bits) {
                const int is_topmost = (t + 1) * w->bits == 32;
                sum += x[j];
                *to = x[j++] * (is_topmost ? 1 : factor);
            }
            *to = sum;
        }
    }
}

/* ---- Products ----------------------------------------------------------------------------------------------------- */

/* Scales and biases of some rows in float32, and where those of a block are. */
struct groups {
    const float *scales, *biases; /* of the row at hand; WIDTH more can be read */
    int shift;                    /* 2^shift lanes share a scale */
    iwide order;                  /* group of each lane, counted from the first one of a block */
};

/* Of each lane of block i. */
static inline wide of_lanes(const struct groups *g, const float *values, size_t i)
{
    const float *first = values + (i * WIDTH >> g->shift);
    if (1 << g->shift >= WIDTH)
        return splat(*first);
#if defined(__clang__)
    wide v;
    for (int lane = 0; lane < WIDTH; lane++)
        v[lane] = first[g->order[lane]];
    return v;
#else
    return __builtin_shuffle(load_wide(first), g->order);
#endif
}

/* Adds to `total` what block i of a quantized row and of R rows of x, `size` apart, make together. */
#define ADD_BLOCK(R)                                                                                                   \
    static inline __attribute__((always_inline)) void add_block_of_##R(                                                \
        wide *total, const struct groups *g, const uint8_t *p, const float *x, size_t size, size_t i, int bits)        \
    {                                                                                                                  \
        const int numbers = numbers_of(bits);                                                                          \
        const uwide lanes = lanes_at(p, bits);                                                                         \
        const wide scales = of_lanes(g, g->scales, i), biases = of_lanes(g, g->biases, i);                             \
        x += i * WIDTH * (numbers + 1);                                                                                \
        wide sums[R] = {{0}};                                                                                          \
        _Pragma("GCC unroll 16") for (int t = 0; t < numbers; t++)                                                     \
        {                                                                                                              \
            const wide q = number(lanes, bits, t);                                                                     \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) sums[r] += q * load_wide(x + r * size + t * WIDTH);    \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) total[r] +=                                                \
            scales * sums[r] + biases * load_wide(x + r * size + numbers * WIDTH);                                     \
    }                                                                                                                  \
                                                                                                                       \
    /* y [R], `apart` apart, = the products of a quantized row and R rows of x. */                                     \
    static inline __attribute__((always_inline)) void multiply_row_by_##R(                                             \
        const struct groups *g, const uint8_t *p, size_t k, const float *x, float *y, size_t apart, int bits)          \
    {                                                                                                                  \
        const size_t numbers = numbers_of(bits), whole = k / (WIDTH * numbers), bytes = WIDTH * numbers * bits / 8;    \
        const size_t size = blocks_of(k, numbers) * WIDTH * (numbers + 1);                                             \
        wide total[R] = {{0}};                                                                                         \
        for (size_t i = 0; i < whole; i++) {                                                                           \
            __builtin_prefetch(p + i * bytes + AHEAD);                                                                 \
            add_block_of_##R(total, g, p + i * bytes, x, size, i, bits);                                               \
        }                                                                                                              \
        if (whole * WIDTH * numbers < k) {                                                                             \
            uint8_t rest[4 * WIDTH] = {0};                                                                             \
            memcpy(rest, p + whole * bytes, k * bits / 8 - whole * bytes);                                             \
            add_block_of_##R(total, g, rest, x, size, whole, bits);                                                    \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) y[r * apart] = sum_wide(total[r]);                         \
    }                                                                                                                  \
                                                                                                                       \
    /* The same for a row in half precision. */                                                                        \
    static inline __attribute__((always_inline)) void multiply_half_row_by_##R(                                        \
        enum kind kind, const char *p, size_t k, const float *x, float *y, size_t apart)                               \
    {                                                                                                                  \
        const size_t size = blocks_of(k, 1) * WIDTH;                                                                   \
        wide total[R] = {{0}}, more[R] = {{0}};                                                                        \
        size_t j = 0;                                                                                                  \
        for (; j + 2 * WIDTH <= k; j += 2 * WIDTH) {                                                                   \
            __builtin_prefetch(p + 2 * j + AHEAD);                                                                     \
            const wide w = widen(kind, p + 2 * j), v = widen(kind, p + 2 * (j + WIDTH));                               \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) total[r] += w * load_wide(x + r * size + j),           \
                more[r] += v * load_wide(x + r * size + j + WIDTH);                                                    \
        }                                                                                                              \
        for (; j < k; j += WIDTH) {                                                                                    \
            char rest[4 * WIDTH] = {0};                                                                                \
            memcpy(rest, p + 2 * j, 2 * smaller(WIDTH, k - j));                                                        \
            const wide w = widen(kind, rest);                                                                          \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) total[r] += w * load_wide(x + r * size + j);           \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) y[r * apart] = sum_wide(total[r] + more[r]);               \
    }

ADD_BLOCK(1)
ADD_BLOCK(2)
ADD_BLOCK(4)

/* One row of w by all m rows of x. y is where its products are wanted, n apart. */
static inline __attribute__((always_inline)) void multiply_row(const struct groups *g, const uint8_t *p, size_t m,
                                                               size_t k, const float *x, float *y, size_t n, int bits)
{
    const size_t numbers = numbers_of(bits), size = blocks_of(k, numbers) * WIDTH * (numbers + 1);
    for (; m >= 4; m -= 4, x += 4 * size, y += 4 * n)
        multiply_row_by_4(g, p, k, x, y, n, bits);
    for (; m >= 2; m -= 2, x += 2 * size, y += 2 * n)
        multiply_row_by_2(g, p, k, x, y, n, bits);
    if (m)
        multiply_row_by_1(g, p, k, x, y, n, bits);
}

static inline __attribute__((always_inline)) void multiply_half_row(enum kind kind, const char *p, size_t m, size_t k,
                                                                    const float *x, float *y, size_t n)
{
    const size_t size = blocks_of(k, 1) * WIDTH;
    for (; m >= 4; m -= 4, x += 4 * size, y += 4 * n)
        multiply_half_row_by_4(kind, p, k, x, y, n);
    for (; m >= 2; m -= 2, x += 2 * size, y += 2 * n)
        multiply_half_row_by_2(kind, p, k, x, y, n);
    if (m)
        multiply_half_row_by_1(kind, p, k, x, y, n);
}

/* Rows first ... last - 1 of w, quantized in so many bits. */
#define MULTIPLY_ROWS(BITS)                                                                                            \
    static void multiply_rows_of_##BITS(const struct weights *w, size_t m, size_t k, const float *x, size_t first,     \
                                        size_t last, float *y)                                                         \
    {                                                                                                                  \
        const size_t groups = k / w->group, some = groups < BLOCK ? BLOCK / groups : 1, bytes = k * BITS / 8;          \
        float scales[some * groups + WIDTH], biases[some * groups + WIDTH];                                            \
        struct groups g = {.shift = __builtin_ctz(w->group / numbers_of(BITS))};                                                    \
        for (int lane = 0; lane < WIDTH; lane++)                                                                       \
            g.order[lane] = lane >> g.shift;                                                                           \
        for (size_t i = first, n; i < last; i += n) {                                                                  \
            n = smaller(some, last - i);                                                                               \
            widen_all(w->kind, w->scales, i * groups, n * groups, scales);                                             \
            widen_all(w->kind, w->biases, i * groups, n * groups, biases);                                             \
            memset(scales + n * groups, 0, WIDTH * sizeof *scales);                                                    \
            memset(biases + n * groups, 0, WIDTH * sizeof *biases);                                                    \
            for (size_t j = 0; j < n; j++) {                                                                           \
                g.scales = scales + j * groups, g.biases = biases + j * groups;                                        \
                multiply_row(&g, (const uint8_t *)w->at + (i + j) * bytes, m, k, x, y + i + j, w->n, BITS);            \
            }                                                                                                          \
        }                                                                                                              \
    }

MULTIPLY_ROWS(2)
MULTIPLY_ROWS(3)
MULTIPLY_ROWS(4)
MULTIPLY_ROWS(5)
MULTIPLY_ROWS(6)
MULTIPLY_ROWS(8)

void multiply_packed(const struct weights *w, size_t m, size_t k, const float *arranged, size_t first, size_t last,
                     float *y)
{
    typedef void multiply_rows(const struct weights *, size_t, size_t, const float *, size_t, size_t, float *);
    static multiply_rows *const of_bits[] = {
        [2] = multiply_rows_of_2, [3] = multiply_rows_of_3, [4] = multiply_rows_of_4,
        [5] = multiply_rows_of_5, [6] = multiply_rows_of_6, [8] = multiply_rows_of_8};
    if (w->bits)
        of_bits[w->bits](w, m, k, arranged, first, last, y);
    else if (w->kind == FLOAT16)
        for (size_t i = first; i < last; i++)
            multiply_half_row(FLOAT16, (const char *)w->at + 2 * i * k, m, k, arranged, y + i, w->n);
    else
        for (size_t i = first; i < last; i++)
            multiply_half_row(BFLOAT16, (const char *)w->at + 2 * i * k, m, k, arranged, y + i, w->n);
}

/* ---- Whole rows --------------------------------------------------------------------------------------------------- */

/* y [k] = row i of w, quantized in so many bits. Eight numbers are `bits` bytes, of which four fit into a word. */
static inline __attribute__((always_inline)) void unpack_row(const struct weights *w, size_t k, size_t i, float *y,
                                                             int bits)
{
    const size_t group = w->group, groups = k / group;
    const uint8_t *p = (const uint8_t *)w->at + i * k * bits / 8;
    const ivec places = {0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits};
    float scales[groups], biases[groups];
    widen_all(w->kind, w->scales, i * groups, groups, scales);
    widen_all(w->kind, w->biases, i * groups, groups, biases);
    for (size_t j = 0; j < k; j += LANES, p += bits) {
        uint64_t both = 0;
        memcpy(&both, p, bits);
        const int32_t low = both, high = both >> 4 * bits;
        const ivec words = {low, low, low, low, high, high, high, high};
        const vec q = __builtin_convertvector((words >> places) & ((1 << bits) - 1), vec);
        store(y + j, q * scales[j / group] + biases[j / group]);
    }
}

void unpack(const struct weights *w, size_t k, size_t first, size_t last, float *y)
{
    if (!w->bits) {
        widen_all(w->kind, w->at, first * k, (last - first) * k, y);
        return;
    }
    for (size_t i = first; i < last; i++, y += k)
        switch (w->bits) {
        case 2: unpack_row(w, k, i, y, 2); break;
        case 3: unpack_row(w, k, i, y, 3); break;
        case 4: unpack_row(w, k, i, y, 4); break;
        case 5: unpack_row(w, k, i, y, 5); break;
        case 6: unpack_row(w, k, i, y, 6); break;
        default: unpack_row(w, k, i, y, 8);
        }
}
