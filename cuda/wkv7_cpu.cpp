// RWKV-7 on the CPU (Peng et al. 2025, arXiv:2503.14456, section 4): S <- S diag(e^w) + (S a) b^T + v k^T ; y = S r.
//
// Forward: lanes are values, and one pass over S per token does the decay, both rank-1 updates, y, and S a of the token
// that follows. The state is saved every CHUNK tokens, S a at each. Backward: lanes are keys. The states of a chunk are
// made again from the saved one, never by dividing by the decay; then one pass per token, from the last to the first,
// does the gradients and takes G = dL/dS back to the token before: G <- G diag(e^w) + (G b) a^T + dy r^T of that token.
#include "heads_cpu.h"

namespace ISA {
namespace {

// The arrays of a call, then from a token or head on. sa is S a, with S the state before the token.
template <class T>
struct Inputs {
  const T *r, *w, *k, *v, *a, *b, *sa;

  Inputs(void *const *x, const T *sa)
      : r((T *)x[0]), w((T *)x[1]), k((T *)x[2]), v((T *)x[3]), a((T *)x[4]), b((T *)x[5]), sa(sa) {}

  void prefetch_token(int64_t at, int64_t n) const {
    prefetch<0>(r + at, n), prefetch<0>(w + at, n), prefetch<0>(k + at, n);
    prefetch<0>(v + at, n), prefetch<0>(a + at, n), prefetch<0>(b + at, n);
  }
};

// out = S a. s: (N keys, C W values).
template <class T, int C>
void apply(const T *s, const T *a, int64_t n, T *out) {
  V<T> sum[C] = {};
  for (int64_t j = 0; j < n; j++)
    UNROLL for (int c = 0; c < C; c++) sum[c] += load(s + (j * C + c) * W<T>) * a[j];
  UNROLL for (int c = 0; c < C; c++) store(out + c * W<T>, sum[c]);
}

// s: (N keys, C W values). keys: e^w, b, k, r of the token and a of the next. sa becomes that of the next.
template <class T, int C>
void step(T *s, int64_t n, const T *keys, const T *values, T *sa, T *y) {
  const T *w = keys, *b = w + n, *k = b + n, *r = k + n, *next_a = r + n;
  V<T> v[C], removed[C], read[C] = {}, next[C] = {};
  UNROLL for (int c = 0; c < C; c++) v[c] = load(values + c * W<T>), removed[c] = load(sa + c * W<T>);
  for (int64_t j = 0; j < n; j++, s += C * W<T>) {
    UNROLL for (int c = 0; c < C; c++) {
      V<T> row = load(s + c * W<T>) * w[j] + removed[c] * b[j] + v[c] * k[j];
      store(s + c * W<T>, row);
      read[c] += row * r[j], next[c] += row * next_a[j];
    }
  }
  UNROLL for (int c = 0; c < C; c++) store(y + c * W<T>, read[c]), store(sa + c * W<T>, next[c]);
}

// What the steps of a chunk need of its tokens: e^w, b, k, r, and a of the token after.
template <class T>
void gather_steps(const Sizes &z, const Inputs<T> &x, int64_t at, int64_t count, bool is_last, T *keys) {
  const int64_t n = z.n, size = 5 * n, after = is_last ? count - 1 : count;
  exp_rows(x.w + at, z.stride, keys, size, n, count);
  copy_rows(x.b + at, z.stride, keys + n, size, n, count);
  copy_rows(x.k + at, z.stride, keys + 2 * n, size, n, count);
  copy_rows(x.r + at, z.stride, keys + 3 * n, size, n, count);
  copy_rows(x.a + at + z.stride, z.stride, keys + 4 * n, size, n, after);
  if (is_last) fill(keys + after * size + 4 * n, T(0), n);
}

template <class T, int C>
void forward(const Call &call, void *const *arrays) {
  const Sizes z(call);
  const T *given = (T *)arrays[6];
  T *y = (T *)arrays[7], *last = (T *)arrays[8], *saved = (T *)arrays[9], *saved_sa = saved + z.states * z.matrices;
  const Inputs<T> x(arrays, saved_sa);
  constexpr int width = C * W<T>;
  const int64_t n = z.n, blocks = n / width, parts = must_split(call) ? blocks : 1;
  for_each(call, parts, [=](int64_t sequence, int64_t head, int64_t part, int) {
    alignas(64) T state[LARGEST * LARGEST], keys[CHUNK * 5 * LARGEST], sa[LARGEST];
    const int64_t begin = call.borders[sequence], end = call.borders[sequence + 1], matrix = z.state(sequence, head);
    const int64_t low = part * blocks / parts * width, high = (part + 1) * blocks / parts * width;
    if (begin == end) return copy(given + matrix + low * n, last + matrix + low * n, (high - low) * n);
    for (int64_t i = low; i < high; i += width) {
      transpose(given + matrix + i * n, n, state + i * n, width, width, n);
      apply<T, C>(state + i * n, x.a + z.vector(begin, head), n, sa + i);
    }
    for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
      const int64_t count = lesser(CHUNK, end - chunk), at = z.vector(chunk, head);
      gather_steps(z, x, at, count, chunk + count == end, keys);
      for (int64_t i = low; i < high; i += width) {
        if (saved) transpose(state + i * n, width, saved + z.saved(begin, chunk, sequence, head) + i * n, n, n, width);
        for (int64_t t = 0; t < count; t++) {
          const int64_t row = at + t * z.stride + i;
          if (i == low && chunk + t + CHUNK < end) x.prefetch_token(row + CHUNK * z.stride, n);
          if (saved) copy(sa + i, saved_sa + row, width);
          step<T, C>(state + i * n, n, keys + t * 5 * n, x.v + row, sa + i, y + row);
        }
      }
    }
    for (int64_t i = low; i < high; i += width) transpose(state + i * n, width, last + matrix + i * n, n, n, width);
  });
}

// A pass stands between two tokens, with S the state there: it needs of the token after S e^w, a, v, sa and d(S a), and
// of the one before r, b, k and dy. Where a chunk ends, there is nothing in the place of one of them.
enum Key { DECAY, A, R, B, K, KEYS };             // (N,) each
enum Value { VALUE, SA, DY, DSA, DV, VALUES };    // (ROWS,) each, for ROWS values after the other
enum Gradient { DW, DK, DB, DA, DR, GRADIENTS };  // (N,) each, of the same tokens

template <class T>
struct Scratch {
  T *keys, *values, *grads, *states, *lanes;

