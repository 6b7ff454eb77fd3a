/* The update rule in its dual form, head by head. Names and formulas are those of the dual form in MLX operations.

   T tokens, H heads, D head dimension (filled with zeros to a multiple of 8), K mini-batch size, F hidden width of the inner model (D for
   TTT-Linear, 4 D for TTT-MLP). All arrays are contiguous float32. */

#include <stdlib.h>
#include <string.h>

#include "inner_model.h"
#include "rule.h"
#include "threads.h"

/* ---- One head ---------------------------------------------------------------------------------------------------- */

/* One head of one sequence: its inner model, the parts of its mini-batch [K, .], and room for the tokens at hand. */
struct head {
    size_t D, F, K, H;
    const float *t;
    struct loss loss;
    float *W1, *b1, *W2, *b2;
    float *W2_transposed; /* NULL where it is not worth making */
    float *k, *e1, *x2, *e2;
    float *q, *z1, *z, *derivative;
    float *losses, *write_norms; /* of the tokens at hand, H apart; NULL where nobody looks */
    float *room; /* where all of them but the inner model are, to be freed */
};

/* x [n] = gelu(x). `derivative` [n], unless it is NULL, gets that of the old x. */
static void activate(size_t n, float *x, float *derivative)
{
    for (size_t i = 0; i < n; i += LANES) {
        vec z = load(x + i);
        if (derivative)
            store(derivative + i, gelu_derivative(z));
        store(x + i, gelu(z));
    }
}

/* What the learner shows is computed in functions of its own, so that the compiler makes the same of the others whether
   somebody looks or not. */
#define APART static __attribute__((noinline))

/* The losses ||LN(f(k)) - (v - k)||^2 / 2 of n tokens, whose f(k) stand in h->z as (z - mean) / std. */
APART void show_losses(const struct head *h, size_t n, const float *k, const float *v)
{
    const size_t D = h->D;
    const float *gamma = h->loss.gamma, *beta = h->loss.beta;
    for (size_t i = 0; i < n; i++, k += D, v += h->H * D) {
        const float *z = h->z + i * D;
        vec squares = {0};
        for (size_t d = 0; d < D; d += LANES) {
            vec missed = load(gamma + d) * load(z + d) + load(beta + d) - (load(v + d) - load(k + d));
            squares += missed * missed;
        }
        h->losses[i * h->H] = 0.5f * sum(squares);
    }
}

/* The squared norm of what a token adds to a map's weights and bias: (||x||^2 + 1) ||e||^2. */
static inline float squared_write(size_t in, const float *x, size_t out, const float *e)
{
    return (dot(in, x, x) + 1) * dot(out, e, e);
}

/* The norms of what n tokens at slots p, p + 1, ... add to the inner model when the mini-batch is committed. */
APART void show_write_norms(const struct head *h, size_t p, size_t n)
{
    const size_t D = h->D, F = h->F;
    for (size_t i = 0, j = p; i < n; i++, j++) {
        float squares = squared_write(D, h->k + j * D, F, h->e1 + j * F);
        if (h->W2)
            squares += squared_write(F, h->x2 + j * F, D, h->e2 + j * D);
        h->write_norms[i * h->H] = h->t[h->K - 1] * __builtin_sqrtf(squares);
    }
}

/* h->z = f(q) for n tokens at slots p, p + 1, ... of the mini-batch, after learning from them.

   Their k and q are in h; v and lr are at the first of them. */
static void linear(struct head *h, size_t p, size_t n, const float *v, const float *lr)
{
    const size_t D = h->D;
    float *k = h->k + p * D, *e = h->e1 + p * D;
    const struct matrix W1 = matrix(h->W1, D, D), q = matrix(h->q, n, D), z = matrix(h->z, n, D);
    forward(z, matrix(k, n, D), W1, h->b1);
    for (size_t i = 0; i < n; i++)
        to_error(&h->loss, (struct token){k + i * D, v + i * h->H * D, lr[i * h->H]}, h->z + i * D, e + i * D);
    if (h->losses)
        show_losses(h, n, k, v);
    forward(z, q, W1, h->b1);
    add_open_rows(z, h->t, q, matrix(h->k, p + n, D), matrix(h->e1, p + n, D));
}

static void mlp(struct head *h, size_t p, size_t n, const float *v, const float *lr)
{
    const size_t D = h->D, F = h->F;
    float *k = h->k + p * D, *x2 = h->x2 + p * F, *e1 = h->e1 + p * F, *e2 = h->e2 + p * D;
    const struct matrix W1 = matrix(h->W1, D, F), W2 = matrix(h->W2, F, D);
    forward(matrix(x2, n, F), matrix(k, n, D), W1, h->b1);
    activate(n * F, x2, h->derivative);
    const struct matrix q = matrix(h->q, n, D), z1 = matrix(h->z1, n, F), z = matrix(h->z, n, D);
    forward(z, matrix(x2, n, F), W2, h->b2);
    for (size_t i = 0; i < n; i++)
        to_error(&h->loss, (struct token){k + i * D, v + i * h->H * D, lr[i * h->H]}, h->z + i * D, e2 + i * D);
    if (h->losses)
        show_losses(h, n, k, v);
    if (h->W2_transposed) {
        memset(e1, 0, n * F * sizeof *e1);
        add_product_of(matrix(e1, n, F), 1, matrix(e2, n, D), matrix(h->W2_transposed, D, F));
    } else
        for (size_t i = 0; i < n * F; i++)
            e1[i] = dot(D, e2 + i / F * D, h->W2 + i % F * D);
    for (size_t i = 0; i < n * F; i++)
        e1[i] *= h->derivative[i];

    forward(z1, q, W1, h->b1);
    add_open_rows(z1, h->t, q, matrix(h->k, p + n, D), matrix(h->e1, p + n, F));
    activate(n * F, h->z1, NULL);
    forward(z, z1, W2, h->b2);
    add_open_rows(z, h->t, z1, matrix(h->x2, p + n, F), matrix(h->e2, p + n, D));
}

