// What surrounds the update rule in a block, for one token of each sequence. A decoded token waits for launches, not for
// arithmetic, so each of these does what would be four to twenty operations.
//
//     conv_norm     x += conv(RMSNorm(x)), then the RMSNorm in front of the TTT layer
//     views         short convolutions, rotation, learning rates, token factors: all that the update rule reads
//     gated_norm    the LayerNorm behind the update rule, times gelu(gate)
//     add_norm      x += what a layer returns, then the RMSNorm in front of the next
//     turned        short convolutions and rotation of many tokens' queries and keys
//
// They are function templates; README.md shows the kernel around them. B sequences, H heads, D head dimension, C = H D
// channels, N inputs before the token that a convolution reads, K mini-batch size. T is the dtype of the model. All
// arithmetic is float32, rounded to T where an array of T is written.
#include "ttt.h"

namespace ttt {

// ---- A row of C channels within one threadgroup -------------------------------------------------------------------
//
// Thread i holds channels i, i + THREADS, ... A row of up to 4096 channels takes 4 registers of each thread.

template <int C>
struct Channels {
  TTT_CONST int SIMDGROUPS = C >= 4096 ? 32 : (C + 127) / 128;
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int EACH = (C + THREADS - 1) / THREADS;
};

// The sum over all threads of S simdgroups; every thread gets it. Nothing else may use the S floats at `sums`.
template <int S>
METAL_FUNC float sum_of_group(float x, threadgroup float* sums, uint simdgroup, uint lane) {
  x = simd_sum(x);
  if (lane == 0) sums[simdgroup] = x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(int(lane) < S ? sums[lane] : 0.0f);
}

// 1 / sqrt(mean x^2 + eps) of the row whose channels the threads hold in x, zero past C.
template <int C>
METAL_FUNC float inverse_rms(thread float* x, float eps, threadgroup float* sums, uint simdgroup, uint lane) {
  typedef Channels<C> Row;
  float squares = 0;
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) squares += x[i] * x[i];
  return precise::rsqrt(sum_of_group<Row::SIMDGROUPS>(squares, sums, simdgroup, lane) / C + eps);
}

// The convolution of a channel at the token x, behind N inputs that are `stride` apart. taps [N + 1], the oldest first.
template <int N, typename T>
METAL_FUNC float convolved(float x, const device T* history, int stride, const device T* taps, float bias) {
  float sum = bias + float(taps[N]) * x;
  TTT_UNROLL for (int j = 0; j < N; ++j) sum += float(taps[j]) * float(history[j * stride]);
  return sum;
}

// The N inputs before the next token.
template <int N, typename T>
METAL_FUNC void shift(device T* to, const device T* history, T newest, int stride) {
  TTT_UNROLL for (int j = 0; j < N; ++j) to[j * stride] = j + 1 < N ? history[(j + 1) * stride] : newest;
}

// ---- Before the projections ---------------------------------------------------------------------------------------

template <int C, int N>
struct ConvNorm {
  TTT_CONST int THREADS = Channels<C>::THREADS;
  TTT_CONST int MEMORY = 2 * Channels<C>::SIMDGROUPS;
};

// x, sum, y [B, 1, C]; history, history_out [B, N, C]; norm, bias, next_norm [C]; taps [C, N + 1]; eps [2], of both norms.
//     sum = x + conv(RMSNorm(x)),   y = RMSNorm(sum)
// The grid has a threadgroup for each sequence.
template <int C, int N, typename T, typename E>
METAL_FUNC void conv_norm(
    const device T* x, const device T* history, const device T* norm, const device T* taps, const device T* bias,
    const device T* next_norm, E eps, device T* sum, device T* y, device T* history_out,
    threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane) {
  typedef Channels<C> Row;
  const size_t sequence = group.x;
  x += sequence * C;
  sum += sequence * C;
  y += sequence * C;
  history += sequence * N * C;
  history_out += sequence * N * C;

  float values[Row::EACH];
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    values[i] = c < C ? float(x[c]) : 0.0f;
  }
  const float scale = inverse_rms<C>(values, eps[0], memory, simdgroup, lane);
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    if (c >= C) continue;
    const T input = T(values[i] * scale * float(norm[c]));
    const T out = T(values[i] + convolved<N>(float(input), history + c, C, taps + c * (N + 1), float(bias[c])));
    shift<N>(history_out + c, history + c, input, C);
    sum[c] = out;
    values[i] = float(out);
  }
  const float next_scale = inverse_rms<C>(values, eps[1], memory + Row::SIMDGROUPS, simdgroup, lane);
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    if (c < C) y[c] = T(values[i] * next_scale * float(next_norm[c]));
  }
}

// ---- Between the projections and the update rule ------------------------------------------------------------------

