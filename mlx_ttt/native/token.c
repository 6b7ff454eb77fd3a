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
    const int32_t *phase;
    float *conv, *conv_qk; /* the inputs before, [B, kernel - 1, C] */
    float *W1, *b1, *W2, *b2, *rows;
};

static void rms_norm(size_t n, const float *x, const float *weight, float eps, float *y)
{
    float squares = 0;
    for (size_t i = 0; i < n; i++)
        squares += x[i] * x[i];
    const float scale = 1 / __builtin_sqrtf(squares / n + eps);
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * scale * weight[i];
}

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

/* Adjacent pairs of x [H, D]. */
static void rotate(const struct block *p, size_t slot, float *x)
{
    const float *cos = p->cos + slot * p->D, *sin = p->sin + slot * p->D;
    for (size_t h = 0; h < p->H; h++, x += p->D)
        for (size_t d = 0; d < p->D; d += 2) {
            const float a = x[d], b = x[d + 1];
            x[d] = a * cos[d] + b * sin[d];
            x[d + 1] = b * cos[d + 1] + a * sin[d + 1];
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
    multiply_few(B, C, C, h, p->v, v, threads);
    multiply_few(B, H, C, h, p->lr_weight, lr, threads);
    if (p->k) {
        multiply_few(B, C, C, h, p->q, q, threads);
        multiply_few(B, C, C, h, p->k, k, threads);
    } else {
        multiply_few(B, C, C, h, p->q, u, threads);
        for (size_t b = 0; b < B; b++) {
            float *history = state->conv_qk + b * (p->kernel - 1) * C;
            convolve(p, history, u + b * C, p->conv_q, p->conv_q_bias, q + b * C);
            convolve(p, history, u + b * C, p->conv_k, p->conv_k_bias, k + b * C);
            remember(p, history, u + b * C);
        }
    }
    for (size_t b = 0; b < B; b++) {
        rotate(p, state->phase[b], q + b * C);
        rotate(p, state->phase[b], k + b * C);
        for (size_t i = 0; i < H; i++)
            lr[b * H + i] = p->base_lr / (1 + __builtin_expf(-lr[b * H + i] - p->lr_bias[i]));
        length[b] = 1;
    }
    const struct call call = {
        .mlp = p->mlp, .T = 1, .H = H, .D = p->D, .K = p->K, .q = q, .k = k, .v = v, .lr = lr, .t = p->t,
        .gamma = p->gamma, .beta = p->beta, .phase = state->phase, .length = length, .y = y,
        .W1 = state->W1, .b1 = state->b1, .W2 = state->W2, .b2 = state->b2, .rows = state->rows};
    mlx_ttt_update(&call, B, threads);
    for (size_t b = 0; b < B; b++) {
        normalize(C, y + b * C, p->post_norm_eps);
        for (size_t i = 0; i < C; i++)
            y[b * C + i] = y[b * C + i] * p->post_norm[i] + p->post_norm_bias[i];
    }
    if (p->g) {
        multiply_few(B, C, C, h, p->g, g, threads);
        gelu_times(n, g, y);
    }
    multiply_few(B, C, C, y, p->o, u, threads);
    for (size_t i = 0; i < n; i++)
        x[i] += u[i];

    for (size_t b = 0; b < B; b++)
        rms_norm(C, x + b * C, p->ffn_norm, p->rms_norm_eps, h + b * C);
    multiply_few(B, F, C, h, p->gate, gate, threads);
    multiply_few(B, F, C, h, p->up, up, threads);
    silu_times(B * F, gate, up);
    multiply_few(B, C, F, up, p->down, u, threads);
    for (size_t i = 0; i < n; i++)
        x[i] += u[i];
    free(room);
}

/* The same through so many blocks, one after the other. */
void mlx_ttt_token(const struct block *blocks, const struct state *states, size_t layers, float *x, size_t B,
                   int threads)
{
    for (size_t i = 0; i < layers; i++)
        read_token(blocks + i, states + i, x, B, threads);
}
