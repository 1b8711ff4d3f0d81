// Splitting the time axis over idle multiprocessors, exactly.
//
// A step of every recurrence here is affine in the state, so a range of tokens, a piece, does no more to the state
// before it than one affine map, and no more to the gradient of the state after it than another. That makes the state
// a prefix sum over pieces (Blelloch 1990, Prefix sums and their applications; Martin & Cundy, arXiv:1709.04057):
//
//   summary   the map of every piece, all pieces at once
//   scan      through the maps of a sequence, one after another: the state before each piece
//   forward   the ordinary kernel, with every piece a sequence of its own
//
// and backward the same from the end. Here is what the kernels of pieces4.cu, pieces6.cu and pieces7.cu share.
#pragma once

#include "common.cuh"

namespace pieces {

// A block holds HEIGHT rows of an (N, N) state, ROWS of them a thread, each shared by LANES neighbours. A lane's
// columns are every LANES-th group of four, so that a warp reads adjacent ones from shared memory.
template <int N>
struct Tile {
  static constexpr int THREADS = N == 128 ? 128 : 64;
  static constexpr int LANES = N == 128 ? 8 : 4;
  static constexpr int QUADS = N / LANES / 4;
  static constexpr int ROWS = N == 16 ? 1 : N == 32 ? 2 : 4;
  static constexpr int HEIGHT = THREADS / LANES * ROWS;
  static constexpr int STRIPS = N / HEIGHT;
  static constexpr int TOKENS = 8 * THREADS / N;  // as many are in shared memory at a time
  static constexpr int GROUP = TOKENS * N;

  float s[ROWS][QUADS][4];

  static __device__ __forceinline__ int row(int r) { return threadIdx.x / LANES * ROWS + r; }
  static __device__ __forceinline__ int column(int q) { return 4 * (q * LANES + threadIdx.x % LANES); }

  // Zeros, or the rows from `top` on of the identity.
  __device__ __forceinline__ void begin(bool identity, int top) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int q = 0; q < QUADS; q++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[r][q][i] = identity && column(q) + i == top + row(r) ? 1.f : 0.f;
  }

  // S += left right^T, of `left` the elements of these rows.
  __device__ __forceinline__ void add(const float *left, const float *right) {
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      const float4 x = load4(right + column(q));
#pragma unroll
      for (int r = 0; r < ROWS; r++) accumulate(s[r][q], left[row(r)], x);
    }
  }

  // S <- S diag(decay) + (S read) write^T.
  __device__ __forceinline__ void step(const float *decay, const float *read, const float *write) {
    float product[ROWS] = {};
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      const float4 x = load4(read + column(q));
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        product[r] += s[r][q][0] * x.x;
        product[r] += s[r][q][1] * x.y;
        product[r] += s[r][q][2] * x.z;
        product[r] += s[r][q][3] * x.w;
      }
    }
#pragma unroll
    for (int bit = 1; bit < LANES; bit *= 2)
#pragma unroll
      for (int r = 0; r < ROWS; r++) product[r] += __shfl_xor_sync(~0u, product[r], bit);
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      const float4 d = load4(decay + column(q)), x = load4(write + column(q));
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        s[r][q][0] *= d.x, s[r][q][1] *= d.y, s[r][q][2] *= d.z, s[r][q][3] *= d.w;
        accumulate(s[r][q], product[r], x);
      }
    }
  }

  // Args: matrix: (N, N), from the block's first row on.
  __device__ __forceinline__ void store(float *matrix) const {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int q = 0; q < QUADS; q++)
        store4(matrix + row(r) * N + column(q), make_float4(s[r][q][0], s[r][q][1], s[r][q][2], s[r][q][3]));
  }

 private:
  static __device__ __forceinline__ void accumulate(float (&to)[4], float scale, float4 x) {
    to[0] += scale * x.x, to[1] += scale * x.y, to[2] += scale * x.z, to[3] += scale * x.w;
  }
};

// The tokens of a piece and a head in the order of time or, backward, against it.
template <int N>
struct Walk {
  int64_t first, stride, count;  // offset of the first token's vector, to the next one, and how many

  __device__ __forceinline__ Walk(const Call &call, int64_t piece, int64_t head, bool back) {
    const Tokens tokens = tokens_of(call, piece);
    first = ((back ? tokens.begin + tokens.count - 1 : tokens.begin) * call.heads + head) * N;
    stride = (back ? -call.heads : call.heads) * N;
    count = tokens.count;
  }

  // Starts to copy a group of tokens; cp_async_commit and a wait are the caller's.
  template <class T>
  __device__ __forceinline__ void copy(T *shared, const T *array, int64_t from) const {
    if (from < count) copy_rows<N>(shared, array + first + from * stride, stride, Tile<N>::TOKENS, count - from);
  }
};

// A copied group as floats.
template <int N, class T>
__device__ __forceinline__ void widen(float *to, const T *from) {
#pragma unroll
  for (int i = 4 * threadIdx.x; i < Tile<N>::GROUP; i += 4 * Tile<N>::THREADS) store4(to + i, load4(from + i));
}

// Calls run(T(), size) with the type of the token arrays and the head size as a constant, if they are built.
template <class Run>
int dispatch(const Call &call, Run run) {
  return with_dtype<float, bf16, f16>(call.dtype, [&](auto type) {
    return with_size<16, 32, 64, 128>(call.size, [&](auto n) { return run(type, n); });
  });
}

}  // namespace pieces
