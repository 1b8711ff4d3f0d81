// What the CPU kernels share: vectors of the widest registers at hand, and the division of work among threads.
//
// Each *_cpu.cpp is compiled once for each instruction set, into a namespace of its name. All that is defined here
// belongs to that namespace, and no function template of the standard library is used: the linker would keep one copy
// of it for all of them, perhaps one that the processor can not run.
#pragma once
#include <omp.h>

#include <utility>

#include "wkv.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace ISA {

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int BYTES = 16, REGISTERS = 32;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif

constexpr int CHUNK = 32;  // tokens from one saved state to the next

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(BYTES)));
  typedef int32_t bits __attribute__((vector_size(BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(BYTES)));
  typedef int64_t bits __attribute__((vector_size(BYTES)));
};
template <class T>
using V = typename Vector<T>::type;
template <class T>
constexpr int W = BYTES / int(sizeof(T));

template <class T>
inline V<T> load(const T *from) {
  V<T> x;
  __builtin_memcpy(&x, from, BYTES);
  return x;
}

template <class T>
inline void store(T *to, V<T> x) {
  __builtin_memcpy(to, &x, BYTES);
}

// Writes x, or adds it to what is there.
template <class T>
inline void put(T *to, V<T> x, bool add) {
  store(to, add ? load(to) + x : x);
}

// 1 / i!, the coefficients of e^x.
template <class T>
constexpr T inverse_factorial(int i) {
  return i < 2 ? T(1) : inverse_factorial<T>(i - 1) / T(i);
}

// e^x within 2 units in the last place: x = n ln 2 + r, a Taylor polynomial of r, and 2^n in two factors so that the
// smallest and largest results come out right; 0 at -inf.
template <class T>
inline V<T> exp(V<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T low = single ? T(-104) : T(-746), high = single ? T(89) : T(710);
  constexpr T round = single ? T(0x1.8p23) : T(0x1.8p52);  // adding it leaves an integer in the low bits
  constexpr T above = single ? T(0x1.63p-1) : T(0x1.62e42feep-1);  // ln 2 in two parts; the first times n is exact
  constexpr T below = single ? T(-0x1.bd0105c610ca8p-13) : T(0x1.a39ef35793c76p-33);
  constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023, degree = single ? 7 : 13;
  using Bits = typename Vector<T>::bits;
  x = x < low ? V<T>{} + low : x;
  x = x > high ? V<T>{} + high : x;
  V<T> shifted = x * T(1.4426950408889634) + round, n = shifted - round;
  V<T> r = x - n * above - n * below, p = V<T>{} + inverse_factorial<T>(degree);
  UNROLL for (int i = degree - 1; i >= 0; i--) p = p * r + inverse_factorial<T>(i);
  Bits whole = (Bits)shifted - (Bits)(V<T>{} + round), half = whole >> 1;
  return p * (V<T>)((half + bias) << mantissa) * (V<T>)((whole - half + bias) << mantissa);
}

// Lane i is element at(i) of a and b one after the other.
template <class T, class At, int... i>
inline V<T> pick(V<T> a, V<T> b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, At::at(i)...);
#else
  return __builtin_shuffle(a, b, typename Vector<T>::bits{At::at(i)...});
#endif
}

template <class T, class At>
inline V<T> pick(V<T> a, V<T> b) {
  return pick<T, At>(a, b, std::make_integer_sequence<int, W<T>>());
}

// The even or odd elements of a pair: inside each part of 16 bytes while sums of fewer are made, then whole parts.
template <class T, int done, int odd>
struct Every2nd {
  static constexpr int part = 16 / int(sizeof(T));
  static constexpr int at(int i) {
    int j = i % part, inside = j < part / 2 ? 2 * j : 2 * j - part + W<T>;
    return done < part ? i - j + inside + odd : (2 * (i / part) + odd) * part + j;
  }
};

template <class T, int left = W<T>>
inline V<T> fold(V<T> *x) {
  if constexpr (left > 1) {
    constexpr int done = W<T> / left;
    UNROLL for (int i = 0; i < left / 2; i++) {
      V<T> a = x[2 * i], b = x[2 * i + 1];
      x[i] = pick<T, Every2nd<T, done, 0>>(a, b) + pick<T, Every2nd<T, done, 1>>(a, b);
    }
    return fold<T, left / 2>(x);
  }
  return x[0];
}

// out[i] = the sum of row i of parts (count, W); count is a multiple of W.
template <class T>
inline void lane_sums(const T *parts, T *out, int64_t count) {
  for (int64_t i = 0; i < count; i += W<T>) {
    V<T> x[W<T>];
    UNROLL for (int j = 0; j < W<T>; j++) x[j] = load(parts + (i + j) * W<T>);
    store(out + i, fold<T>(x));
  }
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Too little to wake threads for.
inline bool is_small(const Call &call) {
  return (call.tokens + call.sequences) * call.heads * call.size * lesser(call.size, 64) < 1 << 19;
}

// run(sequence, head, part, thread) for all of them, in any order.
template <class F>
void for_each(const Call &call, int64_t parts, const F &run) {
  const int64_t heads = call.heads * parts, items = call.sequences * heads;
#pragma omp parallel for schedule(dynamic) num_threads(call.threads) if (!is_small(call))
  for (int64_t i = 0; i < items; i++) run(i / heads, i % heads / parts, i % parts, omp_get_thread_num());
}

}  // namespace ISA