struct Views {
  TTT_CONST int SIMDGROUPS = 4;
  TTT_CONST int THREADS = 32 * SIMDGROUPS;
  TTT_CONST int MEMORY = SIMDGROUPS;
};

// Writes two neighbours of a head, turned by an angle whose cos and sin (with its sign) are at both.
template <typename T>
METAL_FUNC void put_rotated(device T* to, float2 x, float2 cos, float2 sin) {
  put_pair(to, x * cos + float2(x.y, x.x) * sin);
}

// x [B, 1, C] is what the projections have read; q_in, k_in, v_in are the products, WIDTH channels apart from one sequence
// to the next; history, history_out [B, N, C], conv_q, conv_k [C, N + 1], their biases [C]; lr_weight [H, C], lr_bias [H];
// cos, sin [K, D]; token_idx [K]; phase [B]; base_lr [1]. q, k, v [B, 1, H, D]; lr [B, 1, H]; t [K].
//     q, k: the products (of the convolutions of q_in, if N > 0), rotated by the phase;   v: as it is
//     lr = base_lr sigmoid(x . lr_weight + lr_bias),   t_i = max(1 / (i + 1) + token_idx_i, 0)
// With N = 0 there are no convolutions, and history, conv_q ... conv_k_bias and history_out are nullptr. The grid has a
// threadgroup of Views::THREADS for each (head, sequence).
template <int D, int K, int N, typename T, typename B, typename TF, typename I, typename F>
METAL_FUNC void views(
    const device T* x, const device T* q_in, const device T* k_in, const device T* v_in,
    const device T* history, const device T* conv_q, const device T* conv_q_bias, const device T* conv_k,
    const device T* conv_k_bias,
    const device float* lr_weight, B lr_bias, const device float* cos, const device float* sin, TF token_idx, I phase,
    F base_lr, device T* q, device T* k, device T* v, device float* lr, device float* t, device T* history_out,
    int H, int q_width, int k_width, int v_width,
    threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane) {
  const int head = group.x, sequence = group.y, C = H * D;
  const size_t head_at = size_t(sequence) * H + head;
  const int channel = head * D;  // the head's first
  const int p = phase[sequence];
  x += size_t(sequence) * C;
  q_in += size_t(sequence) * q_width + channel;
  k_in += size_t(sequence) * k_width + channel;
  v_in += size_t(sequence) * v_width + channel;
  lr_weight += size_t(head) * C;
  q += head_at * D;
  k += head_at * D;
  v += head_at * D;
  const size_t history_at = size_t(sequence) * N * C + channel;

  float gate = 0;
  for (int c = thread_index; c < C; c += Views::THREADS) gate += float(x[c]) * lr_weight[c];
  for (int d = 2 * thread_index; d < D; d += 2 * Views::THREADS) {
    float2 of_q = pair_at(q_in + d), of_k = pair_at(k_in + d);
    if (N) {
      const float2 input = of_q;
      const device T* past = history + history_at + d;
      TTT_UNROLL for (int i = 0; i < 2; ++i) {
        const int c = channel + d + i;
        of_q[i] = convolved<N>(input[i], past + i, C, conv_q + c * (N + 1), float(conv_q_bias[c]));
        of_k[i] = convolved<N>(input[i], past + i, C, conv_k + c * (N + 1), float(conv_k_bias[c]));
        shift<N>(history_out + history_at + d + i, past + i, q_in[d + i], C);
      }
    }
    const float2 cos_d = pair_at(cos + p * D + d), sin_d = pair_at(sin + p * D + d);
    put_rotated(q + d, of_q, cos_d, sin_d);
    put_rotated(k + d, of_k, cos_d, sin_d);
    put_pair(v + d, pair_at(v_in + d));
  }
  if (head == 0 && sequence == 0) {
    for (int i = thread_index; i < K; i += Views::THREADS) t[i] = max(1.0f / (i + 1) + token_idx[i], 0.0f);
  }
  gate = sum_of_group<Views::SIMDGROUPS>(gate, memory, simdgroup, lane);
  if (thread_index == 0) lr[head_at] = base_lr[0] / (1.0f + precise::exp(-(gate + lr_bias[head])));
}

// ---- The same for many tokens -------------------------------------------------------------------------------------

struct Turned {
  TTT_CONST int THREADS = 128;
};

