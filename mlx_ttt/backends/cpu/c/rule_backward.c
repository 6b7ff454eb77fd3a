/* The backward of the update rule, head by head: from the cotangents of y, of the weights and of the rows after the
   tokens to those of everything that went in. A d in front of a name is its cotangent. Formulas: differentiate the dual
   form by hand; tests/backends/cpu/rule_backward.py has them in NumPy.

   The mini-batches are walked through backwards, and each needs the weights it started with. They are computed again:
   forwards once, keeping the weights before every GROUP-th mini-batch; then group by group from the last, keeping all
   that its mini-batches made of their keys. So a thread needs the room of GROUP mini-batches, and for each other group
   that of the weights. A text of one group, 512 tokens in mini-batches of 16, is computed again only once. (Weights can
   also be had from those after the mini-batch, by taking the commit back. That is as much arithmetic as computing them
   from those before, and the rounding adds up over a long text.)

   A mini-batch of n = K tokens takes, in units of K D F multiplications (F = D for TTT-Linear, 4 D for TTT-MLP):

                                                   TTT-Linear                TTT-MLP
       keys again, and the commit                  2: k W, k^T e             5: k W1, x2 W2, e2 W2^T, two commits
       the same before, if there are more groups   2                         5
       queries again                               1: q W                    2
       what was read                               2: dz W^T, q^T dz         4
       what was committed                          2: k dW, e dW^T           4
       how e1 was made of e2                       -                         2: h W2, h^T e2
       how the keys went forward                   2: dz W^T, k^T dz         4
       together                                    9 (the forward: 3)        21 (the forward: 7)

   and, for each map, six products of K by K pairs of tokens with D or F (the forward: two). Of the call's arrays it
   reads q, k, v, lr, dy and writes dq, dk, dv, dlr, 7 K D + 2 K numbers. The weights and their cotangents, 2 D F
   (TTT-MLP: 4 D F) numbers, are read and written where they are, in the core's own cache. A mini-batch of a group keeps
   its weights and 3 K D (TTT-MLP: 3 K D + 4 K F) numbers, written once and read once: with D = 64 and K = 16 a group is
   0.9 MB (6.7 MB). */

#include <stdlib.h>
#include <string.h>

#include "inner_model.h"
#include "rule.h"
#include "threads.h"

enum { GROUP = 32, MOST_MAPS = 2 };

/* A linear map x W + b of the inner model. */
struct map {
    size_t in, out;
    float *W, *b;   /* before the mini-batch */
    float *x, *e;   /* the mini-batch's rows [K, .]: those that were there, then those that its tokens made */
    float *dW, *db; /* first of the weights after the mini-batch, then before it */
    float *dx, *de; /* [K, .] */
};

/* n tokens of one mini-batch, in slots p, p + 1, ..., and what they make of the weights before it. */
struct mini_batch {
    size_t p, n, first; /* `first` counts from the sequence's first token */
    struct map map[MOST_MAPS];
    float *slope, *bend;    /* TTT-MLP: gelu'(z1) and (e2 W2^T) gelu''(z1) of the new rows [n, F] */
    float *z_hat, *inv_std; /* (z - mean) / std [n, D], and 1 / std [n] */
};

/* One head of one sequence. */
struct head {
    const struct backward *c;
    size_t maps, D, F, K, H, length, phase;
    size_t token; /* its first, in an array [B, T, H] */
    struct loss loss;
    const float *t;
    float *rows, *drows, *dt, *dgamma, *dbeta;
    struct map map[MOST_MAPS];           /* with the weights before the call */
    size_t weights, kept;                /* numbers: of the weights, and of all that a mini-batch of a group keeps */
    float *group, *checkpoints;          /* [GROUP, kept]; the weights before each group but the first */
    float *q, *dq, *dy, *z, *dz;         /* of the tokens at hand [K, D] */
    float *x2, *slope, *dz1, *spare;     /* [K, F] */
    float *scores[MOST_MAPS], *products; /* [K, K] */
    float *room;                         /* where all of them are, to be freed */
};

/* ---- Where things are ------------------------------------------------------------------------------------------- */

static size_t mini_batches(const struct head *h) { return (h->phase + h->length + h->K - 1) / h->K; }

static float *take(float **room, size_t n)
{
    float *taken = *room;
    *room += n;
    return taken;
}

