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

/* Room for what becomes of B tokens in a block. */
struct room {
    float *h, *u, *q, *k, *v, *y, *g; /* [B, C] */
    float *gate, *up;                 /* [B, intermediate] */
    float *lr;                        /* [B, H] */
    int32_t *length;                  /* [B] */
};

/* To be freed at h. */
static struct room make_room(const struct block *p, size_t B)
{
    const size_t n = B * p->C, m = B * p->intermediate, rates = B * p->H;
    float *h = malloc((7 * n + 2 * m + rates + B) * sizeof *h);
    if (!h)
        abort();
    float *gate = h + 7 * n, *lr = gate + 2 * m;
    return (struct room){h, h + n, h + 2 * n, h + 3 * n, h + 4 * n, h + 5 * n, h + 6 * n, gate, gate + m,
                         lr, (int32_t *)(lr + rates)};
}

static void add(size_t n, const float *x, float *y)
{
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

static void normed(const struct block *p, const float *x, const float *weight, float *y, size_t B)
{
    for (size_t b = 0; b < B; b++)
        rms_norm(p->C, x + b * p->C, weight, p->rms_norm_eps, y + b * p->C);
}

/* The convolution in front. */
static void pre_conv(const struct block *p, const struct state *state, const struct room *r, float *x, size_t B)
{
    const size_t C = p->C;
    normed(p, x, p->conv_norm, r->h, B);
    for (size_t b = 0; b < B; b++) {
        float *history = state->conv + b * (p->kernel - 1) * C;
        convolve(p, history, r->h + b * C, p->conv, p->conv_bias, r->u + b * C);
        remember(p, history, r->h + b * C);
    }
    add(B * C, r->u, x);
}

static void queries_and_keys(const struct block *p, const struct state *state, const struct room *r, size_t B)
{
    const size_t C = p->C, H = p->H, D = p->D;
    for (size_t b = 0; b < B; b++) {
        float *q = r->q + b * C, *k = r->k + b * C;
        if (!p->k) { /* both from the shared projection */
            const float *qk = r->u + b * C;
            float *history = state->conv_qk + b * (p->kernel - 1) * C;
            convolve(p, history, qk, p->conv_q, p->conv_q_bias, q);
            convolve(p, history, qk, p->conv_k, p->conv_k_bias, k);
            remember(p, history, qk);
        }
        const float *cos = p->cos + state->phase[b] * D, *sin = p->sin + state->phase[b] * D;
        rotate(H, D, q, cos, sin, q);
        rotate(H, D, k, cos, sin, k);
    }
}

static void ttt(const struct block *p, const struct state *state, const struct room *r, float *x, size_t B, int threads)
{
    const size_t C = p->C, H = p->H;
    normed(p, x, p->seq_norm, r->h, B);
    const struct factor factors[] = {{C, p->q, p->k ? r->q : r->u}, {C, p->v, r->v},
                                     {H, p->lr_weight, r->lr},      {p->k ? C : 0, p->k, r->k},
                                     {p->g ? C : 0, p->g, r->g}};
    multiply_few(B, C, r->h, 5, factors, threads);
    queries_and_keys(p, state, r, B);
    for (size_t b = 0; b < B; b++) {
        for (size_t i = 0; i < H; i++)
            r->lr[b * H + i] = p->base_lr / (1 + __builtin_expf(-r->lr[b * H + i] - p->lr_bias[i]));
        r->length[b] = 1;
    }
    const struct call call = {
        .mlp = p->mlp, .T = 1, .H = H, .D = p->D, .K = p->K, .q = r->q, .k = r->k, .v = r->v, .lr = r->lr, .t = p->t,
        .gamma = p->gamma, .beta = p->beta, .phase = state->phase, .length = r->length, .y = r->y,
        .W1 = state->W1, .b1 = state->b1, .W2 = state->W2, .b2 = state->b2, .rows = state->rows};
    mlx_ttt_update(&call, B, threads);
    for (size_t b = 0; b < B; b++) {
        float *y = r->y + b * C;
        layer_norm(C, y, p->post_norm, p->post_norm_bias, p->post_norm_eps, y);
    }
    if (p->g)
        gelu_times(B * C, r->g, r->y);
    multiply_few(B, C, r->y, 1, &(struct factor){C, p->o, r->u}, threads);
    add(B * C, r->u, x);
}

static void feed_forward(const struct block *p, const struct room *r, float *x, size_t B, int threads)
{
    const size_t C = p->C, F = p->intermediate;
    normed(p, x, p->ffn_norm, r->h, B);
    multiply_few(B, C, r->h, 2, (struct factor[]){{F, p->gate, r->gate}, {F, p->up, r->up}}, threads);
    silu_times(B * F, r->gate, r->up);
    multiply_few(B, F, r->up, 1, &(struct factor){C, p->down, r->u}, threads);
    add(B * C, r->u, x);
}

/* x [B, C], the block's input and, when it returns, its output. All sizes but H, K and kernel are multiples of 8. */
static void read_token(const struct block *p, const struct state *state, float *x, size_t B, int threads)
{
    const struct room room = make_room(p, B);
    if (p->conv)
        pre_conv(p, state, &room, x, B);
    ttt(p, state, &room, x, B, threads);
    feed_forward(p, &room, x, B, threads);
    for (size_t b = 0; b < B; b++)
        state->phase[b] = (state->phase[b] + 1) % p->K;
    free(room.h);
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
