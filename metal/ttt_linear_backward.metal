// TTT-Linear, f(x) = x W1 + b1: the gradient of ttt::linear_chunk. One launch takes all tokens of a call.
//
// README.md shows the kernel around ttt::linear_backward. A leading d marks a cotangent: dy is that of y, dW1_out that
// of the weights after the call, dW1 that of the weights before it.
//
// Per mini-batch, with W and b at its start, S_ij = q_i . k_j + 1 for j <= i, else 0, and c = t_{K-1} if the mini-batch
// is complete and commits, else 0:
//     z_i = q_i W + b - t_i (S e)_i,   y_i = q_i + LN(z_i)
//     dz  = gradient of the LayerNorm, from dy
//     de  = -S^T (t dz) - c (k dW' + db'),    dS = -(t dz) e^T for j <= i
//     dq  = dy + dz W^T + dS k,               dlr_j = g_j . de_j
//     dt_i -= (S e)_i . dz_i,                 dt_{K-1} -= sum_j e_j . (k_j dW' + db') if it commits
// and, with z^ the normalized k W + b, r its 1 / std, u and g as in ttt.h, v - k the target, dG = lr r de:
//     s   = mean(dG z^),   du = dG - mean(dG) - z^ s,   dz^ = gamma^2 du - dG mean(u z^) - u s
//     dZ  = r (dz^ - mean(dz^) - z^ mean(dz^ z^)) - z^ lr r (g . de) / D
//     dv  = -gamma du,   dk = dS^T q - c e dW'^T + dZ W^T - dv
//     dW  = dW' + q^T dz + k^T dZ,   db = db' + sum dz + sum dZ
//     dgamma += dy z^(z) + du (2 gamma z^ + beta - (v - k)),   dbeta += dy + gamma du
// The rows that earlier calls left open are constants with cotangents of their own: dk and de.
#include "ttt.h"

namespace ttt {

// There is one threadgroup for each sequence and head. Each simdgroup owns 8 * TILES columns, as in linear_chunk.
//
// The mini-batches are walked twice. Forwards, W stays in registers, and what each mini-batch starts with is written
// to device memory. Backwards, it is read from there. The commits could also be undone, W = W' + c k^T e. But dZ W^T
// takes W by rows, which other simdgroups own, so W would go through device memory all the same. README.md counts it.
//
// Backwards a mini-batch takes 6 barriers: k and q are staged; the sums for the LayerNorm's gradient and S are known;
// those for the LayerNorm of z; e, dz and the sums for the gradient's gradient; dZ and dS; the views are free again.
//
// Of the five views of a mini-batch, as many as fit are in threadgroup memory (all at D = 64 with K <= 16), the others
// in device memory. dW stays in registers up to D = 96. It is also written out for every mini-batch, for e dW'^T.
//
// Registers of a thread at D = 64, K = 16, TILES = 1: dW 16, db 2, gamma, beta and their sums 8, t and its sums 5,
// k W 4, z 4, S e 4, k dW' 4, e 4, beta - target 4, norms 8, dz 4, de 4, dk and dq 8, operand tiles 6, addresses and
// counters about 28: 113 of the 128 that a threadgroup of 256 may have. At D = 96 (384 threads) 121 of 128. At D = 128
// (512 threads) dW is streamed: 97 of 96.

template <int D, int K, int TILES>
struct LinearBackward {
  TTT_CONST int SIMDGROUPS = D / (8 * TILES);
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int BLOCKS = (K + 7) / 8;  // tiles that hold the tokens of a mini-batch
  TTT_CONST int ROWS = 8 * BLOCKS;
  TTT_CONST bool KEEPS_DW = D <= 96;

  TTT_CONST int VIEW = ROWS * (D + 4);                      // floats of [ROWS, D]
  TTT_CONST int VIEWS = 5;                                  // k, q, dz, e, dZ
  TTT_CONST int TRIANGLE = 64 * BLOCKS * (BLOCKS + 1) / 2;  // floats of [ROWS, ROWS] up to the diagonal
  TTT_CONST int SUMS = 12;                                  // 8 for the gradient, 4 for the output
  TTT_CONST int LEFT = 32768 / 4 - TRIANGLE - SUMS * ROWS * SIMDGROUPS;
  TTT_CONST int LOCAL = LEFT / VIEW < VIEWS ? LEFT / VIEW : VIEWS;  // views in threadgroup memory
  TTT_CONST int MEMORY = TRIANGLE + SUMS * ROWS * SIMDGROUPS + LOCAL * VIEW;