/* Mini-batch i of the sequence; what it keeps is in place `i % GROUP` of the group. */
static struct mini_batch place(const struct head *h, size_t i)
{
    const size_t D = h->D, F = h->F, K = h->K, from = i ? i * K : h->phase, to = h->phase + h->length;
    struct mini_batch m = {.p = from % K, .n = smaller((i + 1) * K, to) - from, .first = from - h->phase};
    float *room = h->group + i % GROUP * h->kept;
    for (size_t l = 0; l < h->maps; l++) {
        m.map[l] = h->map[l];
        m.map[l].W = take(&room, D * F);
        m.map[l].b = take(&room, m.map[l].out);
    }
    for (size_t l = 0; l < h->maps; l++) {
        m.map[l].x = take(&room, K * m.map[l].in);
        m.map[l].e = take(&room, K * m.map[l].out);
    }
    m.z_hat = take(&room, K * D);
    m.inv_std = take(&room, K);
    if (h->maps > 1)
        m.slope = take(&room, K * F), m.bend = take(&room, K * F);
    return m;
}

static int complete(const struct head *h, const struct mini_batch *m) { return m->p + m->n == h->K; }

/* Rows from to - from of `part` [., width] as a matrix. */
static struct matrix part(float *rows, size_t from, size_t to, size_t width)
{
    return matrix(rows + from * width, to - from, width);
}

/* x of one token after the other, from [T, H, D] to [n, D]. */
static void gather(const struct head *h, const struct mini_batch *m, const float *from, float *to)
{
    from += (h->token + m->first * h->H) * h->D;
    for (size_t i = 0; i < m->n; i++)
        memcpy(to + i * h->D, from + i * h->H * h->D, h->D * sizeof *to);
}

static void scatter(const struct head *h, const struct mini_batch *m, const float *from, float *to)
{
    to += (h->token + m->first * h->H) * h->D;
    for (size_t i = 0; i < m->n; i++)
        memcpy(to + i * h->H * h->D, from + i * h->D, h->D * sizeof *to);
}

enum direction { UNPACK, PACK };

/* Copies the first `slots` packed rows to the parts (x, e) of each map, or back. */
static void copy_rows(const struct head *h, enum direction direction, float *rows, size_t slots, float *parts[])
{
    for (size_t j = 0; j < slots; j++)
        for (size_t i = 0; i < 2 * h->maps; i++) {
            const size_t width = i % 2 ? h->map[i / 2].out : h->map[i / 2].in;
            float *part = parts[i] + j * width;
            memcpy(direction == UNPACK ? part : rows, direction == UNPACK ? rows : part, width * sizeof *rows);
            rows += width;
        }
}

static struct token token_of(const struct head *h, const struct mini_batch *m, size_t i)
{
    const size_t at = h->token + (m->first + i) * h->H;
    return (struct token){m->map[0].x + (m->p + i) * h->D, h->c->call.v + at * h->D, h->c->call.lr[at]};
}

/* ---- The keys again --------------------------------------------------------------------------------------------- */

/* x [n] = gelu(x), with its derivatives. */
static void activate(size_t n, float *x, float *slope, float *bend)
{
    for (size_t i = 0; i < n; i += LANES) {
        const struct bent y = bent_gelu(load(x + i));
        store(x + i, y.value);
        store(slope + i, y.slope);
        if (bend)
            store(bend + i, y.bend);
    }
}

/* to [n] *= by. */
static void multiply(size_t n, const float *by, float *to)
{
    for (size_t i = 0; i < n; i += LANES)
        store(to + i, load(to + i) * load(by + i));
}

/* Makes the rows of the tokens. */
static void learn(const struct head *h, const struct mini_batch *m)
{
    const size_t D = h->D, F = h->F, p = m->p, n = m->n;
    const struct map *first = &m->map[0], *last = &m->map[h->maps - 1];
    copy_rows(h, UNPACK, h->rows, p, (float *[]){first->x, first->e, last->x, last->e});
    gather(h, m, h->c->call.k, first->x + p * D);
    if (h->maps > 1) {
        const struct matrix x2 = part(last->x, p, p + n, F);
        forward(x2, part(first->x, p, p + n, D), matrix(first->W, D, F), first->b);
        activate(n * F, x2.at, m->slope, m->bend);
    }
    forward(matrix(m->z_hat, n, D), part(last->x, p, p + n, last->in), matrix(last->W, last->in, D), last->b);
    for (size_t i = 0; i < n; i++)
        m->inv_std[i] = to_error(&h->loss, token_of(h, m, i), m->z_hat + i * D, last->e + (p + i) * D);
    if (h->maps > 1) {
        const struct matrix e1 = part(first->e, p, p + n, F);
        memset(e1.at, 0, n * F * sizeof(float));
        add_product_of(e1, 1, part(last->e, p, p + n, D), transposed(matrix(last->W, F, D)));
        multiply(n * F, e1.at, m->bend);
        multiply(n * F, m->slope, e1.at);
    }
}

