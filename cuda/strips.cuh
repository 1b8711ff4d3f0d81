// Who holds what of a state S (value, key) in the recurrent kernels of wkv6 and wkv7.
//
// The rows of S never mix, so a block takes a strip of them. A thread holds ROWS x 4 numbers of S in registers; N / 4
// lanes of a warp share a row, and sum over its keys by shuffles. Sums over the values, which the gradients of all
// vectors but v need, go through the warps, the block, and, where the strips of a head are in several blocks, memory.
// They are always added in the order of one binary tree, so that the bits do not depend on the division into blocks.
#pragma once

#include "common.cuh"

namespace recurrent {

constexpr int EVERY = 16;  // tokens from one saved state to the next

template <int Size>
struct Shape {
  static constexpr int N = Size, LANES = N / 4;
  static constexpr int ROWS = N == 16 ? 2 : 8;  // of a thread
  static constexpr int WARP_ROWS = 32 / LANES * ROWS;
  static constexpr int WARPS = N / WARP_ROWS < 4 ? N / WARP_ROWS : 4;  // of a block, at most
  static constexpr int MOST_STRIPS = N < 64 ? 1 : 4;
  static constexpr int FEWEST_WARPS = N / WARP_ROWS / MOST_STRIPS;

  // More blocks for a head where heads alone would leave multiprocessors idle, or where one block cannot hold it.
  static int strips(const Call &call) {
    return N == 128 || call.sequences * call.heads < 256 ? MOST_STRIPS : 1;
  }
  static unsigned threads(int strips) { return 32 * (N / WARP_ROWS / strips); }
};

// Where a thread stands.
template <int N>
struct Place : Shape<N> {
  using Shape<N>::LANES, Shape<N>::ROWS, Shape<N>::WARP_ROWS;
  int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  int strip, row, key;  // its first row and key
  int64_t heads, head, sequence, stride;
  Tokens tokens;

  __device__ __forceinline__ Place(const Call &call, int strips) : heads(call.heads), stride(call.heads * N) {
    strip = blockIdx.x % strips;
    head = blockIdx.x / strips % heads;
    sequence = blockIdx.x / strips / heads;
    row = (strip * warps + warp) * WARP_ROWS + lane / LANES * ROWS;
    key = lane % LANES * 4;
    tokens = tokens_of(call, sequence);
  }
  // A sum over keys ends in the first lanes of a row group, one row in each.
  __device__ __forceinline__ bool owner() const { return lane % LANES < ROWS; }
  __device__ __forceinline__ int owned() const { return row + lane % ROWS; }

  __device__ __forceinline__ int64_t first_vector() const { return tokens.begin * stride + head * N; }
  __device__ __forceinline__ int64_t state(int64_t number) const {
    return (number * heads + head) * N * N + row * N + key;
  }
  __device__ __forceinline__ int64_t first_saved() const { return state(tokens.begin / EVERY + sequence); }
  __device__ __forceinline__ int tile() const { return (row - strip * warps * WARP_ROWS) * N + key; }
};

template <int Count>
__device__ __forceinline__ float inner(const float (&x)[Count], const float (&y)[Count]) {
  float sum = x[0] * y[0];
#pragma unroll
  for (int i = 1; i < Count; i++) sum += x[i] * y[i];
  return sum;
}

template <int N>
struct Tile {
  static constexpr int ROWS = Shape<N>::ROWS;
  float x[ROWS][4];

  __device__ __forceinline__ void load(const float *from) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const float4 row = load4(from + i * N);
      x[i][0] = row.x, x[i][1] = row.y, x[i][2] = row.z, x[i][3] = row.w;
    }
  }
  __device__ __forceinline__ void store(float *to) const {
#pragma unroll
    for (int i = 0; i < ROWS; i++) store4(to + i * N, make_float4(x[i][0], x[i][1], x[i][2], x[i][3]));
  }

  __device__ __forceinline__ void decay(const float (&keys)[4]) {
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) x[i][j] *= keys[j];
  }
  // += values keys^T
  __device__ __forceinline__ void add(const float (&values)[ROWS], const float (&keys)[4]) {
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) x[i][j] += values[i] * keys[j];
  }
  // This thread's part of the product with keys, and of that of the transpose with values.
  __device__ __forceinline__ void dot(float (&out)[ROWS], const float (&keys)[4]) const {
#pragma unroll
    for (int i = 0; i < ROWS; i++) out[i] = inner(x[i], keys);
  }
  __device__ __forceinline__ void dot_values(float (&out)[4], const float (&values)[ROWS]) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      out[j] = x[0][j] * values[0];
#pragma unroll
      for (int i = 1; i < ROWS; i++) out[j] += x[i][j] * values[i];
    }
  }
  // The same of the elementwise product with another state.
  __device__ __forceinline__ void dot_state(float (&out)[4], const Tile &other) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      out[j] = x[0][j] * other.x[0][j];
#pragma unroll
      for (int i = 1; i < ROWS; i++) out[j] += x[i][j] * other.x[i][j];
    }
  }
};

template <int Count, class T>
__device__ __forceinline__ void read(float (&x)[Count], const T *from) {
  if constexpr (Count == 2) {
    x[0] = to_float(from[0]), x[1] = to_float(from[1]);
  } else {
#pragma unroll
    for (int i = 0; i < Count; i += 4) {
      const float4 four = load4(from + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}

// The sum of x[i] over the lanes of a row, where i is the lane modulo ROWS: half of the values go to the other half of
// the lanes until each has one.
template <int N>
__device__ __forceinline__ float sum_over_keys(float (&x)[Shape<N>::ROWS], int lane) {
#pragma unroll
  for (int half = Shape<N>::ROWS / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; i++) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(~0u, given, half);
    }
  }
#pragma unroll
  for (int bits = Shape<N>::ROWS; bits < Shape<N>::LANES; bits *= 2) x[0] += __shfl_xor_sync(~0u, x[0], bits);
  return x[0];
}

// The other way: what the lanes of a row group own, in all of them.
template <int N>
__device__ __forceinline__ void share(float (&x)[Shape<N>::ROWS], float owned, int lane) {
#pragma unroll
  for (int i = 0; i < Shape<N>::ROWS; i++) x[i] = __shfl_sync(~0u, owned, lane / Shape<N>::ROWS * Shape<N>::ROWS + i);
}

template <int N, int Warps>
__device__ __forceinline__ float4 tree(const float *x) {
  if constexpr (Warps == 1) {
    return load4(x);
  } else {
    return tree<N, Warps / 2>(x) + tree<N, Warps / 2>(x + Warps / 2 * N);
  }
}

// Sums over the values of the rows of a warp, for all keys, go to shared memory; after a barrier the block adds them.
template <int N, int Columns>
__device__ __forceinline__ void sum_over_values(float (&x)[Columns][4], float *shared, const Place<N> &at) {
#pragma unroll
  for (int c = 0; c < Columns; c++) {
#pragma unroll
    for (int bits = at.LANES; bits < 32; bits *= 2)
#pragma unroll
      for (int j = 0; j < 4; j++) x[c][j] += __shfl_xor_sync(~0u, x[c][j], bits);
    if (at.lane < at.LANES)
      store4(shared + (c * at.warps + at.warp) * N + at.key, make_float4(x[c][0], x[c][1], x[c][2], x[c][3]));
  }
}

template <int N>
__device__ __forceinline__ float4 sum_of_warps(const float *shared, const Place<N> &at) {
  return at.warps == at.WARPS ? tree<N, at.WARPS>(shared) : tree<N, at.FEWEST_WARPS>(shared);
}

}  // namespace recurrent
