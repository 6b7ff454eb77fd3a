// What the kernels of both inner models use: 8x8 tiles, the LayerNorm and its gradient, the tanh GELU.
//
// All arithmetic is float32. A tile is one simdgroup_float8x8. The 32 lanes of a simdgroup hold its 64 elements in
// registers: two neighbours of a row in each lane. Matrix products take whole tiles, and everything else takes those
// pairs. So a product can be used without a detour through memory.
#ifndef TTT_H
#define TTT_H

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

#define TTT_CONST static constant constexpr const
// For loops over register arrays: an index that is known only at run time would put the array in memory.
#define TTT_UNROLL _Pragma("clang loop unroll(full)")
// For long loops over device memory: keeps 16 loads under way.
#define TTT_UNROLL_16 _Pragma("clang loop unroll_count(16)")

namespace ttt {

constant constexpr float LAYER_NORM_EPS = 1e-6f;

typedef simdgroup_float8x8 Tile;

// A lane holds the elements (row, col) and (row, col + 1) of a tile.
struct Lane {
  int row;
  int col;
};

METAL_FUNC Lane lane_of(uint lane) {
  const int quad = lane / 4;
  Lane at;
  at.row = (quad & 4) + (lane / 2) % 4;
  at.col = (quad & 2) * 2 + (lane % 2) * 2;
  return at;
}

METAL_FUNC float2 pair(thread Tile& tile) {
  return float2(tile.thread_elements()[0], tile.thread_elements()[1]);
}

METAL_FUNC Tile tile_of(float2 pair) {
  Tile tile;
  tile.thread_elements()[0] = pair.x;
  tile.thread_elements()[1] = pair.y;
  return tile;
}

template <typename P>
METAL_FUNC float2 pair_at(P from) {
  return float2(float(from[0]), float(from[1]));
}

template <typename T>
METAL_FUNC void put_pair(device T* to, float2 pair) {
  to[0] = T(pair.x);
  to[1] = T(pair.y);
}

METAL_FUNC Tile filled(float value) {
  return make_filled_simdgroup_matrix<float, 8, 8>(value);
}

// d = a b + d
METAL_FUNC void multiply_add(thread Tile& d, thread Tile& a, thread Tile& b) {
  simdgroup_multiply_accumulate(d, a, b, d);
}

template <typename P>
METAL_FUNC Tile load_tile(P from, int stride) {
  Tile tile;
  simdgroup_load(tile, from, stride);
  return tile;
}

template <typename P>
METAL_FUNC Tile load_transposed(P from, int stride) {
  Tile tile;
  simdgroup_load(tile, from, stride, ulong2(0, 0), true);
  return tile;
}

template <typename P>
METAL_FUNC void store_tile(Tile tile, P to, int stride) {
  simdgroup_store(tile, to, stride);
}

// The lane that holds element (row, col).
METAL_FUNC ushort lane_holding(int row, int col) {
  return (row & 4) * 4 + (row & 3) * 2 + (col & 4) * 2 + (col & 2) / 2;
}

METAL_FUNC Tile transposed(thread Tile& tile, Lane lane) {
  const float2 mine = pair(tile);
  const ushort from = lane_holding(lane.col, lane.row);  // two lanes on is the row below
  const float2 upper = float2(simd_shuffle(mine.x, from), simd_shuffle(mine.y, from));
  const float2 lower = float2(simd_shuffle(mine.x, from + 2), simd_shuffle(mine.y, from + 2));
  return tile_of(lane.row & 1 ? float2(upper.y, lower.y) : float2(upper.x, lower.x));
}

// Sums over the four lanes that hold a row of a tile; all four get the sum.
METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

METAL_FUNC float sum(float2 x) {
  return x.x + x.y;
}

// ---- The tokens of a mini-batch -----------------------------------------------------------------------------------

// A mini-batch, seen from a call. Row i stands for token start + i of the call, so a mini-batch that an earlier call
// opened has a negative start. Rows before `first` are open rows of earlier calls, rows first ... count - 1 are tokens
// of this call, and rows from `count` on do not exist yet: they count as zero.
struct Span {
  int start;
  int first;
  int count;
};

METAL_FUNC Span span_at(int start, int length, int K) {
  Span span;
  span.start = start;
  span.first = max(0, -start);
  span.count = min(K, length - start);
  return span;
}

METAL_FUNC bool is_new(Span span, int row) {
  return span.first <= row && row < span.count;
}

// Two neighbours of a token's q, k or v, from device memory.
template <typename T>
METAL_FUNC float2 token_pair(const device T* view, size_t stride, Span span, int row) {
  return is_new(span, row) ? pair_at(view + (span.start + row) * stride) : float2(0.0f);
}

// Where a head's tokens and open rows are in device memory.
template <typename T, typename LR>
struct Source {
  const device T* q;
  const device T* k;
  LR lr;
  int H;
  const device float* rows;  // of the open mini-batch, k first
  int width;                 // floats of such a row
};

// Copies the k, q and lr of a mini-batch to a workspace, in two steps: fetch() starts the loads as early as possible,
// put() stores what they brought once the workspace is free. Meanwhile the threadgroup works on.
//
// A row of the workspace takes D + 4 floats. The padding spreads the 8 rows of a tile over all 32 banks of threadgroup
// memory. In the rows of k, its first float holds lr.
template <int D, int ROWS, int THREADS, bool WITH_Q>
struct Staging {
  TTT_CONST int STRIDE = D + 4;
  TTT_CONST int EACH = ROWS * D / THREADS;
  float k[EACH], q[WITH_Q ? EACH : 1], lr;

