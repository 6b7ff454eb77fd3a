// TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2 with hidden width F = 4D: the update rule in its dual form. One launch
// takes all tokens of a call.
//
// ttt::mlp_chunk takes any number of tokens, from any phase of the open mini-batch. ttt::mlp_step takes one token that
// does not complete its mini-batch. Both are function templates; README.md shows the kernel around them.
//
// H heads, D head dimension, K mini-batch size, T tokens of the call; i and j run over a mini-batch.
//     z1_j = k_j W1 + b1,  x2_j = gelu(z1_j),  g2_j = gradient of |LN(x2_j W2 + b2) - (v_j - k_j)|^2 / 2,
//     g1_j = (g2_j W2^T) gelu'(z1_j),  e1_j = lr_j g1_j,  e2_j = lr_j g2_j
//     q2_i = gelu(q_i W1 + b1 - t_i sum_{j<=i} (q_i . k_j + 1) e1_j)
//     z_i  = q2_i W2 + b2 - t_i sum_{j<=i} (q2_i . x2_j + 1) e2_j,      y_i = q_i + LN(z_i)
//     after the last token of a mini-batch:  W1 -= t_{K-1} sum_j k_j^T e1_j,  W2 -= t_{K-1} sum_j x2_j^T e2_j,  b alike
// While a mini-batch is open, its rows (k_j | e1_j | x2_j | e2_j) are part of the state.
#include "ttt.h"

namespace ttt {

// ---- Chunk form ---------------------------------------------------------------------------------------------------
//
// There is one threadgroup for each sequence and head. Each simdgroup owns some hidden units: their columns of W1 and
// their rows of W2. So z1, x2, e1, q2 and both updates stay in the registers of one simdgroup. The simdgroups exchange
// only the sums over all hidden units, x2 W2, q2 W2 and q2 x2^T, and the rows of e2.
//
// Where the weights are: at D = 64, both would take 64 registers of each of 512 threads. Such a thread has 96, and the
// rest needs more than 32. A mini-batch needs W2 three times, so W2 is kept (32 registers). W1 is streamed through the
// device's cache, read once and written once: the tiles that a mini-batch reads get what the one before has learned on
// their way. That is 128 KB a head for the 1.8 million multiply-adds of 16 tokens. Where D > 64 or K > 16, W2 is streamed
// as well, read three times and written once: e2 depends on all of x2 W2, and e1 and q2 on all of e2. No barrier guards
// the weights, since only the lane that owns an element touches it.
//
// A sum over all hidden units is formed in threadgroup memory, in COPIES copies. MEMBERS = SIMDGROUPS / COPIES
// simdgroups share a copy. At any time each of them adds to another part of the columns, and at a barrier they all move
// on to the next part. So the order of the additions is fixed. A mini-batch takes 4 + 2 MEMBERS barriers: 12 at D = 64,
// 16 at D = 96.
//
// Registers of a thread at D = 64, K = 16: W2 32, x2 8, e1 of the mini-batch before, gelu' and later e1 8, q W1 and later
// q2 8, tiles of W1 or g1 4, b1 4, operand tiles 2, b2, gamma and beta 6, addresses and counters about 16: 88 of the 96
// that a threadgroup of 512 may have. At D = 96 (384 threads), without W2: 16, 16, 16, 8, 8, 2, 9 and 16, 91 of 128. At
// D = 128 (512 threads) 94 of 96.

template <int D, int K, int TILES, bool SHOWN = false>  // which it does not depend on
struct MlpChunk {
  TTT_CONST int F = 4 * D;
  TTT_CONST int BLOCKS = (K + 7) / 8;  // tiles that hold the tokens of a mini-batch
  TTT_CONST int ROWS = 8 * BLOCKS;
  TTT_CONST int WIDTH = 10 * D;        // of a row of the open mini-batch
  TTT_CONST int STRIDE = D + 4;

  TTT_CONST bool KEEPS_W2 = D <= 64 && BLOCKS <= 2 && TILES == 1;
  TTT_CONST int SIMDGROUPS = KEEPS_W2 ? D / 4 : D / (8 * TILES);
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int UNITS = F / 8 / SIMDGROUPS;  // tiles of hidden units in one simdgroup

  TTT_CONST int VIEW = ROWS * STRIDE;                       // floats of [ROWS, D]
  TTT_CONST int TRIANGLE = 64 * BLOCKS * (BLOCKS + 1) / 2;  // floats of [ROWS, ROWS] up to the diagonal
  // Threadgroup memory besides k, q and q k^T, for COPIES of x2 W2 and of q2 x2^T.
  TTT_CONST int LEFT = 32768 / 4 - 2 * VIEW - TRIANGLE;
  TTT_CONST int COPY = VIEW + TRIANGLE;
  TTT_CONST int COPIES = SIMDGROUPS % 4 == 0 && 4 * COPY <= LEFT ? 4 : SIMDGROUPS % 2 == 0 && 2 * COPY <= LEFT ? 2 : 1;
  TTT_CONST int MEMBERS = SIMDGROUPS / COPIES;
  TTT_CONST int PART = D / 8 / MEMBERS;  // tiles of columns that a simdgroup adds to at a time
  TTT_CONST bool FITS = COPY <= LEFT;  // else (K > 24 at D = 96, K > 16 at D = 128) the views are in device memory
  TTT_CONST int VIEWS = (2 + COPIES) * VIEW;
  TTT_CONST int MEMORY = (1 + COPIES) * TRIANGLE + (FITS ? VIEWS : 0);
  TTT_CONST int SCRATCH = FITS ? 0 : VIEWS;  // floats of device memory for each head

