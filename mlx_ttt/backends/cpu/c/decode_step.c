/* One token of each sequence through the whole network: the blocks and layers of the network in C, for T = 1. */

#include <stdlib.h>
#include <string.h>

#include "blas.h"
#include "rule.h"
#include "vectors.h"

/* The parameters of a block. All but the projections are contiguous float32. Those that a block does not have are NULL.
   All sizes but H, K and kernel are multiples of 8. ctypes in Python declares the same structure. */
struct block {
    size_t C, H, D, K, intermediate, kernel, mlp;
    const float *conv_norm, *conv, *conv_bias; /* weights of convolutions [kernel, C] */
    const float *seq_norm;
    const struct weights *q, *k, *v, *o, *g, *lr_weight;
    const float *conv_q, *conv_q_bias, *conv_k, *conv_k_bias;
    const float *lr_bias, *t, *gamma, *beta, *cos, *sin; /* cos and sin [K, D] */
    const float *post_norm, *post_norm_bias;
    const float *ffn_norm;
    const struct weights *gate, *up, *down;
    float rms_norm_eps, post_norm_eps, base_lr;
};

/* The blocks of a network, and what is before and behind them. ctypes in Python declares the same structure. */
struct network {
    const struct block *blocks;
    size_t layers;
    const struct weights *embedding;
    const float *norm;
    float norm_eps;
};

/* The state of B sequences in one block; a step changes it. ctypes in Python declares the same structure. */
struct state {
    int32_t *phase;
    float *conv, *conv_qk; /* the latest inputs of convolutions, [B, kernel - 1, C] */
    float *W1, *b1, *W2, *b2, *rows;
};

/* How B tokens are learned from, [layers, B, H] each, or at one layer [B, H]. ctypes in Python declares the same
   structure. */
struct learning {
    const float *scale;            /* of the learning rates; NULL for 1 */
    float *loss, *lr, *write_norm; /* what the learners do; NULL where nobody looks */
};

/* The same at layer i, of which each has n = B H numbers. */
static struct learning at_layer(struct learning all, size_t i, size_t n)
{
    if (all.scale)
        all.scale += i * n;
    if (all.loss)
        all.loss += i * n, all.lr += i * n, all.write_norm += i * n;
    return all;
}

/* What becomes of B tokens in a block. */
struct tokens {
    float *h, *u, *q, *k, *v, *y, *g; /* [B, C] */
    float *gate, *up;                 /* [B, intermediate] */
    float *lr;                        /* [B, H] */
    int32_t *length;                  /* [B] */
};

/* The caller frees h, which is where all of them are. */
static struct tokens room_for_tokens(const struct block *p, size_t B)
{
    const size_t n = B * p->C, m = B * p->intermediate, rates = B * p->H;
    float *h = malloc((7 * n + 2 * m + rates + B) * sizeof *h);
    if (!h)
        abort();
    float *gate = h + 7 * n, *lr = gate + 2 * m;
    return (struct tokens){h, h + n, h + 2 * n, h + 3 * n, h + 4 * n, h + 5 * n, h + 6 * n, gate, gate + m,
                           lr, (int32_t *)(lr + rates)};
}

static void norm_tokens(const struct block *p, const float *x, const float *weight, float *y, size_t B)
{
    for (size_t b = 0; b < B; b++)
        rms_norm(p->C, x + b * p->C, weight, p->rms_norm_eps, y + b * p->C);
}

/* y [C] = the convolution at x [C], which `history` [kernel - 1, C] precedes. */
static void convolve(const struct block *p, const float *history, const float *x, const float *weight,
                     const float *bias, float *y)
{
    const size_t C = p->C, last = p->kernel - 1;
    memcpy(y, bias, C * sizeof *y);
    add_product(C, x, weight + last * C, y);
    for (size_t tap = 0; tap < last; tap++)
        add_product(C, history + tap * C, weight + tap * C, y);
}

/* Moves x to the end of `history`, and its first input out. */
static void append(const struct block *p, float *history, const float *x)
{
    const size_t n = p->kernel - 1, size = p->C * sizeof *x;
    if (n) {
        memmove(history, history + p->C, (n - 1) * size);
        memcpy(history + (n - 1) * p->C, x, size);
    }
}

/* The convolution in front of a block. */
static void pre_conv(const struct block *p, const struct state *state, const struct tokens *r, float *x, size_t B)
{
    const size_t C = p->C;
    norm_tokens(p, x, p->conv_norm, r->h, B);
    for (size_t b = 0; b < B; b++) {
        float *history = state->conv + b * (p->kernel - 1) * C;
        convolve(p, history, r->h + b * C, p->conv, p->conv_bias, r->u + b * C);
        append(p, history, r->h + b * C);
    }
    add(B * C, r->u, x);
}

