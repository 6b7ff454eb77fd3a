/* One token through a block of the network: layers.py, in the same words, for T = 1. */

#include <stdlib.h>
#include <string.h>

#include "update.h"

/* The parameters of a block, contiguous float32; one_token.py has the same structure. What a backbone lacks is NULL. */
struct block {
    size_t C, H, D, K, intermediate, kernel, mlp;
    const float *conv_norm, *conv, *conv_bias; /* weights of convolutions [kernel, C] */
    const float *seq_norm, *q, *k, *v, *o, *g;
    const float *conv_q, *conv_q_bias, *conv_k, *conv_k_bias;
    const float *lr_weight, *lr_bias, *t, *gamma, *beta, *cos, *sin; /* cos and sin [K, D] */
    const float *post_norm, *post_norm_bias;
    const float *ffn_norm, *gate, *up, *down;
    float rms_norm_eps, post_norm_eps, base_lr;
};

/* What a layer remembers of B sequences, to be written. */
struct state {
    int32_t *phase;
    float *conv, *conv_qk; /* the inputs before, [B, kernel - 1, C] */
    float *W1, *b1, *W2, *b2, *rows;
};

/* y [C], the convolution at x [C] and the kernel - 1 inputs before. */
static void convolve(const struct block *p, const float *history, const float *x, const float *weight,
                     const float *bias, float *y)
{
    const size_t C = p->C;
    for (size_t i = 0; i < C; i++)
        y[i] = bias[i] + x[i] * weight[(p->kernel - 1) * C + i];
    for (size_t tap = 0; tap + 1 < p->kernel; tap++)
        for (size_t i = 0; i < C; i++)
            y[i] += history[tap * C + i] * weight[tap * C + i];
}

static void remember(const struct block *p, float *history, const float *x)
{
    const size_t n = p->kernel - 1, size = p->C * sizeof *x;
    if (n) {
        memmove(history, history + p->C, (n - 1) * size);
        memcpy(history + (n - 1) * p->C, x, size);
    }
}

/* y = activation(x) y, [n]; n a multiple of 8. */
static void gelu_times(size_t n, const float *x, float *y)
{
    for (size_t i = 0; i < n; i += LANES)
        store(y + i, gelu(load(x + i)) * load(y + i));
}

static void silu_times(size_t n, const float *x, float *y)
{
    for (size_t i = 0; i < n; i += LANES)
        store(y + i, silu(load(x + i)) * load(y + i));
}

/* x [B, C], the block's input and, when it returns, its output. All sizes but H, K and kernel are multiples of 8. */
static void read_token(const struct block *p, const struct state *state, float *x, size_t B, int threads)
{
    const size_t C = p->C, H = p->H, F = p->intermediate, n = B * C;
    float *room = calloc(1, B * (7 * C + 2 * F + H + 1) * sizeof *room);
    if (!room)
        abort();
    float *h = room, *u = h + n, *q = u + n, *k = q + n, *v = k + n, *y = v + n, *g = y + n;
    float *gate = g + n, *up = gate + B * F, *lr = up + B * F;
    int32_t *length = (int32_t *)(lr + B * H);

    if (p->conv)
        for (size_t b = 0; b < B; b++) {
            float *history = state->conv + b * (p->kernel - 1) * C;
            rms_norm(C, x + b * C, p->conv_norm, p->rms_norm_eps, h);
            convolve(p, history, h, p->conv, p->conv_bias, u);
            remember(p, history, h);
            for (size_t i = 0; i < C; i++)
                x[b * C + i] += u[i];
        }

    for (size_t b = 0; b < B; b++)
        rms_norm(C, x + b * C, p->seq_norm, p->rms_norm_eps, h + b * C);
    float *q_before = p->k ? q : u; /* the convolution */
    const struct factor factors[] = {
        {C, p->q, q_before}, {C, p->v, v}, {H, p->lr_weight, lr}, {p->k ? C : 0, p->k, k}, {p->g ? C : 0, p->g, g}};
    multiply_few(B, C, h, 5, factors, threads);
    if (!p->k)
        for (size_t b = 0; b < B; b++) {
            float *history = state->conv_qk + b * (p->kernel - 1) * C;
            convolve(p, history, u + b * C, p->conv_q, p->conv_q_bias, q + b * C);
            convolve(p, history, u + b * C, p->conv_k, p->conv_k_bias, k + b * C);
            remember(p, history, u + b * C);
        }
    for (size_t b = 0; b < B; b++) {
        const float *cos = p->cos + state->phase[b] * p->D, *sin = p->sin + state->phase[b] * p->D;
        rotate(H, p->D, q + b * C, cos, sin, q + b * C);
        rotate(H, p->D, k + b * C, cos, sin, k + b * C);
        for (size_t i = 0; i < H; i++)
            lr[b * H + i] = p->base_lr / (1 + __builtin_expf(-lr[b * H + i] - p->lr_bias[i]));
        length[b] = 1;
    }
    const struct call call = {
        .mlp = p->mlp, .T = 1, .H = H, .D = p->D, .K = p->K, .q = q, .k = k, .v = v, .lr = lr, .t = p->t,
        .gamma = p->gamma, .beta = p->beta, .phase = state->phase, .length = length, .y = y,
        .W1 = state->W1, .b1 = state->b1, .W2 = state->W2, .b2 = state->b2, .rows = state->rows};
    mlx_ttt_update(&call, B, threads);
    for (size_t b = 0; b < B; b++)
        layer_norm(C, y + b * C, p->post_norm, p->post_norm_bias, p->post_norm_eps, y + b * C);
    if (p->g)
        gelu_times(n, g, y);
    multiply_few(B, C, y, 1, &(struct factor){C, p->o, u}, threads);
    for (size_t i = 0; i < n; i++)
        x[i] += u[i];

    for (size_t b = 0; b < B; b++)
        rms_norm(C, x + b * C, p->ffn_norm, p->rms_norm_eps, h + b * C);
    multiply_few(B, C, h, 2, (struct factor[]){{F, p->gate, gate}, {F, p->up, up}}, threads);
    silu_times(B * F, gate, up);
    multiply_few(B, F, up, 1, &(struct factor){C, p->down, u}, threads);
    for (size_t i = 0; i < n; i++)
        x[i] += u[i];
    for (size_t b = 0; b < B; b++)
        state->phase[b] = (state->phase[b] + 1) % p->K;
    free(room);
}

/* The same through so many blocks, one after the other, and the last norm. */
void mlx_ttt_token(const struct block *blocks, const struct state *states, size_t layers, const float *norm, float eps,
                   float *x, size_t B, int threads)
{
    for (size_t i = 0; i < layers; i++)
        read_token(blocks + i, states + i, x, B, threads);
    const size_t C = blocks->C;
    for (size_t b = 0; b < B; b++)
        rms_norm(C, x + b * C, norm, eps, x + b * C);
}