  typedef Staging<D, ROWS, THREADS, true> Next;
};

// The memory that holds the views of a mini-batch: threadgroup memory, or device memory.
template <bool IN_THREADGROUP>
struct Workspace {
  typedef threadgroup float* P;
  TTT_CONST mem_flags FLAGS = mem_flags::mem_threadgroup;
  static METAL_FUNC P at(threadgroup float* memory, device float*) {
    return memory;
  }
};

template <>
struct Workspace<false> {
  typedef device float* P;
  TTT_CONST mem_flags FLAGS = mem_flags::mem_threadgroup | mem_flags::mem_device;
  static METAL_FUNC P at(threadgroup float*, device float* scratch) {
    return scratch;
  }
};

// A simdgroup's tiles of W2, its hidden units by all columns. They are kept in registers, or streamed.
template <int D, int UNITS, bool KEPT>
struct TilesOfW2 {
  Tile kept[KEPT ? UNITS : 1][KEPT ? D / 8 : 1];
  const device float* from;
  device float* to;

  METAL_FUNC void open(const device float* W2, device float* W2_out) {
    from = W2;
    to = W2_out;
    if (!KEPT) return;
    TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
      TTT_UNROLL for (int d = 0; d < D / 8; ++d) kept[KEPT ? h : 0][KEPT ? d : 0] = load_tile(at(from, h, d), D);
    }
  }

  METAL_FUNC Tile get(int h, int d) {
    if (KEPT) return kept[KEPT ? h : 0][KEPT ? d : 0];
    return load_tile(at(from, h, d), D);
  }

  METAL_FUNC void set(int h, int d, Tile tile) {
    if (KEPT) kept[KEPT ? h : 0][KEPT ? d : 0] = tile;
    else store_tile(tile, at(to, h, d), D);
  }

  // To be called when every tile has been set. From then on, get() reads what was written.
  METAL_FUNC void commit() {
    from = to;
  }

  METAL_FUNC void close() {
    if (!KEPT && from == to) return;
    TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
      TTT_UNROLL for (int d = 0; d < D / 8; ++d) store_tile(get(h, d), at(to, h, d), D);
    }
  }

  template <typename P>
  static METAL_FUNC P at(P W2, int h, int d) {
    return W2 + h * 8 * D + d * 8;
  }
};

// The update W2 += factor x2^T e2, where it is due.
template <typename P>
struct UpdateOfW2 {
  bool is_due;
  P e2s;
  float factor;
};

// total += x W2 for this simdgroup's units, in one part of the columns. If an update is due, it is applied to each tile
// of W2 after the tile has been used.
template <int D, int K, int TILES, typename P, typename X, typename W>
METAL_FUNC void add_units(
    P total, thread X& x, thread W& W2, int part, bool is_first, thread X& x2_transposed, UpdateOfW2<P> update) {
  typedef MlpChunk<D, K, TILES> Chunk;
  TTT_UNROLL for (int i = 0; i < Chunk::PART; ++i) {
    const int d = part * Chunk::PART + i;
    Tile acc[Chunk::BLOCKS], step[Chunk::BLOCKS];
    TTT_UNROLL for (int r = 0; r < Chunk::BLOCKS; ++r) {
      const int at = 8 * r * Chunk::STRIDE + 8 * d;
      acc[r] = is_first ? filled(0) : load_tile(total + at, Chunk::STRIDE);
      if (!update.is_due) continue;
      Tile e2 = load_tile(update.e2s + at, Chunk::STRIDE);
      step[r] = tile_of(update.factor * pair(e2));
    }
    TTT_UNROLL for (int h = 0; h < Chunk::UNITS; ++h) {
      Tile tile = W2.get(h, d);
      TTT_UNROLL for (int r = 0; r < Chunk::BLOCKS; ++r) multiply_add(acc[r], x[h][r], tile);
      if (!update.is_due) continue;
      TTT_UNROLL for (int r = 0; r < Chunk::BLOCKS; ++r) multiply_add(tile, x2_transposed[h][r], step[r]);
      W2.set(h, d, tile);
    }
    TTT_UNROLL for (int r = 0; r < Chunk::BLOCKS; ++r) {
      store_tile(acc[r], total + 8 * r * Chunk::STRIDE + 8 * d, Chunk::STRIDE);
    }
  }
}

