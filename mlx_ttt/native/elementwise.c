/* Activations and convolutions: what surrounds the update rule and is no matrix product. Contiguous float32. */

#include "native.h"

enum { BLOCK = 1 << 14 }; /* elements that a thread takes at a time */

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

struct convolution {
    const float *x, *weight, *bias;
    float *y;
    size_t T, C, kernel;
};

static void convolve(const void *context, int piece)
{
    const struct convolution *c = context;
    const size_t b = piece / c->T, t = piece % c->T, C = c->C;
    const float *x = c->x + (b * (c->T + c->kernel - 1) + t) * C;
    float *y = c->y + (b * c->T + t) * C;
    for (size_t i = 0; i < C; i++)
        y[i] = c->bias[i];
    for (size_t tap = 0; tap < c->kernel; tap++, x += C)
        for (size_t i = 0; i < C; i++)
            y[i] += x[i] * c->weight[tap * C + i];
}

/* y [B, T, C], the causal depthwise convolution of x [B, kernel - 1 + T, C]; weight [kernel, C], bias [C]. */
void mlx_ttt_convolve(const float *x, const float *weight, const float *bias, float *y, size_t B, size_t T,
                      size_t C, size_t kernel, int threads)
{
    const struct convolution c = {x, weight, bias, y, T, C, kernel};
    share(convolve, &c, B * T, threads);
}
