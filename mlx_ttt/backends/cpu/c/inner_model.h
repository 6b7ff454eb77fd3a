/* What an inner model computes and learns, for one head of one sequence: a linear map, and the error it learns from. */

#pragma once

#include "matrix.h"

static const float EPS = 1e-6f; /* of the LayerNorm behind the inner model */

/* The LayerNorm's weights [D]. Where D is no multiple of 8, zeros follow these and every other row [D]. */
struct loss {
    size_t D;
    const float *gamma, *beta;
};

/* A token's key and value [D], and its learning rate. */
struct token {
    const float *k, *v;
    float lr;
};

#pragma GCC visibility push(hidden)

/* z = x W + b. */
void forward(struct matrix z, struct matrix x, struct matrix W, const float *b);

/* W += scale x^T e and b += scale sum e, for the rows of x and e. */
void add_gradient(struct matrix W, float *b, float scale, struct matrix x, struct matrix e);

/* Adds to z what the open mini-batch has taught: z_i -= t_i sum_{j <= i} (x_i . past_x_j + 1) past_e_j.

   The rows of x and z are the last of the slots that past_x and past_e hold. */
void add_open_rows(struct matrix z, const float *t, struct matrix x, struct matrix past_x, struct matrix past_e);

/* e = lr times the gradient of ||LN(z) - (v - k)||^2 / 2 with respect to z [D]. z becomes (z - mean) / std; e may be z.
   Returns 1 / std. */
float to_error(const struct loss *loss, struct token token, float *z, float *e);

#pragma GCC visibility pop
