// TTT-Linear, f(x) = x W1 + b1: the update rule in its dual form. One launch takes all tokens of a call.
//
// ttt::linear_chunk takes any number of tokens, from any phase of the open mini-batch. ttt::linear_step takes one token
// that does not complete its mini-batch. Both are function templates; README.md shows the kernel around them.
//
// H heads, D head dimension, K mini-batch size, T tokens of the call; i and j run over a mini-batch.
//     g_j = gradient of |LN(k_j W1 + b1) - (v_j - k_j)|^2 / 2,     e_j = lr_j g_j
//     z_i = q_i W1 + b1 - t_i sum_{j<=i} (q_i . k_j + 1) e_j,      y_i = q_i + LN(z_i)
//     after the last token of a mini-batch:  W1 -= t_{K-1} sum_j k_j^T e_j,  b1 -= t_{K-1} sum_j e_j
// While a mini-batch is open, its rows (k_j | e_j) are part of the state.
#include "ttt.h"

namespace ttt {

// ---- Chunk form ---------------------------------------------------------------------------------------------------
//
// There is one threadgroup for each sequence and head. Each simdgroup owns 8 * TILES columns. From the first token to
// the last, it keeps its columns of W1 and b1 in registers, and its columns of z, e and y too. Only q, k, the causal
// weights and the sums of the LayerNorms pass through threadgroup memory.
//
// A mini-batch takes two barriers. It cannot take fewer: the LayerNorm of k W1 + b1 needs all columns, and so does the
// LayerNorm of z, which depends on it. Everything else is exchanged at the same two barriers: the causal weights at the
// first, q and k of the next mini-batch at the second. For this, k is held twice. Where 32 KB do not suffice for that
// (K > 24 at D = 64, K > 16 at D = 96, K > 8 at D = 128), k is held once, and a third barrier is needed.
//
// Registers of a thread at D = 64, K = 16, TILES = 1: W1 16, b1 2, e 4, z 4, q 4, v 4, gamma and beta 4, t 3, the
// next mini-batch's k and q 9, operand tiles 6, addresses and counters about 16: 72 of the 128 that a threadgroup of
// 256 may have. At D = 96 (384 threads) 80 of 128, at D = 128 (512 threads) 88 of 96.

template <int D, int K, int TILES, bool SHOWN = false>
struct LinearChunk {
  TTT_CONST int SIMDGROUPS = D / (8 * TILES);
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int BLOCKS = (K + 7) / 8;  // tiles that hold the tokens of a mini-batch
  TTT_CONST int ROWS = 8 * BLOCKS;

  TTT_CONST int VIEW = ROWS * (D + 4);                      // floats of [ROWS, D]
  TTT_CONST int TRIANGLE = 64 * BLOCKS * (BLOCKS + 1) / 2;  // floats of [ROWS, ROWS] up to the diagonal
  TTT_CONST int K_SUMS = ROWS * SIMDGROUPS * GRADIENT_SUMS;
  TTT_CONST int Q_SUM = SHOWN ? SHOWN_SUMS : NORM_SUMS;  // floats for each row and simdgroup
  TTT_CONST int Q_SUMS = ROWS * SIMDGROUPS * Q_SUM;
  TTT_CONST int LEFT = 32768 / 4 - TRIANGLE - K_SUMS - Q_SUMS;
  TTT_CONST bool Q_STAGED = 2 * VIEW <= LEFT;  // else every simdgroup reads q from the device's cache
  TTT_CONST bool K_TWICE = 3 * VIEW <= LEFT;
  TTT_CONST int MEMORY = TRIANGLE + K_SUMS + Q_SUMS + VIEW * (1 + Q_STAGED + K_TWICE);

