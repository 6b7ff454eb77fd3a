/* The operations around the update rule that are no products, for many tokens: norms, RoPE, activations, convolutions.
   All arrays are contiguous float32. */

#include <stdlib.h>
#include <string.h>

#include "threads.h"
#include "vectors.h"

enum { BLOCK = 1 << 14 }; /* elements that a thread takes at a time */

/* ---- Activations, element by element ---------------------------------------------------------------------------- */

/* ctypes in Python declares the same structure. */
struct activation {
    const float *x, *factor, *dy;
    float *y, *dx, *dfactor;
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

/* y = gelu(x) factor, or silu(x) factor. */
void mlx_ttt_activate(const float *x, const float *factor, float *y, size_t size, size_t gelu, int threads)
{
    const struct activation a = {.x = x, .factor = factor, .y = y, .size = size, .gelu = gelu};
    share(activate, &a, (size + BLOCK - 1) / BLOCK, threads);
}

static void activate_backward(const void *context, int piece)
{
    const struct activation *a = context;
    const size_t last = smaller((size_t)(piece + 1) * BLOCK, a->size);
    size_t i = (size_t)piece * BLOCK;
    for (; i + LANES <= last; i += LANES) {
        const struct bent f = a->gelu ? bent_gelu(load(a->x + i)) : bent_silu(load(a->x + i));
        store(a->dx + i, load(a->dy + i) * load(a->factor + i) * f.slope);
        store(a->dfactor + i, load(a->dy + i) * f.value);
    }
    for (; i < last; i++) {
        const struct bent f = a->gelu ? bent_gelu((vec){a->x[i]}) : bent_silu((vec){a->x[i]});
        a->dx[i] = a->dy[i] * a->factor[i] * f.slope[0];
        a->dfactor[i] = a->dy[i] * f.value[0];
    }
}

/* The cotangents of x and factor: all that is in `activation` but y. */
void mlx_ttt_activate_backward(const struct activation *activation, int threads)
{
    share(activate_backward, activation, (activation->size + BLOCK - 1) / BLOCK, threads);
}

/* ---- Row by row ------------------------------------------------------------------------------------------------- */

/* x and y [count, width]. ctypes in Python declares the same structure. */
struct rows {
    const float *x;
    float *y;
    size_t count, width;
};

/* An operation on rows. */
struct operation {
    void (*row)(const struct operation *, size_t i); /* makes row i of y */
    struct rows rows;
    const float *a, *b; /* its parameters: weight and bias, cos and sin, or a number for each row */
    float eps;          /* of a norm */
    size_t T, kernel;   /* of a convolution */
    size_t D, tables;   /* of RoPE */
};

/* y_i = log sum exp(x_i), where y is [count]. */
static void log_sum_exp(const void *context, int i)
{
    const struct rows *r = context;
    const size_t n = r->width, whole = n / LANES * LANES;
    const float *x = r->x + i * n;
    float most = x[0], total = 0;
    vec largest = {0}, sums = {0};
    ivec no_numbers = {0};
    largest += most;
    for (size_t j = 0; j < whole; j += LANES) {
        const vec v = load(x + j);
        no_numbers |= v != v;
        largest = choose(v > largest, v, largest);
    }
    for (int l = 0; l < LANES; l++)
        most = largest[l] > most ? largest[l] : most;
    for (size_t j = whole; j < n; j++)
        most = x[j] > most ? x[j] : most;
    const vec least = {-87, -87, -87, -87, -87, -87, -87, -87}; /* where the exponential is as good as zero */
    for (size_t j = 0; j < whole; j += LANES) {
        const vec v = load(x + j) - most;
        sums += exponential(choose(v < least, least, v));
    }
    for (size_t j = whole; j < n; j++) {
        no_numbers |= (vec){x[j]} != (vec){x[j]};
        total += x[j] - most < -87 ? 0 : exponential((vec){x[j] - most})[0];
    }
    for (int l = 0; l < LANES; l++)
        if (no_numbers[l])
            total = __builtin_nanf("");
    r->y[i] = most + __builtin_logf(total + sum(sums));
}

void mlx_ttt_log_sum_exp(const float *x, float *y, size_t count, size_t width, int threads)
{
    share(log_sum_exp, &(struct rows){x, y, count, width}, count, threads);
}

static size_t rows_at_a_time(const struct rows *r) { return 1 + BLOCK / r->width; }

static void some_rows(const void *context, int piece)
{
    const struct operation *o = context;
    const struct rows *r = &o->rows;
    const size_t n = rows_at_a_time(r), first = piece * n, last = smaller(first + n, r->count);
    for (size_t i = first; i < last; i++)
        o->row(o, i);
}

static void share_rows(const struct operation *o, int threads)
{
    const size_t n = rows_at_a_time(&o->rows);
    share(some_rows, o, (o->rows.count + n - 1) / n, threads);
}

static void convolve_row(const struct operation *o, size_t i)
{
    const size_t C = o->rows.width, sequence = i / o->T;
    const size_t before = sequence * (o->kernel - 1); /* rows of x that y does not have */
    const float *x = o->rows.x + (i + before) * C;
    float *y = o->rows.y + i * C;
    memcpy(y, o->b, C * sizeof *y);
    for (size_t tap = 0; tap < o->kernel; tap++)
        add_product(C, x + tap * C, o->a + tap * C, y);
}

/* The causal depthwise convolution of x [B, kernel - 1 + T, C] is y [B, T, C]; `rows` counts the B T rows of y.
   weight [kernel, C], bias [C]. */
void mlx_ttt_convolve(const struct rows *rows, const float *weight, const float *bias, size_t T, size_t kernel,
                      int threads)
{
    share_rows(&(struct operation){convolve_row, *rows, weight, bias, .T = T, .kernel = kernel}, threads);
}

static void softmax_row(const struct operation *o, size_t i)
{
    const size_t n = o->rows.width, whole = n / LANES * LANES;
    const float *x = o->rows.x + i * n, log_sum = o->a[i], factor = o->b[i] + 0 * log_sum; /* NaN where log_sum is */
    float *y = o->rows.y + i * n;
    const vec least = {-87, -87, -87, -87, -87, -87, -87, -87}; /* where the exponential is as good as zero */
    for (size_t j = 0; j < whole; j += LANES) {
        const vec v = load(x + j) - log_sum;
        store(y + j, factor * exponential(choose(v < least, least, v)));
    }
    for (size_t j = whole; j < n; j++)
        y[j] = x[j] - log_sum < -87 ? 0 * factor : factor * exponential((vec){x[j] - log_sum})[0];
}

/* y = softmax(x) times a factor for each row, given log sum exp(x) [count]. */
void mlx_ttt_softmax(const struct rows *rows, const float *log_sum, const float *factor, int threads)
{
    share_rows(&(struct operation){softmax_row, *rows, log_sum, factor}, threads);
}

static void rms_norm_row(const struct operation *o, size_t i)
{
    const struct rows *r = &o->rows;
    rms_norm(r->width, r->x + i * r->width, o->a, o->eps, r->y + i * r->width);
}

/* y = RMSNorm(x), weight [width]. */
void mlx_ttt_rms_norm(const struct rows *rows, const float *weight, float eps, int threads)
{
    share_rows(&(struct operation){rms_norm_row, *rows, weight, .eps = eps}, threads);
}

static void layer_norm_row(const struct operation *o, size_t i)
{
    const struct rows *r = &o->rows;
    layer_norm(r->width, r->x + i * r->width, o->a, o->b, o->eps, r->y + i * r->width);
}

/* y = LayerNorm(x), weight and bias [width]. */
void mlx_ttt_layer_norm(const struct rows *rows, const float *weight, const float *bias, float eps, int threads)
{
    share_rows(&(struct operation){layer_norm_row, *rows, weight, bias, .eps = eps}, threads);
}

static void rotate_row(const struct operation *o, size_t i)
{
    const struct rows *r = &o->rows;
    const size_t D = o->D, table = i % o->tables * D;
    rotate(r->width / D, D, r->x + i * r->width, o->a + table, o->b + table, r->y + i * r->width);
}

/* y = RoPE(x) for rows of H heads of D. Row i takes row i % tables of cos and sin [tables, D]. */
void mlx_ttt_rotate(const struct rows *rows, const float *cos, const float *sin, size_t D, size_t tables, int threads)
{
    share_rows(&(struct operation){rotate_row, *rows, cos, sin, .D = D, .tables = tables}, threads);
}

/* ---- Row by row, backwards -------------------------------------------------------------------------------------- */

/* The backward of an operation on rows: y in `rows` is the cotangent of x. */
struct gradient {
    void (*row)(const struct gradient *, size_t i, float *sums); /* makes row i, adds to the sums */
    struct rows rows;
    const float *dy, *weight;
    float eps;
    size_t T, kernel;
    size_t parameters;
    float *sums; /* [pieces, parameters, width]: cotangents of the parameters. Each piece has its own, so that a result
                    does not depend on which thread was faster. */
};

static void some_rows_backward(const void *context, int piece)
{
    const struct gradient *g = context;
    const size_t n = rows_at_a_time(&g->rows), first = piece * n, last = smaller(first + n, g->rows.count);
    for (size_t i = first; i < last; i++)
        g->row(g, i, g->sums + piece * g->parameters * g->rows.width);
}

/* dparameters [parameters, width] = what all rows add to them. */
static void share_gradient(struct gradient g, float *dparameters, int threads)
{
    const size_t n = rows_at_a_time(&g.rows), pieces = (g.rows.count + n - 1) / n, size = g.parameters * g.rows.width;
    g.sums = calloc(pieces * size + 1, sizeof *g.sums);
    if (!g.sums)
        abort();
    share(some_rows_backward, &g, pieces, threads);
    memset(dparameters, 0, size * sizeof *dparameters);
    for (size_t piece = 0; piece < pieces; piece++)
        add(size, g.sums + piece * size, dparameters);
    free(g.sums);
}

/* dx [n] of x_hat = (x - mean) / std, given that of x_hat; for an RMSNorm, of x / rms, with mean = 0. */
static void norm_backward(const struct gradient *g, size_t i, float mean, float scale, float *dweight)
{
    const size_t n = g->rows.width;
    const float *x = g->rows.x + i * n, *dy = g->dy + i * n;
    float *dx = g->rows.y + i * n, total = 0, product = 0;
    for (size_t d = 0; d < n; d++) {
        const float x_hat = (x[d] - mean) * scale, dx_hat = g->weight[d] * dy[d];
        dweight[d] += dy[d] * x_hat;
        total += dx_hat;
        product += dx_hat * x_hat;
    }
    const float mean_product = product / n, mean_dx = g->parameters > 1 ? total / n : 0;
    for (size_t d = 0; d < n; d++)
        dx[d] = (g->weight[d] * dy[d] - mean_dx - (x[d] - mean) * scale * mean_product) * scale;
}

static void rms_norm_row_backward(const struct gradient *g, size_t i, float *sums)
{
    const size_t n = g->rows.width;
    const float *x = g->rows.x + i * n;
    float squares = 0;
    for (size_t d = 0; d < n; d++)
        squares += x[d] * x[d];
    norm_backward(g, i, 0, 1 / __builtin_sqrtf(squares / n + g->eps), sums);
}

void mlx_ttt_rms_norm_backward(const struct rows *rows, const float *weight, const float *dy, float *dweight, float eps,
                               int threads)
{
    const struct gradient g = {rms_norm_row_backward, *rows, dy, weight, .eps = eps, .parameters = 1};
    share_gradient(g, dweight, threads);
}

static void layer_norm_row_backward(const struct gradient *g, size_t i, float *sums)
{
    const size_t n = g->rows.width;
    const float *x = g->rows.x + i * n;
    float total = 0, squares = 0;
    for (size_t d = 0; d < n; d++)
        total += x[d];
    const float mean = total / n;
    for (size_t d = 0; d < n; d++)
        squares += (x[d] - mean) * (x[d] - mean);
    norm_backward(g, i, mean, 1 / __builtin_sqrtf(squares / n + g->eps), sums);
    add(n, g->dy + i * n, sums + n);
}

/* dparameters [2, width]: of weight and bias. */
void mlx_ttt_layer_norm_backward(const struct rows *rows, const float *weight, const float *dy, float *dparameters,
                                 float eps, int threads)
{
    const struct gradient g = {layer_norm_row_backward, *rows, dy, weight, .eps = eps, .parameters = 2};
    share_gradient(g, dparameters, threads);
}

static void convolve_row_backward(const struct gradient *g, size_t i, float *sums)
{
    const size_t C = g->rows.width, length = g->T + g->kernel - 1, sequence = i / length, at = i % length;
    const float *x = g->rows.x + i * C;
    float *dx = g->rows.y + i * C;
    memset(dx, 0, C * sizeof *dx);
    for (size_t tap = 0; tap < g->kernel; tap++)
        if (tap <= at && at - tap < g->T) {
            const float *dy = g->dy + (sequence * g->T + at - tap) * C;
            add_product(C, dy, g->weight + tap * C, dx);
            add_product(C, dy, x, sums + tap * C);
            if (!tap)
                add(C, dy, sums + g->kernel * C);
        }
}

/* `rows` counts the rows of x. dparameters [kernel + 1, width]: of weight and bias. */
void mlx_ttt_convolve_backward(const struct rows *rows, const float *weight, const float *dy, float *dparameters,
                               size_t T, size_t kernel, int threads)
{
    const struct gradient g = {convolve_row_backward, *rows, dy, weight, .T = T, .kernel = kernel,
                               .parameters = kernel + 1};
    share_gradient(g, dparameters, threads);
}
