// TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2: the gradient of ttt::mlp_chunk. One launch takes all tokens of a call.
//
// README.md shows the kernel around ttt::mlp_backward. A leading d marks a cotangent: dy is that of y, dW1_out that of
// W1 after the call, dW1 that of W1 before it.
//
// Per mini-batch, with the weights at its start and c = t_{K-1} if it is complete and commits, else 0. tril() is zero
// above the diagonal. Forwards, as in ttt_mlp.metal:
//     z1 = k W1 + b1,   x2 = gelu(z1),   z2 = x2 W2 + b2,   e2 from z2,   a = e2 W2^T,   e1 = a gelu'(z1)
//     S1 = tril(q k^T + 1),    p1 = q W1 + b1 - t S1 e1,    q2 = gelu(p1)
//     S2 = tril(q2 x2^T + 1),  p2 = q2 W2 + b2 - t S2 e2,   y = q + LN(p2)
// and backwards, with dp2 from dy:
//     de2 = -S2^T (t dp2) - c (x2 dW2' + db2'),   dS2 = -tril((t dp2) e2^T)
//     dq2 = dp2 W2^T + dS2 x2,                    dx2 = dS2^T q2 - c e2 dW2'^T
//     dp1 = dq2 gelu'(p1)
//     de1 = -S1^T (t dp1) - c (k dW1' + db1'),    dS1 = -tril((t dp1) e1^T)
//     h   = de1 gelu'(z1),   de2 += h W2,         dz1 = de1 a gelu''(z1)
//     dz2, dlr, dgamma, dbeta, dv from de2 as in ttt_linear_backward.metal
//     dx2 += dz2 W2^T,   dz1 += dx2 gelu'(z1)
//     dq  = dy + dp1 W1^T + dS1 k,   dk = dS1^T q - c e1 dW1'^T + dz1 W1^T - dv
//     dW1 = dW1' + q^T dp1 + k^T dz1,             db1 = db1' + sum dp1 + sum dz1
//     dW2 = dW2' + q2^T dp2 + h^T e2 + x2^T dz2,  db2 = db2' + sum dp2 + sum dz2
//     dt -= (S2 e2) . dp2 + (S1 e1) . dp1,   dt_{K-1} -= e2 . (x2 dW2' + db2') + e1 . (k dW1' + db1') if it commits
// The rows that earlier calls left open are constants with cotangents of their own: dk, de1, dx2, de2.
#include "ttt.h"

namespace ttt {

// There is one threadgroup for each sequence and head. The mini-batches are walked twice. Forwards, what each starts
// with is written to device memory. Backwards, it is read from there.
//
// Weights and their cotangents take 256 KB a head at D = 64, more than the registers of a threadgroup. So they are
// streamed through the device's cache, and so are the views [ROWS, F] of a mini-batch. Of the views [ROWS, D], as many
// as fit are in threadgroup memory. A mini-batch is a chain of stages with a barrier behind each, 13 backwards and 5
// forwards. A stage is one of three kinds. Each simdgroup takes
//     its hidden units, 32 * TILES, for what is [ROWS, F], for dW1 (columns) and dW2 (rows);
//     its columns, 8 * TILES, for what is [ROWS, D], also where that sums over all hidden units;
//     some of the rows, where a LayerNorm is in the way.
// So no sum passes from one simdgroup to another but for those at the end, of t, gamma and beta.
//
// Registers of a thread are not the limit: at K = 16 the largest stage holds 22 tiles, 44 registers.

template <int D, int K, int TILES>
struct MlpBackward {
  TTT_CONST int F = 4 * D;
  TTT_CONST int WIDTH = 10 * D;  // of a row of the open mini-batch
  TTT_CONST int SIMDGROUPS = D / (8 * TILES);
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int UNITS = 4 * TILES;     // tiles of hidden units in one simdgroup
  TTT_CONST int BLOCKS = (K + 7) / 8;  // tiles that hold the tokens of a mini-batch
  TTT_CONST int ROWS = 8 * BLOCKS;

  TTT_CONST int VIEW = ROWS * (D + 4);                      // floats of [ROWS, D]
  TTT_CONST int VIEWS = 7;                                  // k, q, z2, e2, dp2, de2, dk
  TTT_CONST int WIDE = ROWS * F;                            // floats of [ROWS, F]
  TTT_CONST int WIDES = 9;                                  // z1, x2, p1, q2, a, e1, dp1, h, dz1
  TTT_CONST int TRIANGLE = 64 * BLOCKS * (BLOCKS + 1) / 2;  // floats of [ROWS, ROWS] up to the diagonal
  TTT_CONST int LEFT = 32768 / 4 - 3 * TRIANGLE - ROWS;
  TTT_CONST int LOCAL = LEFT / VIEW < VIEWS ? LEFT / VIEW : VIEWS;  // views in threadgroup memory
  TTT_CONST int MEMORY = 3 * TRIANGLE + ROWS + LOCAL * VIEW;