/* Commits mini-batch m, and writes the weights after it to `weights`. */
static void commit(const struct head *h, const struct mini_batch *m, float *weights)
{
    memcpy(weights, m->map[0].W, h->weights * sizeof *weights);
    for (size_t l = 0; l < h->maps; l++) {
        const struct map *map = &m->map[l];
        float *W = take(&weights, map->in * map->out), *b = take(&weights, map->out);
        add_gradient(matrix(W, map->in, map->out), b, -h->t[h->K - 1], matrix(map->x, h->K, map->in),
                     matrix(map->e, h->K, map->out));
    }
}

/* ---- One mini-batch backwards ----------------------------------------------------------------------------------- */

/* dz [n, D] of z, given dz_hat in its place, where z_hat = (z - mean) / std. */
static void normalize_backward(size_t D, const float *z_hat, float inv_std, float *dz)
{
    vec s = {0}, products = {0};
    for (size_t i = 0; i < D; i += LANES)
        s += load(dz + i), products += load(dz + i) * load(z_hat + i);
    const float mean = sum(s) / D, mean_product = sum(products) / D;
    for (size_t i = 0; i < D; i += LANES)
        store(dz + i, first_of((load(dz + i) - mean - load(z_hat + i) * mean_product) * inv_std, D - i));
}

/* Applies map l to the queries again, as each token saw it: z_i = x_i W + b - t_i sum_{j <= i} score_ij e_j. Keeps the
   scores x_i . x_j + 1 of the mini-batch's rows. */
static void read_again(const struct head *h, const struct mini_batch *m, size_t l, struct matrix x, struct matrix z)
{
    const struct map *map = &m->map[l];
    const size_t slots = m->p + m->n;
    float *score = h->scores[l], *scaled = h->products;
    for (size_t i = 0; i < m->n; i++)
        for (size_t j = 0; j < slots; j++, score++, scaled++) {
            *score = j > m->p + i ? 0 : dot_plus_one(map->in, x.at + i * map->in, map->x + j * map->in);
            *scaled = h->t[m->p + i] * *score;
        }
    forward(z, x, matrix(map->W, map->in, map->out), map->b);
    add_product_of(z, -1, matrix(h->products, m->n, slots), matrix(map->e, slots, map->out));
}

/* h->dz = the cotangent of what the inner model gave for the queries, before the LayerNorm. */
static void output_backward(const struct head *h, const struct mini_batch *m)
{
    const size_t D = h->D;
    for (size_t i = 0; i < m->n; i++) {
        float *z = h->z + i * D, *dz = h->dz + i * D;
        const float *dy = h->dy + i * D, inv_std = normalize(h->loss.D, z, EPS);
        for (size_t d = 0; d < D; d += LANES) {
            store(h->dgamma + d, load(h->dgamma + d) + load(dy + d) * load(z + d));
            store(h->dbeta + d, load(h->dbeta + d) + load(dy + d));
            store(dz + d, load(dy + d) * load(h->loss.gamma + d));
        }
        normalize_backward(h->loss.D, z, inv_std, dz);
    }
}

/* What the mini-batch has committed of map l, backwards: begins dx, de and adds to dt. */
static void commit_backward(const struct head *h, const struct map *map)
{
    const size_t K = h->K, in = map->in, out = map->out;
    const float t = h->t[K - 1];
    const struct matrix dW = matrix(map->dW, in, out), e = matrix(map->e, K, out);
    forward(matrix(map->de, K, out), matrix(map->x, K, in), dW, map->db);
    h->dt[K - 1] -= dot(K * out, map->e, map->de);
    for (size_t i = 0; i < K * out; i++)
        map->de[i] *= -t;
    memset(map->dx, 0, K * in * sizeof *map->dx);
    add_product_of(matrix(map->dx, K, in), -t, e, transposed(dW));
}

