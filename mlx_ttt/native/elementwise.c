/* Activations and convolutions: what surrounds the update rule and is no matrix product. Contiguous float32. */

#include "native.h"

enum { BLOCK = 1 << 14 }; /* elements that a thread takes at a time */

struct activation {
    const float *x, *factor;
    float *y;
    size_t size;
    int gelu;
};

static void activate(const void *context, int piece)
{
    const struct activation *a = context;
    const size_t first = (size_t)piece * BLOCK, last = smaller(first + BLOCK, a->size);
    for (size_t i = first; i < last; i += LANES) {
        const size_t n = smaller(last - i, LANES);
        float x[LANES] = {0}, factor[LANES] = {0};
        __builtin_memcpy(x, a->x + i, n * sizeof *x);
        __builtin_memcpy(factor, a->factor + i, n * sizeof *x);
        vec z = load(x);
        vec y = z * sigmoid(z);
        if (a->gelu)
            y = gelu(z);
        store(x, load(factor) * y);
        __builtin_memcpy(a->y + i, x, n * sizeof *x);
    }
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
