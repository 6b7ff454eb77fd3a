/* cblas_sgemm for MLX on a Linux CPU: a few rows times a matrix, which is what decoding a token is made of, and all else
   by OpenBLAS, in front of which this stands.

   OpenBLAS copies a matrix before it multiplies by it, even one row; so a token costs two to three times what reading
   the weights does. Here the matrix is read once: a large one in all threads, a small one by the caller alone. */

#include "native.h"

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 }; /* BLAS's numbers */
enum {
    FEW = 8,         /* rows */
    LARGE = 1 << 17, /* elements of a matrix that is worth several threads */
    PIECE = 1 << 14, /* elements of it that a thread takes at a time, at least, */
    PIECES = 4       /* and into how many it is cut for each thread, at most */
};

typedef void sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
static sgemm *openblas;
static int (*num_threads)(void);

/* y [m, n] = alpha x [m, k] w + beta y, all in rows; w is [k, n], or [n, k] if transposed. */
struct product {
    const float *x, *w;
    float *y, alpha, beta;
    size_t ldx, ldw, ldy;
    int m, n, k, transposed;
    int width; /* columns of a piece */
};

static inline void put(const struct product *p, float *y, float s)
{
    *y = p->alpha * s + (p->beta == 0 ? 0 : p->beta * *y);
}

/* Columns first ... last - 1 of y: four rows of w at a time, each along k. */
static void along_rows(const struct product *p, int first, int last)
{
    const int k = p->k;
    for (int i = 0; i < p->m; i++) {
        const float *x = p->x + i * p->ldx;
        for (int n = first; n < last; n += 4) {
            const float *w0 = p->w + n * p->ldw; /* past the last row, the first again */
            const float *w1 = n + 1 < last ? w0 + p->ldw : w0, *w2 = n + 2 < last ? w0 + 2 * p->ldw : w0;
            const float *w3 = n + 3 < last ? w0 + 3 * p->ldw : w0;
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
            for (int r = 0; r < 4 && n + r < last; r++)
                put(p, p->y + i * p->ldy + n + r, s[r]);
        }
    }
}

/* The same, where a row of w is along n: 32 columns at a time, then single ones. */
static void along_columns(const struct product *p, int first, int last)
{
    const int k = p->k;
    for (int i = 0; i < p->m; i++) {
        const float *x = p->x + i * p->ldx;
        float *y = p->y + i * p->ldy;
        int n = first;
        for (; n + 4 * LANES <= last; n += 4 * LANES) {
            vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
            const float *w = p->w + n;
            for (int j = 0; j < k; j++, w += p->ldw) {
                s0 += x[j] * load(w), s1 += x[j] * load(w + LANES);
                s2 += x[j] * load(w + 2 * LANES), s3 += x[j] * load(w + 3 * LANES);
            }
            const vec s[4] = {s0, s1, s2, s3};
            for (int r = 0; r < 4 * LANES; r++)
                put(p, y + n + r, s[r / LANES][r % LANES]);
        }
        for (; n < last; n++) {
            float s = 0;
            for (int j = 0; j < k; j++)
                s += x[j] * p->w[j * p->ldw + n];
            put(p, y + n, s);
        }
    }
}

static void piece(const void *context, int i)
{
    const struct product *p = context;
    const int first = i * p->width, last = first + p->width;
    along_rows(p, first, last < p->n ? last : p->n);
}

static void multiply(struct product p, int threads)
{
    const size_t size = (size_t)p.n * p.k / (PIECES * (threads > 0 ? threads : 1));
    p.width = ((size > PIECE ? size : PIECE) / p.k + 4) / 4 * 4;
    if (!p.transposed)
        along_columns(&p, 0, p.n);
    else if ((size_t)p.n * p.k < LARGE)
        along_rows(&p, 0, p.n);
    else
        share(piece, &p, (p.n + p.width - 1) / p.width, threads);
}

void multiply_few(size_t m, size_t n, size_t k, const float *x, const float *w, float *y, int threads)
{
    multiply((struct product){x, w, y, 1, 0, k, k, n, m, n, k, 1, 0}, threads);
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc)
{
    const int few = m > 0 && m <= FEW && k > 0;
    if (order == ROW_MAJOR && ta == NO_TRANS && (tb == NO_TRANS || tb == TRANS) && few)
        multiply((struct product){a, b, c, alpha, beta, lda, ldb, ldc, m, n, k, tb == TRANS, 0}, num_threads());
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