  // Floats of device memory for each head: all other views, and the weights of every mini-batch but the first.
  TTT_CONST int START = 2 * D * F + F + D;  // W1, b1, W2, b2
  static METAL_FUNC size_t scratch(int tokens) {
    return size_t((tokens + K - 2) / K) * START + (VIEWS - LOCAL) * VIEW + WIDES * WIDE;
  }

  typedef Staging<D, ROWS, THREADS, false> Keys;
  typedef Staging<D, ROWS, THREADS, true> KeysAndQueries;
};

// acc += a b for one tile of columns. a is [8 * BLOCKS, N], b is [N, 8]; if TRANSPOSED, b^T [8, N] is in memory.
template <int BLOCKS, int N, bool TRANSPOSED, typename A, typename B>
METAL_FUNC void add_product(thread Tile* acc, A a, int a_stride, B b, int b_stride) {
  for (int n = 0; n < N; n += 8) {
    Tile right = TRANSPOSED ? load_transposed(b + n, b_stride) : load_tile(b + n * b_stride, b_stride);
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      Tile left = load_tile(a + 8 * r * a_stride + n, a_stride);
      multiply_add(acc[r], left, right);
    }
  }
}

// The same with two left sides, so that b is read once.
template <int BLOCKS, int N, bool TRANSPOSED, typename A1, typename A2, typename B>
METAL_FUNC void add_products(
    thread Tile* acc1, A1 a1, thread Tile* acc2, A2 a2, int a_stride, B b, int b_stride) {
  for (int n = 0; n < N; n += 8) {
    Tile right = TRANSPOSED ? load_transposed(b + n, b_stride) : load_tile(b + n * b_stride, b_stride);
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      Tile left1 = load_tile(a1 + 8 * r * a_stride + n, a_stride);
      Tile left2 = load_tile(a2 + 8 * r * a_stride + n, a_stride);
      multiply_add(acc1[r], left1, right);
      multiply_add(acc2[r], left2, right);
    }
  }
}

// acc += S x, of a packed triangle S.
template <int BLOCKS>
METAL_FUNC void add_causal(thread Tile* acc, const threadgroup float* triangle, thread Tile* x) {
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
    TTT_UNROLL for (int j = 0; j < BLOCKS; ++j) {
      if (j > r) continue;
      Tile weight = load_tile(triangle + triangle_at(r, j), 8);
      multiply_add(acc[r], weight, x[j]);
    }
  }
}

// acc += S^T x
template <int BLOCKS>
METAL_FUNC void add_causal_transposed(thread Tile* acc, const threadgroup float* triangle, thread Tile* x) {
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
    TTT_UNROLL for (int i = 0; i < BLOCKS; ++i) {
      if (i < r) continue;
      Tile weight = load_transposed(triangle + triangle_at(i, r), 8);
      multiply_add(acc[r], weight, x[i]);
    }
  }
}

template <int BLOCKS, typename P>
METAL_FUNC void load_tiles(thread Tile* x, P from, int stride) {
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) x[r] = load_tile(from + 8 * r * stride, stride);
}

template <int BLOCKS, typename P>
METAL_FUNC void store_tiles(thread Tile* x, P to, int stride) {
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) store_tile(x[r], to + 8 * r * stride, stride);
}

template <int BLOCKS>
METAL_FUNC void fill_tiles(thread Tile* x, float2 value) {
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) x[r] = tile_of(value);
}

// A triangle of factor_i (x_i . y_j + one) for j <= i. Each simdgroup computes some of its tiles.
template <int BLOCKS, int N, int S, typename X, typename Y>
METAL_FUNC void put_dots(
    threadgroup float* to, X x, Y y, int stride, thread float* factor, float one, int simdgroup, Lane lane) {
  int tile = 0;
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
    TTT_UNROLL for (int c = 0; c < BLOCKS; ++c) {
      if (c > r || tile++ % S != simdgroup) continue;
      Tile dots = filled(0);
      for (int n = 0; n < N; n += 8) {
        Tile left = load_tile(x + 8 * r * stride + n, stride);
        Tile right = load_transposed(y + 8 * c * stride + n, stride);
        multiply_add(dots, left, right);
      }
      store_tile(causal(factor[r] * (pair(dots) + one), r, c, lane), to + triangle_at(r, c), 8);
    }
  }
}

// to = from + the sums of x over its rows. Of the lanes that hold a column, one reads and writes.
template <int BLOCKS>
METAL_FUNC void add_column_sums(device float* to, const device float* from, thread Tile* x, float factor, Lane lane) {
  float2 total = float2(0.0f);
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) total += factor * pair(x[r]);
  Tile ones = filled(1), mine = tile_of(total), all = filled(0);
  multiply_add(all, ones, mine);
  if (lane.row == 0) put_pair(to + lane.col, pair_at(from + lane.col) + pair(all));
}

METAL_FUNC float2 gelu_of(float2 x) {
  return float2(gelu(x.x).value, gelu(x.y).value);
}

METAL_FUNC float2 slope_of(float2 x) {
  return float2(gelu(x.x).slope, gelu(x.y).slope);
}

