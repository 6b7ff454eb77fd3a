/* The update rule in its dual form, for one head after the other: what update/dual.py does, in the same words.

   Shapes: T tokens, H heads, D head dimension (a multiple of 8), K mini-batch size, F the inner model's hidden width (D
   for TTT-Linear). All arrays are contiguous float32. */

#include <stdlib.h>
#include <string.h>

#include "update.h"

static const float EPS = 1e-6f;
enum { PANEL = 2 * LANES };

/* ---- Products of small matrices: c [m, n] += scale a b, n a multiple of 8 --------------------------------------- */

/* Keeps the compiler from loading the same vector again for each row. */
#if defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v)
#endif

/* R rows and 16 columns of c. Element (i, p) of a is at i ai + p ap. */
#define TILE(R)                                                                                                       \
    static inline void tile_of_##R(size_t k, float scale, const float *a, size_t ai, size_t ap, const float *b,       \
                                   size_t ldb, float *c, size_t ldc)                                                  \
    {                                                                                                                 \
        vec left[R] = {{0}}, right[R] = {{0}};                                                                        \
        for (size_t p = 0; p < k; p++, a += ap, b += ldb) {                                                           \
            vec x = load(b), y = load(b + LANES);                                                                     \
            IN_REGISTER(x);                                                                                           \
            IN_REGISTER(y);                                                                                           \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)                                                       \
                left[r] += a[r * ai] * x, right[r] += a[r * ai] * y;                                                  \
        }                                                                                                             \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++, c += ldc)                                                 \
        {                                                                                                             \
            store(c, load(c) + scale * left[r]);                                                                      \
            store(c + LANES, load(c + LANES) + scale * right[r]);                                                     \
        }                                                                                                             \
    }

TILE(4)
TILE(1)

/* One row of c: b is read once, in four streams, as some_columns of blas.c does it. */
static void one_row(size_t n, size_t k, float scale, const float *a, size_t ap, const float *b, size_t ldb, float *c)
{
    const size_t part = k / 4;
    for (size_t p = 0; p < part; p++) {
        const float *b0 = b + p * ldb, *b1 = b0 + part * ldb, *b2 = b1 + part * ldb, *b3 = b2 + part * ldb;
        const float a0 = scale * a[p * ap], a1 = scale * a[(p + part) * ap];
        const float a2 = scale * a[(p + 2 * part) * ap], a3 = scale * a[(p + 3 * part) * ap];
        for (size_t j = 0; j < n; j += LANES)
            store(c + j, load(c + j) + a0 * load(b0 + j) + a1 * load(b1 + j) + a2 * load(b2 + j) + a3 * load(b3 + j));
    }
    for (size_t p = 4 * part; p < k; p++)
        for (size_t j = 0; j < n; j += LANES)
            store(c + j, load(c + j) + scale * a[p * ap] * load(b + p * ldb + j));
}

static void multiply(size_t m, size_t n, size_t k, float scale, const float *a, size_t ai, size_t ap, const float *b,
                     size_t ldb, float *c, size_t ldc)
{
    if (m == 1) {
        one_row(n, k, scale, a, ap, b, ldb, c);
        return;
    }
    float panel[k * PANEL], edge[4 * PANEL];
    for (size_t j = 0; j < n; j += PANEL) {
        const size_t columns = smaller(PANEL, n - j);
        const float *bj = b + j;
        size_t ld = ldb;
        if (m > 4 || columns < PANEL) { /* side by side: rows of b far apart would evict each other from the cache */
            for (size_t p = 0; p < k; p++)
                for (size_t l = 0; l < PANEL; l += LANES)
                    store(panel + p * PANEL + l, l < columns ? load(bj + p * ldb + l) : (vec){0});
            bj = panel, ld = PANEL;
        }
        for (size_t i = 0, rows; i < m; i += rows) {
            rows = m - i < 4 ? 1 : 4;
            float *tile = c + i * ldc + j;
            size_t ldt = ldc;
            if (columns < PANEL) {
                for (size_t r = 0; r < rows; r++)
                    store(edge + r * PANEL, load(tile + r * ldc));
                tile = edge, ldt = PANEL;
            }
            (rows == 4 ? tile_of_4 : tile_of_1)(k, scale, a + i * ai, ai, ap, bj, ld, tile, ldt);
            if (columns < PANEL)
                for (size_t r = 0; r < rows; r++)
                    store(c + (i + r) * ldc + j, load(edge + r * PANEL));
        }
    }
}

/* z [n, F] = x [n, D] W [D, F] + b. */
static void forward(size_t n, size_t F, size_t D, const float *x, const float *W, const float *b, float *z)
{
    for (size_t i = 0; i < n; i++)
        memcpy(z + i * F, b, F * sizeof *z);
    multiply(n, F, D, 1, x, D, 1, W, F, z, F);
}