  typedef Staging<D, ROWS, THREADS, Q_STAGED> Next;
};

// q, k, v, y [B, T, H, D]; lr [B, T, H]; t [K]; gamma, beta [H, D]; W1 [B, H, D, D]; b1 [B, H, 1, D];
// rows [B, H, K, 2D]; phase, length [B]. The grid has one threadgroup of LinearChunk::THREADS threads for each (head,
// sequence). memory holds LinearChunk::MEMORY floats.
template <int D, int K, int TILES, bool SHOWN = false, typename T, typename LR, typename TF, typename I>
METAL_FUNC void linear_chunk(
    const device T* q, const device T* k, const device T* v, LR lr, TF t,
    const device float* gamma, const device float* beta,
    const device float* W1, const device float* b1, const device float* rows, I phase, I length,
    device T* y, device float* W1_out, device float* b1_out, device float* rows_out,
    int tokens, int H, threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane_index,
    device float* loss = nullptr, device float* write_norm = nullptr) {
  typedef LinearChunk<D, K, TILES, SHOWN> Chunk;
  constexpr int BLOCKS = Chunk::BLOCKS, S = Chunk::SIMDGROUPS, STRIDE = D + 4, Q_SUM = Chunk::Q_SUM;
  const Lane lane = lane_of(lane_index);
  const int head = group.x, sequence = group.y;
  const int first_column = simdgroup * 8 * TILES;  // of this simdgroup
  const int column = first_column + lane.col;      // of this lane, in the first of its tiles

  threadgroup float* weights = memory;                        // -t_i (q_i . k_j + 1), a packed triangle
  threadgroup float* k_sums = weights + Chunk::TRIANGLE;      // [ROWS, S, GRADIENT_SUMS]
  threadgroup float* q_sums = k_sums + Chunk::K_SUMS;         // [ROWS, S, Q_SUM]
  threadgroup float* ks = q_sums + Chunk::Q_SUMS;             // [ROWS, D], of this mini-batch
  threadgroup float* ks_next = Chunk::K_TWICE ? ks + Chunk::VIEW : ks;
  threadgroup float* qs = ks_next + Chunk::VIEW;              // [ROWS, D]

  const size_t token_stride = size_t(H) * D;
  const size_t tokens_at = (size_t(sequence) * tokens * H + head) * D;
  const size_t head_at = size_t(sequence) * H + head;
  q += tokens_at;
  k += tokens_at;
  v += tokens_at;
  y += tokens_at;
  lr += size_t(sequence) * tokens * H + head;
  gamma += head * D;
  beta += head * D;
  W1 += head_at * D * D + first_column;
  W1_out += head_at * D * D + first_column;
  b1 += head_at * D;
  b1_out += head_at * D;
  rows += head_at * K * 2 * D;
  rows_out += head_at * K * 2 * D;
  if (SHOWN) {
    loss += size_t(sequence) * tokens * H + head;
    write_norm += size_t(sequence) * tokens * H + head;
  }

  const int n = length[sequence];
  Span span = span_at(-int(phase[sequence]), n, K);
  const Source<T, LR> source = {q, k, lr, H, rows, 2 * D};
  typename Chunk::Next next;
  next.fetch(source, span, thread_index);

  Tile W[D / 8][TILES], bias[TILES];  // every row of a bias tile is b1
  float2 scale[TILES], shift[TILES];  // gamma and beta
  TTT_UNROLL for (int c = 0; c < TILES; ++c) {
    TTT_UNROLL for (int d = 0; d < D / 8; ++d) W[d][c] = load_tile(W1 + d * 8 * D + 8 * c, D);
    bias[c] = tile_of(pair_at(b1 + column + 8 * c));
    scale[c] = pair_at(gamma + column + 8 * c);
    shift[c] = pair_at(beta + column + 8 * c);
  }
  float t_row[BLOCKS];
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) t_row[r] = 8 * r + lane.row < K ? t[8 * r + lane.row] : 0.0f;
  const float t_last = t[K - 1];
  for (int i = thread_index; i < (tokens - n) * D; i += Chunk::THREADS) y[(n + i / D) * token_stride + i % D] = T(0.0f);
  for (int i = n + thread_index; SHOWN && i < tokens; i += Chunk::THREADS) {
    loss[i * H] = 0;
    write_norm[i * H] = 0;
  }

  next.put(ks, qs, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  while (true) {
    const bool is_last = span.start + K >= n, commits = span.count == K;

    float2 v_own[BLOCKS][TILES], q_own[BLOCKS][TILES];
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        const int at = column + 8 * c;
        v_own[r][c] = token_pair(v + at, token_stride, span, row);
        if (Chunk::Q_STAGED) q_own[r][c] = pair_at(qs + row * STRIDE + at);
        else q_own[r][c] = token_pair(q + at, token_stride, span, row);
      }
    }

