// What the fused CPU ops share: arrays of any dtype as vectors, sums over lanes, blocks of tokens, and the sums over
// these that gradients of parameters are.
#pragma once
#include "cpu.h"
#include "fused.h"

#define ALWAYS __attribute__((always_inline))

namespace ISA {

// How many lanes of a vector count: all of them, known to the compiler, or an int.
template <class T>
struct Whole {
  constexpr operator int() const { return W<T>; }
};

// An array read and written in vectors of T, whatever it is stored as.
template <class T>
struct Field {
  using Bits = typename Vector<T>::bits;
  typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
  typedef uint32_t Words __attribute__((vector_size(BYTES)));
  char *data;
  int32_t dtype;

  Field(char *data, int32_t dtype) : data(data), dtype(dtype) {}
  Field(T *x) : Field(reinterpret_cast<char *>(x), sizeof(T) == 8 ? F64 : F32) {}
  operator bool() const { return data; }
  Field operator+(int64_t i) const { return {data + i * (dtype == BF16 ? 2 : int64_t(sizeof(T))), dtype}; }

  template <class Lanes>
  ALWAYS V<T> get(int64_t i, Lanes n) const {
    V<T> x = {};
    if constexpr (sizeof(T) == 4) {
      if (dtype == BF16) {
        Halves halves = {};
        __builtin_memcpy(&halves, data + 2 * i, 2 * n);
        return (V<T>)(__builtin_convertvector(halves, Words) << 16);
      }
    }
    __builtin_memcpy(&x, data + sizeof(T) * i, sizeof(T) * n);
    return x;
  }
  template <class Lanes>
  ALWAYS void put(int64_t i, V<T> x, Lanes n) const {
    if constexpr (sizeof(T) == 4) {
      if (dtype == BF16) {
        const Words bits = (Words)x, nearest = bits + (0x7fff + (bits >> 16 & 1));  // ties to even
        const Halves halves = __builtin_convertvector((x == x ? nearest : bits | 0x400000) >> 16, Halves);
        __builtin_memcpy(data + 2 * i, &halves, 2 * n);
        return;
      }
    }
    __builtin_memcpy(data + sizeof(T) * i, &x, sizeof(T) * n);
  }
  template <class Lanes>
  ALWAYS void add(int64_t i, V<T> x, Lanes n) const {
    put(i, get(i, n) + x, n);
  }
};

// What an op is called with.
template <class T>
struct Arrays {
  void *const *data;
  const int32_t *dtypes;

  Field<T> operator[](int i) const { return {static_cast<char *>(data[i]), dtypes[i]}; }
  Arrays operator+(int i) const { return {data + i, dtypes + i}; }
  T *plain(int i) const { return static_cast<T *>(data[i]); }
};

// f of the arrays, if they can be those of a call.
template <class F>
int with_arrays(const Call &call, void *const *data, int64_t count, const F &f) {
  const int32_t *const dtypes = static_cast<int32_t *>(data[count]);
  for (int64_t i = 0; i < count; i++)
    if (data[i] && (call.dtype == F64 ? dtypes[i] != F64 : dtypes[i] != F32 && dtypes[i] != BF16)) return -1;
  call.dtype == F64 ? f(Arrays<double>{data, dtypes}) : f(Arrays<float>{data, dtypes});
  return 0;
}

// f(c, lanes) for `count` channels.
template <class T, class F>
ALWAYS inline void channels(int64_t count, const F &f) {
  int64_t c = 0;
  for (; c + W<T> <= count; c += W<T>) f(c, Whole<T>{});
  if (c < count) f(c, int(count - c));
}

// x with zeros in the lanes that do not count.
template <class T, class Lanes>
ALWAYS inline V<T> only(V<T> x, Lanes n) {
  if (n == W<T>) return x;
  for (int i = n; i < W<T>; i++) x[i] = 0;
  return x;
}

template <int distance>
struct Across {
  static constexpr int at(int i) { return i ^ distance; }
};

// The sum over the lanes.
template <class T, int distance = W<T> / 2>
inline T sum(V<T> x) {
  x += pick<T, Across<distance>>(x, x);
  if constexpr (distance > 1) return sum<T, distance / 2>(x);
  return x[0];
}

template <class T>
inline T root(T x) {
  return sizeof(T) == 4 ? __builtin_sqrtf(x) : __builtin_sqrt(x);
}

template <class T>
inline V<T> roots(V<T> x) {
  UNROLL for (int i = 0; i < W<T>; i++) x[i] = root<T>(x[i]);
  return x;
}

template <class T>
inline V<T> sigmoid(V<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

inline int64_t blocks_of(const Call &call) { return (call.tokens + BLOCK - 1) / BLOCK; }

// run(i, begin, end) for all blocks of tokens, in any order. Each thread has its own copy of `run`, which is to have
// copies of what it needs: the compiler then sees that no result is written over them.
template <class F>
void for_blocks(const Call &call, const F &run) {
  const int64_t tokens = call.tokens, count = blocks_of(call);
  const bool small = tokens * call.heads * call.size < 1 << 14;  // than to wake threads
#pragma omp parallel num_threads(call.threads) if (!small)
  {
    const F own = run;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) own(i, i * BLOCK, lesser((i + 1) * BLOCK, tokens));
  }
}

// Rows of `width` numbers that each block of tokens has for itself.
template <class T>
struct Partials {
  T *data;
  int64_t rows, width;

  Field<T> row(int64_t block, int64_t row) const { return data + (block * rows + row) * width; }
  void clear(int64_t block) const { __builtin_memset(data + block * rows * width, 0, sizeof(T) * rows * width); }

  // out = the sum of a row over the blocks, each addition with what rounding took from the one before.
  void total(const Call &call, int64_t which, Field<T> out) const {
    constexpr int64_t share = 16 * W<T>;
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.tokens * width > 1 << 21)
    for (int64_t at = 0; at < width; at += share) {
      channels<T>(lesser(share, width - at), [&](int64_t c, auto n) ALWAYS {
        V<T> total = {}, lost = {};
        for (int64_t i = 0; i < blocks_of(call); i++) {
          const V<T> x = row(i, which).get(at + c, n) - lost, next = total + x;
          lost = next - total - x;
          total = next;
        }
        out.put(at + c, total, n);
      });
    }
  }
};

// Bytes of the partials of a call.
inline int64_t workspace(const Call &call, int64_t rows, int64_t width) {
  return blocks_of(call) * rows * width * int64_t(call.dtype == F64 ? sizeof(double) : sizeof(float));
}

// The functions of an op out of two templates: with how many arrays, and with how many rows of partials.
#define DEFINE(name, forward, forward_arrays, backward, backward_arrays, rows)                                     \
  int name##_forward(const Call &call, void *const *arrays) {                                                      \
    return with_arrays(call, arrays, forward_arrays, [&](auto x) { forward(call, x); });                           \
  }                                                                                                                \
  int name##_backward(const Call &call, void *const *arrays) {                                                     \
    return with_arrays(call, arrays, backward_arrays, [&](auto x) { backward(call, x); });                         \
  }                                                                                                                \
  int64_t name##_workspace(const Call &call) { return workspace(call, rows, call.heads * call.size); }

}  // namespace ISA