/* `read_again` of map l backwards, from dz to dx. */
static void read_backward(const struct head *h, const struct mini_batch *m, size_t l, struct matrix dz,
                          struct matrix dx)
{
    const struct map *map = &m->map[l];
    const size_t n = m->n, slots = m->p + n, in = map->in, out = map->out;
    const struct matrix x = matrix(l ? h->x2 : h->q, n, in), W = matrix(map->W, in, out);
    const struct matrix scores = matrix(h->scores[l], n, slots), products = matrix(h->products, n, slots);
    for (size_t i = 0; i < n; i++) {
        const float t = h->t[m->p + i];
        float dt = 0;
        for (size_t j = 0; j < slots; j++) {
            float *score = scores.at + i * slots + j, *product = products.at + i * slots + j;
            *product = j > m->p + i ? 0 : dot(out, dz.at + i * out, map->e + j * out);
            dt -= *score * *product;
            *score *= t;
            *product *= t;
        }
        h->dt[m->p + i] += dt;
    }
    add_product_of(matrix(map->de, slots, out), -1, transposed(scores), dz);
    add_product_of(matrix(map->dx, slots, in), -1, transposed(products), x);
    memset(dx.at, 0, n * in * sizeof *dx.at);
    add_product_of(dx, 1, dz, transposed(W));
    add_product_of(dx, -1, products, matrix(map->x, slots, in));
    add_gradient(matrix(map->dW, in, out), map->db, 1, x, dz);
}

/* `to_error` backwards, for token i: from de to dz [D], and to the gradients of the token, gamma and beta. */
static void error_backward(const struct head *h, const struct mini_batch *m, size_t i, const float *de, float *dz)
{
    const size_t D = h->D, n = h->loss.D, at = h->token + (m->first + i) * h->H;
    const struct token token = token_of(h, m, i);
    const float *z_hat = m->z_hat + i * D, inv_std = m->inv_std[i];
    float *dk = m->map[0].dx + (m->p + i) * D, *dv = h->c->dv + at * D, residual[D];
    vec s = {0}, products = {0};
    for (size_t d = 0; d < D; d += LANES) {
        vec gamma = load(h->loss.gamma + d), z = load(z_hat + d);
        vec r = gamma * z + load(h->loss.beta + d) - (load(token.v + d) - load(token.k + d));
        store(residual + d, r);
        s += r * gamma, products += r * gamma * z;
    }
    const float mean = sum(s) / n, mean_product = sum(products) / n;

    vec dlr = {0}, ds = {0}, dproducts = {0};
    for (size_t d = 0; d < D; d += LANES) {
        vec u = load(residual + d) * load(h->loss.gamma + d), z = load(z_hat + d), x = load(de + d);
        dlr += x * (u - mean - z * mean_product);
        ds += x, dproducts += x * z;
    }
    const float scale = inv_std * token.lr, dlr_sum = sum(dlr) * inv_std;
    const float dmean = sum(ds) * scale / n, dmean_product = sum(dproducts) * scale / n;
    h->c->dlr[at] = dlr_sum;
    for (size_t d = 0; d < D; d += LANES) {
        vec gamma = load(h->loss.gamma + d), z = load(z_hat + d), r = load(residual + d), x = load(de + d) * scale;
        vec du = x - dmean - z * dmean_product;
        store(dz + d, gamma * gamma * du - x * mean_product - r * gamma * dmean_product);
        store(h->dgamma + d, load(h->dgamma + d) + du * (r + gamma * z));
        store(h->dbeta + d, load(h->dbeta + d) + du * gamma);
        store(dv + d, -du * gamma);
        store(dk + d, load(dk + d) + du * gamma);
    }
    normalize_backward(n, z_hat, inv_std, dz);
    const float dstd = -dlr_sum * scale / n; /* the cotangent of std, over n */
    for (size_t d = 0; d < D; d += LANES)
        store(dz + d, load(dz + d) + dstd * load(z_hat + d));
}