    // k W1 + b1 and q W1 + b1 in this simdgroup's columns.
    Tile zk[BLOCKS][TILES], zq[BLOCKS][TILES];
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        zk[r][c] = bias[c];
        zq[r][c] = bias[c];
      }
      TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
        Tile k_tile = load_tile(ks + 8 * r * STRIDE + 8 * d, STRIDE), q_tile;
        if (Chunk::Q_STAGED) q_tile = load_tile(qs + 8 * r * STRIDE + 8 * d, STRIDE);
        else q_tile = tile_of(token_pair(q + 8 * d + lane.col, token_stride, span, 8 * r + lane.row));
        TTT_UNROLL for (int c = 0; c < TILES; ++c) {
          multiply_add(zk[r][c], k_tile, W[d][c]);
          multiply_add(zq[r][c], q_tile, W[d][c]);
        }
      }
    }

    // First exchange: the sums for the LayerNorm's gradient, and the causal weights. Each simdgroup computes some tiles
    // of the weights.
    float2 w[BLOCKS][TILES];
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      float2 z[TILES];
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        const float2 target = v_own[r][c] - pair_at(ks + row * STRIDE + column + 8 * c);
        w[r][c] = scale[c] * (shift[c] - target);
        z[c] = pair(zk[r][c]);
      }
      put_gradient_sums<TILES>(k_sums + (row * S + simdgroup) * GRADIENT_SUMS, z, w[r], scale, lane);
    }
    int tile = 0;
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      TTT_UNROLL for (int c = 0; c < BLOCKS; ++c) {
        if (c > r || tile++ % S != int(simdgroup)) continue;
        Tile dots = filled(0);
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
          Tile k_tile = load_transposed(ks + 8 * c * STRIDE + 8 * d, STRIDE), q_tile;
          if (Chunk::Q_STAGED) q_tile = load_tile(qs + 8 * r * STRIDE + 8 * d, STRIDE);
          else q_tile = tile_of(token_pair(q + 8 * d + lane.col, token_stride, span, 8 * r + lane.row));
          multiply_add(dots, q_tile, k_tile);
        }
        store_tile(causal_weights(dots, t_row[r], r, c, lane), weights + triangle_at(r, c), 8);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const Span next_span = span_at(span.start + K, n, K);
    if (!is_last) next.fetch(source, next_span, thread_index);

    // e replaces k W1 + b1 in its registers.
    float k_squares[SHOWN ? BLOCKS : 1];
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      const NormGradient norm = merge_gradient<D, S>(k_sums + row * S * GRADIENT_SUMS, lane);
      const float lr_row = ks[row * STRIDE + D];
      float missed = 0, e_squares = 0;
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        float2 e = float2(0.0f);
        if (is_new(span, row)) e = lr_row * gradient(norm, pair(zk[r][c]), w[r][c], scale[c]);
        else if (row < span.first) e = pair_at(rows + row * 2 * D + D + column + 8 * c);
        if (SHOWN) {
          const float2 target = v_own[r][c] - pair_at(ks + row * STRIDE + column + 8 * c);
          const float2 miss = scale[c] * normalized(norm.norm, pair(zk[r][c])) + shift[c] - target;
          missed += sum(miss * miss);
          e_squares += sum(e * e);
        }
        zk[r][c] = tile_of(e);
        if (is_last && row < K) {
          put_pair(rows_out + row * 2 * D + D + column + 8 * c, commits ? float2(0.0f) : e);
        }
      }
      if (SHOWN) {
        missed = row_sum(missed);
        e_squares = row_sum(e_squares);
        if (lane.col == 0) {
          q_sums[(row * S + simdgroup) * Q_SUM + MISSED] = missed;
          q_sums[(row * S + simdgroup) * Q_SUM + E_SQUARES] = e_squares;
        }
        float squares = 0;
        for (int d = quarter(lane); d < D; d += 4) squares += ks[row * STRIDE + d] * ks[row * STRIDE + d];
        k_squares[SHOWN ? r : 0] = row_sum(squares);
      }
    }

    // Second exchange: the sums for the LayerNorm of z, and the next mini-batch.
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      float2 z[TILES];
      TTT_UNROLL for (int j = 0; j < BLOCKS; ++j) {
        if (j > r) continue;
        Tile weight = load_tile(weights + triangle_at(r, j), 8);
        TTT_UNROLL for (int c = 0; c < TILES; ++c) multiply_add(zq[r][c], weight, zk[j][c]);
      }
      TTT_UNROLL for (int c = 0; c < TILES; ++c) z[c] = pair(zq[r][c]);
      put_norm_sums<TILES>(q_sums + ((8 * r + lane.row) * S + simdgroup) * Q_SUM, z, lane);
    }
    if (commits) {
      Tile ones = filled(1);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        Tile step[TILES];
        TTT_UNROLL for (int c = 0; c < TILES; ++c) {
          step[c] = tile_of(-t_last * pair(zk[r][c]));
          multiply_add(bias[c], ones, step[c]);
        }
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
          Tile k_tile = load_transposed(ks + 8 * r * STRIDE + 8 * d, STRIDE);
          TTT_UNROLL for (int c = 0; c < TILES; ++c) multiply_add(W[d][c], k_tile, step[c]);
        }
      }
    }
    if (is_last) {
      for (int i = thread_index; i < K * D; i += Chunk::THREADS) {
        const int row = i / D, col = i % D;
        rows_out[row * 2 * D + col] = commits ? 0.0f : ks[row * STRIDE + col];
      }
    } else if (Chunk::K_TWICE) {
      next.put(ks_next, qs, thread_index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      const Norm norm = merge_norm<D, S, Q_SUM>(q_sums + row * S * Q_SUM, lane);
      if (SHOWN && simdgroup == 0 && lane.col == 0 && is_new(span, row)) {
        float missed = 0, e_squares = 0;
        for (int s = 0; s < S; ++s) {
          missed += q_sums[(row * S + s) * Q_SUM + MISSED];
          e_squares += q_sums[(row * S + s) * Q_SUM + E_SQUARES];
        }
        loss[(span.start + row) * H] = 0.5f * missed;
        write_norm[(span.start + row) * H] = t_last * precise::sqrt((k_squares[SHOWN ? r : 0] + 1) * e_squares);
      }
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        if (!is_new(span, row)) continue;
        const float2 out = q_own[r][c] + scale[c] * normalized(norm, pair(zq[r][c])) + shift[c];
        put_pair(y + (span.start + row) * token_stride + column + 8 * c, out);
      }
    }
    if (is_last) break;

    if (Chunk::K_TWICE) {
      threadgroup float* spare = ks;
      ks = ks_next;
      ks_next = spare;
    } else {
      next.put(ks, qs, thread_index);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    span = next_span;
  }

  TTT_UNROLL for (int c = 0; c < TILES; ++c) {
    TTT_UNROLL for (int d = 0; d < D / 8; ++d) store_tile(W[d][c], W1_out + d * 8 * D + 8 * c, D);
    if (lane.row == 0) put_pair(b1_out + column + 8 * c, pair(bias[c]));
  }
}

