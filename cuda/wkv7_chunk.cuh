// What forward and backward of wkv7_mma.cu share: a chunk of 16 tokens in shared memory, its scaled inputs and the
// small matrices between its tokens. The algebra is in wkv7_mma.cu.
#pragma once

#include "common.cuh"
#include "tiles.cuh"

namespace wkv7_mma {

using namespace tiles;

constexpr int LENGTH = 16;            // tokens of a chunk: a tile
constexpr int EVERY = 2 * LENGTH;     // tokens from one saved state to the next
constexpr int SQUARE = LENGTH + 8;    // row of a token by token matrix in shared memory
constexpr int SYSTEM = LENGTH + 4;    // and of the one in float

enum Array { R, K, V, A, B, DY };         // of a stage
enum Product { QK, QB, AK, AB };          // of r, a by k, b; for gradients of dy, du by v, u

// Each product but AB is two matrices of bf16: number m, and in m + LEFT what is left of it by rounding.
template <class T>
constexpr bool SPLIT = std::is_same_v<T, bf16>;
constexpr int LEFT = 4;
template <class T>
using Squares = T[SPLIT<T> ? LEFT + AB : LEFT][LENGTH][SQUARE];

template <class T>
struct Inputs {
  const float *w;
  const T *x[6];
};

// Inputs of a chunk. Scaled in place: r, a by e^(log decay from the chunk's middle to the token), k, b by its inverse.
// Row t + 1 of w then holds that log decay for token t, and row 0 that of the state before the chunk.
template <class T, int N, int Count>
struct Stage {
  float w[LENGTH + 1][N + 8];
  T x[Count][LENGTH][N + 8];
};

// Head blockIdx.y of sequence blockIdx.x. Numbers of tokens fit 31 bits, since arrays of more do not fit a GPU; what
// they are multiplied to does not.
template <int N>
struct Place {
  int stride;        // numbers from one token to the next
  int begin, count;  // tokens of the sequence

