// What the fused CUDA ops share: arrays of any dtype in vectors of four, a thread's place, sums over heads and tokens.
//
// A block has 256 channels, four a thread, of BLOCK tokens, and goes through these in order with sums over tokens in
// registers. What a block leaves is added in the order of the blocks by total_kernel. Threads behind the last channel
// go along, for the sake of shuffles, with zeros.
#pragma once

#include "common.cuh"
#include "fused.h"

namespace fused {

constexpr int Threads = 64, Channels = 4 * Threads, Slices = 8;

struct Four {
  float x[4];

  __device__ __forceinline__ float &operator[](int i) { return x[i]; }
  __device__ __forceinline__ float operator[](int i) const { return x[i]; }
};

// f of each of four.
template <class F>
__device__ __forceinline__ Four each(F f) {
  Four out;
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = f(i);
  return out;
}

__device__ __forceinline__ void add(Four &to, Four x) {
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] += x[i];
}

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

struct Field {
  void *data;
  int32_t dtype;

  __device__ __forceinline__ explicit operator bool() const { return data; }
  __device__ __forceinline__ Four get(int64_t i, bool valid = true) const {
    if (!valid) return Four{};
    float4 x;
    if (dtype == F32) x = load4(static_cast<const float *>(data) + i);
    else if (dtype == BF16) x = load4(static_cast<const bf16 *>(data) + i);
    else x = load4(static_cast<const f16 *>(data) + i);
    return {{x.x, x.y, x.z, x.w}};
  }
  __device__ __forceinline__ void put(int64_t i, Four x, bool valid = true) const {
    if (!valid) return;
    const float4 y = make_float4(x[0], x[1], x[2], x[3]);
    if (dtype == F32) store4(static_cast<float *>(data) + i, y);
    else if (dtype == BF16) store4(static_cast<bf16 *>(data) + i, y);
    else store4(static_cast<f16 *>(data) + i, y);
  }
};

template <int Count>
struct Fields {
  Field x[Count];

  __host__ __device__ __forceinline__ const Field &operator[](int i) const { return x[i]; }
};

// `Count` arrays from number `first` of a call's, whose dtypes lie after all `of` them.
template <int Count>
Fields<Count> fields(void *const *arrays, int of, int first) {
  Fields<Count> out;
  for (int i = 0; i < Count; i++) out.x[i] = {arrays[first + i], static_cast<const int32_t *>(arrays[of])[first + i]};
  return out;
}

inline bool fits(const Call &call, void *const *arrays, int count) {
  const int32_t *dtypes = static_cast<const int32_t *>(arrays[count]);
  for (int i = 0; i < count; i++)
    if (arrays[i] && dtypes[i] == F64) return false;
  return call.dtype == F32 && call.size % 4 == 0;
}

inline int64_t blocks_of(const Call &call) { return ceil_div(call.tokens, BLOCK); }

inline int64_t workspace(const Call &call, int64_t rows, int64_t width) {
  return blocks_of(call) * rows * width * int64_t(sizeof(float));
}

inline dim3 grid_of(const Call &call, int64_t width) {
  return dim3(unsigned(blocks_of(call)), unsigned(ceil_div(width, Channels)));
}

// Where a thread of grid_of stands.
struct Place {
  int64_t width, begin, end, channel;
  bool valid;

  __device__ __forceinline__ Place(const Call &call, int64_t width)
      : width(width), begin(blockIdx.x * BLOCK), end(min(begin + BLOCK, call.tokens)),
        channel(int64_t(blockIdx.y) * Channels + threadIdx.x * 4), valid(channel < width) {}
  __device__ __forceinline__ int64_t at(int64_t t) const { return t * width + channel; }
  // A row of the block's numbers in the workspace.
  __device__ __forceinline__ void keep(float *space, int rows, int row, Four x) const {
    if (!valid) return;
    float *to = space + (int64_t(blockIdx.x) * rows + row) * width + channel;
    store4(to, make_float4(x[0], x[1], x[2], x[3]));
  }
};

// The sum over the channels of a head, the same bits in all of its lanes.
template <int N>
__device__ __forceinline__ float head_sum(Four x) {
  float sum = x[0] + x[1] + (x[2] + x[3]);
#pragma unroll
  for (int bits = 1; bits < N / 4; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  return sum;
}

// out[row] = the sum of a row of the workspace over the blocks of tokens: slices of these in order, each addition with
// what rounding took from the one before it, then the slices.
template <int Rows>
__global__ void total_kernel(const float *space, int64_t blocks, int rows, int64_t width, Fields<Rows> out) {
  DYNAMIC_SHARED(float, slices);
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32, row = blockIdx.y;
  const int64_t channel = int64_t(blockIdx.x) * 32 + lane, length = ceil_div(blocks, Slices);
  const int64_t end = min((slice + 1) * length, blocks);
  float sum = 0, lost = 0;
  for (int64_t i = slice * length; channel < width && i < end; i++) {
    const float x = space[(i * rows + row) * width + channel] - lost, next = sum + x;
    lost = next - sum - x;
    sum = next;
  }
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (slice || channel >= width) return;
  for (int i = 1; i < Slices; i++) sum += slices[i * 32 + lane];
  float *to = static_cast<float *>(out.x[0].data);
#pragma unroll
  for (int i = 1; i < Rows; i++)
    if (i == row) to = static_cast<float *>(out.x[i].data);
  to[channel] = sum;
}

// The sums of the first `Rows` of `rows` rows.
template <int Rows>
int total(const Call &call, const float *space, int rows, int64_t width, const Fields<Rows> &out) {
  const dim3 grid(unsigned(ceil_div(width, 32)), Rows);
  return LAUNCH(total_kernel<Rows>, grid, dim3(32 * Slices), 32 * Slices * sizeof(float), call.stream, space,
                blocks_of(call), rows, width, out);
}

}  // namespace fused
