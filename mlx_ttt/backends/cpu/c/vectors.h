/* Vectors of eight numbers, and the functions of a row of numbers that several files use. */

#pragma once

#include <stddef.h>
#include <stdint.h>

enum { LANES = 8 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { return *(const vec *)p; }

static inline void store(float *p, vec v) { *(vec *)p = v; }

static inline float sum(vec v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* The first n numbers of v, then zeros. */
static inline vec first_of(vec v, size_t n)
{
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (vec)((ivec)v & (lane < (int32_t)n));
}

/* y [n] += x. */
static inline void add(size_t n, const float *x, float *y)
{
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

/* y [n] += x weight, element by element: one tap of a depthwise convolution. */
static inline void add_product(size_t n, const float *x, const float *weight, float *y)
{
    for (size_t i = 0; i < n; i++)
        y[i] += x[i] * weight[i];
}

/* ---- Norms ------------------------------------------------------------------------------------------------------ */

/* z [n] = (z - mean) / std. Where n is no multiple of 8, zeros fill the last vector. Returns 1 / std. */
static inline float normalize(size_t n, float *z, float eps)
{
    vec s = {0}, squares = {0};
    for (size_t i = 0; i < n; i += LANES)
        s += load(z + i);
    const float mean = sum(s) / n;
    for (size_t i = 0; i < n; i += LANES) {
        vec centred = first_of(load(z + i) - mean, n - i);
        squares += centred * centred;
        store(z + i, centred);
    }
    const float inv_std = 1 / __builtin_sqrtf(sum(squares) / n + eps);
    for (size_t i = 0; i < n; i += LANES)
        store(z + i, load(z + i) * inv_std);
    return inv_std;
}

/* y [n] = weight x / rms(x). y may be x. */
static inline void rms_norm(size_t n, const float *x, const float *weight, float eps, float *y)
{
    float squares = 0;
    for (size_t i = 0; i < n; i++)
        squares += x[i] * x[i];
    const float scale = 1 / __builtin_sqrtf(squares / n + eps);
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * scale * weight[i];
}

/* y [n] = weight (x - mean) / std + bias. y may be x. */
static inline void layer_norm(size_t n, const float *x, const float *weight, const float *bias, float eps, float *y)
{
    float total = 0, squares = 0;
    for (size_t i = 0; i < n; i++)
        total += x[i];
    const float mean = total / n;
    for (size_t i = 0; i < n; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / __builtin_sqrtf(squares / n + eps);
    for (size_t i = 0; i < n; i++)
        y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

/* ---- RoPE ------------------------------------------------------------------------------------------------------- */

/* Rotates the adjacent pairs of x [H, D] by the factors cos and sin [D]. y may be x. */
static inline void rotate(size_t H, size_t D, const float *x, const float *cos, const float *sin, float *y)
{
    for (size_t h = 0; h < H; h++, x += D, y += D)
        for (size_t d = 0; d < D; d += 2) {
            const float a = x[d], b = x[d + 1];
            y[d] = a * cos[d] + b * sin[d];
            y[d + 1] = b * cos[d + 1] + a * sin[d + 1];
        }
}

/* ---- Activations ------------------------------------------------------------------------------------------------ */

/* exp(x) for x from -87 to 87: 2^n times a Taylor polynomial of the remainder, which is at most ln(2) / 2. */
static inline vec exponential(vec x)
{
    ivec n = __builtin_convertvector(x * 1.44269504f + 200.5f, ivec) - 200; /* + 200: truncating then rounds */
    vec m = __builtin_convertvector(n, vec), r = x - m * 0.693359375f + m * 2.12194440e-4f;
    vec y = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return y * (vec)((n + 127) << 23);
}

static inline vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

static inline vec sigmoid(vec x)
{
    const vec most = {87, 87, 87, 87, 87, 87, 87, 87};
    x = choose(x > most, most, x);
    x = choose(x < -most, -most, x);
    return 1 / (1 + exponential(-x));
}

/* The tanh GELU is x sigmoid(SLOPE (x + CUBIC x^3)). */
static const float SLOPE = 1.5957691216f, CUBIC = 0.044715f; /* SLOPE = 2 sqrt(2 / pi) */

static inline vec gelu(vec x)
{
    /* Below -20 the result is zero. Without the bound, -infinity times zero would make it NaN. */
    const vec least = {-20, -20, -20, -20, -20, -20, -20, -20};
    x = choose(x < least, least, x);
    return x * sigmoid(SLOPE * x * (1 + CUBIC * x * x));
}

static inline vec gelu_derivative(vec x)
{
    vec s = sigmoid(SLOPE * x * (1 + CUBIC * x * x));
    return s + x * s * (1 - s) * SLOPE * (1 + 3 * CUBIC * x * x);
}

/* gelu(x) with its first and second derivative. */
struct bent {
    vec value, slope, bend;
};

static inline struct bent bent_gelu(vec x)
{
    /* Beyond 20 the second derivative is zero. Without the bound, zero times infinity would make it NaN. */
    const vec most = {20, 20, 20, 20, 20, 20, 20, 20};
    vec z = choose(x < -most, -most, choose(x > most, most, x));
    vec s = sigmoid(SLOPE * z * (1 + CUBIC * z * z));
    vec d = SLOPE * (1 + 3 * CUBIC * z * z), dd = SLOPE * 6 * CUBIC * z, ds = s * (1 - s);
    return (struct bent){choose(x < -most, z, x) * s, s + z * ds * d, ds * (2 * d + z * (dd + (1 - 2 * s) * d * d))};
}

static inline vec silu(vec x)
{
    const vec least = {-100, -100, -100, -100, -100, -100, -100, -100}; /* as in gelu */
    x = choose(x < least, least, x);
    return x * sigmoid(x);
}

/* silu(x) with its derivative; no second one. */
static inline struct bent bent_silu(vec x)
{
    const vec least = {-100, -100, -100, -100, -100, -100, -100, -100};
    x = choose(x < least, least, x);
    vec s = sigmoid(x), y = x * s;
    return (struct bent){.value = y, .slope = s + y * (1 - s)};
}
