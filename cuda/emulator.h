// The names of CUDA for g++, which compiles kernels to run on the CPU: a test of their arithmetic, their barriers and
// their shared memory where there is no GPU. fibers.h runs the threads.
//
// What a missing barrier does depends on the order in which threads run, so a right kernel gives the same bits in every
// emulator_order. In the random one warps interleave, and every cp_async16 is done at once or at its cp_async_wait;
// in the others always at the wait, so that a missing one reads what was there before.
//
// Stricter than a GPU: lanes never run in lockstep, masks name all lanes, no static shared memory, and all threads come
// to the same line. Not seen: time, bank conflicts, registers, the rounding inside a tensor core.
#pragma once

#include <cmath>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define DYNAMIC_SHARED(type, name) type *const name = reinterpret_cast<type *>(emulator::self->shared)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define EMULATOR_SITE emulator::Site site = emulator::Site::here()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
using bf16 = __nv_bfloat16;
using f16 = __half;
using std::max;
using std::min;

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator EMULATOR_HIDDEN {

template <class To, class From>
To cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulator

inline float to_float(float x) { return x; }
__forceinline__ float to_float(bf16 x) { return emulator::cast<float>(uint32_t(x.bits) << 16); }
__forceinline__ float to_float(f16 x) {
  // The exponent of the half, moved to the float's place, is 112 too small; subnormals come right by the product.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t bits = emulator::cast<uint32_t>(emulator::cast<float>(magnitude) * 0x1p112f);
  return emulator::cast<float>(bits | sign | (magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0u));
}

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    const uint32_t bits = emulator::cast<uint32_t>(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (x != x) return {0x7fff};
    if constexpr (std::is_same_v<T, bf16>) return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    if (magnitude >= emulator::cast<uint32_t>(65520.0f)) return {uint16_t(sign | 0x7c00)};
    if (magnitude < emulator::cast<uint32_t>(0x1p-14f)) {
      // A float next to 0.5 is a multiple of 2^-24, as a subnormal half is.
      const float sum = emulator::cast<float>(magnitude) + 0.5f;
      return {uint16_t(sign | (emulator::cast<uint32_t>(sum) - emulator::cast<uint32_t>(0.5f)))};
    }
    return {uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13))};
  }
}

template <class T>
uint32_t pack2(float lo, float hi) {
  return from_float<T>(lo).bits | uint32_t(from_float<T>(hi).bits) << 16;
}
template <class T>
__forceinline__ float2 unpack2(uint32_t pair) {
  return {to_float(T{uint16_t(pair)}), to_float(T{uint16_t(pair >> 16)})};
}
inline uint32_t to_tf32(float x) {
  return x != x ? 0x7fffffffu : (emulator::cast<uint32_t>(x) + 0x1000) & ~0x1fffu;
}
inline float fast_exp(float x) { return std::exp(x); }

namespace emulator EMULATOR_HIDDEN {

struct Shuffle {
  uint64_t value, result;
  int from;
};

inline void shuffle(Thread *lanes, int count) {
  for (int i = 0; i < count; i++) {
    auto &mine = *static_cast<Shuffle *>(lanes[i].operands);
    if (mine.from < 0 || mine.from >= count) fail(lanes[i], lanes[i].what, lanes[i].site, "reads a lane of no thread");
    mine.result = static_cast<Shuffle *>(lanes[mine.from].operands)->value;
  }
}

template <class T>
T shuffled(unsigned mask, T value, int from, const char *what, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (mask != ~0u) fail(*self->current, what, site, "has a mask of some lanes only");
  Shuffle mine{0, 0, from};
  std::memcpy(&mine.value, &value, sizeof value);
  wait(IN_WARP, what, site, shuffle, &mine);
  std::memcpy(&value, &mine.result, sizeof value);
  return value;
}

inline void require_shared(const void *pointer, const char *what, Site site) {
  const char *at = static_cast<const char *>(pointer);
  const Thread &thread = *self->current;
  if (reinterpret_cast<uintptr_t>(at) % 16) fail(thread, what, site, "has an address that is no multiple of 16 bytes");
  if (at < self->shared || at + 16 > self->shared + self->launch->shared_bytes)
    fail(thread, what, site, "has an address outside the shared memory");
}

typedef float Row __attribute__((vector_size(32)));

inline void require_warp(Thread *lanes, int count) {
  if (count != WARP) fail(lanes[0], lanes[0].what, lanes[0].site, "needs a warp of 32 lanes");
}

struct Mma {
  float *d;
  const uint32_t *a, *b;
};

// d (16, 8) += a (16, K) b (K, 8); T is float for tf32, of which a tensor core reads the upper 19 bits.
template <class T, int K>
void mma(Thread *lanes, int count) {
  require_warp(lanes, count);
  float a[16][K];
  Row b[K], d[16];
  for (int lane = 0; lane < WARP; lane++) {
    const Mma &mine = *static_cast<Mma *>(lanes[lane].operands);
    const int g = lane / 4, t = lane % 4;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      d[g + i / 2 * 8][t * 2 + i % 2] = mine.d[i];
      float *row = a[g + i % 2 * 8];
      if constexpr (K == 8) {
        row[t + i / 2 * 4] = cast<float>(mine.a[i] & ~0x1fffu);
        if (i < 2) b[t + i * 4][g] = cast<float>(mine.b[i] & ~0x1fffu);
      } else {
        const float2 pair = unpack2<T>(mine.a[i]);
        row[t * 2 + i / 2 * 8] = pair.x;
        row[t * 2 + i / 2 * 8 + 1] = pair.y;
        if (i >= 2) continue;
        const float2 column = unpack2<T>(mine.b[i]);
        b[t * 2 + i * 8][g] = column.x;
        b[t * 2 + i * 8 + 1][g] = column.y;
      }
    }
  }
  for (int row = 0; row < 16; row++) {
    Row sum = d[row];
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) sum += a[row][k] * b[k];
    d[row] = sum;
  }
  for (int lane = 0; lane < WARP; lane++) {
    float *to = static_cast<Mma *>(lanes[lane].operands)->d;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) to[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

struct Rows {
  uint32_t *r;
  const void *row;
};

template <int Matrices, bool Transposed>
void load_matrices(Thread *lanes, int count) {
  require_warp(lanes, count);
  for (int i = 0; i < Matrices; i++) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; row++) std::memcpy(m[row], static_cast<Rows *>(lanes[8 * i + row].operands)->row, 16);
    for (int lane = 0; lane < WARP; lane++) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t lo = Transposed ? m[t][g] : m[g][t], hi = Transposed ? m[t + 1][g] : m[g][t + 1];
      static_cast<Rows *>(lanes[lane].operands)->r[i] = lo | hi << 16;
    }
  }
}

