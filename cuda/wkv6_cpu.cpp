// RWKV-5 and RWKV-6 on the CPU (arXiv:2404.05892, section 4): y = (S + v (u k)^T) r ; S <- S diag(e^w) + v k^T.
//
// No element of the state needs another, so a tile of it stays in registers over the tokens of a chunk. Forward: lanes
// are values, and tile after tile of keys is added to y. The state is saved every CHUNK tokens. Backward: lanes are
// keys. The states of a tile are made again from the saved one, then one sweep from the last token to the first carries
// G = dL/dS of the state after a token to the one before it: G <- G diag(e^w) + dy r^T.
#include "heads_cpu.h"

namespace ISA {
namespace {

template <class T>
struct Inputs {
  const T *r, *k, *v, *w, *u;

  explicit Inputs(void *const *x) : r((T *)x[0]), k((T *)x[1]), v((T *)x[2]), w((T *)x[3]), u((T *)x[4]) {}

  // Asks for a share of a chunk that comes soon.
  void prefetch_share(int64_t at, const Sizes &z, int64_t share, int64_t shares) const {
    prefetch_rows<0>(r + at, z, share, shares), prefetch_rows<0>(k + at, z, share, shares);
    prefetch_rows<0>(v + at, z, share, shares), prefetch_rows<0>(w + at, z, share, shares);
  }
};

// What lies together of a token, (N,) each.
enum Key { DECAY, K, R, KEYS };
enum Value { VALUE, DY, VALUES };
enum Gradient { DW, DK, DR, GRADIENTS };

template <class T>
void gather_keys(const Sizes &z, const Inputs<T> &x, int64_t at, int64_t count, T *keys) {
  exp_rows(x.w + at, z.stride, keys + DECAY * z.n, KEYS * z.n, z.n, count);
  copy_rows(x.k + at, z.stride, keys + K * z.n, KEYS * z.n, z.n, count);
  copy_rows(x.r + at, z.stride, keys + R * z.n, KEYS * z.n, z.n, count);
}

// out[t] = the sum over i of x_t[i] y_t[i] u[i], or without u. lanes: room for CHUNK vectors.
template <class T>
void products(const T *x, const T *y, const T *u, int64_t size, int64_t n, int64_t count, T *lanes, T *out) {
  for (int64_t t = 0; t < count; t++, x += size, y += size) {
    V<T> sum = {};
    for (int64_t j = 0; j < n; j += W<T>) sum += load(x + j) * (u ? load(u + j) * load(y + j) : load(y + j));
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
    if (begin == end) return copy(given + matrix + low * n, last + matrix + low * n, (high - low) * n);
    for (int64_t i = low; i < high; i += width)
      transpose(given + matrix + i * n, n, state + i * n, width, width, n);
    for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
      const int64_t count = lesser(CHUNK, end - chunk), at = z.vector(chunk, head);
      gather_keys(z, x, at, count, keys);
      copy_rows(x.v + at + low, z.stride, v + low, n, high - low, count);
      products(keys + R * n, keys + K * n, x.u + head * n, KEYS * n, n, count, lanes, bonus);
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = low; i < high; i += W<T>) store(y + t * n + i, load(v + t * n + i) * bonus[t]);
      for (int64_t i = low; i < high; i += width) {
        if (saved) transpose(state + i * n, width, saved + z.saved(begin, chunk, sequence, head) + i * n, n, n, width);
        for (int64_t j = 0; j < n; j += ROWS) {
          const int64_t tile = ((i - low) / width * n + j) / ROWS, tiles = (high - low) / width * n / ROWS;
          if (chunk + CHUNK < end) x.prefetch_share(at + CHUNK * z.stride, z, tile, tiles);
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

template <class T>
struct Backward {
  const Sizes z;
  const Inputs<T> x;
  T *const *out, *const dv, *const du, *const first, *const space;
  const T *const saved, *const dy, *const dstate;
  T *const grads[GRADIENTS];

  Backward(const Call &call, void *const *arrays)
      : z(call), x(arrays), out((T *const *)arrays + 9), dv(out[2]), du(out[4]), first(out[5]), space(out[6]),
        saved((T *)arrays[6]), dy((T *)arrays[7]), dstate((T *)arrays[8]), grads{out[3], out[1], out[0]} {}

  void gather(const Scratch<T> &own, const T *u, int64_t at, int64_t count) const {
    const int64_t n = z.n;
    gather_keys(z, x, at, count, own.keys);
    copy_rows(x.v + at, z.stride, own.values + VALUE * n, VALUES * n, n, count);
    copy_rows(dy + at, z.stride, own.values + DY * n, VALUES * n, n, count);
    products(own.keys + R * n, own.keys + K * n, u, KEYS * n, n, count, own.lanes, own.bonus);
    products(own.values, own.values + DY * n, (T *)nullptr, VALUES * n, n, count, own.lanes, own.seen);
  }

  void prefetch_share(int64_t at, const T *kept, int64_t share, int64_t shares) const {
    x.prefetch_share(at, z, share, shares);
    prefetch_rows<0>(dy + at, z, share, shares);
    prefetch<0>(kept + share * ROWS * z.n, ROWS * z.n);
    prefetch_rows<1>(out[0] + at, z, share, shares), prefetch_rows<1>(out[1] + at, z, share, shares);
    prefetch_rows<1>(out[2] + at, z, share, shares), prefetch_rows<1>(out[3] + at, z, share, shares);
  }

  // ROWS values of a chunk, from i on. at: of the first token's dv.
  void rows(const Scratch<T> &own, T *g, const T *kept, int64_t at, int64_t i, int64_t count, bool add) const {
    const int64_t n = z.n;
    for (int64_t j = 0; j < n; j += W<T>) {
      remake(kept + j, own.keys + j, own.values + i, n, count, own.states);
      sweep(g + j, own.states, own.keys + j, own.values + i, n, count, own.grads + j, own.lanes, add, j > 0);
    }
    lane_sums(own.lanes, own.sums, (count * ROWS + W<T> - 1) / W<T> * W<T>);
    for (int64_t t = 0; t < count; t++)
      for (int m = 0; m < ROWS; m++)
        dv[at + t * z.stride + m] = own.sums[t * ROWS + m] + own.bonus[t] * own.values[(t * VALUES + DY) * n + i + m];
  }

  // Once a part has the sums over states: that of w times its decay, and for the first part what the bonus adds.
  void finish(const Scratch<T> &own, const T *u, int64_t count, T *du) const {
    const int64_t n = z.n;
    for (int64_t j = 0; j < n; j += W<T>) {
      V<T> sum = {};
      for (int64_t t = 0; t < count; t++) {
        const T *key = own.keys + t * KEYS * n + j;
        T *grad = own.grads + t * GRADIENTS * n + j;
        store(grad + DW * n, load(grad + DW * n) * load(key + DECAY * n));
        if (!du) continue;
        const V<T> k = load(key + K * n) * own.seen[t], r = load(key + R * n) * own.seen[t];
        put(grad + DK * n, load(u + j) * r, true), put(grad + DR * n, load(u + j) * k, true);
        sum += load(key + K * n) * r;
      }
      if (du) put(du + j, sum, true);
    }
  }

  void run(const Call &call) const {
    const bool split = must_split(call) && z.parts > 1;
    T *partial = space + call.threads * Scratch<T>::size(z);
    for_each(call, split ? z.parts : 1, [=](int64_t sequence, int64_t head, int64_t part, int thread) {
      const Scratch<T> own(space + thread * Scratch<T>::size(z), z);
      const int64_t begin = call.borders[sequence], end = call.borders[sequence + 1], matrix = z.state(sequence, head);
      const int64_t n = z.n, half = n / z.parts, low = part * half, high = split ? low + half : n;
      const T *u = x.u + head * n;
      T *sum = du + z.vector(sequence, head);
      copy(dstate + matrix + low * n, first + matrix + low * n, (high - low) * n);
      if (!part) fill(sum, T(0), n);
      for (int64_t chunk = z.last_chunk(begin, end); chunk >= begin; chunk -= CHUNK) {
        const int64_t count = lesser(CHUNK, end - chunk), at = z.vector(chunk, head);
        const T *kept = saved + z.saved(begin, chunk, sequence, head);
        gather(own, u, at, count);
        for (int64_t i = low; i < high; i += ROWS) {
          if (chunk > begin)
            prefetch_share(at - CHUNK * z.stride, kept - z.matrices, (i - low) / ROWS, (high - low) / ROWS);
          rows(own, first + matrix + i * n, kept + i * n, at + i, i, count, i % half > 0);
          if ((i + ROWS) % half) continue;
          finish(own, u, count, i < half ? sum : nullptr);
          for (int m = 0; m < GRADIENTS; m++)
            copy_rows(own.grads + m * n, GRADIENTS * n, (part ? partial + m * z.vectors : grads[m]) + at, z.stride, n,
                      count, i >= half && !part);
        }
      }
    });
    if (split) add_partials(call, grads, GRADIENTS, partial, z);
  }
};

}  // namespace

int wkv6_forward(const Call &call, void *const *arrays) {
  return with_width<2>(call, [&](auto type, auto width) { forward<decltype(type), width.value>(call, arrays); });
}

int wkv6_backward(const Call &call, void *const *arrays) {
  return with_width<1>(call, [&](auto type, auto) { Backward<decltype(type)>(call, arrays).run(call); });
}

int64_t wkv6_workspace(const Call &call) { return workspace_of<Scratch>(call, GRADIENTS); }

}  // namespace ISA