  template <typename T, typename LR>
  METAL_FUNC void fetch(Source<T, LR> from, Span span, int thread_index) {
    TTT_UNROLL for (int i = 0; i < EACH; ++i) {
      const int row = (thread_index + i * THREADS) / D, col = (thread_index + i * THREADS) % D;
      const size_t token = size_t(span.start + row) * from.H * D + col;
      const bool is_token = is_new(span, row);
      k[i] = is_token ? float(from.k[token]) : row < span.first ? from.rows[row * from.width + col] : 0.0f;
      if (WITH_Q) q[i] = is_token ? float(from.q[token]) : 0.0f;
    }
    lr = is_new(span, thread_index) ? float(from.lr[size_t(span.start + thread_index) * from.H]) : 0.0f;
  }

  // Before `put` with another mini-batch: keeps k of the one that is there. Nobody but the thread that puts an element
  // there moves it, so no barrier is needed between them.
  template <typename P>
  METAL_FUNC void save(P ks, P to, int thread_index) {
    TTT_UNROLL for (int i = 0; i < EACH; ++i) {
      const int row = (thread_index + i * THREADS) / D, col = (thread_index + i * THREADS) % D;
      to[row * STRIDE + col] = ks[row * STRIDE + col];
    }
  }

  template <typename P, typename Q>
  METAL_FUNC void put(P ks, Q qs, int thread_index) {
    TTT_UNROLL for (int i = 0; i < EACH; ++i) {
      const int row = (thread_index + i * THREADS) / D, col = (thread_index + i * THREADS) % D;
      ks[row * STRIDE + col] = k[i];
      if (WITH_Q) qs[row * STRIDE + col] = q[i];
    }
    if (thread_index < ROWS) ks[thread_index * STRIDE + D] = lr;
  }
};

// Where view INDEX of a mini-batch is: in threadgroup memory, or from LOCAL on in device memory.
template <int INDEX, int LOCAL, int VIEW, bool IS_LOCAL = (INDEX < LOCAL)>
struct View {
  static METAL_FUNC threadgroup float* at(threadgroup float* memory, device float*) {
    return memory + INDEX * VIEW;
  }
};

template <int INDEX, int LOCAL, int VIEW>
struct View<INDEX, LOCAL, VIEW, false> {
  static METAL_FUNC device float* at(threadgroup float*, device float* scratch) {
    return scratch + (INDEX - LOCAL) * VIEW;
  }
};

// A lower triangle of tiles is packed, 64 floats a tile. This is where tile (r, c), c <= r, begins.
METAL_FUNC int triangle_at(int r, int c) {
  return 64 * (r * (r + 1) / 2 + c);
}

// The place of element (row, col), col <= row, in such a triangle.
METAL_FUNC int in_triangle(int row, int col) {
  return triangle_at(row / 8, col / 8) + row % 8 * 8 + col % 8;
}

// A lane's pair of tile (r, c) of a triangle, with zeros above the diagonal.
METAL_FUNC Tile causal(float2 x, int r, int c, Lane lane) {
  const int row = 8 * r + lane.row, col = 8 * c + lane.col;
  return tile_of(float2(col <= row ? x.x : 0.0f, col + 1 <= row ? x.y : 0.0f));
}

// The causal weights of a tile: -t_i (dot_ij + 1) for j <= i, else 0. t is that of the lane's row.
METAL_FUNC Tile causal_weights(thread Tile& dots, float t, int r, int c, Lane lane) {
  return causal(-t * (pair(dots) + 1.0f), r, c, lane);
}

// ---- LayerNorm over D columns that are spread over S simdgroups ---------------------------------------------------
//
// Each simdgroup reduces its own columns of a row to a few sums and writes them to threadgroup memory. After one
// barrier, every simdgroup merges the sums of all. The sums are taken about the simdgroup's own mean m, not about zero,
// so that a row with a large mean loses no digits. Merging moves them to the row's mean, like the parallel variance of
// Chan et al. (1979).
//
// With z^ = (z - mean) / std and u = (LN(z) - target) gamma, the gradient of |LN(z) - target|^2 / 2 by z is
//     g = (u - mean(u) - z^ mean(u z^)) / std .
// With w = gamma (beta - target), u is gamma^2 z^ + w. So both means are polynomials in z, and their coefficients are
// known before the mean and the std of z. This is why one exchange is enough for the LayerNorm and its gradient.

// The sums over a simdgroup's columns of one row. The LayerNorm needs the first two, its gradient all.
constant constexpr int MEAN = 0;      // m = mean z
constant constexpr int SQUARES = 1;   // sum (z - m)^2
constant constexpr int SCALES = 2;    // sum gamma^2
constant constexpr int SLOPES = 3;    // sum gamma^2 (z - m)
constant constexpr int CURVES = 4;    // sum gamma^2 (z - m)^2
constant constexpr int SHIFTS = 5;    // sum w
constant constexpr int TILTS = 6;     // sum w (z - m)
constant constexpr int NORM_SUMS = 2;
// Of a token whose loss and norm of the write are shown, beside the sums of its z.
constant constexpr int MISSED = 2;     // sum (LN(z) - target)^2
constant constexpr int E_SQUARES = 3;  // sum e^2
constant constexpr int SHOWN_SUMS = 4;
constant constexpr int GRADIENT_SUMS = 7;

// Which of a row's four lanes this is. They share the work of merging the sums of S simdgroups.
METAL_FUNC int quarter(Lane lane) {
  return lane.col / 2;
}

// Mean and sum of centred squares of one row, over the columns of this simdgroup. z holds the lane's pairs, one from
// each tile.
template <int TILES>
METAL_FUNC float2 moments(thread float2* z) {
  float total = 0;
  TTT_UNROLL for (int c = 0; c < TILES; ++c) total += sum(z[c]);
  const float mean = row_sum(total) / (8 * TILES);
  float squares = 0;
  TTT_UNROLL for (int c = 0; c < TILES; ++c) squares += sum((z[c] - mean) * (z[c] - mean));
  return float2(mean, row_sum(squares));
}

template <int TILES>
METAL_FUNC void put_norm_sums(threadgroup float* to, thread float2* z, Lane lane) {
  const float2 m = moments<TILES>(z);
  if (lane.col == 0) {
    to[MEAN] = m.x;
    to[SQUARES] = m.y;
  }
}

template <int TILES>
METAL_FUNC void put_gradient_sums(
    threadgroup float* to, thread float2* z, thread float2* w, thread float2* gamma, Lane lane) {
  const float2 m = moments<TILES>(z);
  float scales = 0, slopes = 0, curves = 0, shifts = 0, tilts = 0;
  TTT_UNROLL for (int c = 0; c < TILES; ++c) {
    const float2 d = z[c] - m.x, scale = gamma[c] * gamma[c];
    scales += sum(scale);
    slopes += sum(scale * d);
    curves += sum(scale * d * d);
    shifts += sum(w[c]);
    tilts += sum(w[c] * d);
  }
  scales = row_sum(scales);
  slopes = row_sum(slopes);
  curves = row_sum(curves);
  shifts = row_sum(shifts);
  tilts = row_sum(tilts);
  if (lane.col == 0) {
    to[MEAN] = m.x;
    to[SQUARES] = m.y;
    to[SCALES] = scales;
    to[SLOPES] = slopes;
    to[CURVES] = curves;
    to[SHIFTS] = shifts;
    to[TILTS] = tilts;
  }
}

struct Norm {
  float mean;
  float inv_std;
};

struct NormGradient {
  Norm norm;
  float mean_u;
  float mean_uz;
};

// The row's mean and 1 / std, from the sums of S simdgroups, which lie N floats apart.
template <int D, int S, int N>
METAL_FUNC Norm merge_norm(const threadgroup float* sums, Lane lane) {
  float mean = 0, squares = 0;
  for (int s = quarter(lane); s < S; s += 4) mean += sums[s * N + MEAN];
  mean = row_sum(mean) / S;
  for (int s = quarter(lane); s < S; s += 4) {
    const float d = sums[s * N + MEAN] - mean;
    squares += sums[s * N + SQUARES] + (D / S) * d * d;
  }
  Norm norm;
  norm.mean = mean;
  norm.inv_std = precise::rsqrt(row_sum(squares) / D + LAYER_NORM_EPS);
  return norm;
}

template <int D, int S>
METAL_FUNC NormGradient merge_gradient(const threadgroup float* sums, Lane lane) {
  NormGradient row;
  row.norm = merge_norm<D, S, GRADIENT_SUMS>(sums, lane);
  const float r = row.norm.inv_std;
  float u = 0, uz = 0;
  for (int s = quarter(lane); s < S; s += 4) {
    const threadgroup float* of = sums + s * GRADIENT_SUMS;
    const float d = of[MEAN] - row.norm.mean;
    u += r * (of[SLOPES] + d * of[SCALES]) + of[SHIFTS];
    uz += r * r * (of[CURVES] + d * (2 * of[SLOPES] + d * of[SCALES])) + r * (of[TILTS] + d * of[SHIFTS]);
  }
  row.mean_u = row_sum(u) / D;
  row.mean_uz = row_sum(uz) / D;
  return row;
}

METAL_FUNC float2 normalized(Norm norm, float2 z) {
  return (z - norm.mean) * norm.inv_std;
}

// g for the lane's pair of columns.
METAL_FUNC float2 gradient(NormGradient row, float2 z, float2 w, float2 gamma) {
  const float2 z_hat = normalized(row.norm, z);
  return (gamma * gamma * z_hat + w - row.mean_u - z_hat * row.mean_uz) * row.norm.inv_std;
}

// ---- A row of D within one simdgroup ------------------------------------------------------------------------------
//
// Lane l holds columns l, l + 32, ... of the row. Columns past D, which there are where D = 16, hold zero.

template <int D>
struct Columns {
  TTT_CONST int COUNT = (D + 31) / 32;

