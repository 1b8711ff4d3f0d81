// What the kernels share around their arithmetic: the choice of a template by dtype and size, the tokens of a sequence,
// vectors of four between memory and registers, and long sums.
#pragma once

#include "device.cuh"
#include "wkv.h"

template <class T>
constexpr int32_t dtype_of = std::is_same_v<T, float> ? F32 : std::is_same_v<T, bf16> ? BF16 : F16;

// f of a value of the one type among Ts that dtype names, or -1.
template <class... Ts, class F>
int with_dtype(int32_t dtype, F f) {
  int code = -1;
  (void)((dtype_of<Ts> == dtype && (code = f(Ts{}), true)) || ...);
  return code;
}

// f of the one among Sizes that equals size, as a constant, or -1.
template <int... Sizes, class F>
int with_size(int64_t size, F f) {
  int code = -1;
  (void)((Sizes == size && (code = f(std::integral_constant<int, Sizes>{}), true)) || ...);
  return code;
}

template <class T>
T *array(void *const *arrays, int i) {
  return static_cast<T *>(arrays[i]);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// All states that forward saves `every` so many tokens, of all sequences (wkv.h).
inline int64_t saved_states(const Call &call, int64_t every) { return call.tokens / every + call.sequences; }

struct Tokens {
  int64_t begin, count;
};

// The tokens of sequence s. Borders that do not fit would have other sequences' memory overwritten: stop at once.
__device__ __forceinline__ Tokens tokens_of(const Call &call, int64_t s) {
  const int64_t begin = call.borders[s], end = call.borders[s + 1];
  const bool first = s > 0 || begin == 0, last = s + 1 < call.sequences || end == call.tokens;
  if (begin < 0 || begin > end || end > call.tokens || !first || !last) __trap();
  return {begin, end - begin};
}

template <class T>
__device__ __forceinline__ float4 load4(const T *from) {
  if constexpr (std::is_same_v<T, float>) {
    return *reinterpret_cast<const float4 *>(from);
  } else {
    const uint2 pairs = *reinterpret_cast<const uint2 *>(from);
    const float2 lo = unpack2<T>(pairs.x), hi = unpack2<T>(pairs.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
  }
}

template <class T>
__device__ __forceinline__ void store4(T *to, float4 x) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4 *>(to) = x;
  } else {
    *reinterpret_cast<uint2 *>(to) = make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w));
  }
}

// Rows of N numbers, `stride` apart, to adjacent rows of shared memory; zeros for those from `count` on. All threads of
// the block take part; cp_async_commit and a wait are the caller's.
template <int N, class T>
__device__ __forceinline__ void copy_rows(T *shared, const T *global, int64_t stride, int rows, int64_t count) {
  constexpr int PIECES = N * sizeof(T) / 16, LENGTH = 16 / sizeof(T);
  for (int i = threadIdx.x; i < rows * PIECES; i += blockDim.x) {
    const int row = i / PIECES;
    const int64_t from = row < count ? row * stride : 0;
    cp_async16(shared + i * LENGTH, global + from + i % PIECES * LENGTH, row < count);
  }
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// A sum in float32 that keeps what it rounds off (Kahan 1965, Further remarks on reducing truncation errors).
struct Sum {
  float total = 0, lost = 0;

  __device__ __forceinline__ void add(float x) {
    const float more = x - lost, sum = total + more;
    lost = (sum - total) - more;
    total = sum;
  }
};
