/* One call of the update rule; update/native.py has the same structure. */

#pragma once

#include "native.h"

struct call {
    int mlp, T, H, D, K;
    const float *q, *k, *v; /* [B, T, H, D] */
    const float *lr;        /* [B, T, H] */
    const float *t;         /* [K] */
    const float *gamma, *beta;
    const int32_t *phase, *length; /* [B] */
    float *y;                      /* [B, T, H, D] */
    float *W1, *b1, *W2, *b2;      /* [B, H, ., .], read, and written by a sequence that completes a mini-batch */
    float *rows;                   /* [B, H, K, 2 D], for TTT-MLP [B, H, K, 10 D]; read and written */
};

/* Reads T tokens of B sequences, of each so many as `length` says; what comes after them in y is left as it is. */
void mlx_ttt_update(const struct call *call, size_t B, int threads);