  static METAL_FUNC bool has(int column) {
    return D % 32 == 0 || column < D;
  }

  static METAL_FUNC void fill(thread float* x, float value) {
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) x[i] = value;
  }

  static METAL_FUNC void copy(thread float* to, thread float* from) {
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) to[i] = from[i];
  }

  static METAL_FUNC float dot(thread float* x, thread float* y) {
    float total = 0;
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) total += x[i] * y[i];
    return simd_sum(total);
  }

  static METAL_FUNC float total(thread float* x) {
    float total = 0;
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) total += x[i];
    return simd_sum(total);
  }

  // z becomes (z - mean) / std; returns 1 / std.
  static METAL_FUNC float normalize(thread float* z, int lane) {
    const float mean = total(z) / D;
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) z[i] = has(lane + 32 * i) ? z[i] - mean : 0.0f;
    const float inv_std = precise::rsqrt(dot(z, z) / D + LAYER_NORM_EPS);
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) z[i] *= inv_std;
    return inv_std;
  }

  // z becomes g, the gradient of |LN(z) - target|^2 / 2.
  static METAL_FUNC void gradient(
      thread float* z, thread float* target, thread float* gamma, thread float* beta, int lane) {
    const float inv_std = normalize(z, lane);
    float u[COUNT];
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) u[i] = (gamma[i] * z[i] + beta[i] - target[i]) * gamma[i];
    const float mean_u = total(u) / D, mean_uz = dot(u, z) / D;
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
      z[i] = has(lane + 32 * i) ? (u[i] - mean_u - z[i] * mean_uz) * inv_std : 0.0f;
    }
  }

  // |LN(z) - target|^2 / 2
  static METAL_FUNC float loss(thread float* z, thread float* target, thread float* gamma, thread float* beta, int lane) {
    float missed[COUNT];
    copy(missed, z);
    normalize(missed, lane);
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) missed[i] = gamma[i] * missed[i] + beta[i] - target[i];
    return 0.5f * dot(missed, missed);
  }

  template <typename P>
  static METAL_FUNC void load(thread float* x, P from, int lane) {
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) x[i] = has(lane + 32 * i) ? float(from[lane + 32 * i]) : 0.0f;
  }

  // x += factor * from
  template <typename P>
  static METAL_FUNC void add(thread float* x, P from, float factor, int lane) {
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
      if (has(lane + 32 * i)) x[i] += factor * float(from[lane + 32 * i]);
    }
  }

  template <typename P>
  static METAL_FUNC void store(P to, thread float* x, int lane) {
    TTT_UNROLL for (int i = 0; i < COUNT; ++i) {
      if (has(lane + 32 * i)) to[lane + 32 * i] = x[i];
    }
  }
};

