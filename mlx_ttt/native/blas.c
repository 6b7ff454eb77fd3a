/* cblas_sgemm for MLX on a Linux CPU: a few rows times a transposed matrix, which is what decoding a token is made of,
   and all else by OpenBLAS, in front of which this stands.

   OpenBLAS copies a matrix before it multiplies by it, even one row; so a token costs two to three times what reading
   the weights does. Here the matrix is read once: a large one in all threads, a small one by the caller alone. */

#include "native.h"

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 }; /* BLAS's numbers */
enum {
    FEW = 15,        /* rows */
    LARGE = 1 << 17, /* elements of matrices that are worth several threads */
    PIECE = 1 << 14, /* elements of them that a thread takes at a time, at least, */
    PIECES = 4       /* and into how many they are cut for each thread, at most */
};

typedef void sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
static sgemm *openblas;
static int (*num_threads)(void);

/* y [m, n] = alpha x [m, k] w [n, k]^T + beta y, all in rows. */
struct product {
    const float *x, *w;
    float *y, alpha, beta;
    size_t ldx, ldw, ldy;
    int m, n, k;
};

static inline void put(const struct product *p, float *y, float s)
{
    *y = p->alpha * s + (p->beta == 0 ? 0 : p->beta * *y);
}

/* Columns first ... last - 1 of y: four rows of w at a time, a quarter of them apart. So memory is read in four long
   streams, which the processor fetches ahead of time; four neighbours would end too soon. */
static void some_columns(const struct product *p, int first, int last)
{
    const int k = p->k, part = (last - first + 3) / 4;
    for (int n = first; n < first + part; n++) {
        const float *w0 = p->w + n * p->ldw; /* past the last row, the first again */
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

/* Products, in pieces of so many elements of w. */
struct products {
    const struct product *p;
    size_t size;
};

static int width(const struct products *all, const struct product *p) { return (all->size / p->k + 4) / 4 * 4; }

static int pieces(const struct products *all, const struct product *p)
{
    return (p->n + width(all, p) - 1) / width(all, p);
}

static void piece(const void *context, int i)
{
    const struct products *all = context;
    const struct product *p = all->p;
    for (; i >= pieces(all, p); p++)
        i -= pieces(all, p);
    const int columns = width(all, p), first = i * columns;
    some_columns(p, first, smaller(first + columns, p->n));
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
        n += pieces(&all, p + i);
    share(piece, &all, n, threads);
}

void multiply_few(size_t m, size_t k, const float *x, int count, const struct factor *factors, int threads)
{
    struct product products[count];
    for (int i = 0; i < count; i++) {
        const struct factor *f = factors + i;
        products[i] = (struct product){x, f->w, f->y, 1, 0, k, k, f->n, m, f->n, k};
    }
    multiply(count, products, threads);
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc)
{
    const struct product product = {a, b, c, alpha, beta, lda, ldb, ldc, m, n, k};
    if (order == ROW_MAJOR && ta == NO_TRANS && tb == TRANS && m > 0 && m <= FEW && n > 0 && k > 0)
        multiply(1, &product, num_threads());
    else
        openblas(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* Before the first product: OpenBLAS's cblas_sgemm and openblas_get_num_threads. */
void mlx_ttt_start(sgemm *their_sgemm, int (*their_num_threads)(void))
{
    openblas = their_sgemm;
    num_threads = their_num_threads;
}

/* As many as OpenBLAS may use now. */
int mlx_ttt_threads(void) { return num_threads(); }