  static int64_t size(const Sizes &z) {
    return (CHUNK + 1) * (KEYS * z.n + VALUES * z.strip + GRADIENTS * z.n + z.strip * z.n) + VALUES * z.strip +
           2 * z.strip * W<T>;
  }
  Scratch(T *from, const Sizes &z) {
    keys = from, values = keys + (CHUNK + 1) * KEYS * z.n + VALUES * z.strip;  // one more, before the first
    grads = values + (CHUNK + 1) * VALUES * z.strip;
    states = grads + (CHUNK + 1) * GRADIENTS * z.n, lanes = states + (CHUNK + 1) * z.strip * z.n;
  }
};

template <class T>
void gather_keys(const Sizes &z, const Inputs<T> &x, int64_t at, int64_t count, T *keys) {
  const int64_t n = z.n, size = KEYS * n;
  exp_rows(x.w + at, z.stride, keys + DECAY * n, size, n, count);
  fill(keys + count * size + DECAY * n, T(1), n);
  copy_rows(x.a + at, z.stride, keys + A * n, size, n, count);
  fill(keys + count * size + A * n, T(0), n);
  fill(keys + R * n, T(0), 3 * n);
  copy_rows(x.r + at, z.stride, keys + size + R * n, size, n, count);
  copy_rows(x.b + at, z.stride, keys + size + B * n, size, n, count);
  copy_rows(x.k + at, z.stride, keys + size + K * n, size, n, count);
}

template <class T>
void gather_values(const Sizes &z, const Inputs<T> &x, const T *dy, int64_t at, int64_t count, T *values) {
  const int64_t size = VALUES * z.strip;
  fill(values + count * size, T(0), size);
  for (int64_t i = 0; i < z.strip; i += ROWS, values += VALUES * ROWS) {
    fill(values + DY * ROWS, T(0), ROWS);
    for (int64_t t = 0; t < count; t++) {
      const int64_t from = at + t * z.stride + i;
      copy(x.v + from, values + t * size + VALUE * ROWS, ROWS);
      copy(x.sa + from, values + t * size + SA * ROWS, ROWS);
      copy(dy + from, values + (t + 1) * size + DY * ROWS, ROWS);
    }
  }
}

// A tile of states is ROWS values by C W keys, and its states before each token of a chunk and after the last lie side
// by side: they are made in registers and stored as one stream.
template <class T, int C>
void remake(const T *kept, const T *keys, const T *values, int64_t n, int64_t strip, int64_t count, T *states) {
  for (int64_t j = 0; j < n; j += C * W<T>) {
    for (int64_t i = 0; i < strip; i += ROWS, states += (CHUNK + 1) * ROWS * C * W<T>) {
      V<T> s[ROWS][C], w[C], b[C], k[C];
      UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < C; c++) s[r][c] = load(kept + (i + r) * n + j + c * W<T>);
      const T *key = keys + j, *value = values + i * VALUES;
      T *to = states;
      for (int64_t t = 0; t < count; t++, key += KEYS * n, value += VALUES * strip) {
        UNROLL for (int c = 0; c < C; c++) {
          w[c] = load(key + DECAY * n + c * W<T>);
          b[c] = load(key + (KEYS + B) * n + c * W<T>), k[c] = load(key + (KEYS + K) * n + c * W<T>);
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
          UNROLL for (int c = 0; c < C; c++, to += W<T>) {
            store(to, s[r][c]);
            s[r][c] = s[r][c] * w[c] + b[c] * value[SA * ROWS + r] + k[c] * value[VALUE * ROWS + r];
          }
        }
      }
      UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < C; c++, to += W<T>) store(to, s[r][c]);
    }
  }
}