// ---- The tanh GELU ------------------------------------------------------------------------------------------------

struct Gelu {
  float value;
  float slope;
};

METAL_FUNC Gelu gelu(float x) {
  constexpr float SQRT_2_BY_PI = 0.7978845608f, CUBIC = 0.044715f;
  const float tanh_u = precise::tanh(SQRT_2_BY_PI * (x + CUBIC * x * x * x));
  const float half_up = 0.5f * (1.0f + tanh_u);
  Gelu out;
  out.value = x * half_up;
  out.slope = half_up + 0.5f * x * (1.0f - tanh_u * tanh_u) * SQRT_2_BY_PI * (1.0f + 3.0f * CUBIC * x * x);
  return out;
}

// The second derivative.
METAL_FUNC float gelu_curve(float x) {
  constexpr float SQRT_2_BY_PI = 0.7978845608f, CUBIC = 0.044715f;
  const float tanh_u = precise::tanh(SQRT_2_BY_PI * (x + CUBIC * x * x * x));
  const float slope = SQRT_2_BY_PI * (1.0f + 3.0f * CUBIC * x * x), curve = SQRT_2_BY_PI * 6.0f * CUBIC * x;
  return (1.0f - tanh_u * tanh_u) * (slope + 0.5f * x * (curve - 2.0f * tanh_u * slope * slope));
}

}  // namespace ttt

#endif
