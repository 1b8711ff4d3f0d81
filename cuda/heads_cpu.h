// What the CPU kernels of wkv6 and wkv7 share: the arrays of heads with a matrix for a state, and their division.
//
// Gradients of v are sums over keys, all others sums over values: those are made in parts of the values, which threads
// share where there are more of them than heads. The parts are a function of N alone, and the sum of the second is
// added to that of the first in any case, so that the bits do not depend on who made them.
#pragma once
#include "cpu.h"

namespace ISA {

constexpr int LARGEST = 128;  // head
constexpr int STRIP = 32;     // values of a part that are worked on together, and
constexpr int ROWS = 8;       // those of them that are kept in registers
constexpr int VECTORS = REGISTERS / 16;

// Rows r and r + d exchange their off-diagonal elements, seen as blocks of d.
template <class T, int d, int second>
struct Exchange {
  static constexpr int at(int i) {
    bool high = i & d;
    return second ? (high ? W<T> + i : i ^ d) : (high ? W<T> + (i ^ d) : i);
  }
};

template <class T, int d = 1>
inline void transpose_square(V<T> *x) {
  if constexpr (d < W<T>) {
    UNROLL for (int i = 0; i < W<T>; i++) {
      if (i & d) continue;
      V<T> a = x[i], b = x[i | d];
      x[i] = pick<T, Exchange<T, d, 0>>(a, b), x[i | d] = pick<T, Exchange<T, d, 1>>(a, b);
    }
    transpose_square<T, 2 * d>(x);
  }
}

// to[j][i] = from[i][j]; rows and columns are multiples of W, the strides count elements.
template <class T>
inline void transpose(const T *from, int64_t from_stride, T *to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += W<T>) {
    for (int64_t j = 0; j < columns; j += W<T>) {
      V<T> x[W<T>];
      UNROLL for (int n = 0; n < W<T>; n++) x[n] = load(from + (i + n) * from_stride + j);
      transpose_square<T>(x);
      UNROLL for (int n = 0; n < W<T>; n++) store(to + (j + n) * to_stride + i, x[n]);
    }
  }
}

// Asks for n elements that will be needed soon. The empty statement is an effect: compilers drop calls without any.
template <int written, class T>
inline void prefetch(const T *from, int64_t n) {
  asm volatile("");
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, written, 2);
}

template <class T>
inline void fill(T *to, T value, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = value;
}

template <class T>
inline void copy(const T *from, T *to, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(T));
}

// Vectors of n, from and to rows so far apart. Those of a head, brought together, do not drive one another out of the
// cache as rows of all heads, a power of two apart, would.
template <class T>
inline void copy_rows(const T *from, int64_t stride, T *to, int64_t to_stride, int64_t n, int64_t count,
                      bool add = false) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t j = 0; j < n; j += W<T>) put(to + t * to_stride + j, load(from + t * stride + j), add);
}

// The same, and e^ of them.
template <class T>
inline void exp_rows(const T *from, int64_t stride, T *to, int64_t to_stride, int64_t n, int64_t count) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t j = 0; j < n; j += W<T>) store(to + t * to_stride + j, exp<T>(load(from + t * stride + j)));
}

// The arrays in elements.
struct Sizes {
  int64_t heads, n, stride, vectors, matrices, states, parts, strip;

  explicit Sizes(const Call &call)
      : heads(call.heads), n(call.size), stride(heads * n), vectors(call.tokens * stride), matrices(stride * n),
        states(call.tokens / CHUNK + call.sequences), parts(n < 32 ? 1 : 2), strip(lesser(n / parts, STRIP)) {}

  int64_t vector(int64_t token, int64_t head) const { return token * stride + head * n; }
  int64_t state(int64_t number, int64_t head) const { return number * matrices + head * n * n; }
  int64_t saved(int64_t begin, int64_t token, int64_t sequence, int64_t head) const {
    return state(begin / CHUNK + sequence + (token - begin) / CHUNK, head);
  }
  int64_t last_chunk(int64_t begin, int64_t end) const {  // its first token; before `begin` if there is none
    return begin < end ? begin + (end - begin - 1) / CHUNK * CHUNK : begin - 1;
  }
};

// Asks for a share of the vectors of a chunk.
template <int written, class T>
inline void prefetch_rows(const T *from, const Sizes &z, int64_t share, int64_t shares) {
  for (int64_t t = CHUNK * share / shares; t < CHUNK * (share + 1) / shares; t++)
    prefetch<written>(from + t * z.stride, z.n);
}

// Whether one head of the longest sequence is more than half of a thread's share: then heads are divided too.
inline bool must_split(const Call &call) {
  int64_t longest = 0;
  for (int64_t i = 0; i < call.sequences; i++) {
    int64_t length = call.borders[i + 1] - call.borders[i];
    longest = length > longest ? length : longest;
  }
  return 2 * longest * call.threads > call.tokens * call.heads;
}

// Bytes for a scratch per thread and the second part of some gradients.
template <template <class> class Scratch>
int64_t workspace_of(const Call &call, int64_t gradients) {
  const Sizes z(call);
  const int64_t own = call.dtype == F64 ? Scratch<double>::size(z) : Scratch<float>::size(z);
  const int64_t partial = must_split(call) && z.parts > 1 ? gradients * z.vectors : 0;
  return (call.dtype == F64 ? 8 : 4) * (call.threads * own + partial);
}

// sums[i] += partial (count, T, H, N).
template <class T>
void add_partials(const Call &call, T *const *sums, int64_t count, const T *partial, const Sizes &z) {
#pragma omp parallel for num_threads(call.threads) if (!is_small(call))
  for (int64_t t = 0; t < call.tokens; t++)
    for (int64_t i = 0; i < count; i++)
      copy_rows(partial + i * z.vectors + t * z.stride, 0, sums[i] + t * z.stride, 0, z.stride, 1, true);
}

// run(T(), C) with C = most registers for a row, or fewer where the head is small; -1 if there is no kernel.
template <int most, class F>
int with_width(const Call &call, const F &run) {
  const int64_t n = call.size;
  if (n != 16 && n != 32 && n != 64 && n != 128) return -1;
  auto choose = [&](auto type) {
    constexpr int width = W<decltype(type)>;
    if (n >= most * width)
      run(type, std::integral_constant<int, most>());
    else
      run(type, std::integral_constant<int, 1>());
    return 0;
  };
  return call.dtype == F32 ? choose(float()) : call.dtype == F64 ? choose(double()) : -1;
}

}  // namespace ISA