/* W -= scale x^T e and b -= scale sum e, for rows x [n, D] and e [n, F]. */
static void commit(size_t n, size_t F, size_t D, float scale, const float *x, const float *e, float *W, float *b)
{
    multiply(D, F, n, -scale, x, 1, D, e, F, W, F);
    for (size_t j = 0; j < n; j++)
        for (size_t f = 0; f < F; f++)
            b[f] -= scale * e[j * F + f];
}

static float dot(size_t n, const float *a, const float *b)
{
    vec s = {0};
    for (size_t i = 0; i < n; i += LANES)
        s += load(a + i) * load(b + i);
    return sum(s);
}

/* z_i -= t_i sum_{j <= i} (x_i . past_x_j + 1) past_e_j for tokens at slots p ... p + n - 1 of the mini-batch. */
static void learned(size_t n, size_t p, size_t D, size_t F, const float *t, const float *x, const float *past_x,
                    const float *past_e, float *z)
{
    enum { MOST = 16 }; /* tokens at a time: all scores of a large mini-batch do not fit on a stack */
    const size_t past = p + n;
    float scores[MOST * past];
    for (size_t first = 0, m; first < n; first += m) {
        m = smaller(MOST, n - first);
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < past; j++) {
                const size_t slot = p + first + i;
                scores[i * past + j] = j > slot ? 0 : t[slot] * (dot(D, x + (first + i) * D, past_x + j * D) + 1);
            }
        multiply(m, F, past, -1, scores, past, 1, past_e, F, z + first * F, F);
    }
}

/* ---- The inner LayerNorm and its gradient, the GELU -------------------------------------------------------------- */

/* e [D] = lr times the gradient of ||LN(z) - (v - k)||^2 / 2 with respect to z, in the place of z. */
static void error(size_t D, float lr, const float *gamma, const float *beta, const float *k, const float *v, float *z)
{
    const float inv_std = normalize(D, z, EPS);
    float u[D];
    vec s = {0}, products = {0};
    for (size_t i = 0; i < D; i += LANES) {
        vec g = load(gamma + i), z_hat = load(z + i);
        vec x = (g * z_hat + load(beta + i) - (load(v + i) - load(k + i))) * g;
        s += x, products += x * z_hat;
        store(u + i, x);
    }
    const float mean = sum(s) / D, mean_product = sum(products) / D;
    for (size_t i = 0; i < D; i += LANES)
        store(z + i, (load(u + i) - mean - load(z + i) * mean_product) * (inv_std * lr));
}

/* The tanh GELU in place, and its derivative unless that is NULL. */
static void activate(size_t n, float *x, float *derivative)
{
    for (size_t i = 0; i < n; i += LANES) {
        vec z = load(x + i);
        if (derivative)
            store(derivative + i, gelu_derivative(z));
        store(x + i, gelu(z));
    }
}

/* ---- One head ---------------------------------------------------------------------------------------------------- */

/* One sequence's view of the inner model, and of the open mini-batch's rows in parts: k, e1 [, x2, e2], [K, .] each. */
struct head {
    size_t D, F, K;
    const float *t, *gamma, *beta;
    float *W1, *b1, *W2, *b2;
    float *k, *e1, *x2, *e2;
    float *W2_transposed; /* or NULL */
    float *q, *z1, *z, *derivative; /* room for the tokens at hand */
};

/* Tokens at slots p ... p + n - 1, their keys in h->k already; v and lr with their strides. z = f(q) in h->z. */
static void read_linear(struct head *h, size_t p, size_t n, const float *v, size_t ldv, const float *lr, size_t ldlr)
{
    const size_t D = h->D;
    float *e = h->e1 + p * D;
    forward(n, D, D, h->k + p * D, h->W1, h->b1, e);
    for (size_t i = 0; i < n; i++)
        error(D, lr[i * ldlr], h->gamma, h->beta, h->k + (p + i) * D, v + i * ldv, e + i * D);
    forward(n, D, D, h->q, h->W1, h->b1, h->z);
    learned(n, p, D, D, h->t, h->q, h->k, h->e1, h->z);
}

static void read_mlp(struct head *h, size_t p, size_t n, const float *v, size_t ldv, const float *lr, size_t ldlr)
{
    const size_t D = h->D, F = h->F;
    float *x2 = h->x2 + p * F, *e1 = h->e1 + p * F, *e2 = h->e2 + p * D;
    forward(n, F, D, h->k + p * D, h->W1, h->b1, x2);
    activate(n * F, x2, h->derivative);
    forward(n, D, F, x2, h->W2, h->b2, e2);
    for (size_t i = 0; i < n; i++)
        error(D, lr[i * ldlr], h->gamma, h->beta, h->k + (p + i) * D, v + i * ldv, e2 + i * D);
    if (h->W2_transposed) {
        memset(e1, 0, n * F * sizeof *e1);
        multiply(n, F, D, 1, e2, D, 1, h->W2_transposed, F, e1, F);
    } else
        for (size_t i = 0; i < n * F; i++)
            e1[i] = dot(D, e2 + i / F * D, h->W2 + i % F * D);
    for (size_t i = 0; i < n * F; i++)
        e1[i] *= h->derivative[i];
    forward(n, F, D, h->q, h->W1, h->b1, h->z1);
    learned(n, p, D, F, h->t, h->q, h->k, h->e1, h->z1);
    activate(n * F, h->z1, NULL);
    forward(n, D, F, h->z1, h->W2, h->b2, h->z);
    learned(n, p, F, D, h->t, h->z1, h->x2, h->e2, h->z);
}