  // Floats of device memory for each head: the other views, and W1 and b1 of every mini-batch but the first.
  TTT_CONST int START = D * (D + 1);
  static METAL_FUNC size_t scratch(int tokens) {
    return size_t((tokens + K - 2) / K) * START + (VIEWS - LOCAL) * VIEW;
  }

  typedef Staging<D, ROWS, THREADS, true> Next;
};

// A simdgroup's columns of dW: in registers, or read again from device memory. Every change is written there.
template <int D, int TILES, bool KEPT>
struct ColumnsOfDW {
  Tile kept[KEPT ? D / 8 : 1][KEPT ? TILES : 1];
  const device float* from;
  device float* to;

  METAL_FUNC void open(const device float* dW_out, device float* dW) {
    from = dW_out;
    to = dW;
    if (!KEPT) return;
    TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        kept[KEPT ? d : 0][KEPT ? c : 0] = load_tile(from + d * 8 * D + 8 * c, D);
      }
    }
  }

  METAL_FUNC Tile get(int d, int c) {
    if (KEPT) return kept[KEPT ? d : 0][KEPT ? c : 0];
    return load_tile(from + d * 8 * D + 8 * c, D);
  }

  METAL_FUNC void set(int d, int c, Tile tile) {
    if (KEPT) kept[KEPT ? d : 0][KEPT ? c : 0] = tile;
    store_tile(tile, to + d * 8 * D + 8 * c, D);
  }

  // To be called when every tile has been set. From then on, get() reads what was written.
  METAL_FUNC void close() {
    from = to;
  }
};

// The sums over a simdgroup's columns of one row for the gradient of the LayerNorm in y. The first two are MEAN and
// SQUARES; a = gamma dy.
constant constexpr int PULLS = 2;        // sum a
constant constexpr int PULL_SLOPES = 3;  // sum a (z - m)
constant constexpr int OUTPUT_SUMS = 4;

// The sums for the gradient of the LayerNorm's gradient.
constant constexpr int ERRORS = 0;        // sum dG
constant constexpr int ERROR_TILTS = 1;   // sum dG z^
constant constexpr int RATES = 2;         // sum g de
constant constexpr int SCALED = 3;        // sum gamma^2 dG
constant constexpr int SCALED_TILTS = 4;  // sum gamma^2 dG z^
constant constexpr int GAMMAS = 5;        // sum gamma^2
constant constexpr int GAMMA_TILTS = 6;   // sum gamma^2 z^
constant constexpr int GAMMA_CURVES = 7;  // sum gamma^2 z^^2
constant constexpr int ERROR_SUMS = 8;

// Adds up one sum of S simdgroups, which lie N floats apart.
template <int S, int N>
METAL_FUNC float merged(const threadgroup float* sums, Lane lane) {
  float total = 0;
  for (int s = quarter(lane); s < S; s += 4) total += sums[s * N];
  return row_sum(total);
}