// total += q2 x2^T for this simdgroup's units, in the tiles up to the diagonal.
template <int D, int K, int TILES, typename X>
METAL_FUNC void add_dots(threadgroup float* total, thread X& q2, thread X& x2_transposed, bool is_first) {
  typedef MlpChunk<D, K, TILES> Chunk;
  TTT_UNROLL for (int r = 0; r < Chunk::BLOCKS; ++r) {
    TTT_UNROLL for (int c = 0; c < Chunk::BLOCKS; ++c) {
      if (c > r) continue;
      Tile acc = is_first ? filled(0) : load_tile(total + triangle_at(r, c), 8);
      TTT_UNROLL for (int h = 0; h < Chunk::UNITS; ++h) multiply_add(acc, q2[h][r], x2_transposed[h][c]);
      store_tile(acc, total + triangle_at(r, c), 8);
    }
  }
}

// q, k, v, y [B, T, H, D]; lr [B, T, H]; t [K]; gamma, beta [H, D]; W1 [B, H, D, F]; b1 [B, H, 1, F];
// W2 [B, H, F, D]; b2 [B, H, 1, D]; rows [B, H, K, 10D]; phase, length [B]; scratch [B, H, MlpChunk::SCRATCH], or
// nullptr where that is 0. The grid has one threadgroup of MlpChunk::THREADS threads for each (head, sequence). memory
// holds MlpChunk::MEMORY floats.
template <int D, int K, int TILES, bool SHOWN = false, typename T, typename LR, typename TF, typename I>
METAL_FUNC void mlp_chunk(
    const device T* q, const device T* k, const device T* v, LR lr, TF t,
    const device float* gamma, const device float* beta,
    const device float* W1, const device float* b1, const device float* W2, const device float* b2,
    const device float* rows, I phase, I length,
    device T* y, device float* W1_out, device float* b1_out, device float* W2_out, device float* b2_out,
    device float* rows_out, device float* scratch,
    int tokens, int H, threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane_index,
    device float* loss = nullptr, device float* write_norm = nullptr) {
  typedef MlpChunk<D, K, TILES> Chunk;
  typedef Workspace<Chunk::FITS> Work;
  typedef Columns<D> Cols;
  constexpr int F = Chunk::F, BLOCKS = Chunk::BLOCKS, UNITS = Chunk::UNITS, STRIDE = Chunk::STRIDE;
  constexpr int S = Chunk::SIMDGROUPS, COPIES = Chunk::COPIES, MEMBERS = Chunk::MEMBERS, WIDTH = Chunk::WIDTH;
  const Lane lane = lane_of(lane_index);
  const int head = group.x, sequence = group.y, member = simdgroup % MEMBERS, copy = simdgroup / MEMBERS;
  const int first_unit = simdgroup * 8 * UNITS;  // of this simdgroup
  const int unit = first_unit + lane.col;        // of this lane, in the first of its tiles

  const size_t token_stride = size_t(H) * D;
  const size_t tokens_at = (size_t(sequence) * tokens * H + head) * D;
  const size_t head_at = size_t(sequence) * H + head;
  q += tokens_at;
  k += tokens_at;
  v += tokens_at;
  y += tokens_at;
  lr += size_t(sequence) * tokens * H + head;
  W1 += head_at * D * F + first_unit;
  W1_out += head_at * D * F + first_unit;
  W2 += (head_at * F + first_unit) * D;
  W2_out += (head_at * F + first_unit) * D;
  b1 += head_at * F;
  b1_out += head_at * F;
  rows += head_at * K * WIDTH;
  rows_out += head_at * K * WIDTH;
  if (SHOWN) {
    loss += size_t(sequence) * tokens * H + head;
    write_norm += size_t(sequence) * tokens * H + head;
  }

  threadgroup float* weights = memory;                   // -t_i (q_i . k_j + 1), a packed triangle
  threadgroup float* q2x2 = memory + Chunk::TRIANGLE;    // q2_i . x2_j, COPIES packed triangles
  typename Work::P ks = Work::at(q2x2 + COPIES * Chunk::TRIANGLE, scratch + head_at * Chunk::SCRATCH);  // [ROWS, D]
  typename Work::P x2W2 = ks + Chunk::VIEW;              // COPIES views, of which the first becomes e2
  typename Work::P e2s = x2W2;
  typename Work::P past_ks = x2W2;                       // until x2 W2 is formed: k of the mini-batch before
  typename Work::P q2W2 = e2s + Chunk::VIEW;             // COPIES views
  typename Work::P qs = x2W2 + COPIES * Chunk::VIEW;     // in the last copy of q2 W2, which is needed later

  Tile bias[UNITS];  // every row is b1
  TTT_UNROLL for (int h = 0; h < UNITS; ++h) bias[h] = tile_of(pair_at(b1 + unit + 8 * h));
  float bias2[Cols::COUNT], scale[Cols::COUNT], shift[Cols::COUNT];
  Cols::load(bias2, b2 + head_at * D, lane_index);
  Cols::load(scale, gamma + head * D, lane_index);
  Cols::load(shift, beta + head * D, lane_index);
  const float t_last = t[K - 1];

  const int n = length[sequence];
  for (int i = thread_index; i < (tokens - n) * D; i += Chunk::THREADS) y[(n + i / D) * token_stride + i % D] = T(0.0f);
  for (int i = n + thread_index; SHOWN && i < tokens; i += Chunk::THREADS) {
    loss[i * H] = 0;
    write_norm[i * H] = 0;
  }

  const Source<T, LR> source = {q, k, lr, H, rows, WIDTH};
  typename Chunk::Next next;
  next.fetch(source, span_at(-int(phase[sequence]), n, K), thread_index);
  TilesOfW2<D, UNITS, Chunk::KEEPS_W2> W2_tiles;
  W2_tiles.open(W2, W2_out);
  const device float* W1_now = W1;
  Tile e1[UNITS][BLOCKS];   // gelu' until e2 is known. While W1 is due: -t_last e1 of the mini-batch before
  bool is_due = false;      // W1 += k^T e1 of the mini-batch before
  for (int start = -int(phase[sequence]); true; start += K) {
    const Span span = span_at(start, n, K);
    const bool is_last = start + K >= n, commits = span.count == K;
    if (is_due) next.save(ks, past_ks, thread_index);
    next.put(ks, qs, thread_index);
    threadgroup_barrier(Work::FLAGS);

    // x2 = gelu(k W1 + b1), the slope of the gelu, and q W1 + b1.
    Tile x2[UNITS][BLOCKS], q2[UNITS][BLOCKS];
    TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        x2[h][r] = bias[h];
        q2[h][r] = bias[h];
      }
    }
    for (int d = 0; d < D / 8; ++d) {
      Tile W[UNITS];
      TTT_UNROLL for (int h = 0; h < UNITS; ++h) W[h] = load_tile(W1_now + d * 8 * F + 8 * h, F);
      if (is_due) {
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          Tile k_tile = load_transposed(past_ks + 8 * r * STRIDE + 8 * d, STRIDE);
          TTT_UNROLL for (int h = 0; h < UNITS; ++h) multiply_add(W[h], k_tile, e1[h][r]);
        }
        TTT_UNROLL for (int h = 0; h < UNITS; ++h) store_tile(W[h], W1_out + d * 8 * F + 8 * h, F);
      }
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        Tile k_tile = load_tile(ks + 8 * r * STRIDE + 8 * d, STRIDE);
        TTT_UNROLL for (int h = 0; h < UNITS; ++h) multiply_add(x2[h][r], k_tile, W[h]);
        Tile q_tile = load_tile(qs + 8 * r * STRIDE + 8 * d, STRIDE);
        TTT_UNROLL for (int h = 0; h < UNITS; ++h) multiply_add(q2[h][r], q_tile, W[h]);
      }
    }
    TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        const float2 z1 = pair(x2[h][r]);
        const Gelu left = gelu(z1.x), right = gelu(z1.y);
        e1[h][r] = tile_of(float2(left.slope, right.slope));
        float2 x = float2(0.0f);
        if (is_new(span, row)) x = float2(left.value, right.value);
        else if (row < span.first) x = pair_at(rows + row * WIDTH + D + F + unit + 8 * h);
        x2[h][r] = tile_of(x);
        if (is_last && row < K) put_pair(rows_out + row * WIDTH + D + F + unit + 8 * h, commits ? float2(0.0f) : x);
      }
    }

    // The causal weights. Each simdgroup computes some of the tiles up to the diagonal.
    int tile = 0;
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
      TTT_UNROLL for (int c = 0; c < BLOCKS; ++c) {
        if (c > r || tile++ % S != int(simdgroup)) continue;
        Tile dots = filled(0);
        for (int d = 0; d < D / 8; ++d) {
          Tile q_tile = load_tile(qs + 8 * r * STRIDE + 8 * d, STRIDE);
          Tile k_tile = load_transposed(ks + 8 * c * STRIDE + 8 * d, STRIDE);
          multiply_add(dots, q_tile, k_tile);
        }
        const float t_row = 8 * r + lane.row < K ? t[8 * r + lane.row] : 0.0f;
        store_tile(causal_weights(dots, t_row, r, c, lane), weights + triangle_at(r, c), 8);
      }
    }

    if (is_due) {
      W1_now = W1_out;
      is_due = false;
      threadgroup_barrier(Work::FLAGS);  // past_ks is free
    }

    // x2 W2, the first sum over the hidden units.
    const UpdateOfW2<typename Work::P> no_update = {false, e2s, 0};
    for (int turn = 0; turn < MEMBERS; ++turn) {
      if (turn > 0) threadgroup_barrier(Work::FLAGS);
      TTT_UNROLL for (int part = 0; part < MEMBERS; ++part) {
        if (part != (member + turn) % MEMBERS) continue;
        add_units<D, K, TILES>(x2W2 + copy * Chunk::VIEW, x2, W2_tiles, part, turn == 0, x2, no_update);
      }
    }
    threadgroup_barrier(Work::FLAGS);

    // e2. Each simdgroup takes some of the rows.
    for (int row = simdgroup; row < Chunk::ROWS; row += S) {
      float e2[Cols::COUNT];
      Cols::fill(e2, 0);
      if (is_new(span, row)) {
        float target[Cols::COUNT];
        Cols::load(target, v + (start + row) * token_stride, lane_index);
        Cols::add(target, ks + row * STRIDE, -1, lane_index);
        Cols::copy(e2, bias2);
        for (int c = 0; c < COPIES; ++c) Cols::add(e2, x2W2 + c * Chunk::VIEW + row * STRIDE, 1, lane_index);
        if (SHOWN) {
          const float lost = Cols::loss(e2, target, scale, shift, lane_index);
          if (lane_index == 0) loss[(start + row) * H] = lost;
        }
        Cols::gradient(e2, target, scale, shift, lane_index);
        TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) e2[i] *= ks[row * STRIDE + D];
      } else if (row < span.first) {
        Cols::load(e2, rows + row * WIDTH + D + 2 * F, lane_index);
      }
      Cols::store(e2s + row * STRIDE, e2, lane_index);
    }
    threadgroup_barrier(Work::FLAGS);

    // e1 = (e2 W2^T) gelu'. What is computed is W2 e2^T, so that the tiles of W2 are used as they are.
    TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
      Tile g1[BLOCKS];
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) g1[r] = filled(0);
      TTT_UNROLL for (int d = 0; d < D / 8; ++d) {
        Tile W = W2_tiles.get(h, d);
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          Tile e2_tile = load_transposed(e2s + 8 * r * STRIDE + 8 * d, STRIDE);
          multiply_add(g1[r], W, e2_tile);
        }
      }
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        const int row = 8 * r + lane.row;
        Tile product = transposed(g1[r], lane);
        float2 e = pair(product) * pair(e1[h][r]);
        if (row < span.first) e = pair_at(rows + row * WIDTH + D + unit + 8 * h);
        e1[h][r] = tile_of(e);
        if (is_last && row < K) put_pair(rows_out + row * WIDTH + D + unit + 8 * h, commits ? float2(0.0f) : e);
      }
    }

    // What this simdgroup's units add to |x2|^2 and |e1|^2.
    float x2_squares[SHOWN ? BLOCKS : 1], e1_squares[SHOWN ? BLOCKS : 1];
    TTT_UNROLL for (int r = 0; SHOWN && r < BLOCKS; ++r) {
      float x = 0, e = 0;
      TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
        x += sum(pair(x2[h][r]) * pair(x2[h][r]));
        e += sum(pair(e1[h][r]) * pair(e1[h][r]));
      }
      x2_squares[SHOWN ? r : 0] = row_sum(x);
      e1_squares[SHOWN ? r : 0] = row_sum(e);
    }

    // q2. And x2^T replaces x2 in its registers.
    TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
      TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
        TTT_UNROLL for (int j = 0; j < BLOCKS; ++j) {
          if (j > r) continue;
          Tile weight = load_tile(weights + triangle_at(r, j), 8);
          multiply_add(q2[h][r], weight, e1[h][j]);
        }
        const float2 z1 = pair(q2[h][r]);
        q2[h][r] = tile_of(float2(gelu(z1.x).value, gelu(z1.y).value));
        x2[h][r] = transposed(x2[h][r], lane);
      }
    }

    // q2 W2 and q2 x2^T, the second sums over the hidden units, and the update of W2.
    const UpdateOfW2<typename Work::P> update = {commits, e2s, -t_last};
    for (int turn = 0; turn < MEMBERS; ++turn) {
      if (turn > 0) threadgroup_barrier(Work::FLAGS);
      TTT_UNROLL for (int part = 0; part < MEMBERS; ++part) {
        if (part != (member + turn) % MEMBERS) continue;
        if (part == 0) add_dots<D, K, TILES>(q2x2 + copy * Chunk::TRIANGLE, q2, x2, turn == 0);
        TTT_UNROLL for (int r = 0; SHOWN && r < BLOCKS; ++r) {  // beside q2 W2, in the padding of its rows
          typename Work::P to = q2W2 + copy * Chunk::VIEW + (8 * r + lane.row) * STRIDE + D;
          if (part != 0 || lane.col != 0) continue;
          to[0] = x2_squares[SHOWN ? r : 0] + (turn == 0 ? 0.0f : to[0]);
          to[1] = e1_squares[SHOWN ? r : 0] + (turn == 0 ? 0.0f : to[1]);
        }
        add_units<D, K, TILES>(q2W2 + copy * Chunk::VIEW, q2, W2_tiles, part, turn == 0, x2, update);
      }
    }
    if (commits) {
      W2_tiles.commit();
      Tile ones = filled(1);
      TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
        TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {
          e1[h][r] = tile_of(-t_last * pair(e1[h][r]));
          multiply_add(bias[h], ones, e1[h][r]);
        }
      }
      is_due = true;
    }
    threadgroup_barrier(Work::FLAGS);

    if (!is_last) next.fetch(source, span_at(start + K, n, K), thread_index);
    // y. Each simdgroup takes some of the rows; each lane first computes the weight of one e2.
    for (int row = simdgroup; row < span.count; row += S) {
      if (row < span.first) continue;
      float z[Cols::COUNT], weight = 1;
      Cols::copy(z, bias2);
      for (int c = 0; c < COPIES; ++c) {
        Cols::add(z, q2W2 + c * Chunk::VIEW + row * STRIDE, 1, lane_index);
        if (int(lane_index) <= row) weight += q2x2[c * Chunk::TRIANGLE + in_triangle(row, lane_index)];
      }
      if (SHOWN) {
        float x2_total = 0, e1_total = 0, k_row[Cols::COUNT], e2_row[Cols::COUNT];
        for (int c = 0; c < COPIES; ++c) {
          x2_total += q2W2[c * Chunk::VIEW + row * STRIDE + D];
          e1_total += q2W2[c * Chunk::VIEW + row * STRIDE + D + 1];
        }
        Cols::load(k_row, ks + row * STRIDE, lane_index);
        Cols::load(e2_row, e2s + row * STRIDE, lane_index);
        const float k_total = Cols::dot(k_row, k_row), e2_total = Cols::dot(e2_row, e2_row);
        const float squares = (k_total + 1) * e1_total + (x2_total + 1) * e2_total;
        if (lane_index == 0) write_norm[(start + row) * H] = t_last * precise::sqrt(squares);
      }
      weight *= -t[row];
      for (int j = 0; j <= row; ++j) Cols::add(z, e2s + j * STRIDE, simd_shuffle(weight, ushort(j)), lane_index);
      Cols::normalize(z, lane_index);
      const size_t token = (start + row) * token_stride;
      TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) {
        const int col = lane_index + 32 * i;
        if (Cols::has(col)) y[token + col] = T(float(q[token + col]) + scale[i] * z[i] + shift[i]);
      }
    }
    if (is_last) {
      for (int i = thread_index; i < K * D; i += Chunk::THREADS) {
        const int row = i / D, col = i % D;
        rows_out[row * WIDTH + col] = commits ? 0.0f : ks[row * STRIDE + col];
        rows_out[row * WIDTH + D + 2 * F + col] = commits ? 0.0f : e2s[row * STRIDE + col];
      }
    }
    if (commits) {
      for (int row = 0; row < K; ++row) Cols::add(bias2, e2s + row * STRIDE, -t_last, lane_index);
    }
    if (is_last) break;
    threadgroup_barrier(Work::FLAGS);
  }

  TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
    if (lane.row == 0) put_pair(b1_out + unit + 8 * h, pair(bias[h]));
  }
  if (simdgroup == 0) Cols::store(b2_out + head_at * D, bias2, lane_index);
  W2_tiles.close();
  if (!is_due && W1_now == W1_out) return;
  for (int d = 0; d < D / 8; ++d) {
    Tile k_tile[BLOCKS];
    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) k_tile[r] = load_transposed(ks + 8 * r * STRIDE + 8 * d, STRIDE);
    TTT_UNROLL for (int h = 0; h < UNITS; ++h) {
      Tile W = load_tile(W1_now + d * 8 * F + 8 * h, F);
      TTT_UNROLL for (int r = 0; is_due && r < BLOCKS; ++r) multiply_add(W, k_tile[r], e1[h][r]);
      store_tile(W, W1_out + d * 8 * F + 8 * h, F);
    }
  }
}