// ---- Step form ----------------------------------------------------------------------------------------------------
//
// A step reads W1 once and writes none of it. Its time is that of reading 4 D^2 bytes per head, so all those loads
// should be under way at once. Before the first barrier, each simdgroup loads 8 * TILES rows of W1 and every S-th open
// row into registers. It returns the open rows whole, with the token's row among them. No kernel writes to its inputs,
// and MLX would copy all rows, too, to put one in its place. After the barrier, the simdgroup adds up what these contribute to k W1, q W1 and the causal sum. After the
// second barrier, the first simdgroup merges the contributions and finishes the token alone.
//
// Registers of a thread at D = 64, K = 16, TILES = 1: W1 16, open rows 8, sums 4, vectors of the token 14, addresses
// and counters about 16: 58 of 128. At D = 128 (512 threads): 32, 8, 8, 28 and 16, 92 of 96.

template <int D, int K, int TILES, bool SHOWN = false>  // which it does not depend on
struct LinearStep {
  TTT_CONST int SIMDGROUPS = D / (8 * TILES);
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int W_ROWS = 8 * TILES;                                // of W1, in one simdgroup
  TTT_CONST int OPEN_ROWS = (K + SIMDGROUPS - 1) / SIMDGROUPS;      // at most, in one simdgroup
  TTT_CONST int MEMORY = 2 * D + 2 * SIMDGROUPS * D;
};