/* `learn` backwards: from dx and de of the rows of the tokens to the weights, and to dx of their keys. */
static void learn_backward(const struct head *h, const struct mini_batch *m)
{
    const size_t D = h->D, F = h->F, p = m->p, n = m->n;
    const struct map *first = &m->map[0], *last = &m->map[h->maps - 1];
    const struct matrix dz = matrix(h->dz, n, D), dz1 = matrix(h->dz1, n, F), de2 = part(last->de, p, p + n, D);
    if (h->maps > 1) { /* e1 = (e2 W2^T) gelu'(z1) */
        const struct matrix back = matrix(h->spare, n, F);
        memcpy(back.at, first->de + p * F, n * F * sizeof *back.at);
        memcpy(dz1.at, back.at, n * F * sizeof *back.at);
        multiply(n * F, m->slope, back.at);
        multiply(n * F, m->bend, dz1.at);
        add_product_of(de2, 1, back, matrix(last->W, F, D));
        add_product_of(matrix(last->dW, F, D), 1, transposed(back), part(last->e, p, p + n, D));
    }
    for (size_t i = 0; i < n; i++)
        error_backward(h, m, i, de2.at + i * D, dz.at + i * D);
    if (h->maps > 1) {
        const struct matrix dx2 = part(last->dx, p, p + n, F);
        add_product_of(dx2, 1, dz, transposed(matrix(last->W, F, D)));
        add_gradient(matrix(last->dW, F, D), last->db, 1, part(last->x, p, p + n, F), dz);
        multiply(n * F, m->slope, dx2.at);
        add(n * F, dx2.at, dz1.at);
    }
    const struct matrix d = h->maps > 1 ? dz1 : dz;
    add_product_of(part(first->dx, p, p + n, D), 1, d, transposed(matrix(first->W, D, F)));
    add_gradient(matrix(first->dW, D, F), first->db, 1, part(first->x, p, p + n, D), d);
}

/* The mini-batch backwards: from the cotangents of the weights after it to those before it, and of its tokens. */
static void backward(const struct head *h, const struct mini_batch *m)
{
    const size_t D = h->D, F = h->F, n = m->n;
    const struct matrix q = matrix(h->q, n, D), x2 = matrix(h->x2, n, F), z = matrix(h->z, n, D);
    const struct matrix dq = matrix(h->dq, n, D), dz = matrix(h->dz, n, D), dz1 = matrix(h->dz1, n, F);
    gather(h, m, h->c->call.q, q.at);
    gather(h, m, h->c->dy, h->dy);
    read_again(h, m, 0, q, h->maps > 1 ? x2 : z);
    if (h->maps > 1) {
        activate(n * F, x2.at, h->slope, NULL);
        read_again(h, m, 1, x2, z);
    }
    output_backward(h, m);

    if (complete(h, m))
        for (size_t l = 0; l < h->maps; l++)
            commit_backward(h, &m->map[l]);
    else /* it stays open: its rows are an output */
        copy_rows(h, UNPACK, h->drows, m->p + n, (float *[]){m->map[0].dx, m->map[0].de, m->map[1].dx, m->map[1].de});
    if (h->maps > 1) {
        read_backward(h, m, 1, dz, dz1);
        multiply(n * F, h->slope, dz1.at);
    }
    read_backward(h, m, 0, h->maps > 1 ? dz1 : dz, dq);
    learn_backward(h, m);

    add(n * D, h->dy, dq.at);
    scatter(h, m, dq.at, h->c->dq);
    scatter(h, m, m->map[0].dx + m->p * D, h->c->dk);
}

/* ---- One head --------------------------------------------------------------------------------------------------- */

static struct head open_head(const struct backward *c, size_t piece)
{
    const size_t D = c->call.D, F = c->call.mlp ? 4 * D : D, K = c->call.K, H = c->call.H, R = c->call.mlp ? 10 : 2;
    const size_t sequence = piece / H, head = piece % H;
    struct head h = {.c = c, .maps = c->call.mlp ? 2 : 1, .D = D, .F = F, .K = K, .H = H, .t = c->call.t};
    h.phase = c->call.phase[sequence], h.length = c->call.length[sequence];
    h.token = sequence * c->call.T * H + head;
    h.loss = (struct loss){c->call.head_dim, c->call.gamma + head * D, c->call.beta + head * D};
    h.rows = c->call.rows + piece * K * R * D, h.drows = c->drows + piece * K * R * D;
    h.dt = c->dt + piece * K, h.dgamma = c->dgamma + piece * D, h.dbeta = c->dbeta + piece * D;
    h.map[0] = (struct map){.in = D, .out = F, .W = c->call.W1 + piece * D * F, .b = c->call.b1 + piece * F,
                            .dW = c->dW1 + piece * D * F, .db = c->db1 + piece * F};
    if (h.maps > 1)
        h.map[1] = (struct map){.in = F, .out = D, .W = c->call.W2 + piece * F * D, .b = c->call.b2 + piece * D,
                                .dW = c->dW2 + piece * F * D, .db = c->db2 + piece * D};
    for (size_t l = 0; l < h.maps; l++) {
        h.weights += h.map[l].in * h.map[l].out + h.map[l].out;
        h.kept += K * (h.map[l].in + h.map[l].out);
    }
    h.kept += h.weights + K * D + K + (h.maps > 1 ? 2 * K * F : 0);
    return h;
}