template <int Matrices, bool Transposed>
void ldmatrix(uint32_t *r, const void *row, const char *what, Site site) {
  if (self->lane() < Matrices * 8) require_shared(row, what, site);
  Rows mine{r, row};
  wait(IN_WARP, what, site, load_matrices<Matrices, Transposed>, &mine);
}

inline void transpose(Thread *lanes, int count) {
  require_warp(lanes, count);
  uint16_t m[8][8];
  for (int lane = 0; lane < WARP; lane++) std::memcpy(&m[lane / 4][lane % 4 * 2], lanes[lane].operands, 4);
  for (int lane = 0; lane < WARP; lane++) {
    const int g = lane / 4, t = lane % 4 * 2;
    *static_cast<uint32_t *>(lanes[lane].operands) = m[t][g] | uint32_t(m[t + 1][g]) << 16;
  }
}

}  // namespace emulator

inline void __syncthreads(EMULATOR_SITE) { emulator::wait(emulator::IN_BLOCK, "__syncthreads", site); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
  if (mask != ~0u) emulator::fail(*emulator::self->current, "__syncwarp", site, "has a mask of some lanes only");
  emulator::wait(emulator::IN_WARP, "__syncwarp", site);
}
[[noreturn]] inline void __trap(EMULATOR_SITE) {
  emulator::fail(*emulator::self->current, "__trap", site, "was called");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, EMULATOR_SITE) {
  return emulator::shuffled(mask, value, lane & 31, "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, EMULATOR_SITE) {
  return emulator::shuffled(mask, value, emulator::self->lane() ^ bits, "__shfl_xor_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, EMULATOR_SITE) {
  const int lane = emulator::self->lane(), from = lane - int(delta);
  return emulator::shuffled(mask, value, from < 0 ? lane : from, "__shfl_up_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMULATOR_SITE) {
  const int lane = emulator::self->lane(), from = lane + int(delta);
  return emulator::shuffled(mask, value, from > 31 ? lane : from, "__shfl_down_sync", site);
}

template <class T>
void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_SITE) {
  emulator::Mma mine{d, a, b};
  emulator::wait(emulator::IN_WARP, "mma16816", site, emulator::mma<T, 16>, &mine);
}
inline void mma1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_SITE) {
  emulator::Mma mine{d, a, b};
  emulator::wait(emulator::IN_WARP, "mma1688_tf32", site, emulator::mma<float, 8>, &mine);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void *shared_row, EMULATOR_SITE) {
  emulator::ldmatrix<4, false>(r, shared_row, "ldmatrix_x4", site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *shared_row, EMULATOR_SITE) {
  emulator::ldmatrix<4, true>(r, shared_row, "ldmatrix_x4_trans", site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void *shared_row, EMULATOR_SITE) {
  emulator::ldmatrix<2, false>(r, shared_row, "ldmatrix_x2", site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void *shared_row, EMULATOR_SITE) {
  emulator::ldmatrix<2, true>(r, shared_row, "ldmatrix_x2_trans", site);
}
inline uint32_t movmatrix_trans(uint32_t matrix, EMULATOR_SITE) {
  emulator::wait(emulator::IN_WARP, "movmatrix_trans", site, emulator::transpose, &matrix);
  return matrix;
}

inline void cp_async16(void *shared, const void *global, bool valid, EMULATOR_SITE) {
  emulator::require_shared(shared, "cp_async16", site);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fail(*emulator::self->current, "cp_async16", site, "has a source that is no multiple of 16 bytes");
  emulator::Worker &worker = *emulator::self;
  const emulator::Copy copy{shared, valid ? global : nullptr, worker.current->groups};
  if (emulator::order == emulator::RANDOM && worker.random.below(2)) return copy.perform();
  worker.current->copies.push_back(copy);
}
inline void cp_async_commit() { emulator::self->current->groups++; }
template <int InFlight>
void cp_async_wait() {
  emulator::Thread &thread = *emulator::self->current;
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group < thread.groups - InFlight; ++copy) copy->perform();
  thread.copies.erase(thread.copies.begin(), copy);
}