// q_in, k_in [B, N + T, C]: the N inputs before the tokens, then theirs; conv_q, conv_k [C, N + 1], their biases [C];
// cos, sin [K, D]; phase [B]: of the first token. q, k [B, T, C].
//     q, k: the products (of the convolutions of q_in, if N > 0), each token's rotated by its phase
// With N > 0 k_in is nullptr; with N = 0 conv_q ... conv_k_bias are. The grid has a threadgroup of Turned::THREADS for
// each (token, sequence).
template <int D, int K, int N, typename T, typename I>
METAL_FUNC void turned(
    const device T* q_in, const device T* k_in, const device T* conv_q, const device T* conv_q_bias,
    const device T* conv_k, const device T* conv_k_bias, const device float* cos, const device float* sin, I phase,
    device T* q, device T* k, int C, int length, uint3 group, uint thread_index) {
  const int token = group.x, sequence = group.y, tokens = length - N;
  const int p = (phase[sequence] + token) % K;
  const size_t first = (size_t(sequence) * length + token) * C;  // of the inputs that the token's convolutions read
  const size_t to = (size_t(sequence) * tokens + token) * C;
  for (int c = 2 * thread_index; c < C; c += 2 * Turned::THREADS) {
    float2 of_q = pair_at(q_in + first + N * C + c), of_k = of_q;
    if (N) {
      const float2 input = of_q;
      TTT_UNROLL for (int i = 0; i < 2; ++i) {
        const int channel = c + i;
        const device T* past = q_in + first + channel;
        of_q[i] = convolved<N>(input[i], past, C, conv_q + channel * (N + 1), float(conv_q_bias[channel]));
        of_k[i] = convolved<N>(input[i], past, C, conv_k + channel * (N + 1), float(conv_k_bias[channel]));
      }
    } else {
      of_k = pair_at(k_in + first + c);
    }
    const float2 cos_d = pair_at(cos + p * D + c % D), sin_d = pair_at(sin + p * D + c % D);
    put_rotated(q + to + c, of_q, cos_d, sin_d);
    put_rotated(k + to + c, of_k, cos_d, sin_d);
  }
}

// ---- Behind the update rule ---------------------------------------------------------------------------------------

template <int C>
struct GatedNorm {
  TTT_CONST int THREADS = Channels<C>::THREADS;
  TTT_CONST int MEMORY = 2 * Channels<C>::SIMDGROUPS;
};

// x, y [B, 1, C]; weight, bias [C]; eps [1]. gate: the products, WIDTH channels apart from one sequence to the next.
//     y = LN(x) gelu(gate)
// The grid has a threadgroup for each sequence.
template <int C, typename T, typename E>
METAL_FUNC void gated_norm(
    const device T* x, const device T* gate, const device T* weight, const device T* bias, E eps, device T* y,
    int gate_width, threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane) {
  typedef Channels<C> Row;
  const size_t sequence = group.x;
  x += sequence * C;
  y += sequence * C;
  gate += sequence * gate_width;

  float values[Row::EACH], total = 0, squares = 0;
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    values[i] = c < C ? float(x[c]) : 0.0f;
    total += values[i];
  }
  const float mean = sum_of_group<Row::SIMDGROUPS>(total, memory, simdgroup, lane) / C;
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    values[i] -= mean;
    if (c < C) squares += values[i] * values[i];
  }
  squares = sum_of_group<Row::SIMDGROUPS>(squares, memory + Row::SIMDGROUPS, simdgroup, lane);
  const float inv_std = precise::rsqrt(squares / C + eps[0]);
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    if (c >= C) continue;
    y[c] = T((values[i] * inv_std * float(weight[c]) + float(bias[c])) * gelu(float(gate[c])).value);
  }
}

template <int C>
struct AddNorm {
  TTT_CONST int THREADS = Channels<C>::THREADS;
  TTT_CONST int MEMORY = Channels<C>::SIMDGROUPS;
};

// x, added, sum, y [B, 1, C]; norm [C]; eps [1].
//     sum = x + added,   y = RMSNorm(sum)
// The grid has a threadgroup for each sequence.
template <int C, typename T, typename E>
METAL_FUNC void add_norm(
    const device T* x, const device T* added, const device T* norm, E eps, device T* sum, device T* y,
    threadgroup float* memory, uint3 group, uint thread_index, uint simdgroup, uint lane) {
  typedef Channels<C> Row;
  const size_t sequence = group.x;
  x += sequence * C;
  added += sequence * C;
  sum += sequence * C;
  y += sequence * C;

  float values[Row::EACH];
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    const T out = c < C ? T(float(x[c]) + float(added[c])) : T(0.0f);
    if (c < C) sum[c] = out;
    values[i] = float(out);
  }
  const float scale = inverse_rms<C>(values, eps[0], memory, simdgroup, lane);
  TTT_UNROLL for (int i = 0; i < Row::EACH; ++i) {
    const int c = thread_index + i * Row::THREADS;
    if (c < C) y[c] = T(values[i] * scale * float(norm[c]));
  }
}

}  // namespace ttt
