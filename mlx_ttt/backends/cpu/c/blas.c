/* Products of a few rows with a transposed matrix, which is what decoding a token is made of.

   MLX calls cblas_sgemm for its products. The one below is loaded before OpenBLAS, so MLX finds it first; it passes all
   larger products on. OpenBLAS copies a matrix before it multiplies, even for a single row, so a token would cost two
   to three times what reading the weights costs. Here a matrix is read once: a large one by all threads, a small one
   by the caller. */

#include "blas.h"

#include <stdlib.h>

#include "threads.h"
#include "vectors.h"

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 }; /* BLAS's numbers */
enum {
    FEW = 15,        /* most rows that are multiplied here */
    LARGE = 1 << 17, /* elements of all matrices from which on several threads help */
    PIECE = 1 << 14, /* least elements that a thread takes at a time */
    PIECES = 4       /* most pieces for each thread */
};

typedef void sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
static sgemm *openblas;
static int (*num_threads)(void);

/* y [m, n] = alpha x [m, k] w [n, k]^T + beta y. Rows are ldx, ldw and ldy apart. Or y = x w^T, where x is arranged for
   packed weights. */
struct product {
    const float *x, *w;
    float *y, alpha, beta;
    size_t ldx, ldw, ldy;
    int m, n, k;
    const struct weights *packed; /* in the place of w, unless NULL */
};

/* beta may be 0 where y holds NaN. */
static inline void put(const struct product *p, float *y, float s)
{
    *y = p->alpha * s + (p->beta == 0 ? 0 : p->beta * *y);
}

/* Columns first ... last - 1 of y, four at a time. The four rows of w lie a quarter of the range apart, so memory is
   read in four long streams, which the processor fetches ahead. Streams of neighbouring rows would be too short. */
static void multiply_columns(const struct product *p, int first, int last)
{
    const int k = p->k, part = (last - first + 3) / 4;
    for (int n = first; n < first + part; n++) {
        const float *w0 = p->w + n * p->ldw; /* where there is no such row, w0 again */
        const float *w1 = n + part < last ? w0 + part * p->ldw : w0;
        const float *w2 = n + 2 * part < last ? w0 + 2 * part * p->ldw : w0;
        const float *w3 = n + 3 * part < last ? w0 + 3 * part * p->ldw : w0;
        for (int i = 0; i < p->m; i++) {
            const float *x = p->x + i * p->ldx;
            vec a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};
            int j = 0;
            for (; j + 2 * LANES <= k; j += 2 * LANES) {
                vec a = load(x + j), b = load(x + j + LANES);
                a0 += a * load(w0 + j), b0 += b * load(w0 + j + LANES);
                a1 += a * load(w1 + j), b1 += b * load(w1 + j + LANES);
                a2 += a * load(w2 + j), b2 += b * load(w2 + j + LANES);
                a3 += a * load(w3 + j), b3 += b * load(w3 + j + LANES);
            }
            float s[4] = {sum(a0 + b0), sum(a1 + b1), sum(a2 + b2), sum(a3 + b3)};
            for (; j < k; j++)
                s[0] += x[j] * w0[j], s[1] += x[j] * w1[j], s[2] += x[j] * w2[j], s[3] += x[j] * w3[j];
            for (int r = 0; r < 4 && n + r * part < last; r++)
                put(p, p->y + i * p->ldy + n + r * part, s[r]);
        }
    }
}

/* Several products, cut into pieces of about `size` elements of w. */
struct products {
    const struct product *p;
    size_t size;
};

static int columns_of_piece(const struct products *all, const struct product *p)
{
    return (all->size / p->k + 4) / 4 * 4;
}

static int pieces_of(const struct products *all, const struct product *p)
{
    const int columns = columns_of_piece(all, p);
    return (p->n + columns - 1) / columns;
}

/* Piece i of all products, counted through. */
static void multiply_piece(const void *context, int i)
{
    const struct products *all = context;
    const struct product *p = all->p;
    for (; i >= pieces_of(all, p); p++)
        i -= pieces_of(all, p);
    const int columns = columns_of_piece(all, p), first = i * columns, last = smaller(first + columns, p->n);
    if (p->packed)
        multiply_packed(p->packed, p->m, p->k, p->x, first, last, p->y);
    else
        multiply_columns(p, first, last);
}

static void multiply(int count, const struct product *p, int threads)
{
    size_t elements = 0;
    for (int i = 0; i < count; i++)
        elements += (size_t)p[i].n * p[i].k;
    if (elements < LARGE || threads < 1)
        threads = 1;
    const size_t size = elements / (PIECES * threads);
    const struct products all = {p, size > PIECE ? size : PIECE};
    int n = 0;
    for (int i = 0; i < count; i++)
        n += pieces_of(&all, p + i);
    share(multiply_piece, &all, n, threads);
}

static int are_alike(const struct weights *v, const struct weights *w)
{
    return v->kind == w->kind && v->bits == w->bits && v->group == w->group;
}

/* The product of each factor, and in `low`, of each adapter, z = x a^T and y += scale z b^T. Returns how many adapters.
   Only packed weights of a new kind have x arranged again, at `room`. */