// q, k, v, dy, dq, dk, dv [B, T, H, D]; lr, dlr [B, T, H]; t [K]; gamma, beta [H, D]; W1, dW1_out, dW1 [B, H, D, D];
// b1, db1_out, db1 [B, H, 1, D]; rows, drows_out, drows [B, H, K, 2D]; phase, length [B]; dconstants [B, H, K + 2D]:
// this head's and sequence's share of the cotangents of t, gamma and beta; scratch [B, H, LinearBackward::scratch(T)].
// The grid has one threadgroup of LinearBackward::THREADS threads for each (head, sequence). memory holds
// LinearBackward::MEMORY floats.
template <int D, int K, int TILES, typename T, typename LR, typename TF, typename I>
METAL_FUNC void linear_backward(
    const device T* q, const device T* k, const device T* v, LR lr, TF t,
    const device float* gamma, const device float* beta,
    const device float* W1, const device float* b1, const device float* rows, I phase, I length,
    const device T* dy, const device float* dW1_out, const device float* db1_out, const device float* drows_out,
    device T* dq, device T* dk, device T* dv, device float* dlr, device float* dconstants,
    device float* dW1, device float* db1, device float* drows, device float* scratch,
    int tokens, int H, threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane_index) {
  typedef LinearBackward<D, K, TILES> Chunk;
  constexpr int BLOCKS = Chunk::BLOCKS, S = Chunk::SIMDGROUPS, STRIDE = D + 4, LOCAL = Chunk::LOCAL;
  constexpr int VIEW = Chunk::VIEW;
  constexpr mem_flags ALL = mem_flags::mem_threadgroup | mem_flags::mem_device;
  constexpr mem_flags VIEWS = LOCAL < Chunk::VIEWS ? ALL : mem_flags::mem_threadgroup;
  const Lane lane = lane_of(lane_index);
  const int head = group.x, sequence = group.y;
  const int first_column = simdgroup * 8 * TILES;  // of this simdgroup
  const int column = first_column + lane.col;      // of this lane, in the first of its tiles

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
  gamma += head * D;
  beta += head * D;
  W1 += head_at * D * D;
  dW1_out += head_at * D * D;
  dW1 += head_at * D * D;
  b1 += head_at * D;
  db1_out += head_at * D;
  db1 += head_at * D;
  rows += head_at * K * 2 * D;
  drows_out += head_at * K * 2 * D;
  drows += head_at * K * 2 * D;
  dconstants += head_at * (K + 2 * D);
  scratch += head_at * Chunk::scratch(tokens);
  device float* starts = scratch + (Chunk::VIEWS - LOCAL) * VIEW;  // W1 and b1 of mini-batches 1, 2, ...

  threadgroup float* triangle = memory;                     // S, then dS, a packed triangle
  threadgroup float* k_sums = triangle + Chunk::TRIANGLE;   // [ROWS, S, GRADIENT_SUMS], then [ROWS, S, ERROR_SUMS]
  threadgroup float* q_sums = k_sums + Chunk::ROWS * S * ERROR_SUMS;  // [ROWS, S, OUTPUT_SUMS]
  threadgroup float* views = q_sums + Chunk::ROWS * S * OUTPUT_SUMS;
  auto ks = View<0, LOCAL, VIEW>::at(views, scratch);
  auto qs = View<1, LOCAL, VIEW>::at(views, scratch);
  auto dzs = View<2, LOCAL, VIEW>::at(views, scratch);
  auto es = View<3, LOCAL, VIEW>::at(views, scratch);
  auto dZs = View<4, LOCAL, VIEW>::at(views, scratch);

  const int n = length[sequence], start = -int(phase[sequence]);
  const int last = max(0, (n - start - 1) / K);  // mini-batch
  const Source<T, LR> source = {q, k, lr, H, rows, 2 * D};

  float2 scale[TILES], shift[TILES];  // gamma and beta
  TTT_UNROLL for (int c = 0; c < TILES; ++c) {
    scale[c] = pair_at(gamma + column + 8 * c);
    shift[c] = pair_at(beta + column + 8 * c);
  }
  float t_row[BLOCKS];
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) t_row[r] = 8 * r + lane.row < K ? t[8 * r + lane.row] : 0.0f;
  const float t_last = t[K - 1];
  for (int i = thread_index; i < (tokens - n) * D; i += Chunk::THREADS) {
    const size_t at = (n + i / D) * token_stride + i % D;
    dq[at] = T(0.0f);
    dk[at] = T(0.0f);
    dv[at] = T(0.0f);
  }
  for (int i = n + thread_index; i < tokens; i += Chunk::THREADS) dlr[size_t(i) * H] = 0;

  // Forwards: the weights at the start of every mini-batch but the first.
  if (last > 0) {
    Tile W[D / 8][TILES], bias[TILES];
    TTT_UNROLL for (int c = 0; c < TILES; ++c) {
      TTT_UNROLL for (int d = 0; d < D / 8; ++d) W[d][c] = load_tile(W1 + d * 8 * D + first_column + 8 * c, D);
      bias[c] = tile_of(pair_at(b1 + column + 8 * c));
    }
    Staging<D, Chunk::ROWS, Chunk::THREADS, false> next;
    next.fetch(source, span_at(start, n, K), thread_index);
    for (int m = 0; m < last; ++m) {
      const Span span = span_at(start + m * K, n, K);
      next.put(ks, ks, thread_index);
      threadgroup_barrier(VIEWS);

      Tile zk[BLOCKS][TILES];
      float2 w[BLOCKS][TILES];
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        TTT_UNROLL for (int c = 0; c < TILES; ++c) zk[r][c] = bias[c];
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
          Tile k_tile = load_tile(ks + 8 * r * STRIDE + 8 * d, STRIDE);
          TTT_UNROLL for (int c = 0; c < TILES; ++c) multiply_add(zk[r][c], k_tile, W[d][c]);
        }
        float2 z[TILES];
        TTT_UNROLL for (int c = 0; c < TILES; ++c) {
          const int at = column + 8 * c;
          const float2 target = token_pair(v + at, token_stride, span, row) - pair_at(ks + row * STRIDE + at);
          w[r][c] = scale[c] * (shift[c] - target);
          z[c] = pair(zk[r][c]);
        }
        put_gradient_sums<TILES>(k_sums + (row * S + simdgroup) * GRADIENT_SUMS, z, w[r], scale, lane);
      }
      next.fetch(source, span_at(span.start + K, n, K), thread_index);
      threadgroup_barrier(mem_flags::mem_threadgroup);

      Tile ones = filled(1);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        const NormGradient norm = merge_gradient<D, S>(k_sums + row * S * GRADIENT_SUMS, lane);
        const float lr_row = ks[row * STRIDE + D];
        Tile step[TILES];
        TTT_UNROLL for (int c = 0; c < TILES; ++c) {
          float2 e = float2(0.0f);
          if (is_new(span, row)) e = lr_row * gradient(norm, pair(zk[r][c]), w[r][c], scale[c]);
          else if (row < span.first) e = pair_at(rows + row * 2 * D + D + column + 8 * c);
          step[c] = tile_of(-t_last * e);
          multiply_add(bias[c], ones, step[c]);
        }
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
          Tile k_tile = load_transposed(ks + 8 * r * STRIDE + 8 * d, STRIDE);
          TTT_UNROLL for (int c = 0; c < TILES; ++c) multiply_add(W[d][c], k_tile, step[c]);
        }
      }
      device float* to = starts + m * size_t(Chunk::START);
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) store_tile(W[d][c], to + d * 8 * D + first_column + 8 * c, D);
        if (lane.row == 0) put_pair(to + D * D + column + 8 * c, pair(bias[c]));
      }
      threadgroup_barrier(ALL);
    }
  }

  ColumnsOfDW<D, TILES, Chunk::KEEPS_DW> dW;
  dW.open(dW1_out + first_column, dW1 + first_column);
  const device float* dW_now = dW1_out;
  Tile db[TILES];                        // every row of such a tile is db1
  float2 dgamma[TILES], dbeta[TILES];    // of this lane's rows
  float dt[BLOCKS], dt_commit = 0;       // of this lane's columns
  TTT_UNROLL for (int c = 0; c < TILES; ++c) {
    db[c] = tile_of(pair_at(db1_out + column + 8 * c));
    dgamma[c] = float2(0.0f);
    dbeta[c] = float2(0.0f);
  }
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) dt[r] = 0;

  typename Chunk::Next next;
  next.fetch(source, span_at(start + last * K, n, K), thread_index);
  for (int m = last; m >= 0; --m) {
    const Span span = span_at(start + m * K, n, K);
    const bool commits = span.count == K, leaves_open = !commits;
    const device float* W = m > 0 ? starts + (m - 1) * size_t(Chunk::START) : W1;
    const device float* b = m > 0 ? W + D * D : b1;
    next.put(ks, qs, thread_index);
    threadgroup_barrier(VIEWS);

    // k W + b, q W + b and k dW' + db' in this simdgroup's columns.
    Tile zk[BLOCKS][TILES], z[BLOCKS][TILES], pulled[BLOCKS][TILES];
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        zk[r][c] = tile_of(pair_at(b + column + 8 * c));
        z[r][c] = zk[r][c];
        pulled[r][c] = db[c];
      }
    }
    TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
      Tile k_tile[BLOCKS], q_tile[BLOCKS];
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        k_tile[r] = load_tile(ks + 8 * r * STRIDE + 8 * d, STRIDE);
        q_tile[r] = load_tile(qs + 8 * r * STRIDE + 8 * d, STRIDE);
      }
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        Tile W_tile = load_tile(W + d * 8 * D + first_column + 8 * c, D);
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          multiply_add(zk[r][c], k_tile[r], W_tile);
          multiply_add(z[r][c], q_tile[r], W_tile);
        }
        if (!commits) continue;
        Tile dW_tile = dW.get(d, c);
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) multiply_add(pulled[r][c], k_tile[r], dW_tile);
      }
    }

    // First exchange: the sums for the LayerNorm's gradient, and S.
    float2 offset[BLOCKS][TILES];  // beta - target
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      float2 own[TILES], w[TILES];
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        const int at = column + 8 * c;
        const float2 target = token_pair(v + at, token_stride, span, row) - pair_at(ks + row * STRIDE + at);
        offset[r][c] = shift[c] - target;
        w[c] = scale[c] * offset[r][c];
        own[c] = pair(zk[r][c]);
      }
      put_gradient_sums<TILES>(k_sums + (row * S + simdgroup) * GRADIENT_SUMS, own, w, scale, lane);
    }
    int tile = 0;
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      TTT_UNROLL for (int c = 0; c < BLOCKS; ++c) {
        if (c > r || tile++ % S != int(simdgroup)) continue;
        Tile dots = filled(0);
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
          Tile q_tile = load_tile(qs + 8 * r * STRIDE + 8 * d, STRIDE);
          Tile k_tile = load_transposed(ks + 8 * c * STRIDE + 8 * d, STRIDE);
          multiply_add(dots, q_tile, k_tile);
        }
        store_tile(causal(pair(dots) + 1.0f, r, c, lane), triangle + triangle_at(r, c), 8);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Second exchange: e, and the sums for the LayerNorm of z and its gradient.
    NormGradient norm[BLOCKS];
    float lr_row[BLOCKS];
    Tile e[BLOCKS][TILES], seen[BLOCKS][TILES];  // seen is S e
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      norm[r] = merge_gradient<D, S>(k_sums + row * S * GRADIENT_SUMS, lane);
      lr_row[r] = ks[row * STRIDE + D];
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        float2 own = float2(0.0f);
        if (is_new(span, row)) own = lr_row[r] * gradient(norm[r], pair(zk[r][c]), scale[c] * offset[r][c], scale[c]);
        else if (row < span.first) own = pair_at(rows + row * 2 * D + D + column + 8 * c);
        e[r][c] = tile_of(own);
        store_tile(e[r][c], es + 8 * r * STRIDE + first_column + 8 * c, STRIDE);
        seen[r][c] = filled(0);
      }
    }
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      TTT_UNROLL for (int j = 0; j < BLOCKS; ++j) {
        if (j > r) continue;
        Tile weight = load_tile(triangle + triangle_at(r, j), 8);
        TTT_UNROLL for (int c = 0; c < TILES; ++c) multiply_add(seen[r][c], weight, e[j][c]);
      }
      float2 own[TILES];
      float pulls = 0, slopes = 0;
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        own[c] = pair(z[r][c]) - t_row[r] * pair(seen[r][c]);
        z[r][c] = tile_of(own[c]);
      }
      const float mean = moments<TILES>(own).x;
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        const float2 pull = scale[c] * token_pair(dy + column + 8 * c, token_stride, span, row);
        pulls += sum(pull);
        slopes += sum(pull * (own[c] - mean));
      }
      pulls = row_sum(pulls);
      slopes = row_sum(slopes);
      threadgroup float* sums = q_sums + (row * S + simdgroup) * OUTPUT_SUMS;
      put_norm_sums<TILES>(sums, own, lane);
      if (lane.col == 0) {
        sums[PULLS] = pulls;
        sums[PULL_SLOPES] = slopes;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Third exchange: dz, and the sums for the gradient of the LayerNorm's gradient.
    Tile dz[BLOCKS][TILES], weighted[BLOCKS][TILES], de[BLOCKS][TILES];  // weighted is t dz
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      const threadgroup float* sums = q_sums + row * S * OUTPUT_SUMS;
      const Norm of_z = merge_norm<D, S, OUTPUT_SUMS>(sums, lane);
      float pulls = 0, slopes = 0;
      for (int s = quarter(lane); s < S; s += 4) {
        const threadgroup float* of = sums + s * OUTPUT_SUMS;
        pulls += of[PULLS];
        slopes += of[PULL_SLOPES] + (of[MEAN] - of_z.mean) * of[PULLS];
      }
      pulls = row_sum(pulls) / D;
      slopes = row_sum(slopes) * of_z.inv_std / D;
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        const float2 pull = token_pair(dy + column + 8 * c, token_stride, span, row);
        const float2 z_hat = normalized(of_z, pair(z[r][c]));
        const float2 own = (scale[c] * pull - pulls - z_hat * slopes) * of_z.inv_std;
        dgamma[c] += pull * z_hat;
        dbeta[c] += pull;
        dt[r] -= sum(own * pair(seen[r][c]));
        dz[r][c] = tile_of(own);
        weighted[r][c] = tile_of(t_row[r] * own);
        store_tile(dz[r][c], dzs + 8 * r * STRIDE + first_column + 8 * c, STRIDE);
      }
    }
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      TTT_UNROLL for (int c = 0; c < TILES; ++c) de[r][c] = filled(0);
      TTT_UNROLL for (int i = 0; i < BLOCKS; ++i) {
        if (i < r) continue;
        Tile weight = load_transposed(triangle + triangle_at(i, r), 8);
        TTT_UNROLL for (int c = 0; c < TILES; ++c) multiply_add(de[r][c], weight, weighted[i][c]);
      }
      float sums[ERROR_SUMS];
      TTT_UNROLL for (int i = 0; i < ERROR_SUMS; ++i) sums[i] = 0;
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        const int at = row * 2 * D + D + column + 8 * c;
        float2 own = -pair(de[r][c]);
        if (commits) {
          own -= t_last * pair(pulled[r][c]);
          dt_commit -= sum(pair(e[r][c]) * pair(pulled[r][c]));
        }
        if (leaves_open && row < span.count) own += pair_at(drows_out + at);
        de[r][c] = tile_of(own);
        if (m == 0 && row < K) put_pair(drows + at, row < span.first ? own : float2(0.0f));

        const float2 z_hat = normalized(norm[r].norm, pair(zk[r][c])), gammas = scale[c] * scale[c];
        const float2 g = gradient(norm[r], pair(zk[r][c]), scale[c] * offset[r][c], scale[c]);
        const float2 dG = lr_row[r] * norm[r].norm.inv_std * own;
        sums[ERRORS] += sum(dG);
        sums[ERROR_TILTS] += sum(dG * z_hat);
        sums[RATES] += sum(g * own);
        sums[SCALED] += sum(gammas * dG);
        sums[SCALED_TILTS] += sum(gammas * dG * z_hat);
        sums[GAMMAS] += sum(gammas);
        sums[GAMMA_TILTS] += sum(gammas * z_hat);
        sums[GAMMA_CURVES] += sum(gammas * z_hat * z_hat);
      }
      TTT_UNROLL for (int i = 0; i < ERROR_SUMS; ++i) {
        const float total = row_sum(sums[i]);
        if (lane.col == 0) k_sums[(row * S + simdgroup) * ERROR_SUMS + i] = total;
      }
    }
    threadgroup_barrier(VIEWS);

    // Fourth exchange: dZ and dS.
    Tile dZ[BLOCKS][TILES], dk_own[BLOCKS][TILES];
    Tile total[TILES];  // of dz and dZ, over this lane's rows
    TTT_UNROLL for (int c = 0; c < TILES; ++c) total[c] = filled(0);
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      const int row = 8 * r + lane.row;
      float sums[ERROR_SUMS];
      TTT_UNROLL for (int i = 0; i < ERROR_SUMS; ++i) {
        sums[i] = merged<S, ERROR_SUMS>(k_sums + row * S * ERROR_SUMS + i, lane);
      }
      const float mean_uz = norm[r].mean_uz, inv_std = norm[r].norm.inv_std;
      const float dG_mean = sums[ERRORS] / D, tilt = sums[ERROR_TILTS] / D;  // tilt is s
      // The means of gamma^2 du and of gamma^2 du z^.
      const float du_mean = (sums[SCALED] - dG_mean * sums[GAMMAS] - tilt * sums[GAMMA_TILTS]) / D;
      const float du_tilt = (sums[SCALED_TILTS] - dG_mean * sums[GAMMA_TILTS] - tilt * sums[GAMMA_CURVES]) / D;
      const float mean = du_mean - dG_mean * mean_uz - tilt * norm[r].mean_u;  // of dz^
      const float mean_z = du_tilt - 2 * tilt * mean_uz;                      // of dz^ z^
      const float of_std = lr_row[r] * inv_std * sums[RATES] / D;
      if (simdgroup == 0 && lane.col == 0 && is_new(span, row)) dlr[size_t(span.start + row) * H] = sums[RATES];
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        const float2 z_hat = normalized(norm[r].norm, pair(zk[r][c])), dG = lr_row[r] * inv_std * pair(de[r][c]);
        const float2 u = scale[c] * (scale[c] * z_hat + offset[r][c]);
        const float2 du = dG - dG_mean - z_hat * tilt;
        const float2 dz_hat = scale[c] * scale[c] * du - dG * mean_uz - u * tilt;
        const float2 own = (dz_hat - mean - z_hat * mean_z) * inv_std - z_hat * of_std;
        dZ[r][c] = tile_of(own);
        store_tile(dZ[r][c], dZs + 8 * r * STRIDE + first_column + 8 * c, STRIDE);
        total[c] = tile_of(pair(total[c]) + pair(dz[r][c]) + own);
        dgamma[c] += du * (2 * scale[c] * z_hat + offset[r][c]);
        dbeta[c] += scale[c] * du;
        if (is_new(span, row)) put_pair(dv + (span.start + row) * token_stride + column + 8 * c, -scale[c] * du);

        float2 dk_pair = scale[c] * du;
        if (leaves_open && row < span.count) dk_pair += pair_at(drows_out + row * 2 * D + column + 8 * c);
        dk_own[r][c] = tile_of(dk_pair);
      }
    }
    if (commits) {
      TTT_UNROLL for (int c = 0; c < TILES; ++c) {
        Tile taken[BLOCKS];  // e dW'^T
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) taken[r] = filled(0);
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
          Tile dW_tile = load_transposed(dW_now + (first_column + 8 * c) * D + 8 * d, D);
          TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
            Tile e_tile = load_tile(es + 8 * r * STRIDE + 8 * d, STRIDE);
            multiply_add(taken[r], e_tile, dW_tile);
          }
        }
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          dk_own[r][c] = tile_of(pair(dk_own[r][c]) - t_last * pair(taken[r]));
        }
      }
    }
    tile = 0;
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      TTT_UNROLL for (int c = 0; c < BLOCKS; ++c) {
        if (c > r || tile++ % S != int(simdgroup)) continue;
        Tile dots = filled(0);
        TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
          Tile dz_tile = load_tile(dzs + 8 * r * STRIDE + 8 * d, STRIDE);
          Tile e_tile = load_transposed(es + 8 * c * STRIDE + 8 * d, STRIDE);
          multiply_add(dots, dz_tile, e_tile);
        }
        store_tile(causal(-t_row[r] * pair(dots), r, c, lane), triangle + triangle_at(r, c), 8);
      }
    }
    threadgroup_barrier(ALL);

    TTT_UNROLL for (int c = 0; c < TILES; ++c) {
      const int at = column + 8 * c;
      Tile dq_own[BLOCKS];
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        dq_own[r] = tile_of(token_pair(dy + at, token_stride, span, 8 * r + lane.row));
      }
      TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
        Tile W_tile = load_transposed(W + (first_column + 8 * c) * D + 8 * d, D);
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          Tile dz_tile = load_tile(dzs + 8 * r * STRIDE + 8 * d, STRIDE);
          Tile dZ_tile = load_tile(dZs + 8 * r * STRIDE + 8 * d, STRIDE);
          multiply_add(dq_own[r], dz_tile, W_tile);
          multiply_add(dk_own[r][c], dZ_tile, W_tile);
        }
      }
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        TTT_UNROLL for (int j = 0; j < BLOCKS; ++j) {
          if (j <= r) {
            Tile weight = load_tile(triangle + triangle_at(r, j), 8);
            Tile k_tile = load_tile(ks + 8 * j * STRIDE + first_column + 8 * c, STRIDE);
            multiply_add(dq_own[r], weight, k_tile);
          }
          if (j >= r) {
            Tile weight = load_transposed(triangle + triangle_at(j, r), 8);
            Tile q_tile = load_tile(qs + 8 * j * STRIDE + first_column + 8 * c, STRIDE);
            multiply_add(dk_own[r][c], weight, q_tile);
          }
        }
        if (m == 0 && row < K) put_pair(drows + row * 2 * D + at, row < span.first ? pair(dk_own[r][c]) : float2(0.0f));
        if (!is_new(span, row)) continue;
        put_pair(dq + (span.start + row) * token_stride + at, pair(dq_own[r]));
        put_pair(dk + (span.start + row) * token_stride + at, pair(dk_own[r][c]));
      }
    }
    Tile ones = filled(1);
    TTT_UNROLL for (int c = 0; c < TILES; ++c) multiply_add(db[c], ones, total[c]);
    TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
      Tile own[TILES];
      TTT_UNROLL for (int c = 0; c < TILES; ++c) own[c] = dW.get(d, c);
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        Tile k_tile = load_transposed(ks + 8 * r * STRIDE + 8 * d, STRIDE);
        Tile q_tile = load_transposed(qs + 8 * r * STRIDE + 8 * d, STRIDE);
        TTT_UNROLL for (int c = 0; c < TILES; ++c) {
          multiply_add(own[c], q_tile, dz[r][c]);
          multiply_add(own[c], k_tile, dZ[r][c]);
        }
      }
      TTT_UNROLL for (int c = 0; c < TILES; ++c) dW.set(d, c, own[c]);
    }
    dW.close();
    dW_now = dW1;
    if (m == 0) break;
    next.fetch(source, span_at(span.start - K, n, K), thread_index);
    threadgroup_barrier(ALL);
  }

  // The sums over the lanes that share a column, and over the simdgroups. The sums of the last mini-batch are read.
  Tile ones = filled(1);
  TTT_UNROLL for (int c = 0; c < TILES; ++c) {
    Tile of_gamma = filled(0), of_beta = filled(0), mine = tile_of(dgamma[c]), mine_too = tile_of(dbeta[c]);
    multiply_add(of_gamma, ones, mine);
    multiply_add(of_beta, ones, mine_too);
    if (lane.row != 0) continue;
    put_pair(db1 + column + 8 * c, pair(db[c]));
    put_pair(dconstants + K + column + 8 * c, pair(of_gamma));
    put_pair(dconstants + K + D + column + 8 * c, pair(of_beta));
  }
  TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
    const float total = row_sum(dt[r]);
    if (lane.col == 0) k_sums[(8 * r + lane.row) * S + simdgroup] = total;
  }
  dt_commit = simd_sum(dt_commit);
  if (lane_index == 0) q_sums[simdgroup] = dt_commit;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < K; i += Chunk::THREADS) {
    float total = 0;
    for (int s = 0; s < S; ++s) total += k_sums[i * S + s] + (i == K - 1 ? q_sums[s] : 0.0f);
    dconstants[i] = total;
  }
}

}  // namespace ttt