enum direction { UNPACK, PACK };

/* Slots first ... last - 1 of the mini-batch, packed in `rows` [last - first, R], to their parts, or back. */
static void transfer(const struct head *h, enum direction direction, float *rows, size_t first, size_t last)
{
    float *parts[] = {h->k, h->e1, h->x2, h->e2};
    const size_t widths[] = {h->D, h->F, h->F, h->D}, n = h->W2 ? 4 : 2;
    for (size_t j = first; j < last; j++)
        for (size_t i = 0; i < n; rows += widths[i++]) {
            float *part = parts[i] + j * widths[i];
            if (direction == UNPACK)
                memcpy(part, rows, widths[i] * sizeof *rows);
            else
                memcpy(rows, part, widths[i] * sizeof *rows);
        }
}

static void one_head(const void *context, int piece)
{
    const struct call *c = context;
    const size_t D = c->D, F = c->mlp ? 4 * D : D, K = c->K, H = c->H, T = c->T;
    const size_t b = piece / H, i = piece, R = c->mlp ? 10 * D : 2 * D, stride = H * D;
    const size_t first = b * T * H + piece % H; /* the head at the sequence's first token */
    struct head h = {.D = D, .F = F, .K = K, .t = c->t};
    h.gamma = c->gamma + piece % H * D, h.beta = c->beta + piece % H * D;
    h.W1 = c->W1 + i * D * F, h.b1 = c->b1 + i * F;
    if (c->mlp)
        h.W2 = c->W2 + i * F * D, h.b2 = c->b2 + i * D;

    const size_t tokens = K * (4 * D + 4 * F);
    float *rows = c->rows + i * K * R, *room = malloc((tokens + D * F) * sizeof *room);
    if (!room)
        abort();
    h.k = room, h.q = h.k + K * D, h.z = h.q + K * D, h.e2 = h.z + K * D;
    h.e1 = h.e2 + K * D, h.x2 = h.e1 + K * F, h.z1 = h.x2 + K * F, h.derivative = h.z1 + K * F;
    if (c->mlp && (size_t)c->length[b] >= K) { /* else it is not worth it */
        h.W2_transposed = room + tokens;
        for (size_t d = 0; d < D; d++)
            for (size_t f = 0; f < F; f++)
                h.W2_transposed[d * F + f] = h.W2[f * D + d];
    }

    const size_t start = c->phase[b];
    size_t p = start, committed = 0;
    transfer(&h, UNPACK, rows, 0, start);
    for (size_t at = 0, left = c->length[b], n; left; at += n, left -= n) {
        n = smaller(left, K - p);
        const size_t token = (first + at * H) * D;
        for (size_t j = 0; j < n; j++) {
            memcpy(h.k + (p + j) * D, c->k + token + j * stride, D * sizeof *room);
            memcpy(h.q + j * D, c->q + token + j * stride, D * sizeof *room);
        }
        (c->mlp ? read_mlp : read_linear)(&h, p, n, c->v + token, stride, c->lr + first + at * H, H);
        for (size_t j = 0; j < n; j++) {
            normalize(D, h.z + j * D, EPS);
            for (size_t d = 0; d < D; d++)
                c->y[token + j * stride + d] = h.q[j * D + d] + h.gamma[d] * h.z[j * D + d] + h.beta[d];
        }
        p += n;
        if (p == K) {
            commit(K, F, D, c->t[K - 1], h.k, h.e1, h.W1, h.b1);
            if (c->mlp)
                commit(K, D, F, c->t[K - 1], h.x2, h.e2, h.W2, h.b2);
            if (h.W2_transposed)
                multiply(D, F, K, -c->t[K - 1], h.e2, 1, D, h.x2, F, h.W2_transposed, F);
            committed = 1;
            p = 0;
        }
    }
    if (committed) {
        transfer(&h, PACK, rows, 0, p);
        memset(rows + p * R, 0, (K - p) * R * sizeof *rows);
    } else
        transfer(&h, PACK, rows + start * R, start, p);
    free(room);
}

void mlx_ttt_update(const struct call *call, size_t B, int threads) { share(one_head, call, B * call->H, threads); }