// s: of the first tile. g (strip, N): dL/dS of the token after, with the part of its own y; on return the same of the
// token before. lanes: products with b and k of the token before; they sum to its d(S a) and dv, which go to `before`.
template <class T, int C>
void pass(const T *s, T *g, int64_t n, int64_t strip, const T *keys, const T *values, T *before, T *grads, T *lanes,
          bool add) {
  for (int64_t j = 0; j < n; j += C * W<T>) {
    V<T> dw[C] = {}, dk[C] = {}, db[C] = {}, da[C] = {}, dr[C] = {}, w[C], a[C], r[C], b[C], k[C];
    UNROLL for (int c = 0; c < C; c++) {
      const T *key = keys + j + c * W<T>;
      w[c] = load(key + DECAY * n), a[c] = load(key + A * n);
      r[c] = load(key + R * n), b[c] = load(key + B * n), k[c] = load(key + K * n);
    }
    T *to = g + j;
    for (int64_t i = 0; i < strip; i += ROWS, s += (CHUNK + 1) * ROWS * C * W<T>) {
      const T *value = values + i * VALUES;
      T *product = lanes + i * 2 * W<T>;
      for (int64_t m = 0; m < ROWS; m++, value++, product += W<T>, to += n) {
        const T v = value[VALUE * ROWS], sa = value[SA * ROWS], dsa = value[DSA * ROWS], dy = value[DY * ROWS];
        V<T> with_b = {}, with_k = {};
        UNROLL for (int c = 0; c < C; c++) {
          V<T> state = load(s + (m * C + c) * W<T>), grad = load(to + c * W<T>);
          dw[c] += state * grad, dk[c] += grad * v, db[c] += grad * sa, da[c] += state * dsa, dr[c] += state * dy;
          grad = grad * w[c] + a[c] * dsa + r[c] * dy;
          store(to + c * W<T>, grad);
          with_b += grad * b[c], with_k += grad * k[c];
        }
        put(product, with_b, j > 0), put(product + ROWS * W<T>, with_k, j > 0);
      }
      if (j + C * W<T> == n) lane_sums(lanes + i * 2 * W<T>, before + i * VALUES + DSA * ROWS, 2 * ROWS);
    }
    UNROLL for (int c = 0; c < C; c++) {
      T *grad = grads + j + c * W<T>;
      put(grad + DW * n, dw[c] * w[c], add), put(grad + DK * n, dk[c], add), put(grad + DB * n, db[c], add);
      put(grad + DA * n, da[c], add), put(grad + DR * n, dr[c], add);
    }
  }
}

template <class T, int C>
struct Backward {
  const Sizes z;
  T *const *out, *const dv, *const first, *const space;
  const T *const saved, *const dy, *const dstate;
  const Inputs<T> x;
  T *const grads[GRADIENTS];

