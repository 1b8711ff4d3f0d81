// RWKV-5 and RWKV-6 on the CPU (arXiv:2404.05892, section 4): y = (S + v (u k)^T) r ; S <- S diag(e^w) + v k^T.
//
// No element of the state needs another, so a tile of it stays in registers over the tokens of a chunk. Forward: lanes
// are values, and tile after tile of keys is added to y. The state is saved every CHUNK tokens. Backward: lanes are
// keys. The states of a tile are made again from the saved one, then one sweep from the last token to the first carries
// G = dL/dS, dL/dS <- dL/dS diag(e^w) + dy r^T. Gradients of v are sums over keys, all others sums over values: those
// are made in two parts of the values, and the second is added to the first whoever made them.
#include "cpu.h"

namespace ISA {
namespace {

template <class T>
struct Inputs {
  const T *r, *k, *v, *w, *u;

  explicit Inputs(void *const *x) : r((T *)x[0]), k((T *)x[1]), v((T *)x[2]), w((T *)x[3]), u((T *)x[4]) {}
};

enum Key { DECAY, K, R, KEYS };              // of a token, (N,) each
enum Value { VALUE, DY, VALUES };            // (N,) each
enum Gradient { DW, DK, DR, GRADIENTS };     // (N,) each

template <class T>
void gather_keys(const Sizes &z, const Inputs<T> &x, int64_t at, int64_t count, T *keys) {
  exp_rows(x.w + at, z.stride, keys + DECAY * z.n, KEYS * z.n, z.n, count);
  copy_rows(x.k + at, z.stride, keys + K * z.n, KEYS * z.n, z.n, count);
  copy_rows(x.r + at, z.stride, keys + R * z.n, KEYS * z.n, z.n, count);
}

// out[t] = r_t . (u k_t), what a token's own v counts in its y. lanes: room for CHUNK vectors.
template <class T>
void bonus_of(const T *keys, const T *u, int64_t n, int64_t count, T *lanes, T *out) {
  for (int64_t t = 0; t < count; t++, keys += KEYS * n) {
    V<T> sum = {};
    for (int64_t j = 0; j < n; j += W<T>) sum += load(keys + R * n + j) * (load(u + j) * load(keys + K * n + j));
    store(lanes + t * W<T>, sum);
  }
  lane_sums(lanes, out, CHUNK);
}

// out[t] = v_t . dy_t
template <class T>
void seen_of(const T *values, int64_t n, int64_t count, T *lanes, T *out) {
  for (int64_t t = 0; t < count; t++, values += VALUES * n) {
    V<T> sum = {};
    for (int64_t j = 0; j < n; j += W<T>) sum += load(values + VALUE * n + j) * load(values + DY * n + j);
    store(lanes + t * W<T>, sum);
  }
  lane_sums(lanes, out, CHUNK);
}

// A tile of the state, ROWS keys by C W values, over the tokens of a chunk. v, y: (count, N) from these values on.
template <class T, int C>
void read(T *state, const T *keys, const T *v, int64_t n, int64_t count, T *y) {
  V<T> s[ROWS][C];
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int c = 0; c < C; c++) s[i][c] = load(state + (i * C + c) * W<T>);
  for (int64_t t = 0; t < count; t++, keys += KEYS * n, v += n, y += n) {
    V<T> now[C], sum[C];
    UNROLL for (int c = 0; c < C; c++) now[c] = load(v + c * W<T>), sum[c] = load(y + c * W<T>);
    UNROLL for (int i = 0; i < ROWS; i++) {
      UNROLL for (int c = 0; c < C; c++) {
        sum[c] += s[i][c] * keys[R * n + i];
        s[i][c] = s[i][c] * keys[DECAY * n + i] + now[c] * keys[K * n + i];
      }
    }
    UNROLL for (int c = 0; c < C; c++) store(y + c * W<T>, sum[c]);
  }
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int c = 0; c < C; c++) store(state + (i * C + c) * W<T>, s[i][c]);
}

