/* A call of the update rule. ctypes in Python declares the same structure. */

#pragma once

#include <stddef.h>
#include <stdint.h>

struct call {
    int mlp, T, H, D, K;           /* D is a multiple of 8 */
    int head_dim;                  /* of each D numbers, as many are the model's; the others are zero */
    const float *q, *k, *v;        /* [B, T, H, D] */
    const float *lr;               /* [B, T, H] */
    const float *t;                /* [K] */
    const float *gamma, *beta;     /* [H, D] */
    const int32_t *phase, *length; /* [B] */
    float *y;                      /* [B, T, H, D] */
    float *W1, *b1, *W2, *b2;      /* [B, H, ., .], changed for a sequence that completes a mini-batch */
    float *rows;                   /* [B, H, K, 2 D], for TTT-MLP [B, H, K, 10 D]; read and written */
    float *loss, *write_norm;      /* [B, T, H], what the learner does with each token; NULL where nobody looks */
};

/* Applies the rule to B sequences of at most T tokens: `length` says how many of each count. The rest of y stays,
   and of loss and write_norm. */
void mlx_ttt_update(const struct call *call, size_t B, int threads);

/* What a gradient of that call goes through, backwards. Each array is of the shape of the one that it belongs to. */
struct backward {
    struct call call;        /* as before: nothing of it is written, y is not read */
    const float *dy;         /* [B, T, H, D] */
    float *dW1, *db1;        /* in: the cotangents of the weights after the tokens; out: before them */
    float *dW2, *db2;
    float *drows;            /* the same of the rows */
    float *dq, *dk, *dv;     /* [B, T, H, D], out: for the tokens that count; the rest stays */
    float *dlr;              /* [B, T, H] */
    float *dt;               /* [B, H, K]: what each head adds to it */
    float *dgamma, *dbeta;   /* [B, H, D] */
};

void mlx_ttt_update_backward(const struct backward *backward, size_t B, int threads);
