/* Products with a few rows, in several threads. */

#pragma once

#include "weights.h"

/* y [m, n] = x [m, k] w [n, k]^T, for the x of `multiply_few`. Nothing where w is NULL. */
struct factor {
    const struct weights *w;
    float *y;
};

/* Multiplies the few rows x [m, k] by `count` matrices at once. */
void multiply_few(size_t m, size_t k, const float *x, int count, const struct factor *factors, int threads);