enum direction { UNPACK, PACK };

/* Copies slots first ... last - 1 from `rows` [last - first, R] to the parts of the mini-batch, or back. */
static void copy_rows(const struct head *h, enum direction direction, float *rows, size_t first, size_t last)
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

static struct head open_head(const struct call *c, size_t sequence, size_t head)
{
    const size_t D = c->D, F = c->mlp ? 4 * D : D, K = c->K, i = sequence * c->H + head;
    struct head h = {.D = D, .F = F, .K = K, .H = c->H, .t = c->t};
    h.loss = (struct loss){c->head_dim, c->gamma + head * D, c->beta + head * D};
    h.W1 = c->W1 + i * D * F, h.b1 = c->b1 + i * F;
    if (c->mlp)
        h.W2 = c->W2 + i * F * D, h.b2 = c->b2 + i * D;

    const size_t tokens = K * (4 * D + 4 * F);
    h.room = malloc((tokens + D * F) * sizeof *h.room);
    if (!h.room)
        abort();
    h.k = h.room, h.q = h.k + K * D, h.z = h.q + K * D, h.e2 = h.z + K * D;
    h.e1 = h.e2 + K * D, h.x2 = h.e1 + K * F, h.z1 = h.x2 + K * F, h.derivative = h.z1 + K * F;
    if (c->mlp && (size_t)c->length[sequence] >= K) { /* for fewer tokens, making it costs more than it saves */
        h.W2_transposed = h.room + tokens;
        for (size_t d = 0; d < D; d++)
            for (size_t f = 0; f < F; f++)
                h.W2_transposed[d * F + f] = h.W2[f * D + d];
    }
    return h;
}

/* y_i = q_i + LN(z_i) for n tokens; y is at the first of them. */
static void put_outputs(const struct head *h, size_t n, float *y)
{
    const size_t D = h->D;
    for (size_t j = 0; j < n; j++) {
        normalize(h->loss.D, h->z + j * D, EPS);
        for (size_t d = 0; d < D; d++)
            y[j * h->H * D + d] = h->q[j * D + d] + h->loss.gamma[d] * h->z[j * D + d] + h->loss.beta[d];
    }
}

/* Updates the inner model by the mini-batch, which is complete. */
static void commit_mini_batch(const struct head *h)
{
    const size_t D = h->D, F = h->F, K = h->K;
    const float t = h->t[K - 1];
    add_gradient(matrix(h->W1, D, F), h->b1, -t, matrix(h->k, K, D), matrix(h->e1, K, F));
    if (!h->W2)
        return;
    const struct matrix x2 = matrix(h->x2, K, F), e2 = matrix(h->e2, K, D);
    add_gradient(matrix(h->W2, F, D), h->b2, -t, x2, e2);
    if (h->W2_transposed)
        add_product_of(matrix(h->W2_transposed, D, F), -t, transposed(e2), x2);
}

static void update_head(const void *context, int piece)
{
    const struct call *c = context;
    const size_t D = c->D, K = c->K, H = c->H, stride = H * D;
    const size_t sequence = piece / H, head = piece % H, first = sequence * c->T * H + head;
    struct head h = open_head(c, sequence, head);

    const size_t R = c->mlp ? 10 * D : 2 * D, start = c->phase[sequence];
    float *rows = c->rows + piece * K * R;
    size_t p = start;
    int committed = 0;
    copy_rows(&h, UNPACK, rows, 0, start);
    for (size_t at = 0, left = c->length[sequence], n; left; at += n, left -= n) {
        n = smaller(left, K - p);
        const size_t token = (first + at * H) * D;
        for (size_t j = 0; j < n; j++) {
            memcpy(h.k + (p + j) * D, c->k + token + j * stride, D * sizeof *h.k);
            memcpy(h.q + j * D, c->q + token + j * stride, D * sizeof *h.q);
        }
        if (c->loss)
            h.losses = c->loss + first + at * H, h.write_norms = c->write_norm + first + at * H;
        (c->mlp ? mlp : linear)(&h, p, n, c->v + token, c->lr + first + at * H);
        if (c->loss)
            show_write_norms(&h, p, n);
        put_outputs(&h, n, c->y + token);
        p += n;
        if (p == K) {
            commit_mini_batch(&h);
            committed = 1;
            p = 0;
        }
    }
    if (committed) {
        copy_rows(&h, PACK, rows, 0, p);
        memset(rows + p * R, 0, (K - p) * R * sizeof *rows);
    } else
        copy_rows(&h, PACK, rows + start * R, start, p);
    free(h.room);
}

void mlx_ttt_update(const struct call *call, size_t B, int threads) { share(update_head, call, B * call->H, threads); }