static int list_products(size_t m, size_t k, const float *x, int count, const struct factor *factors, float *room,
                         struct product *products, struct product (*low)[2])
{
    int adapters = 0;
    for (int i = 0; i < count; i++) {
        const struct weights *w = factors[i].w;
        struct product *p = products + i;
        *p = (struct product){x, w->at, factors[i].y, 1, 0, k, k, w->n, m, w->n, k, NULL};
        if (is_packed(w)) {
            p->packed = w, p->x = NULL;
            for (int j = 0; j < i; j++)
                if (is_packed(factors[j].w) && are_alike(factors[j].w, w))
                    p->x = products[j].x;
            if (!p->x) {
                arrange(w, m, k, x, room);
                p->x = room;
                room += m * arranged_size(w, k);
            }
        }
        if (w->rank) {
            const size_t r = w->rank;
            low[adapters][0] = (struct product){x, w->a, room, 1, 0, k, k, r, m, r, k, NULL};
            low[adapters++][1] = (struct product){room, w->b, factors[i].y, w->scale, 1, r, r, w->n, m, w->n, r, NULL};
            room += m * r;
        }
    }
    return adapters;
}

void multiply_few(size_t m, size_t k, const float *x, int count, const struct factor *factors, int threads)
{
    struct factor there[count];
    size_t size = 0;
    int n = 0;
    for (int i = 0; i < count; i++)
        if (factors[i].w) {
            const struct weights *w = (there[n++] = factors[i]).w;
            size += m * ((is_packed(w) ? arranged_size(w, k) : 0) + w->rank);
        }
    float *room = size ? malloc(size * sizeof *room) : NULL;
    if (size && !room)
        abort();
    struct product products[2 * n], low[n][2];
    const int adapters = list_products(m, k, x, n, there, room, products, low);
    for (int i = 0; i < adapters; i++)
        products[n + i] = low[i][0];
    multiply(n + adapters, products, threads);
    for (int i = 0; i < adapters; i++)
        products[i] = low[i][1];
    if (adapters)
        multiply(adapters, products, threads);
    free(room);
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc)
{
    const struct product product = {a, b, c, alpha, beta, lda, ldb, ldc, m, n, k, NULL};
    if (order == ROW_MAJOR && ta == NO_TRANS && tb == TRANS && m > 0 && m <= FEW && n > 0 && k > 0)
        multiply(1, &product, num_threads());
    else
        openblas(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* ---- Any number of rows ------------------------------------------------------------------------------------------ */

enum {
    ROOM = 1 << 22, /* numbers of packed weights that are unpacked at a time: OpenBLAS copies x once for each time */
    STRIP = 16      /* rows that a thread unpacks */
};

/* How many rows of w [n, k] are unpacked at a time: as many each time, whole pieces. */
static size_t rows_at_a_time(size_t n, size_t k)
{
    const size_t most = ROOM / k > 256 ? ROOM / k : 256, times = (n + most - 1) / most;
    return ((n + times - 1) / times + STRIP - 1) / STRIP * STRIP;
}

/* Rows of w from `first` on, to be unpacked by several threads. */
struct unpacking {
    const struct weights *w;
    size_t k, first, last;
    float *y;
};

static void unpack_some(const void *context, int i)
{
    const struct unpacking *u = context;
    const size_t first = u->first + (size_t)i * STRIP, last = smaller(first + STRIP, u->last);
    unpack(u->w, u->k, first, last, u->y + (first - u->first) * u->k);
}

/* y [m, n] = x [m, k] w [n, k]^T without adapters; or, where `back` is set, y [m, k] = x [m, n] w. Packed weights. */
void mlx_ttt_multiply(const struct weights *w, const float *x, float *y, size_t m, size_t k, size_t back, int threads)
{
    if (m <= FEW && !back) {
        multiply_few(m, k, x, 1, &(struct factor){w, y}, threads);
        return;
    }
    const size_t step = rows_at_a_time(w->n, k);
    float *rows = malloc(step * k * sizeof *rows);
    if (!rows)
        abort();
    for (size_t first = 0; first < w->n; first += step) {
        const size_t last = smaller(first + step, w->n), n = last - first;
        const struct unpacking u = {w, k, first, last, rows};
        share(unpack_some, &u, (n + STRIP - 1) / STRIP, threads);
        if (back)
            openblas(ROW_MAJOR, NO_TRANS, NO_TRANS, m, k, n, 1, x + first, w->n, rows, k, first > 0, y, k);
        else
            openblas(ROW_MAJOR, NO_TRANS, TRANS, m, n, k, 1, x, k, rows, k, 0, y + first, w->n);
    }
    free(rows);
}

/* Sets OpenBLAS's cblas_sgemm and openblas_get_num_threads; to be called before the first product. */
void mlx_ttt_start(sgemm *their_sgemm, int (*their_num_threads)(void))
{
    openblas = their_sgemm;
    num_threads = their_num_threads;
}

/* How many threads OpenBLAS may use now, which is how many our own functions use. */
int mlx_ttt_threads(void) { return num_threads(); }