// ---- Step form ----------------------------------------------------------------------------------------------------
//
// Each lane owns TILES hidden units, each simdgroup 32 * TILES. So W1 is read in whole cache lines, and z1, x2, e1 and
// q2 stay with their lane. W2 is needed three times: for x2 W2, e2 W2^T and q2 W2. A simdgroup keeps its rows of W2 in
// registers. So it reads them once, and these loads are under way from the first instruction on. Only at D = 128 there
// are not enough registers, and W2 comes from the device's cache each time. The open rows are returned whole,
// as in TTT-Linear. Each part of them is written where it is read.
//
// Registers of a thread at D = 64, TILES = 1: W2 64, the lane's units 4, rows of D 10 at most, addresses and counters
// about 16: 94 of the 128 that a threadgroup of 256 may have. At D = 96 (384 threads): 96, 4, 15 and 16, 131 of 128,
// but the rows of D can be read again from threadgroup memory.

template <int D, int K, int TILES, bool SHOWN = false>
struct MlpStep {
  TTT_CONST int F = 4 * D;
  TTT_CONST int SIMDGROUPS = D / (8 * TILES);
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int UNITS = 32 * TILES;  // hidden units of a simdgroup
  TTT_CONST int WIDTH = 10 * D;
  TTT_CONST bool KEEPS_W2 = UNITS * Columns<D>::COUNT <= 96;
  TTT_CONST int MEMORY = 6 * D + 2 * SIMDGROUPS * D + K + SIMDGROUPS * K + (SHOWN ? 2 * SIMDGROUPS : 0);
};

