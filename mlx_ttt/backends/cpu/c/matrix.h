/* Products of small matrices. */

#pragma once

#include "vectors.h"

#pragma GCC visibility push(hidden)

/* Element (i, j) is at[i row + j column]. */
struct matrix {
    float *at;
    size_t rows, columns, row, column;
};

static inline struct matrix matrix(float *at, size_t rows, size_t columns)
{
    return (struct matrix){at, rows, columns, columns, 1};
}

static inline struct matrix transposed(struct matrix a)
{
    return (struct matrix){a.at, a.columns, a.rows, a.column, a.row};
}

static inline struct matrix from_row(struct matrix a, size_t i)
{
    a.at += i * a.row;
    return a;
}

static inline struct matrix from_column(struct matrix a, size_t j)
{
    a.at += j * a.column;
    return a;
}

/* Eight sums of products, which together are a . b. */
static inline vec partial_dots(size_t n, const float *a, const float *b)
{
    vec s = {0};
    for (size_t i = 0; i < n; i += LANES)
        s += load(a + i) * load(b + i);
    return s;
}

static inline float dot(size_t n, const float *a, const float *b) { return sum(partial_dots(n, a, b)); }

/* c [m, n] += scale a [m, k] b [k, n]. The rows of c are contiguous, n is a multiple of 8. So are the rows of b; or its
   columns, as those of a transposed matrix, and then k is a multiple of 8, too. */
void add_product_of(struct matrix c, float scale, struct matrix a, struct matrix b);

/* a . b + 1. */
float dot_plus_one(size_t n, const float *a, const float *b);

#pragma GCC visibility pop