/* q and k, rotated. Where they share a projection, it is in r->u, and each is a convolution of it. */
static void queries_and_keys(const struct block *p, const struct state *state, const struct tokens *r, size_t B)
{
    const size_t C = p->C, H = p->H, D = p->D;
    for (size_t b = 0; b < B; b++) {
        float *q = r->q + b * C, *k = r->k + b * C;
        if (!p->k) {
            const float *qk = r->u + b * C;
            float *history = state->conv_qk + b * (p->kernel - 1) * C;
            convolve(p, history, qk, p->conv_q, p->conv_q_bias, q);
            convolve(p, history, qk, p->conv_k, p->conv_k_bias, k);
            append(p, history, qk);
        }
        const float *cos = p->cos + state->phase[b] * D, *sin = p->sin + state->phase[b] * D;
        rotate(H, D, q, cos, sin, q);
        rotate(H, D, k, cos, sin, k);
    }
}

/* y [n] = gelu(x) y. */
static void gelu_times(size_t n, const float *x, float *y)
{
    for (size_t i = 0; i < n; i += LANES)
        store(y + i, gelu(load(x + i)) * load(y + i));
}

/* y [n] = silu(x) y. */
static void silu_times(size_t n, const float *x, float *y)
{
    for (size_t i = 0; i < n; i += LANES)
        store(y + i, silu(load(x + i)) * load(y + i));
}

/* Scales the learning rates lr [n], and shows what they have become. */
static __attribute__((noinline)) void scale_rates(const struct learning *learning, float *lr, size_t n)
{
    for (size_t i = 0; learning->scale && i < n; i++)
        lr[i] *= learning->scale[i];
    if (learning->lr)
        memcpy(learning->lr, lr, n * sizeof *lr);
}

/* x += TTT(norm(x)). */
static void ttt(const struct block *p, const struct state *state, const struct learning *learning,
                const struct tokens *r, float *x, size_t B, int threads)
{
    const size_t C = p->C, H = p->H;
    norm_tokens(p, x, p->seq_norm, r->h, B);
    const struct factor factors[] = {
        {p->q, p->k ? r->q : r->u}, {p->v, r->v}, {p->lr_weight, r->lr}, {p->k, r->k}, {p->g, r->g}};
    multiply_few(B, C, r->h, 5, factors, threads);
    queries_and_keys(p, state, r, B);
    for (size_t b = 0; b < B; b++) {
        for (size_t i = 0; i < H; i++)
            r->lr[b * H + i] = p->base_lr / (1 + __builtin_expf(-r->lr[b * H + i] - p->lr_bias[i]));
        r->length[b] = 1;
    }
    scale_rates(learning, r->lr, B * H);
    const struct call call = {
        .mlp = p->mlp, .T = 1, .H = H, .D = p->D, .K = p->K, .head_dim = p->D, .q = r->q, .k = r->k, .v = r->v,
        .lr = r->lr, .t = p->t, .gamma = p->gamma, .beta = p->beta, .phase = state->phase, .length = r->length,
        .y = r->y, .W1 = state->W1, .b1 = state->b1, .W2 = state->W2, .b2 = state->b2, .rows = state->rows,
        .loss = learning->loss, .write_norm = learning->write_norm};
    mlx_ttt_update(&call, B, threads);
    for (size_t b = 0; b < B; b++) {
        float *y = r->y + b * C;
        layer_norm(C, y, p->post_norm, p->post_norm_bias, p->post_norm_eps, y);
    }
    if (p->g)
        gelu_times(B * C, r->g, r->y);
    multiply_few(B, C, r->y, 1, &(struct factor){p->o, r->u}, threads);
    add(B * C, r->u, x);
}

/* x += SwiGLU(norm(x)). */
static void feed_forward(const struct block *p, const struct tokens *r, float *x, size_t B, int threads)
{
    const size_t C = p->C, F = p->intermediate;
    norm_tokens(p, x, p->ffn_norm, r->h, B);
    multiply_few(B, C, r->h, 2, (struct factor[]){{p->gate, r->gate}, {p->up, r->up}}, threads);
    silu_times(B * F, r->gate, r->up);
    multiply_few(B, F, r->up, 1, &(struct factor){p->down, r->u}, threads);
    add(B * C, r->u, x);
}

/* One block: x [B, C] is its input and becomes its output. */
static void block_step(const struct block *p, const struct state *state, struct learning learning, float *x, size_t B,
                       int threads)
{
    const struct tokens tokens = room_for_tokens(p, B);
    if (p->conv)
        pre_conv(p, state, &tokens, x, B);
    ttt(p, state, &learning, &tokens, x, B, threads);
    feed_forward(p, &tokens, x, B, threads);
    for (size_t b = 0; b < B; b++)
        state->phase[b] = (state->phase[b] + 1) % p->K;
    free(tokens.h);
}

/* x [B, C] = the hidden states of tokens ids [B] after the last norm. There is one state for each block. */
void mlx_ttt_token(const struct network *network, const struct state *states, const struct learning *learning,
                   const int64_t *ids, float *x, size_t B, int threads)
{
    const size_t C = network->blocks->C;
    for (size_t b = 0; b < B; b++)
        unpack(network->embedding, C, ids[b], ids[b] + 1, x + b * C);
    for (size_t i = 0; i < network->layers; i++)
        block_step(network->blocks + i, states + i, at_layer(*learning, i, B * network->blocks->H), x, B, threads);
    for (size_t b = 0; b < B; b++)
        rms_norm(C, x + b * C, network->norm, network->norm_eps, x + b * C);
}