  __device__ explicit Place(const Call &call) : stride(call.heads * N) {
    const Tokens tokens = tokens_of(call, blockIdx.x);
    begin = tokens.begin;
    count = tokens.count;
  }
  __device__ int chunks() const { return (count + LENGTH - 1) / LENGTH; }
  __device__ int valid(int chunk) const { return count - chunk * LENGTH; }  // tokens from this chunk on
  __device__ int token(int chunk) const { return begin + chunk * LENGTH; }
  __device__ int64_t row(int chunk) const { return int64_t(token(chunk)) * stride + blockIdx.y * N; }
  __device__ int64_t state(int number) const { return (int64_t(number) * stride + blockIdx.y * N) * N; }
  __device__ int64_t state() const { return state(blockIdx.x); }
  __device__ int64_t saved_before(int even_chunk) const { return state(token(even_chunk) / EVERY + blockIdx.x); }
};

// Calls f(token, column) for each piece of 16 bytes of a chunk's rows: for the same ones by a thread every time, so
// that a thread that has read its pieces may overwrite them.
template <class T, int N, class F>
__device__ __forceinline__ void for_pieces(F f) {
  constexpr int Pieces = N * sizeof(T) / 16, Rows = 2 * N / Pieces;
#pragma unroll
  for (int t = 0; t < LENGTH; t += Rows) f(t + threadIdx.x / Pieces, threadIdx.x % Pieces * int(16 / sizeof(T)));
}

template <class T, int N>
__device__ __forceinline__ void fetch_rows(T (*rows)[N + 8], const T *global, const Place<N> &place, int chunk) {
  global += place.row(chunk);
  for_pieces<T, N>([&](int t, int column) {
    cp_async16(&rows[t][column], global + t * place.stride + column, t < place.valid(chunk));
  });
}

template <class T, int N>
__device__ __forceinline__ void write_rows(T *global, const T (*rows)[N + 8], const Place<N> &place, int chunk) {
  global += place.row(chunk);
  for_pieces<T, N>([&](int t, int column) {
    if (t < place.valid(chunk))
      *reinterpret_cast<uint4 *>(global + t * place.stride + column) =
          *reinterpret_cast<const uint4 *>(&rows[t][column]);
  });
}

// Tokens behind the last one are zeros: they do not decay, write or read.
template <class T, int N, int Count>
__device__ __forceinline__ void fetch(Stage<T, N, Count> &stage, const Inputs<T> &in, const Place<N> &place,
                                      int chunk) {
  fetch_rows<float, N>(stage.w, in.w, place, chunk);
#pragma unroll
  for (int i = 0; i < Count; i++) fetch_rows<T, N>(stage.x[i], in.x[i], place, chunk);
  cp_async_commit();
}

// Calls f(pair of numbers, where they are in a state) for all that a lane holds of the 16 rows of values of this warp.
template <int N, class F>
__device__ __forceinline__ void for_pairs(Tile (&s)[N / 16], F f) {
#pragma unroll
  for (int n = 0; n < N / 16; n++)
    for (int j = 0; j < 2; j++)
      for (int i = 0; i < 2; i++)
        f(&s[n].d[j][2 * i], (16 * warp_id() + tile_row(i)) * N + 16 * n + tile_column(j));
}

template <int N>
__device__ __forceinline__ void load_state(Tile (&s)[N / 16], const float *state) {
  for_pairs<N>(s, [&](float *pair, int at) {
    const float2 x = *reinterpret_cast<const float2 *>(state + at);
    pair[0] = x.x, pair[1] = x.y;
  });
}

template <int N>
__device__ __forceinline__ void store_state(float *state, Tile (&s)[N / 16]) {
  for_pairs<N>(s, [&](float *pair, int at) {
    *reinterpret_cast<float2 *>(state + at) = make_float2(pair[0], pair[1]);
  });
}

// Saved states are for backward alone: they lie as the lanes hold them, 16 bytes apart.
template <int N>
__device__ __forceinline__ void save(float *saved, const Tile (&s)[N / 16]) {
#pragma unroll
  for (int n = 0; n < N / 16; n++)
    for (int j = 0; j < 2; j++)
      store4(saved + 16 * N * warp_id() + 128 * (2 * n + j) + 4 * lane_id(),
             make_float4(s[n].d[j][0], s[n].d[j][1], s[n].d[j][2], s[n].d[j][3]));
}

template <int N>
__device__ __forceinline__ void load_saved(Tile (&s)[N / 16], const float *saved) {
#pragma unroll
  for (int n = 0; n < N / 16; n++)
    for (int j = 0; j < 2; j++) {
      const float4 x = load4(saved + 16 * N * warp_id() + 128 * (2 * n + j) + 4 * lane_id());
      s[n].d[j][0] = x.x, s[n].d[j][1] = x.y, s[n].d[j][2] = x.z, s[n].d[j][3] = x.w;
    }
}

template <int N>
__device__ __forceinline__ void scale_columns(Tile (&s)[N / 16], const float *factors) {
#pragma unroll
  for (int n = 0; n < N / 16; n++)
    for (int j = 0; j < 2; j++) {
      const float2 f = *reinterpret_cast<const float2 *>(factors + 16 * n + tile_column(j));
      for (int e = 0; e < 4; e += 2) s[n].d[j][e] *= f.x, s[n].d[j][e + 1] *= f.y;
    }
}

__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 exp4(float4 x, float sign) {
  return make_float4(fast_exp(sign * x.x), fast_exp(sign * x.y), fast_exp(sign * x.z), fast_exp(sign * x.w));
}
__device__ __forceinline__ float4 shuffled(float4 x, int lanes) {
  return make_float4(__shfl_xor_sync(~0u, x.x, lanes), __shfl_xor_sync(~0u, x.y, lanes),
                     __shfl_xor_sync(~0u, x.z, lanes), __shfl_xor_sync(~0u, x.w, lanes));
}

// Log decays below this would be answered wrongly: they become NaN, and with them all that depends on them. RWKV-7's
// own end at -0.6065.
template <class T>
constexpr float SLOWEST = SPLIT<T> ? -4.5f : -1.3f;

template <class T>
__device__ __forceinline__ float4 load_decays(const float *w) {
  const auto checked = [](float x) { return x < SLOWEST<T> ? NAN : x; };
  const float4 x = load4(w);
  return make_float4(checked(x.x), checked(x.y), checked(x.z), checked(x.w));
}

// Scales the inputs of this warp's 16 channels: a lane has four channels of tokens t, t + 1. Sums of log decays start
// at the middle of the chunk and go outwards. head: e^(decay of the first half), tail: of the second.
template <bool KeepDecays, class T, int N, int Count>
__device__ __forceinline__ void scale_inputs(Stage<T, N, Count> &stage, float *head, float *tail) {
  const int pair = lane_id() / 4, t = 2 * pair, channel = 16 * warp_id() + lane_id() % 4 * 4;
  const bool second_half = pair >= 4, odd = pair & 1, high = pair & 2;
  const float4 w[2] = {load_decays<T>(&stage.w[t][channel]), load_decays<T>(&stage.w[t + 1][channel])};
  const float4 own = w[0] + w[1], next = shuffled(own, 4), both = own + next, others = shuffled(both, 8);
  const float4 zero = {};
  if (pair % 4 == 0) store4((second_half ? tail : head) + channel, exp4(both + others, 1));
  // Before token t.
  float4 p = second_half ? (odd ? next : zero) + (high ? others : zero)
                         : (own + (odd ? zero : next) + (high ? zero : others)) * make_float4(-1, -1, -1, -1);
  if (KeepDecays) __syncwarp();
#pragma unroll
  for (int j = 0; j < 3; j++) {
    const float4 up = exp4(p, 1), down = exp4(p, -1);
    const auto scale = [&](Array x, int token, float4 factor) {
      T *const at = &stage.x[x][token][channel];
      store4(at, load4(at) * factor);
    };
    if (j > 0) scale(R, t + j - 1, up), scale(K, t + j - 1, down), scale(B, t + j - 1, down);
    if (j < 2) scale(A, t + j, up);
    if (KeepDecays && (j > 0 || pair == 0)) store4(&stage.w[t + j][channel], p);
    if (j < 2) p = p + w[j];
  }
}

// The products of r, a by k, b that a warp makes: one, for N = 64. They change warps from turn to turn, since the
// inverse of one is most of the work, and warps of one number share a scheduler with those of other blocks.
template <int N>
struct Products {
  static constexpr int COUNT = N < 64 ? 64 / N : 1;
  Tile tiles[COUNT] = {};
  int first;