// A simdgroup's rows of W2. They are kept in registers, or read again each time.
template <int D, int ROWS, bool KEPT>
struct RowsOfW2 {
  float kept[KEPT ? ROWS : 1][Columns<D>::COUNT];
  const device float* from;

  METAL_FUNC void open(const device float* W2, int lane) {
    from = W2;
    if (!KEPT) return;
    TTT_UNROLL for (int r = 0; r < ROWS; ++r) Columns<D>::load(kept[KEPT ? r : 0], from + r * D, lane);
  }

  METAL_FUNC void get(thread float* row, int r, int lane) {
    if (KEPT) Columns<D>::copy(row, kept[KEPT ? r : 0]);
    else Columns<D>::load(row, from + r * D, lane);
  }
};

// Shapes as above with T = 1; rows_out [B, H, K, 10D]. phase < K - 1.
template <int D, int K, int TILES, bool SHOWN = false, typename T, typename LR, typename TF, typename I>
METAL_FUNC void mlp_step(
    const device T* q, const device T* k, const device T* v, LR lr, TF t,
    const device float* gamma, const device float* beta,
    const device float* W1, const device float* b1, const device float* W2, const device float* b2,
    const device float* rows, I phase,
    device T* y, device float* rows_out,
    int H, threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane_index,
    device float* loss = nullptr, device float* write_norm = nullptr) {
  typedef MlpStep<D, K, TILES, SHOWN> Step;
  typedef Columns<D> Cols;
  constexpr int F = Step::F, S = Step::SIMDGROUPS, WIDTH = Step::WIDTH;
  const int head = group.x, sequence = group.y, lane = lane_index;
  const int first_unit = simdgroup * Step::UNITS;
  const size_t head_at = size_t(sequence) * H + head;
  const int p = phase[sequence];

  threadgroup float* ks = memory;                // [D]
  threadgroup float* qs = ks + D;                // [D]
  threadgroup float* targets = qs + D;           // v - k  [D]
  threadgroup float* gammas = targets + D;       // [D]
  threadgroup float* betas = gammas + D;         // [D]
  threadgroup float* biases = betas + D;         // b2  [D]
  threadgroup float* x2W2 = biases + D;          // from each simdgroup's units  [S, D]
  threadgroup float* q2W2 = x2W2 + S * D;
  threadgroup float* qk = q2W2 + S * D;          // -t (q . k_j + 1)  [K]
  threadgroup float* q2x2 = qk + K;              // q2 . x2_j, from each simdgroup's units  [S, K]
  threadgroup float* squares = q2x2 + S * K;     // |x2|^2 and |e1|^2, from each simdgroup's units  [S, 2], if shown

  q += head_at * D;
  k += head_at * D;
  v += head_at * D;
  y += head_at * D;
  gamma += head * D;
  beta += head * D;
  W1 += head_at * D * F + first_unit + lane;
  b1 += head_at * F + first_unit + lane;
  b2 += head_at * D;
  rows += head_at * K * WIDTH;
  rows_out += head_at * K * WIDTH;
  device float* row = rows_out + p * WIDTH;

  RowsOfW2<D, Step::UNITS, Step::KEEPS_W2> W2_rows;
  W2_rows.open(W2 + (head_at * F + first_unit) * D, lane);
  for (int i = thread_index; i < D; i += Step::THREADS) {
    ks[i] = float(k[i]);
    qs[i] = float(q[i]);
    targets[i] = float(v[i]) - float(k[i]);
    gammas[i] = gamma[i];
    betas[i] = beta[i];
    biases[i] = b2[i];
  }
  for (int i = (p + 1) * WIDTH + thread_index; i < K * WIDTH; i += Step::THREADS) rows_out[i] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float part[Cols::COUNT];
  for (int j = simdgroup; j <= p; j += S) {
    float q_row[Cols::COUNT];
    Cols::load(q_row, qs, lane);
    if (j < p) Cols::load(part, rows + j * WIDTH, lane);
    else Cols::load(part, ks, lane);
    Cols::store(rows_out + j * WIDTH, part, lane);
    const float dot = Cols::dot(q_row, part);
    if (lane == 0) qk[j] = -t[p] * (dot + 1);
  }

  // z1 and q W1 + b1 for the lane's units, and what the simdgroup's units contribute to x2 W2.
  float x2[TILES], slope[TILES], q2[TILES];
  TTT_UNROLL for (int u = 0; u < TILES; ++u) {
    float z1 = b1[32 * u];
    q2[u] = z1;
    TTT_UNROLL_16 for (int d = 0; d < D; ++d) {
      const float W = W1[d * F + 32 * u];
      z1 += ks[d] * W;
      q2[u] += qs[d] * W;
    }
    const Gelu x = gelu(z1);
    x2[u] = x.value;
    slope[u] = x.slope;
  }
  float z[Cols::COUNT];
  Cols::fill(z, 0);
  TTT_UNROLL for (int r = 0; r < Step::UNITS; ++r) {
    W2_rows.get(part, r, lane);
    const float x = simd_shuffle(x2[r / 32], ushort(r % 32));
    TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) z[i] += x * part[i];
  }
  Cols::store(x2W2 + simdgroup * D, z, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Every simdgroup computes e2, since each needs all of it.
  float e2[Cols::COUNT], target[Cols::COUNT], scale[Cols::COUNT], shift[Cols::COUNT];
  Cols::load(e2, biases, lane);
  Cols::load(target, targets, lane);
  Cols::load(scale, gammas, lane);
  Cols::load(shift, betas, lane);
  for (int s = 0; s < S; ++s) Cols::add(e2, x2W2 + s * D, 1, lane);
  if (SHOWN && simdgroup == 0) {
    const float lost = Cols::loss(e2, target, scale, shift, lane);
    if (lane == 0) loss[head_at] = lost;
  }
  Cols::gradient(e2, target, scale, shift, lane);
  TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) e2[i] *= float(lr[head_at]);

  // e1 and q2.
  float e1[TILES];
  TTT_UNROLL for (int r = 0; r < Step::UNITS; ++r) {
    W2_rows.get(part, r, lane);
    const float g1 = Cols::dot(e2, part);
    if (lane == r % 32) e1[r / 32] = g1 * slope[r / 32];
  }
  TTT_UNROLL for (int u = 0; u < TILES; ++u) {
    const int unit = first_unit + 32 * u + lane;
    row[D + unit] = e1[u];
    for (int j = 0; j < p; ++j) {
      const float past = rows[j * WIDTH + D + unit];
      rows_out[j * WIDTH + D + unit] = past;
      q2[u] += qk[j] * past;
    }
    q2[u] = gelu(q2[u] + qk[p] * e1[u]).value;
  }
  if (SHOWN) {
    float x2_squares = 0, e1_squares = 0;
    TTT_UNROLL for (int u = 0; u < TILES; ++u) {
      x2_squares += x2[u] * x2[u];
      e1_squares += e1[u] * e1[u];
    }
    x2_squares = simd_sum(x2_squares);
    e1_squares = simd_sum(e1_squares);
    if (lane == 0) {
      squares[2 * simdgroup] = x2_squares;
      squares[2 * simdgroup + 1] = e1_squares;
    }
  }

  for (int j = 0; j <= p; ++j) {
    float dot = 0;
    TTT_UNROLL for (int u = 0; u < TILES; ++u) {
      const int at = j * WIDTH + D + F + first_unit + 32 * u + lane;
      const float x = j < p ? rows[at] : x2[u];
      rows_out[at] = x;
      dot += q2[u] * x;
    }
    dot = simd_sum(dot);
    if (lane == 0) q2x2[simdgroup * K + j] = dot;
  }
  Cols::fill(z, 0);
  TTT_UNROLL for (int r = 0; r < Step::UNITS; ++r) {
    W2_rows.get(part, r, lane);
    const float x = simd_shuffle(q2[r / 32], ushort(r % 32));
    TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) z[i] += x * part[i];
  }
  Cols::store(q2W2 + simdgroup * D, z, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) return;

  Cols::store(row + D + 2 * F, e2, lane);
  if (SHOWN) {
    Cols::load(part, ks, lane);
    float x2_squares = 0, e1_squares = 0;
    for (int s = 0; s < S; ++s) {
      x2_squares += squares[2 * s];
      e1_squares += squares[2 * s + 1];
    }
    const float write = (Cols::dot(part, part) + 1) * e1_squares + (x2_squares + 1) * Cols::dot(e2, e2);
    if (lane == 0) write_norm[head_at] = t[K - 1] * precise::sqrt(write);
  }
  float weight = 1;  // of e2_j, in lane j
  if (lane <= p) {
    for (int s = 0; s < S; ++s) weight += q2x2[s * K + lane];
  }
  weight *= -t[p];
  Cols::load(z, biases, lane);
  const float own_weight = simd_shuffle(weight, ushort(p));
  TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) z[i] += own_weight * e2[i];
  for (int s = 0; s < S; ++s) Cols::add(z, q2W2 + s * D, 1, lane);
  for (int j = 0; j < p; ++j) {
    const float weight_j = simd_shuffle(weight, ushort(j));
    Cols::load(part, rows + j * WIDTH + D + 2 * F, lane);
    Cols::store(rows_out + j * WIDTH + D + 2 * F, part, lane);
    TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) z[i] += weight_j * part[i];
  }
  Cols::normalize(z, lane);
  TTT_UNROLL for (int i = 0; i < Cols::COUNT; ++i) {
    const int col = lane + 32 * i;
    if (Cols::has(col)) y[col] = T(qs[col] + gammas[col] * z[i] + betas[col]);
  }
}

}  // namespace ttt