template <class T, int C>
void forward(const Call &call, void *const *arrays) {
  const Sizes z(call);
  const Inputs<T> x(arrays);
  const T *given = (T *)arrays[5];
  T *out = (T *)arrays[6], *last = (T *)arrays[7], *saved = (T *)arrays[8];
  constexpr int width = C * W<T>;
  const int64_t n = z.n, blocks = n / width, parts = must_split(call) ? blocks : 1;
  for_each(call, parts, [=](int64_t sequence, int64_t head, int64_t part, int) {
    alignas(64) T state[LARGEST * LARGEST], keys[CHUNK * KEYS * LARGEST], v[CHUNK * LARGEST], y[CHUNK * LARGEST];
    alignas(64) T lanes[CHUNK * W<T>], bonus[CHUNK];
    const int64_t begin = call.borders[sequence], end = call.borders[sequence + 1], matrix = z.state(sequence, head);
    const int64_t low = part * blocks / parts * width, high = (part + 1) * blocks / parts * width;
    for (int64_t i = low; i < high; i += width)
      transpose(given + matrix + i * n, n, state + i * n, width, width, n);
    for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
      const int64_t count = lesser(CHUNK, end - chunk), at = z.vector(chunk, head);
      gather_keys(z, x, at, count, keys);
      copy_rows(x.v + at + low, z.stride, v + low, n, high - low, count);
      bonus_of(keys, x.u + head * n, n, count, lanes, bonus);
      for (int64_t i = low; i < high; i += W<T>)
        for (int64_t t = 0; t < count; t++) store(y + t * n + i, load(v + t * n + i) * bonus[t]);
      for (int64_t i = low; i < high; i += width) {
        if (saved) transpose(state + i * n, width, saved + z.saved(begin, chunk, sequence, head) + i * n, n, n, width);
        for (int64_t j = 0; j < n; j += ROWS) {
          if (chunk + CHUNK < end) {
            const int64_t tile = ((i - low) / width * n + j) / ROWS, tiles = (high - low) / width * n / ROWS;
            for (const T *p : {x.r, x.k, x.v, x.w}) prefetch_share<0>(p + at + CHUNK * z.stride, z, tile, tiles);
          }
          read<T, C>(state + i * n + j * width, keys + j, v + i, n, count, y + i);
        }
      }
      copy_rows(y + low, n, out + at + low, z.stride, high - low, count);
    }
    for (int64_t i = low; i < high; i += width) transpose(state + i * n, width, last + matrix + i * n, n, n, width);
  });
}

template <class T>
struct Scratch {
  T *keys, *values, *grads, *states, *lanes, *sums, *bonus, *seen;

  static int64_t size(const Sizes &z) {
    return CHUNK * (z.n * (KEYS + VALUES + GRADIENTS + ROWS) + ROWS * (W<T> + 1) + 2);
  }
  Scratch(T *from, const Sizes &z) {
    keys = from, values = keys + CHUNK * KEYS * z.n, grads = values + CHUNK * VALUES * z.n;
    states = grads + CHUNK * GRADIENTS * z.n, lanes = states + CHUNK * ROWS * z.n;
    sums = lanes + CHUNK * ROWS * W<T>, bonus = sums + CHUNK * ROWS, seen = bonus + CHUNK;
  }
};

// The states before each token of a chunk: a tile of ROWS values by W keys. v: (count, VALUES, N) from these on.
template <class T>
void remake(const T *kept, const T *keys, const T *v, int64_t n, int64_t count, T *states) {
  V<T> s[ROWS];
  UNROLL for (int i = 0; i < ROWS; i++) s[i] = load(kept + i * n);
  for (int64_t t = 0; t < count; t++, keys += KEYS * n, v += VALUES * n, states += ROWS * W<T>) {
    const V<T> w = load(keys + DECAY * n), k = load(keys + K * n);
    UNROLL for (int i = 0; i < ROWS; i++) {
      store(states + i * W<T>, s[i]);
      s[i] = s[i] * w + k * v[i];
    }
  }
}

// The same tile of G, from the last token to the first. lanes (count, ROWS): products with k, whose lanes sum to dv.
template <class T>
void sweep(T *kept, const T *states, const T *keys, const T *values, int64_t n, int64_t count, T *grads, T *lanes,
           bool add, bool add_lanes) {
  V<T> g[ROWS];
  UNROLL for (int i = 0; i < ROWS; i++) g[i] = load(kept + i * n);
  for (int64_t t = count - 1; t >= 0; t--) {
    const T *key = keys + t * KEYS * n, *v = values + t * VALUES * n, *dy = v + DY * n, *s = states + t * ROWS * W<T>;
    const V<T> w = load(key + DECAY * n), k = load(key + K * n), r = load(key + R * n);
    V<T> dw = {}, dk = {}, dr = {};
    UNROLL for (int i = 0; i < ROWS; i++) {
      const V<T> state = load(s + i * W<T>);
      dw += state * g[i], dk += g[i] * v[i], dr += state * dy[i];
      put(lanes + (t * ROWS + i) * W<T>, g[i] * k, add_lanes);
      g[i] = g[i] * w + r * dy[i];
    }
    T *grad = grads + t * GRADIENTS * n;
    put(grad + DW * n, dw, add), put(grad + DK * n, dk, add), put(grad + DR * n, dr, add);
  }
  UNROLL for (int i = 0; i < ROWS; i++) store(kept + i * n, g[i]);
}

// A chunk's gradients of the keys as sums over states: those of w, and, for the first part, what the bonus adds.
template <class T>
void finish(const Sizes &z, const Scratch<T> &own, const T *u, int64_t count, T *du) {
  const int64_t n = z.n;
  for (int64_t j = 0; j < n; j += W<T>) {
    V<T> sum = {}, uj = u ? load(u + j) : V<T>{};
    for (int64_t t = 0; t < count; t++) {
      const T *key = own.keys + t * KEYS * n + j;
      T *grad = own.grads + t * GRADIENTS * n + j;
      V<T> k = load(key + K * n), r = load(key + R * n);
      store(grad + DW * n, load(grad + DW * n) * load(key + DECAY * n));
      if (!u) continue;
      put(grad + DK * n, uj * r * own.seen[t], true), put(grad + DR * n, uj * k * own.seen[t], true);
      sum += k * r * own.seen[t];
    }
    if (u) put(du + j, sum, true);
  }
}

