/* Matrices as MLX keeps them: float32, half precision, or quantized in groups of a row. */

#pragma once

#include <stddef.h>
#include <stdint.h>

enum kind { FLOAT32, FLOAT16, BFLOAT16 };

/* A matrix w [n, k], and what an adapter adds to a product with it. ctypes in Python declares the same structure. */
struct weights {
    size_t n;
    enum kind kind;              /* of its numbers; of a quantized matrix, of scales and biases */
    int bits, group;             /* of a quantized matrix; else 0. k is a multiple of the group, which is one of 32 */
    const void *at;              /* [n, k] numbers, or [n, k bits / 32] words: one number after the other, lowest first */
    const void *scales, *biases; /* [n, k / group]; an element is scale number + bias */
    size_t rank;                 /* 0: no adapter */
    const float *a, *b;          /* [rank, k] and [n, rank]: LoRA adds scale b (a x) to w x */
    float scale;
};

#pragma GCC visibility push(hidden)

/* Whether rows have to be arranged before they are multiplied: all but float32. */
static inline int is_packed(const struct weights *w) { return w->bits || w->kind != FLOAT32; }

/* How many numbers a row x [k] takes when it is arranged for such weights. */
size_t arranged_size(const struct weights *w, size_t k);

/* Puts x [m, k] into the order in which the numbers of such weights are unpacked. Weights of the same kind, bits and
   group take the same. */
void arrange(const struct weights *w, size_t m, size_t k, const float *x, float *arranged);

/* Elements first ... last - 1 of each row of y [m, n] = x [m, k] w^T, for x arranged. */
void multiply_packed(const struct weights *w, size_t m, size_t k, const float *arranged, size_t first, size_t last,
                     float *y);

/* y [last - first, k] = rows first ... last - 1 of w. */
void unpack(const struct weights *w, size_t k, size_t first, size_t last, float *y);

#pragma GCC visibility pop
