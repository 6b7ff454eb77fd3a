/* What the files of this folder share: vectors, activations of vectors, and work in several threads. */

#pragma once

#include <stddef.h>
#include <stdint.h>

enum { LANES = 8 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }

static inline void store(float *p, vec v) { *(vec *)p = v; }

static inline float sum(vec v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* ---- Norms ------------------------------------------------------------------------------------------------------ */

/* Subtracts the mean of z [n], n a multiple of 8, and divides by the standard deviation; returns 1 / that. */
static inline float normalize(size_t n, float *z, float eps)
{
    vec s = {0}, squares = {0};
    for (size_t i = 0; i < n; i += LANES)
        s += load(z + i);
    const float mean = sum(s) / n;
    for (size_t i = 0; i < n; i += LANES) {
        vec centred = load(z + i) - mean;
        squares += centred * centred;
        store(z + i, centred);
    }
    const float inv_std = 1 / __builtin_sqrtf(sum(squares) / n + eps);
    for (size_t i = 0; i < n; i += LANES)
        store(z + i, load(z + i) * inv_std);
    return inv_std;
}

/* y [n] = weight x / rms(x); y may be x. */
static inline void rms_norm(size_t n, const float *x, const float *weight, float eps, float *y)
{
    float squares = 0;
    for (size_t i = 0; i < n; i++)
        squares += x[i] * x[i];
    const float scale = 1 / __builtin_sqrtf(squares / n + eps);
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * scale * weight[i];
}

/* y [n] = weight (x - mean) / std + bias; y may be x. */
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

/* Adjacent pairs of x [H, D], with factors [D]; y may be x. */
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

typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* exp for x in -87 ... 87: 2^n times the Taylor polynomial of the rest, which is at most ln 2 / 2. */
static inline vec exponential(vec x)
{
    ivec n = __builtin_convertvector(x * 1.44269504f + 200.5f, ivec) - 200; /* rounds: what is converted is positive */
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

/* The tanh GELU, x sigmoid(SLOPE (x + CUBIC x^3)), and its derivative. */
static const float SLOPE = 1.5957691216f, CUBIC = 0.044715f; /* SLOPE = 2 sqrt(2 / pi) */

static inline vec gelu(vec x)
{
    const vec least = {-20, -20, -20, -20, -20, -20, -20, -20}; /* where both are zero, which -inf times 0 is not */
    x = choose(x < least, least, x);
    return x * sigmoid(SLOPE * x * (1 + CUBIC * x * x));
}

static inline vec silu(vec x)
{
    const vec least = {-100, -100, -100, -100, -100, -100, -100, -100};
    x = choose(x < least, least, x);
    return x * sigmoid(x);
}

static inline vec gelu_derivative(vec x)
{
    vec s = sigmoid(SLOPE * x * (1 + CUBIC * x * x));
    return s + x * s * (1 - s) * SLOPE * (1 + 3 * CUBIC * x * x);
}

/* ---- Several threads -------------------------------------------------------------------------------------------- */

/* Pieces 0 ... n - 1 of some work, in any order, each by one thread. */
typedef void work(const void *context, int piece);

/* Do all pieces in at most so many threads, this one among them. */
void share(work *work, const void *context, int pieces, int threads);

/* y_i [m, n_i] = x [m, k] w_i [n_i, k]^T for a few rows x and so many matrices, all of them in one go. */
struct factor {
    size_t n;
    const float *w;
    float *y;
};
void multiply_few(size_t m, size_t k, const float *x, int count, const struct factor *factors, int threads);