template <class T>
void backward(const Call &call, void *const *arrays) {
  const Sizes z(call);
  const Inputs<T> x(arrays);
  T *const *out = (T *const *)arrays + 9, *first = out[5], *space = out[6];
  const T *saved = (T *)arrays[6], *dy = (T *)arrays[7], *dstate = (T *)arrays[8];
  T *const grads[GRADIENTS] = {out[3], out[1], out[0]}, *dv = out[2];
  const bool split = must_split(call);
  T *partial = space + call.threads * Scratch<T>::size(z);
  for_each(call, split ? z.parts : 1, [=](int64_t sequence, int64_t head, int64_t part, int thread) {
    const Scratch<T> own(space + thread * Scratch<T>::size(z), z);
    const int64_t begin = call.borders[sequence], end = call.borders[sequence + 1], matrix = z.state(sequence, head);
    const int64_t n = z.n, rows = n / z.parts, low = part * rows, high = split ? low + rows : n;
    const T *u = x.u + head * n;
    T *du = out[4] + z.vector(sequence, head);
    __builtin_memcpy(first + matrix + low * n, dstate + matrix + low * n, sizeof(T) * (high - low) * n);
    if (!part) fill(du, T(0), n);
    if (begin == end) return;
    for (int64_t chunk = begin + (end - begin - 1) / CHUNK * CHUNK; chunk >= begin; chunk -= CHUNK) {
      const int64_t count = lesser(CHUNK, end - chunk), at = z.vector(chunk, head);
      const T *kept = saved + z.saved(begin, chunk, sequence, head);
      gather_keys(z, x, at, count, own.keys);
      copy_rows(x.v + at, z.stride, own.values + VALUE * n, VALUES * n, n, count);
      copy_rows(dy + at, z.stride, own.values + DY * n, VALUES * n, n, count);
      bonus_of(own.keys, u, n, count, own.lanes, own.bonus);
      seen_of(own.values, n, count, own.lanes, own.seen);
      for (int64_t i = low; i < high; i += ROWS) {
        for (int64_t j = 0; j < n; j += W<T>) {
          if (chunk > begin) {
            const int64_t tile = ((i - low) * n / ROWS + j) / W<T>, tiles = (high - low) * n / (ROWS * W<T>);
            for (const T *p : {x.r, x.k, x.v, x.w, dy}) prefetch_share<0>(p + at - CHUNK * z.stride, z, tile, tiles);
            prefetch<0>(kept - z.matrices + tile * ROWS * W<T>, ROWS * W<T>);
            for (T *p : {out[0], out[1], out[2], out[3]}) prefetch_share<1>(p + at - CHUNK * z.stride, z, tile, tiles);
          }
          remake(kept + i * n + j, own.keys + j, own.values + i, n, count, own.states);
          sweep(first + matrix + i * n + j, own.states, own.keys + j, own.values + i, n, count, own.grads + j,
                      own.lanes, i % rows > 0, j > 0);
        }
        lane_sums(own.lanes, own.sums, (count * ROWS + W<T> - 1) / W<T> * W<T>);
        for (int64_t t = 0; t < count; t++)
          for (int m = 0; m < ROWS; m++)
            dv[at + t * z.stride + i + m] =
                own.sums[t * ROWS + m] + own.bonus[t] * own.values[(t * VALUES + DY) * n + i + m];
        if ((i + ROWS) % rows) continue;
        finish(z, own, i < rows ? u : nullptr, count, du);
        for (int m = 0; m < GRADIENTS; m++)
          copy_rows(own.grads + m * n, GRADIENTS * n, (part ? partial + m * z.vectors : grads[m]) + at, z.stride, n,
                    count, i >= rows && !part);
      }
    }
  });
  if (split && z.parts > 1) add_partials(call, grads, GRADIENTS, partial, z);
}

template <class T>
int64_t workspace(const Call &call) {
  const Sizes z(call);
  const int64_t partials = must_split(call) && z.parts > 1 ? GRADIENTS * z.vectors : 0;
  return int64_t(sizeof(T)) * (call.threads * Scratch<T>::size(z) + partials);
}

}  // namespace

int wkv6_forward(const Call &call, void *const *arrays) {
  return with_width<FORWARD_VECTORS>(call, [&](auto type, auto width) {
    forward<decltype(type), width.value>(call, arrays);
  });
}

int wkv6_backward(const Call &call, void *const *arrays) {
  return with_width<1>(call, [&](auto type, auto) { backward<decltype(type)>(call, arrays); });
}

int64_t wkv6_workspace(const Call &call) {
  return call.dtype == F64 ? workspace<double>(call) : workspace<float>(call);
}

}  // namespace ISA