// Shapes as above with T = 1; rows_out [B, H, K, 2D]. phase < K - 1.
template <int D, int K, int TILES, bool SHOWN = false, typename T, typename LR, typename TF, typename I>
METAL_FUNC void linear_step(
    const device T* q, const device T* k, const device T* v, LR lr, TF t,
    const device float* gamma, const device float* beta,
    const device float* W1, const device float* b1, const device float* rows, I phase,
    device T* y, device float* rows_out,
    int H, threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane_index,
    device float* loss = nullptr, device float* write_norm = nullptr) {
  typedef LinearStep<D, K, TILES, SHOWN> Step;
  typedef Columns<D> Cols;
  constexpr int S = Step::SIMDGROUPS;
  const int head = group.x, sequence = group.y, lane = lane_index;
  const size_t head_at = size_t(sequence) * H + head;
  const int p = phase[sequence];

  threadgroup float* ks = memory;           // [D]
  threadgroup float* qs = ks + D;           // [D]
  threadgroup float* zk_sums = qs + D;      // k W1 from each simdgroup's rows  [S, D]
  threadgroup float* zq_sums = zk_sums + S * D;

  q += head_at * D;
  k += head_at * D;
  rows += head_at * K * 2 * D;
  rows_out += head_at * K * 2 * D;

  float W[Step::W_ROWS][Cols::COUNT];
  float k_past[Step::OPEN_ROWS][Cols::COUNT], e_past[Step::OPEN_ROWS][Cols::COUNT];
  TTT_UNROLL for (int r = 0; r < Step::W_ROWS; ++r) {
    Cols::load(W[r], W1 + (head_at * D + simdgroup * Step::W_ROWS + r) * D, lane);
  }
  TTT_UNROLL for (int r = 0; r < Step::OPEN_ROWS; ++r) {
    const int j = r * S + simdgroup;
    if (j >= p) continue;
    Cols::load(k_past[r], rows + j * 2 * D, lane);
    Cols::load(e_past[r], rows + j * 2 * D + D, lane);
  }
  float bias[Cols::COUNT], scale[Cols::COUNT], shift[Cols::COUNT], target[Cols::COUNT];
  if (simdgroup == 0) {
    Cols::load(bias, b1 + head_at * D, lane);
    Cols::load(scale, gamma + head * D, lane);
    Cols::load(shift, beta + head * D, lane);
    Cols::load(target, v + head_at * D, lane);
  }
  for (int i = thread_index; i < D; i += Step::THREADS) {
    ks[i] = float(k[i]);
    qs[i] = float(q[i]);
  }
  for (int i = (p + 1) * 2 * D + thread_index; i < K * 2 * D; i += Step::THREADS) rows_out[i] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float q_row[Cols::COUNT], zk[Cols::COUNT], zq[Cols::COUNT];
  Cols::load(q_row, qs, lane);
  Cols::fill(zk, 0);
  Cols::fill(zq, 0);
  TTT_UNROLL for (int r = 0; r < Step::OPEN_ROWS; ++r) {
    const int j = r * S + simdgroup;
    if (j >= p) continue;
    Cols::store(rows_out + j * 2 * D, k_past[r], lane);
    Cols::store(rows_out + j * 2 * D + D, e_past[r], lane);
    const float weight = -t[p] * (Cols::dot(q_row, k_past[r]) + 1);
    TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) zq[i] += weight * e_past[r][i];
  }
  TTT_UNROLL for (int r = 0; r < Step::W_ROWS; ++r) {
    const float k_r = ks[simdgroup * Step::W_ROWS + r], q_r = qs[simdgroup * Step::W_ROWS + r];
    TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) {
      zk[i] += k_r * W[r][i];
      zq[i] += q_r * W[r][i];
    }
  }
  Cols::store(zk_sums + simdgroup * D, zk, lane);
  Cols::store(zq_sums + simdgroup * D, zq, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) return;

  float k_row[Cols::COUNT];
  Cols::load(k_row, ks, lane);
  Cols::add(target, ks, -1, lane);
  TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) {
    zk[i] = bias[i];
    zq[i] = bias[i];
  }
  for (int s = 0; s < S; ++s) {
    Cols::add(zk, zk_sums + s * D, 1, lane);
    Cols::add(zq, zq_sums + s * D, 1, lane);
  }

  const float lost = SHOWN ? Cols::loss(zk, target, scale, shift, lane) : 0.0f;
  Cols::gradient(zk, target, scale, shift, lane);
  const float lr_row = float(lr[head_at]), weight = -t[p] * (Cols::dot(q_row, k_row) + 1);
  TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) {
    zk[i] *= lr_row;  // e
    zq[i] += weight * zk[i];
  }
  if (SHOWN) {
    const float squares = (Cols::dot(k_row, k_row) + 1) * Cols::dot(zk, zk);
    if (lane == 0) {
      loss[head_at] = lost;
      write_norm[head_at] = t[K - 1] * precise::sqrt(squares);
    }
  }
  Cols::store(rows_out + p * 2 * D, k_row, lane);
  Cols::store(rows_out + p * 2 * D + D, zk, lane);

  Cols::normalize(zq, lane);
  y += head_at * D;
  TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) {
    if (Cols::has(lane + 32 * i)) y[lane + 32 * i] = T(q_row[i] + scale[i] * zq[i] + shift[i]);
  }
}

}  // namespace ttt
