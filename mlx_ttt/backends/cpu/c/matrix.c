#include "matrix.h"

/* Makes the compiler take v as it is: it does not load v again where v is used, nor reorder the additions that make v
   with those that follow. Without it, the last digits of results would depend on what the compiler inlines. */
#if defined(__AVX__)
#define FIX(v) __asm__("" : "+x"(v))
#else
#define FIX(v)
#endif

enum { PANEL = 2 * LANES }; /* columns of a tile */

/* c += scale a b, for R rows and PANEL columns of c. */
#define ADD_TILE(R)                                                                                                   \
    static inline __attribute__((always_inline)) void add_tile_of_##R(struct matrix c, float scale, struct matrix a,  \
                                                                      struct matrix b)                                \
    {                                                                                                                 \
        vec left[R] = {{0}}, right[R] = {{0}};                                                                        \
        for (size_t p = 0; p < a.columns; p++, a.at += a.column, b.at += b.row) {                                     \
            vec x = load(b.at), y = load(b.at + LANES);                                                               \
            FIX(x);                                                                                                   \
            FIX(y);                                                                                                   \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)                                                       \
                left[r] += a.at[r * a.row] * x, right[r] += a.at[r * a.row] * y;                                      \
        }                                                                                                             \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++, c.at += c.row)                                            \
        {                                                                                                             \
            store(c.at, load(c.at) + scale * left[r]);                                                                \
            store(c.at + LANES, load(c.at + LANES) + scale * right[r]);                                               \
        }                                                                                                             \
    }

ADD_TILE(4)
ADD_TILE(1)

/* The same for a c of one row. Reads b once, in four streams, for the reason that blas.c gives. */
static void add_row_product(struct matrix c, float scale, struct matrix a, struct matrix b)
{
    const size_t n = c.columns, k = a.columns, part = k / 4;
    for (size_t p = 0; p < part; p++) {
        const float *b0 = b.at + p * b.row, *b1 = b0 + part * b.row, *b2 = b1 + part * b.row, *b3 = b2 + part * b.row;
        const float a0 = scale * a.at[p * a.column], a1 = scale * a.at[(p + part) * a.column];
        const float a2 = scale * a.at[(p + 2 * part) * a.column], a3 = scale * a.at[(p + 3 * part) * a.column];
        for (size_t j = 0; j < n; j += LANES) {
            vec left = a1 * load(b1 + j), right = a3 * load(b3 + j);
            FIX(left);
            FIX(right);
            left += a0 * load(b0 + j), right += a2 * load(b2 + j);
            FIX(left);
            FIX(right);
            left += right;
            FIX(left);
            store(c.at + j, load(c.at + j) + left);
        }
    }
    for (size_t p = 4 * part; p < k; p++)
        for (size_t j = 0; j < n; j += LANES)
            store(c.at + j, load(c.at + j) + scale * a.at[p * a.column] * load(b.at + p * b.row + j));
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Transposes eight rows of eight: one number of each half in turn, three times. */
static inline void transpose_block(vec rows[LANES])
{
    for (int round = 0; round < 3; round++) {
        vec mixed[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = SHUFFLE(rows[i], rows[i + LANES / 2], 0, 8, 1, 9, 2, 10, 3, 11);
            mixed[2 * i + 1] = SHUFFLE(rows[i], rows[i + LANES / 2], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int i = 0; i < LANES; i++)
            rows[i] = mixed[i];
    }
}

/* to [b.rows, PANEL] = the first columns of b, and zeros after them. */
static inline void pack(float *to, struct matrix b, size_t columns)
{
    if (b.column == 1) {
        for (size_t p = 0; p < b.rows; p++)
            for (size_t l = 0; l < PANEL; l += LANES)
                store(to + p * PANEL + l, l < columns ? load(b.at + p * b.row + l) : (vec){0});
        return;
    }
    for (size_t l = 0; l < PANEL; l += LANES)
        for (size_t p = 0; p < b.rows; p += LANES) {
            vec block[LANES] = {{0}};
            for (size_t i = 0; i < LANES && l < columns; i++)
                block[i] = load(b.at + (l + i) * b.column + p);
            transpose_block(block);
            for (size_t i = 0; i < LANES; i++)
                store(to + (p + i) * PANEL + l, block[i]);
        }
}

void add_product_of(struct matrix c, float scale, struct matrix a, struct matrix b)
{
    if (c.rows == 1 && b.column == 1) {
        add_row_product(c, scale, a, b);
        return;
    }
    float panel[b.rows * PANEL], edge[4 * PANEL];
    for (size_t j = 0; j < c.columns; j += PANEL) {
        const size_t columns = smaller(PANEL, c.columns - j);
        struct matrix right = from_column(b, j);
        if (c.rows > 4 || columns < PANEL || b.column != 1) { /* rows far apart would evict each other from the cache */
            pack(panel, right, columns);
            right = matrix(panel, b.rows, PANEL);
        }
        for (size_t i = 0, rows; i < c.rows; i += rows) {
            rows = c.rows - i < 4 ? 1 : 4;
            const struct matrix wanted = from_column(from_row(c, i), j);
            struct matrix tile = wanted;
            if (columns < PANEL) { /* half a tile is computed beside c */
                tile = matrix(edge, rows, PANEL);
                for (size_t r = 0; r < rows; r++)
                    store(edge + r * PANEL, load(wanted.at + r * wanted.row));
            }
            if (rows == 4)
                add_tile_of_4(tile, scale, from_row(a, i), right);
            else
                add_tile_of_1(tile, scale, from_row(a, i), right);
            if (columns < PANEL)
                for (size_t r = 0; r < rows; r++)
                    store(wanted.at + r * wanted.row, load(edge + r * PANEL));
        }
    }
}

float dot_plus_one(size_t n, const float *a, const float *b)
{
    const vec s = partial_dots(n, a, b);
    float s0 = s[0] + s[4], s1 = s[1] + s[5], s2 = s[2] + s[6], s3 = s[3] + s[7];
    FIX(s0);
    FIX(s1);
    FIX(s2);
    FIX(s3);
    s0 += s3, s1 += 1;
    FIX(s0);
    FIX(s1);
    s0 += s1;
    FIX(s0);
    return s0 + s2;
}