  __device__ explicit Products(int turn) : first((warp_id() + unsigned(turn)) % (N / 16)) {}
  template <class F>
  __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (first + i * (N / 16) < 4) f(first + i * (N / 16), tiles[i]);
  }
};

// Leaves the products of a token with the ones before it, and of r (or dy) with itself.
__device__ __forceinline__ void mask(Tile &d, int product) {
  const int same_too = product < AK;
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++)
      if (tile_column(j) + e % 2 >= tile_row(e / 2) + same_too) d.d[j][e] = 0;
}

// m = (I - x)^-1 - I of the strictly lower triangular x, by m = x + x m, a column to a lane (twice).
template <class T>
__device__ __forceinline__ void invert(const Tile &x, float *system, T (*inverse)[SQUARE]) {
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) system[(tile_column(j) + e % 2) * SYSTEM + tile_row(e / 2)] = x.d[j][e];
  __syncwarp();
  const int column = lane_id() % 16;
  float m[LENGTH];
#pragma unroll
  for (int k = 0; k < LENGTH; k += 4) {
    const float4 l = load4(system + column * SYSTEM + k);
    m[k] = l.x, m[k + 1] = l.y, m[k + 2] = l.z, m[k + 3] = l.w;
  }
#pragma unroll
  for (int i = 0; i < LENGTH - 1; i++)
#pragma unroll
    for (int k = (i + 1) / 4 * 4; k < LENGTH; k += 4) {
      const float4 l = load4(system + i * SYSTEM + k);
      if (k > i) m[k] += l.x * m[i];
      if (k + 1 > i) m[k + 1] += l.y * m[i];
      if (k + 2 > i) m[k + 2] += l.z * m[i];
      m[k + 3] += l.w * m[i];
    }
  const bool below = lane_id() >= 16;
#pragma unroll
  for (int i = 0; i < LENGTH / 2; i++)
    inverse[i + (below ? LENGTH / 2 : 0)][column] = from_float<T>(below ? m[i + LENGTH / 2] : m[i]);
}

template <class T>
__device__ __forceinline__ void store_square(Squares<T> &squares, int m, const Tile &d) {
  const Operand x = rounded<T>(d);
  store_tile(squares[m][0], SQUARE, x);
  if (SPLIT<T> && m != AB) store_tile(squares[m + LEFT][0], SQUARE, left<T>(d, x));
}

// Calls f with product m, and with what is left of it.
template <bool Transposed, class T, class F>
__device__ __forceinline__ void for_parts(const Squares<T> &squares, Product m, F f) {
  f(Transposed ? load_transposed(squares[m][0], SQUARE) : load_tile(squares[m][0], SQUARE));
  if constexpr (SPLIT<T>)
    f(Transposed ? load_transposed(squares[m + LEFT][0], SQUARE) : load_tile(squares[m + LEFT][0], SQUARE));
}

template <class T, int N>
__device__ __forceinline__ void store_squares(Products<N> &products, Squares<T> &squares, float *system) {
  products.each([&](int m, Tile &d) {
    mask(d, m);
    if (m == AB) invert(d, system, squares[m]);
    if (m != AB) store_square<T>(squares, m, d);
  });
}

// Z = a' S^T + AK V, then U, both transposed. Z comes in without the second term.
template <class T>
__device__ __forceinline__ Operand solve(Tile &z, const Operand &v, const Squares<T> &squares) {
  for_parts<false, T>(squares, AK, [&](const Operand &x) { add_product<T>(z, v, x); });
  add_product<T>(z, rounded<T>(z), load_tile(squares[AB][0], SQUARE));
  return rounded<T>(z);
}

template <class T, int N, int Count>
__device__ __forceinline__ void update(Tile (&s)[N / 16], const Stage<T, N, Count> &stage, const Operand &v,
                                       const Operand &u, const float *tail) {
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    add_product<T>(s[n], v, load_transposed(&stage.x[K][0][16 * n], N + 8));
    add_product<T>(s[n], u, load_transposed(&stage.x[B][0][16 * n], N + 8));
  }
  scale_columns<N>(s, tail);
}

}  // namespace wkv7_mma