static void make_room(struct head *h)
{
    const size_t D = h->D, F = h->F, K = h->K, N = mini_batches(h);
    const size_t group = smaller(N, GROUP) * h->kept, checkpoints = (N - 1) / GROUP * h->weights;
    float *room = malloc((group + checkpoints + K * (7 * D + 6 * F + 3 * K)) * sizeof *room);
    if (!room)
        abort();
    h->room = room;
    h->group = take(&room, group);
    h->checkpoints = take(&room, checkpoints);
    float **of_D[] = {&h->q, &h->dq, &h->dy, &h->z, &h->dz}, **of_F[] = {&h->x2, &h->slope, &h->dz1, &h->spare};
    for (size_t i = 0; i < sizeof of_D / sizeof *of_D; i++)
        *of_D[i] = take(&room, K * D);
    for (size_t i = 0; i < sizeof of_F / sizeof *of_F; i++)
        *of_F[i] = take(&room, K * F);
    for (size_t l = 0; l < h->maps; l++) {
        h->map[l].dx = take(&room, K * h->map[l].in);
        h->map[l].de = take(&room, K * h->map[l].out);
        h->scores[l] = take(&room, K * K);
    }
    h->products = take(&room, K * K);
}

/* Puts the weights before mini-batch i, the first of a group, in their place. */
static void begin_group(const struct head *h, size_t i)
{
    float *weights = h->group;
    if (i) {
        memcpy(weights, h->checkpoints + (i / GROUP - 1) * h->weights, h->weights * sizeof *weights);
        return;
    }
    for (size_t l = 0; l < h->maps; l++) {
        const size_t W = h->map[l].in * h->map[l].out, b = h->map[l].out;
        memcpy(take(&weights, W), h->map[l].W, W * sizeof *weights);
        memcpy(take(&weights, b), h->map[l].b, b * sizeof *weights);
    }
}

/* Learns mini-batches first ... last - 1 of a group, and commits all but the last. */
static void learn_group(const struct head *h, size_t first, size_t last)
{
    begin_group(h, first);
    for (size_t i = first; i < last; i++) {
        const struct mini_batch m = place(h, i);
        learn(h, &m);
        if (i + 1 < last)
            commit(h, &m, place(h, i + 1).map[0].W);
    }
}

static void head_backward(const void *context, int piece)
{
    struct head h = open_head(context, piece);
    if (!h.length)
        return; /* the state stays, and so do its cotangents */
    make_room(&h);
    const size_t N = mini_batches(&h), groups = (N + GROUP - 1) / GROUP;
    for (size_t g = 0; g + 1 < groups; g++) {
        learn_group(&h, g * GROUP, (g + 1) * GROUP);
        const struct mini_batch m = place(&h, (g + 1) * GROUP - 1);
        commit(&h, &m, h.checkpoints + g * h.weights);
    }
    for (size_t g = groups; g--;) {
        const size_t first = g * GROUP, last = smaller(first + GROUP, N);
        learn_group(&h, first, last);
        for (size_t i = last; i-- > first;) {
            const struct mini_batch m = place(&h, i);
            backward(&h, &m);
        }
    }

    /* Rows where there are tokens now were overwritten; all were cleared, if a mini-batch was completed. */
    const size_t end = smaller(h.phase + h.length, h.K), R = h.map[0].in + h.map[0].out + h.map[1].in + h.map[1].out;
    memset(h.drows + h.phase * R, 0, (end - h.phase) * R * sizeof *h.drows);
    copy_rows(&h, PACK, h.drows, h.phase, (float *[]){h.map[0].dx, h.map[0].de, h.map[1].dx, h.map[1].de});
    free(h.room);
}

void mlx_ttt_update_backward(const struct backward *backward, size_t B, int threads)
{
    share(head_backward, backward, B * backward->call.H, threads);
}