  Backward(const Call &call, void *const *arrays)
      : z(call), out((T *const *)arrays + 10), dv(out[3]), first(out[6]), space(out[7]), saved((T *)arrays[7]),
        dy((T *)arrays[8]), dstate((T *)arrays[9]), x(arrays, saved + z.states * z.matrices),
        grads{out[1], out[2], out[5], out[4], out[0]} {}

  // Token t of the chunk before, which begins at `at` and its state at `kept`: asked for while this one is computed.
  void prefetch_token(int64_t at, const T *kept, int64_t t) const {
    const int64_t n = z.n, share = n * n / CHUNK;
    at += t * z.stride;
    x.prefetch_token(at, n), prefetch<0>(x.sa + at, n), prefetch<0>(dy + at, n), prefetch<0>(kept + t * share, share);
    prefetch<1>(out[0] + at, n), prefetch<1>(out[1] + at, n), prefetch<1>(out[2] + at, n);
    prefetch<1>(out[3] + at, n), prefetch<1>(out[4] + at, n), prefetch<1>(out[5] + at, n);
  }

  // The strip of values from i on.
  void strip(const Scratch<T> &own, T *g, const T *kept, int64_t at, int64_t count, bool add, bool ask) const {
    const int64_t n = z.n, size = VALUES * z.strip;
    gather_values(z, x, dy, at, count, own.values);
    remake<T, C>(kept, own.keys, own.values, n, z.strip, count, own.states);
    for (int64_t t = count; t >= 0; t--) {
      T *values = own.values + t * size;
      if (ask && t < CHUNK) prefetch_token(at - CHUNK * z.stride, kept - z.matrices, t);
      pass<T, C>(own.states + t * ROWS * C * W<T>, g, n, z.strip, own.keys + t * KEYS * n, values, values - size,
                 own.grads + t * GRADIENTS * n, own.lanes, add);
    }
    for (int64_t t = 0; t < count; t++)
      for (int64_t i = 0; i < z.strip; i += ROWS)
        copy(own.values + t * size + i * VALUES + DV * ROWS, dv + at + t * z.stride + i, ROWS);
  }

  void run(const Call &call) const {
    const bool split = must_split(call) && z.parts > 1;
    T *partial = space + call.threads * Scratch<T>::size(z);
    for_each(call, split ? z.parts : 1, [=](int64_t sequence, int64_t head, int64_t part, int thread) {
      const Scratch<T> own(space + thread * Scratch<T>::size(z), z);
      const int64_t begin = call.borders[sequence], end = call.borders[sequence + 1], matrix = z.state(sequence, head);
      const int64_t n = z.n, rows = n / z.parts, low = part * rows, high = split ? low + rows : n;
      copy(dstate + matrix + low * n, first + matrix + low * n, (high - low) * n);
      for (int64_t chunk = z.last_chunk(begin, end); chunk >= begin; chunk -= CHUNK) {
        const int64_t count = lesser(CHUNK, end - chunk), at = z.vector(chunk, head);
        const T *kept = saved + z.saved(begin, chunk, sequence, head);
        gather_keys(z, x, at, count, own.keys);
        for (int64_t i = low; i < high; i += z.strip) {
          strip(own, first + matrix + i * n, kept + i * n, at + i, count, i % rows > 0, i == low && chunk > begin);
          if ((i + z.strip) % rows) continue;
          for (int m = 0; m < GRADIENTS; m++)
            copy_rows(own.grads + m * n + (m == DR) * GRADIENTS * n, GRADIENTS * n,
                      (part ? partial + m * z.vectors : grads[m]) + at, z.stride, n, count, i >= rows && !part);
        }
      }
    });
    if (split) add_partials(call, grads, GRADIENTS, partial, z);
  }
};

}  // namespace

int wkv7_forward(const Call &call, void *const *arrays) {
  return with_width<2>(call, [&](auto type, auto width) { forward<decltype(type), width.value>(call, arrays); });
}

int wkv7_backward(const Call &call, void *const *arrays) {
  return with_width<VECTORS>(call, [&](auto type, auto width) {
    Backward<decltype(type), width.value>(call, arrays).run(call);
  });
}

int64_t wkv7_workspace(const Call &call) { return workspace_of<Scratch>(call, GRADIENTS); }

}  // namespace ISA
