/* What surrounds the update rule and is no product: norms, RoPE, activations, convolutions. Contiguous float32. */

#include "native.h"

enum { BLOCK = 1 << 14 }; /* elements that a thread takes at a time */

/* ---- Activations, wherever a row ends --------------------------------------------------------------------------- */

struct activation {
    const float *x, *factor;
    float *y;
    size_t size;
    int gelu;
};

static inline vec activated(const struct activation *a, vec x)
{
    return a->gelu ? gelu(x) : silu(x);
}

static void activate(const void *context, int piece)
{
    const struct activation *a = context;
    const size_t last = smaller((size_t)(piece + 1) * BLOCK, a->size);
    size_t i = (size_t)piece * BLOCK;
    for (; i + LANES <= last; i += LANES)
        store(a->y + i, load(a->factor + i) * activated(a, load(a->x + i)));
    for (; i < last; i++)
        a->y[i] = a->factor[i] * activated(a, (vec){a->x[i]})[0];
}

/* y = factor gelu(x), or factor silu(x). */
void mlx_ttt_activate(const float *x, const float *factor, float *y, size_t size, size_t gelu, int threads)
{
    const struct activation a = {x, factor, y, size, gelu};
    share(activate, &a, (size + BLOCK - 1) / BLOCK, threads);
}

/* ---- Rows, one by one ------------------------------------------------------------------------------------------- */

struct rows {
    void (*one)(const struct rows *, size_t i);
    size_t count, n; /* rows of x and of y, and how long one is */
    const float *x;
    float *y;
    const float *a, *b; /* two parameters: weight and bias, or cos and sin */
    float eps;          /* of a norm */
    size_t T, kernel;   /* of a convolution */
    size_t D, tables;   /* of RoPE: the rows of cos and sin, which repeat */
};

static size_t at_a_time(const struct rows *r) { return 1 + BLOCK / r->n; }

static void some(const void *context, int piece)
{
    const struct rows *r = context;
    const size_t first = piece * at_a_time(r), last = smaller(first + at_a_time(r), r->count);
    for (size_t i = first; i < last; i++)
        r->one(r, i);
}

static void share_rows(const struct rows *r, int threads)
{
    share(some, r, (r->count + at_a_time(r) - 1) / at_a_time(r), threads);
}

static void convolved(const struct rows *r, size_t i)
{
    const size_t C = r->n, before = i / r->T * (r->kernel - 1); /* rows of x that have none of y */
    const float *x = r->x + (i + before) * C;
    float *y = r->y + i * C;
    for (size_t c = 0; c < C; c++)
        y[c] = r->b[c];
    for (size_t tap = 0; tap < r->kernel; tap++, x += C)
        for (size_t c = 0; c < C; c++)
            y[c] += x[c] * r->a[tap * C + c];
}

/* y [B, T, C], the causal depthwise convolution of x [B, kernel - 1 + T, C]; weight [kernel, C], bias [C]. */
void mlx_ttt_convolve(const float *x, const float *weight, const float *bias, float *y, size_t B, size_t T,
                      size_t C, size_t kernel, int threads)
{
    share_rows(&(struct rows){convolved, B * T, C, x, y, weight, bias, .T = T, .kernel = kernel}, threads);
}

static void rms_normed(const struct rows *r, size_t i)
{
    rms_norm(r->n, r->x + i * r->n, r->a, r->eps, r->y + i * r->n);
}

/* y [n, C], RMSNorm of x. */
void mlx_ttt_rms_norm(const float *x, const float *weight, float *y, size_t n, size_t C, float eps, int threads)
{
    share_rows(&(struct rows){rms_normed, n, C, x, y, weight, .eps = eps}, threads);
}

static void layer_normed(const struct rows *r, size_t i)
{
    layer_norm(r->n, r->x + i * r->n, r->a, r->b, r->eps, r->y + i * r->n);
}

/* y [n, C], LayerNorm of x. */
void mlx_ttt_layer_norm(const float *x, const float *weight, const float *bias, float *y, size_t n, size_t C, float eps,
                        int threads)
{
    share_rows(&(struct rows){layer_normed, n, C, x, y, weight, bias, .eps = eps}, threads);
}

static void rotated(const struct rows *r, size_t i)
{
    const size_t D = r->D, table = i % r->tables * D;
    rotate(r->n / D, D, r->x + i * r->n, r->a + table, r->b + table, r->y + i * r->n);
}

/* y [n, H, D], RoPE of x; cos and sin [tables, D], where row i of x takes row i modulo tables. */
void mlx_ttt_rotate(const float *x, const float *cos, const float *sin, float *y, size_t n, size_t H, size_t D,
                    size_t tables, int threads)
{
    share_rows(&(struct rows){rotated, n, H * D, x, y, cos, sin, .D = D, .tables = tables}, threads);
}