METAL_FUNC float2 curve_of(float2 x) {
  return float2(gelu_curve(x.x), gelu_curve(x.y));
}

// q, k, v, dy, dq, dk, dv [B, T, H, D]; lr, dlr [B, T, H]; t [K]; gamma, beta [H, D]; W1, dW1_out, dW1 [B, H, D, F];
// b1, db1_out, db1 [B, H, 1, F]; W2, dW2_out, dW2 [B, H, F, D]; b2, db2_out, db2 [B, H, 1, D]; rows, drows_out, drows
// [B, H, K, 10D]; phase, length [B]; dconstants [B, H, K + 2D]: this head's and sequence's share of the cotangents of
// t, gamma and beta; scratch [B, H, MlpBackward::scratch(T)]. The grid has one threadgroup of MlpBackward::THREADS
// threads for each (head, sequence). memory holds MlpBackward::MEMORY floats.
template <int D, int K, int TILES, typename T, typename LR, typename TF, typename I>
METAL_FUNC void mlp_backward(
    const device T* q, const device T* k, const device T* v, LR lr, TF t,
    const device float* gamma, const device float* beta,
    const device float* W1, const device float* b1, const device float* W2, const device float* b2,
    const device float* rows, I phase, I length, const device T* dy,
    const device float* dW1_out, const device float* db1_out, const device float* dW2_out, const device float* db2_out,
    const device float* drows_out,
    device T* dq, device T* dk, device T* dv, device float* dlr, device float* dconstants,
    device float* dW1, device float* db1, device float* dW2, device float* db2, device float* drows,
    device float* scratch,
    int tokens, int H, threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane_index) {
  typedef MlpBackward<D, K, TILES> Chunk;
  typedef Columns<D> Cols;
  constexpr int F = Chunk::F, BLOCKS = Chunk::BLOCKS, ROWS = Chunk::ROWS, UNITS = Chunk::UNITS, STRIDE = D + 4;
  constexpr int S = Chunk::SIMDGROUPS, LOCAL = Chunk::LOCAL, VIEW = Chunk::VIEW, WIDE = Chunk::WIDE;
  constexpr int WIDTH = Chunk::WIDTH, COUNT = Cols::COUNT;
  constexpr mem_flags ALL = mem_flags::mem_threadgroup | mem_flags::mem_device;
  const Lane lane = lane_of(lane_index);
  const int head = group.x, sequence = group.y;
  const int first_column = simdgroup * 8 * TILES, first_unit = simdgroup * 8 * UNITS;  // of this simdgroup

  const size_t token_stride = size_t(H) * D;
  const size_t tokens_at = (size_t(sequence) * tokens * H + head) * D;
  const size_t head_at = size_t(sequence) * H + head;
  q += tokens_at;
  k += tokens_at;
  v += tokens_at;
  dy += tokens_at;
  dq += tokens_at;
  dk += tokens_at;
  dv += tokens_at;
  lr += size_t(sequence) * tokens * H + head;
  dlr += size_t(sequence) * tokens * H + head;
  W1 += head_at * D * F;
  dW1_out += head_at * D * F;
  dW1 += head_at * D * F;
  b1 += head_at * F;
  db1_out += head_at * F;
  db1 += head_at * F;
  W2 += head_at * F * D;
  dW2_out += head_at * F * D;
  dW2 += head_at * F * D;
  b2 += head_at * D;
  db2_out += head_at * D;
  db2 += head_at * D;
  rows += head_at * K * WIDTH;
  drows_out += head_at * K * WIDTH;
  drows += head_at * K * WIDTH;
  dconstants += head_at * (K + 2 * D);
  scratch += head_at * Chunk::scratch(tokens);

  threadgroup float* S1 = memory;               // then dS1; packed triangles
  threadgroup float* S2 = S1 + Chunk::TRIANGLE;
  threadgroup float* dS2 = S2 + Chunk::TRIANGLE;
  threadgroup float* dt_rows = dS2 + Chunk::TRIANGLE;  // what the second layer adds to dt  [ROWS]
  threadgroup float* views = dt_rows + ROWS;
  auto ks = View<0, LOCAL, VIEW>::at(views, scratch);
  auto qs = View<1, LOCAL, VIEW>::at(views, scratch);
  auto es = View<2, LOCAL, VIEW>::at(views, scratch);    // e2
  auto dp2s = View<3, LOCAL, VIEW>::at(views, scratch);  // q2 W2 + b2, then dp2
  auto de2s = View<4, LOCAL, VIEW>::at(views, scratch);  // x2 dW2' + db2', then de2, then dz2
  auto z2s = View<5, LOCAL, VIEW>::at(views, scratch);
  auto dks = View<6, LOCAL, VIEW>::at(views, scratch);
  device float* wide = scratch + (Chunk::VIEWS - LOCAL) * VIEW;  // views [ROWS, F]
  device float* z1s = wide;
  device float* x2s = z1s + WIDE;
  device float* p1s = x2s + WIDE;   // q W1 + b1, then p1
  device float* q2s = p1s + WIDE;
  device float* as = q2s + WIDE;
  device float* e1s = as + WIDE;
  device float* dp1s = e1s + WIDE;
  device float* hs = dp1s + WIDE;
  device float* dz1s = hs + WIDE;
  device float* starts = dz1s + WIDE;  // the weights of mini-batches 1, 2, ...

  const int n = length[sequence], start = -int(phase[sequence]);
  const int last = max(0, (n - start - 1) / K);  // mini-batch
  const Source<T, LR> source = {q, k, lr, H, rows, WIDTH};

  float scale[COUNT], shift[COUNT], dgamma[COUNT], dbeta[COUNT];
  Cols::load(scale, gamma + head * D, lane_index);
  Cols::load(shift, beta + head * D, lane_index);
  Cols::fill(dgamma, 0);
  Cols::fill(dbeta, 0);
  float t_row[BLOCKS], minus_t[BLOCKS], ones_row[BLOCKS];
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
    t_row[r] = 8 * r + lane.row < K ? t[8 * r + lane.row] : 0.0f;
    minus_t[r] = -t_row[r];
    ones_row[r] = 1;
  }
  const float t_last = t[K - 1];
  float dt[BLOCKS], dt_commit = 0;  // what the first layer and the commits add, in this lane's columns
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) dt[r] = 0;
  for (int i = thread_index; i < ROWS; i += Chunk::THREADS) dt_rows[i] = 0;
  for (int i = thread_index; i < (tokens - n) * D; i += Chunk::THREADS) {
    const size_t at = (n + i / D) * token_stride + i % D;
    dq[at] = T(0.0f);
    dk[at] = T(0.0f);
    dv[at] = T(0.0f);
  }
  for (int i = n + thread_index; i < tokens; i += Chunk::THREADS) dlr[size_t(i) * H] = 0;

  const device float* dW1_now = dW1_out;
  const device float* db1_now = db1_out;
  const device float* dW2_now = dW2_out;
  const device float* db2_now = db2_out;

  // Turns 0 ... last - 1 go forwards, and are there for the weights that a mini-batch leaves. The others go backwards.
  for (int turn = 0; turn <= 2 * last; ++turn) {
    const bool backwards = turn >= last;
    const int m = backwards ? 2 * last - turn : turn;
    const Span span = span_at(start + m * K, n, K);
    const bool commits = span.count == K, leaves_open = !commits;
    const device float* W1_m = m > 0 ? starts + (m - 1) * size_t(Chunk::START) : W1;
    const device float* b1_m = m > 0 ? W1_m + D * F : b1;
    const device float* W2_m = m > 0 ? W1_m + D * F + F : W2;
    const device float* b2_m = m > 0 ? W1_m + 2 * D * F + F : b2;
    if (backwards) {
      typename Chunk::KeysAndQueries staged;
      staged.fetch(source, span, thread_index);
      staged.put(ks, qs, thread_index);
    } else {
      typename Chunk::Keys staged;
      staged.fetch(source, span, thread_index);
      staged.put(ks, ks, thread_index);
    }
    threadgroup_barrier(ALL);

    // By hidden units: z1, x2 and q W1 + b1. And S1.
    for (int u = 0; u < UNITS; ++u) {
      const int unit = first_unit + 8 * u, own = unit + lane.col;
      Tile z1[BLOCKS], p1[BLOCKS], x2[BLOCKS];
      fill_tiles<BLOCKS>(z1, pair_at(b1_m + own));
      if (backwards) {
        fill_tiles<BLOCKS>(p1, pair_at(b1_m + own));
        add_products<BLOCKS, D, false>(z1, ks, p1, qs, STRIDE, W1_m + unit, F);
        store_tiles<BLOCKS>(p1, p1s + unit, F);
      } else {
        add_product<BLOCKS, D, false>(z1, ks, STRIDE, W1_m + unit, F);
      }
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        float2 x = float2(0.0f);
        if (is_new(span, row)) x = gelu_of(pair(z1[r]));
        else if (row < span.first) x = pair_at(rows + row * WIDTH + D + F + own);
        x2[r] = tile_of(x);
      }
      store_tiles<BLOCKS>(z1, z1s + unit, F);
      store_tiles<BLOCKS>(x2, x2s + unit, F);
    }
    if (backwards) put_dots<BLOCKS, D, S>(S1, qs, ks, STRIDE, ones_row, 1.0f, simdgroup, lane);
    threadgroup_barrier(ALL);

    // By columns: z2, and x2 dW2' + db2'.
    for (int c = 0; c < TILES; ++c) {
      const int column = first_column + 8 * c, own = column + lane.col;
      Tile z2[BLOCKS], c2[BLOCKS];
      fill_tiles<BLOCKS>(z2, pair_at(b2_m + own));
      add_product<BLOCKS, F, false>(z2, x2s, F, W2_m + column, D);
      store_tiles<BLOCKS>(z2, z2s + column, STRIDE);
      if (!backwards || !commits) continue;
      fill_tiles<BLOCKS>(c2, pair_at(db2_now + own));
      add_product<BLOCKS, F, false>(c2, x2s, F, dW2_now + column, D);
      store_tiles<BLOCKS>(c2, de2s + column, STRIDE);
    }
    threadgroup_barrier(ALL);

    // By rows: e2.
    for (int row = simdgroup; row < ROWS; row += S) {
      float e2[COUNT];
      Cols::fill(e2, 0);
      if (is_new(span, row)) {
        float target[COUNT];
        Cols::load(target, v + (span.start + row) * token_stride, lane_index);
        Cols::add(target, ks + row * STRIDE, -1, lane_index);
        Cols::load(e2, z2s + row * STRIDE, lane_index);
        Cols::gradient(e2, target, scale, shift, lane_index);
        TTT_UNROLL for (int i = 0; i < COUNT; ++i) e2[i] *= ks[row * STRIDE + D];
      } else if (row < span.first) {
        Cols::load(e2, rows + row * WIDTH + D + 2 * F, lane_index);
      }
      Cols::store(es + row * STRIDE, e2, lane_index);
    }
    threadgroup_barrier(ALL);

    // By hidden units: e1; then forwards the weights that the mini-batch leaves, backwards p1 and q2.
    for (int u = 0; u < UNITS; ++u) {
      const int unit = first_unit + 8 * u, own = unit + lane.col;
      Tile a[BLOCKS], e1[BLOCKS], seen[BLOCKS];
      fill_tiles<BLOCKS>(a, float2(0.0f));
      add_product<BLOCKS, D, true>(a, es, STRIDE, W2_m + unit * D, D);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        Tile z1 = load_tile(z1s + 8 * r * F + unit, F);
        float2 e = float2(0.0f);
        if (is_new(span, row)) e = pair(a[r]) * slope_of(pair(z1));
        else if (row < span.first) e = pair_at(rows + row * WIDTH + D + own);
        e1[r] = tile_of(e);
        seen[r] = filled(0);
      }
      if (backwards) {
        store_tiles<BLOCKS>(a, as + unit, F);
        store_tiles<BLOCKS>(e1, e1s + unit, F);
        add_causal<BLOCKS>(seen, S1, e1);
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          Tile p1 = load_tile(p1s + 8 * r * F + unit, F);
          p1 = tile_of(pair(p1) - t_row[r] * pair(seen[r]));
          store_tile(p1, p1s + 8 * r * F + unit, F);
          store_tile(tile_of(gelu_of(pair(p1))), q2s + 8 * r * F + unit, F);
        }
        continue;
      }
      device float* W1_to = starts + m * size_t(Chunk::START);
      device float* W2_to = W1_to + D * F + F + unit * D;
      add_column_sums<BLOCKS>(W1_to + D * F + unit, b1_m + unit, e1, -t_last, lane);
      Tile x2_transposed[BLOCKS];
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        e1[r] = tile_of(-t_last * pair(e1[r]));
        x2_transposed[r] = load_transposed(x2s + 8 * r * F + unit, F);
      }
      for (int d = 0; d < D; d += 8) {
        Tile first = load_tile(W1_m + d * F + unit, F), second = load_tile(W2_m + unit * D + d, D);
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          Tile k_tile = load_transposed(ks + 8 * r * STRIDE + d, STRIDE);
          Tile e2 = load_tile(es + 8 * r * STRIDE + d, STRIDE);
          e2 = tile_of(-t_last * pair(e2));
          multiply_add(first, k_tile, e1[r]);
          multiply_add(second, x2_transposed[r], e2);
        }
        store_tile(first, W1_to + d * F + unit, F);
        store_tile(second, W2_to + d, D);
      }
    }
    if (!backwards) {
      for (int c = 0; c < TILES; ++c) {
        const int column = first_column + 8 * c;
        Tile e2[BLOCKS];
        load_tiles<BLOCKS>(e2, es + column, STRIDE);
        device float* b2_to = starts + m * size_t(Chunk::START) + 2 * D * F + F;
        add_column_sums<BLOCKS>(b2_to + column, b2_m + column, e2, -t_last, lane);
      }
    }
    threadgroup_barrier(ALL);
    if (!backwards) continue;

    // By columns: q2 W2 + b2. And S2.
    for (int c = 0; c < TILES; ++c) {
      const int column = first_column + 8 * c;
      Tile p2[BLOCKS];
      fill_tiles<BLOCKS>(p2, pair_at(b2_m + column + lane.col));
      add_product<BLOCKS, F, false>(p2, q2s, F, W2_m + column, D);
      store_tiles<BLOCKS>(p2, dp2s + column, STRIDE);
    }
    put_dots<BLOCKS, F, S>(S2, q2s, x2s, F, ones_row, 1.0f, simdgroup, lane);
    threadgroup_barrier(ALL);

    // By rows: dp2, through the LayerNorm of y.
    for (int row = simdgroup; row < ROWS; row += S) {
      float z[COUNT], seen[COUNT], pull[COUNT], dz[COUNT];
      Cols::fill(dz, 0);
      if (is_new(span, row)) {
        Cols::fill(seen, 0);
        for (int j = 0; j <= row; ++j) Cols::add(seen, es + j * STRIDE, S2[in_triangle(row, j)], lane_index);
        Cols::load(z, dp2s + row * STRIDE, lane_index);
        TTT_UNROLL for (int i = 0; i < COUNT; ++i) z[i] -= t[row] * seen[i];
        const float inv_std = Cols::normalize(z, lane_index);
        Cols::load(pull, dy + (span.start + row) * token_stride, lane_index);
        TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
          dgamma[i] += pull[i] * z[i];
          dbeta[i] += pull[i];
          pull[i] *= scale[i];
        }
        const float mean = Cols::total(pull) / D, tilt = Cols::dot(pull, z) / D;
        TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
          dz[i] = Cols::has(lane_index + 32 * i) ? (pull[i] - mean - z[i] * tilt) * inv_std : 0.0f;
        }
        const float share = Cols::dot(seen, dz);
        if (lane_index == 0) dt_rows[row] -= share;
      }
      Cols::store(dp2s + row * STRIDE, dz, lane_index);
    }
    threadgroup_barrier(ALL);

    // By columns: de2, without what comes through e1. And dS2.
    for (int c = 0; c < TILES; ++c) {
      const int column = first_column + 8 * c, own = column + lane.col;
      Tile weighted[BLOCKS], de2[BLOCKS];
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        Tile dp2 = load_tile(dp2s + 8 * r * STRIDE + column, STRIDE);
        weighted[r] = tile_of(t_row[r] * pair(dp2));
        de2[r] = filled(0);
      }
      add_causal_transposed<BLOCKS>(de2, S2, weighted);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        float2 total = -pair(de2[r]);
        if (commits) {
          Tile c2 = load_tile(de2s + 8 * r * STRIDE + column, STRIDE);
          Tile e2 = load_tile(es + 8 * r * STRIDE + column, STRIDE);
          total -= t_last * pair(c2);
          dt_commit -= sum(pair(e2) * pair(c2));
        }
        if (leaves_open && row < span.count) total += pair_at(drows_out + row * WIDTH + D + 2 * F + own);
        store_tile(tile_of(total), de2s + 8 * r * STRIDE + column, STRIDE);
      }
    }
    put_dots<BLOCKS, D, S>(dS2, dp2s, es, STRIDE, minus_t, 0.0f, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // for dS2 alone: the next stage reads nothing of de2

    // By hidden units: dp1, de1, h, and the first part of dz1.
    for (int u = 0; u < UNITS; ++u) {
      const int unit = first_unit + 8 * u, own = unit + lane.col;
      Tile tiles[BLOCKS], e1[BLOCKS], seen[BLOCKS], c1[BLOCKS], dp1[BLOCKS], de1[BLOCKS];
      load_tiles<BLOCKS>(e1, e1s + unit, F);
      fill_tiles<BLOCKS>(seen, float2(0.0f));
      add_causal<BLOCKS>(seen, S1, e1);
      if (commits) {
        fill_tiles<BLOCKS>(c1, pair_at(db1_now + own));  // k dW1' + db1'
        add_product<BLOCKS, D, false>(c1, ks, STRIDE, dW1_now + unit, F);
      }
      load_tiles<BLOCKS>(tiles, x2s + unit, F);
      fill_tiles<BLOCKS>(dp1, float2(0.0f));
      fill_tiles<BLOCKS>(de1, float2(0.0f));
      add_product<BLOCKS, D, true>(dp1, dp2s, STRIDE, W2_m + unit * D, D);
      add_causal<BLOCKS>(dp1, dS2, tiles);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        Tile p1 = load_tile(p1s + 8 * r * F + unit, F);
        dp1[r] = tile_of(pair(dp1[r]) * slope_of(pair(p1)));
        dt[r] -= sum(pair(dp1[r]) * pair(seen[r]));
        tiles[r] = tile_of(t_row[r] * pair(dp1[r]));
      }
      store_tiles<BLOCKS>(dp1, dp1s + unit, F);
      add_causal_transposed<BLOCKS>(de1, S1, tiles);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row, at = 8 * r * F + unit;
        float2 total = -pair(de1[r]), h = float2(0.0f), dz1 = float2(0.0f);
        if (commits) {
          total -= t_last * pair(c1[r]);
          dt_commit -= sum(pair(e1[r]) * pair(c1[r]));
        }
        if (leaves_open && row < span.count) total += pair_at(drows_out + row * WIDTH + D + own);
        if (m == 0 && row < K) put_pair(drows + row * WIDTH + D + own, row < span.first ? total : float2(0.0f));
        Tile z1 = load_tile(z1s + at, F), a = load_tile(as + at, F);
        if (is_new(span, row)) {
          h = total * slope_of(pair(z1));
          dz1 = total * pair(a) * curve_of(pair(z1));
        }
        store_tile(tile_of(h), hs + at, F);
        store_tile(tile_of(dz1), dz1s + at, F);
      }
    }
    threadgroup_barrier(ALL);

    // By columns: the rest of de2, and the first part of dk. And dS1.
    for (int c = 0; c < TILES; ++c) {
      const int column = first_column + 8 * c, own = column + lane.col;
      Tile de2[BLOCKS], taken[BLOCKS];
      load_tiles<BLOCKS>(de2, de2s + column, STRIDE);
      add_product<BLOCKS, F, false>(de2, hs, F, W2_m + column, D);
      store_tiles<BLOCKS>(de2, de2s + column, STRIDE);
      fill_tiles<BLOCKS>(taken, float2(0.0f));  // e1 dW1'^T
      if (commits) add_product<BLOCKS, F, true>(taken, e1s, F, dW1_now + column * F, F);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        float2 total = -t_last * pair(taken[r]);
        if (leaves_open && row < span.count) total += pair_at(drows_out + row * WIDTH + own);
        store_tile(tile_of(total), dks + 8 * r * STRIDE + column, STRIDE);
        if (m > 0 || row >= K) continue;
        put_pair(drows + row * WIDTH + D + 2 * F + own, row < span.first ? pair(de2[r]) : float2(0.0f));
      }
    }
    put_dots<BLOCKS, F, S>(S1, dp1s, e1s, F, minus_t, 0.0f, simdgroup, lane);
    threadgroup_barrier(ALL);

    // By rows: dz2, through the gradient of the LayerNorm.
    for (int row = simdgroup; row < ROWS; row += S) {
      float z[COUNT], offset[COUNT], u[COUNT], g[COUNT], de[COUNT], dG[COUNT], dz[COUNT];
      Cols::fill(dz, 0);
      if (is_new(span, row)) {
        const size_t token = (span.start + row) * token_stride;
        Cols::load(offset, v + token, lane_index);
        Cols::add(offset, ks + row * STRIDE, -1, lane_index);
        Cols::load(z, z2s + row * STRIDE, lane_index);
        Cols::load(de, de2s + row * STRIDE, lane_index);
        const float inv_std = Cols::normalize(z, lane_index), rate = ks[row * STRIDE + D];
        TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
          offset[i] = shift[i] - offset[i];  // beta - target
          u[i] = scale[i] * (scale[i] * z[i] + offset[i]);
          dG[i] = rate * inv_std * de[i];
        }
        const float mean_u = Cols::total(u) / D, mean_uz = Cols::dot(u, z) / D;
        const float dG_mean = Cols::total(dG) / D, tilt = Cols::dot(dG, z) / D;
        TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
          g[i] = (u[i] - mean_u - z[i] * mean_uz) * inv_std;
          const float du = dG[i] - dG_mean - z[i] * tilt;
          dgamma[i] += du * (2 * scale[i] * z[i] + offset[i]);
          dbeta[i] += scale[i] * du;
          dz[i] = scale[i] * scale[i] * du - dG[i] * mean_uz - u[i] * tilt;
          const int col = lane_index + 32 * i;
          if (!Cols::has(col)) continue;
          dv[token + col] = T(-scale[i] * du);
          dks[row * STRIDE + col] += scale[i] * du;
        }
        const float share = Cols::dot(g, de), mean = Cols::total(dz) / D, mean_z = Cols::dot(dz, z) / D;
        TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
          dz[i] = (dz[i] - mean - z[i] * mean_z) * inv_std - z[i] * rate * inv_std * share / D;
        }
        if (lane_index == 0) dlr[size_t(span.start + row) * H] = share;
      }
      Cols::store(de2s + row * STRIDE, dz, lane_index);
    }
    threadgroup_barrier(ALL);

    // By hidden units: dx2, the rest of dz1, and the cotangents of the weights.
    for (int u = 0; u < UNITS; ++u) {
      const int unit = first_unit + 8 * u, own = unit + lane.col;
      Tile tiles[BLOCKS], dx2[BLOCKS], dp1[BLOCKS], dz1[BLOCKS], total[BLOCKS];
      load_tiles<BLOCKS>(tiles, q2s + unit, F);
      fill_tiles<BLOCKS>(dx2, float2(0.0f));
      add_causal_transposed<BLOCKS>(dx2, dS2, tiles);
      if (commits) {
        // e2 dW2'^T as the transpose of dW2' e2^T: only the lane that owns an element of dW2 touches it in this stage.
        Tile taken[BLOCKS];
        fill_tiles<BLOCKS>(taken, float2(0.0f));
        for (int d = 0; d < D; d += 8) {
          Tile left = load_tile(dW2_now + unit * D + d, D);
          TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
            Tile right = load_transposed(es + 8 * r * STRIDE + d, STRIDE);
            multiply_add(taken[r], left, right);
          }
        }
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          taken[r] = transposed(taken[r], lane);
          dx2[r] = tile_of(pair(dx2[r]) - t_last * pair(taken[r]));
        }
      }
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        if (leaves_open && row < span.count) {
          dx2[r] = tile_of(pair(dx2[r]) + pair_at(drows_out + row * WIDTH + D + F + own));
        }
      }
      load_tiles<BLOCKS>(dp1, dp1s + unit, F);
      add_product<BLOCKS, D, true>(dx2, de2s, STRIDE, W2_m + unit * D, D);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row, at = 8 * r * F + unit;
        if (m == 0 && row < K) {
          put_pair(drows + row * WIDTH + D + F + own, row < span.first ? pair(dx2[r]) : float2(0.0f));
        }
        dz1[r] = load_tile(dz1s + at, F);
        Tile z1 = load_tile(z1s + at, F);
        if (is_new(span, row)) dz1[r] = tile_of(pair(dz1[r]) + pair(dx2[r]) * slope_of(pair(z1)));
        total[r] = tile_of(pair(dp1[r]) + pair(dz1[r]));
      }
      store_tiles<BLOCKS>(dz1, dz1s + unit, F);
      add_column_sums<BLOCKS>(db1 + unit, db1_now + unit, total, 1, lane);

      Tile q2[BLOCKS], x2[BLOCKS], h[BLOCKS];  // transposed
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int at = 8 * r * F + unit;
        q2[r] = load_transposed(q2s + at, F);
        x2[r] = load_transposed(x2s + at, F);
        h[r] = load_transposed(hs + at, F);
      }
      for (int d = 0; d < D; d += 8) {
        Tile first = load_tile(dW1_now + d * F + unit, F), second = load_tile(dW2_now + unit * D + d, D);
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          const int at = 8 * r * STRIDE + d;
          Tile k_tile = load_transposed(ks + at, STRIDE), q_tile = load_transposed(qs + at, STRIDE);
          multiply_add(first, q_tile, dp1[r]);
          multiply_add(first, k_tile, dz1[r]);
          Tile dp2 = load_tile(dp2s + at, STRIDE), e2 = load_tile(es + at, STRIDE), dz2 = load_tile(de2s + at, STRIDE);
          multiply_add(second, q2[r], dp2);
          multiply_add(second, h[r], e2);
          multiply_add(second, x2[r], dz2);
        }
        store_tile(first, dW1 + d * F + unit, F);
        store_tile(second, dW2 + unit * D + d, D);
      }
    }
    threadgroup_barrier(ALL);

    // By columns: dq, dk and db2.
    for (int c = 0; c < TILES; ++c) {
      const int column = first_column + 8 * c, own = column + lane.col;
      Tile dq_own[BLOCKS], dk_own[BLOCKS], tiles[BLOCKS], total[BLOCKS];
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int at = 8 * r * STRIDE + column;
        dq_own[r] = tile_of(token_pair(dy + own, token_stride, span, 8 * r + lane.row));
        dk_own[r] = load_tile(dks + at, STRIDE);
        Tile dp2 = load_tile(dp2s + at, STRIDE), dz2 = load_tile(de2s + at, STRIDE);
        total[r] = tile_of(pair(dp2) + pair(dz2));
      }
      add_column_sums<BLOCKS>(db2 + column, db2_now + column, total, 1, lane);
      add_products<BLOCKS, F, true>(dq_own, dp1s, dk_own, dz1s, F, W1_m + column * F, F);
      load_tiles<BLOCKS>(tiles, ks + column, STRIDE);
      add_causal<BLOCKS>(dq_own, S1, tiles);
      load_tiles<BLOCKS>(tiles, qs + column, STRIDE);
      add_causal_transposed<BLOCKS>(dk_own, S1, tiles);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        if (m == 0 && row < K) put_pair(drows + row * WIDTH + own, row < span.first ? pair(dk_own[r]) : float2(0.0f));
        if (!is_new(span, row)) continue;
        put_pair(dq + (span.start + row) * token_stride + own, pair(dq_own[r]));
        put_pair(dk + (span.start + row) * token_stride + own, pair(dk_own[r]));
      }
    }
    dW1_now = dW1;
    db1_now = db1;
    dW2_now = dW2;
    db2_now = db2;
    threadgroup_barrier(ALL);
  }

  // The sums over the simdgroups, through what was a view.
  device float* of_constants = wide;             // dgamma and dbeta  [S, 2D]
  device float* of_rows = wide + S * 2 * D;      // dt  [ROWS, S]
  device float* of_commits = of_rows + ROWS * S;  // [S]
  Cols::store(of_constants + simdgroup * 2 * D, dgamma, lane_index);
  Cols::store(of_constants + simdgroup * 2 * D + D, dbeta, lane_index);
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
    const float total = row_sum(dt[r]);
    if (lane.col == 0) of_rows[(8 * r + lane.row) * S + simdgroup] = total;
  }
  dt_commit = simd_sum(dt_commit);
  if (lane_index == 0) of_commits[simdgroup] = dt_commit;
  threadgroup_barrier(ALL);
  for (int i = thread_index; i < K + 2 * D; i += Chunk::THREADS) {
    float total = i < K ? dt_rows[i] : 0.0f;
    for (int s = 0; s < S; ++s) {
      if (i >= K) total += of_constants[s * 2 * D + i - K];
      else total += of_rows[i * S + s] + (i == K - 1 ? of_commits[s] : 0.0f);
    }
    dconstants[i] = total;
  }
}

}  // namespace ttt
