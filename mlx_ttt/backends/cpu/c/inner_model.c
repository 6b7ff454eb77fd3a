#include <string.h>

#include "inner_model.h"

void forward(struct matrix z, struct matrix x, struct matrix W, const float *b)
{
    for (size_t i = 0; i < z.rows; i++)
        memcpy(z.at + i * z.row, b, z.columns * sizeof *b);
    add_product_of(z, 1, x, W);
}

void add_gradient(struct matrix W, float *b, float scale, struct matrix x, struct matrix e)
{
    add_product_of(W, scale, transposed(x), e);
    for (size_t j = 0; j < e.rows; j++)
        for (size_t f = 0; f < e.columns; f++)
            b[f] += scale * e.at[j * e.row + f];
}

void add_open_rows(struct matrix z, const float *t, struct matrix x, struct matrix past_x, struct matrix past_e)
{
    enum { MOST = 16 }; /* tokens at a time: the stack does not hold all scores of a large mini-batch */
    const size_t slots = past_x.rows, first_slot = slots - x.rows, D = x.columns;
    float scores[MOST * slots];
    for (size_t first = 0, m; first < x.rows; first += m) {
        m = smaller(MOST, x.rows - first);
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < slots; j++) {
                const size_t slot = first_slot + first + i;
                const float *x_i = x.at + (first + i) * D;
                scores[i * slots + j] = j > slot ? 0 : t[slot] * dot_plus_one(D, x_i, past_x.at + j * D);
            }
        add_product_of(matrix(z.at + first * z.row, m, z.columns), -1, matrix(scores, m, slots), past_e);
    }
}

float to_error(const struct loss *loss, struct token token, float *z, float *e)
{
    const size_t D = loss->D;
    const float *gamma = loss->gamma, *beta = loss->beta, inv_std = normalize(D, z, EPS);
    float u[D + LANES];
    vec s = {0}, products = {0};
    for (size_t i = 0; i < D; i += LANES) {
        vec g = load(gamma + i), z_hat = load(z + i);
        vec x = (g * z_hat + load(beta + i) - (load(token.v + i) - load(token.k + i))) * g;
        s += x, products += x * z_hat;
        store(u + i, x);
    }
    const float mean = sum(s) / D, mean_product = sum(products) / D;
    for (size_t i = 0; i < D; i += LANES)
        store(e + i, first_of((load(u + i) - mean - load(z + i) * mean_product) * (inv_std * token.lr), D - i));
    return inv_std;
}
