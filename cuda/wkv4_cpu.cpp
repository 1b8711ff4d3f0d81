// RWKV-4 on the CPU (Peng et al. 2023, arXiv:2305.13048, appendix D): N <- e^w N + e^k v ; D <- e^w D + e^k ;
// y = (N + e^(u+k) v) / (D + e^(u+k)), with N = n e^m and D = d e^m, m the largest exponent so far.
//
// Lanes are channels, a task is a sequence and VECTORS vectors of them. Backward makes the states of a chunk again from
// the saved one. Of two exponents one is the largest, so that each pair of scales costs one e^x. The exponent is kept
// as top + since w: adding w token after token would round as often.
#include "cpu.h"

namespace ISA {
namespace {

constexpr int VECTORS = 4;
enum Part { NUMERATOR, DENOMINATOR, EXPONENT, PARTS };

// Lanes past the last channel are zeros, which no operation here makes infinite.
template <class T>
V<T> load_lanes(const T *from, int64_t lanes) {
  if (lanes >= W<T>) return load(from);
  V<T> x = {};
  if (lanes > 0) __builtin_memcpy(&x, from, sizeof(T) * lanes);
  return x;
}

template <class T>
void store_lanes(T *to, V<T> x, int64_t lanes) {
  if (lanes >= W<T>)
    store(to, x);
  else if (lanes > 0)
    __builtin_memcpy(to, &x, sizeof(T) * lanes);
}

template <class T>
struct Scales {
  V<T> left, right, top;

  Scales(V<T> a, V<T> b) {
    const V<T> one = V<T>{} + T(1);
    const V<T> least = exp<T>(a > b ? b - a : a - b);
    left = a >= b ? one : least, right = a >= b ? least : one, top = a >= b ? a : b;
  }
};

template <class T>
struct State {
  V<T> n, d, top, since;

  V<T> exponent(V<T> w) const { return top + since * w; }

  void add(V<T> w, V<T> k, V<T> v) {
    const V<T> later = since + T(1), decayed = top + later * w;
    const Scales<T> s(decayed, k);
    n = s.left * n + s.right * v, d = s.left * d + s.right;
    top = decayed >= k ? top : k, since = decayed >= k ? later : V<T>{};
  }

  // With the exponent as one number; what its rounding took away goes to n and d.
  void settle(V<T> w) {
    const V<T> whole = exponent(w), rest = exp<T>(since * w + (top - whole));
    n *= rest, d *= rest, top = whole, since = V<T>{};
  }
};

// The gradients of the state after a token on the way to those before it, and the sums of those of w and u.
template <class T>
struct Gradient {
  V<T> n, d, w, u;

  // Returns: dk; dv by reference.
  V<T> back(const State<T> &s, V<T> log_decay, V<T> bonus, V<T> k, V<T> v, V<T> dy, V<T> &dv) {
    const Scales<T> kept(s.top + (s.since + T(1)) * log_decay, k), read(s.exponent(log_decay), bonus + k);
    w += kept.left * (n * s.n + d * s.d);
    V<T> dk = kept.right * (n * v + d);
    dv = kept.right * n;
    const V<T> below = read.left * s.d + read.right, dn = dy / below;
    const V<T> dd = -dn * (read.left * s.n + read.right * v) / below, now = read.right * (dn * v + dd);
    u += now;
    n = kept.left * n + read.left * dn, d = kept.left * d + read.left * dd;
    dv += read.right * dn;
    return dk + now;
  }
};

// Nothing is left of a state after a decay of e^-1e30, and 0 times it is 0.
template <class T>
V<T> load_decay(const T *from, int64_t lanes) {
  const V<T> w = load_lanes(from, lanes), least = V<T>{} - T(1e30);
  return w < least ? least : w;
}

struct Layout {
  int64_t channels, tasks;

  template <class T>
  static Layout of(const Call &call, T) {
    const int64_t channels = call.heads * call.size, width = VECTORS * W<T>;
    return {channels, (channels + width - 1) / width};
  }
  int64_t saved(const Call &call, int64_t sequence, int64_t token) const {
    const int64_t begin = call.borders[sequence];
    return (begin / CHUNK + sequence + (token - begin) / CHUNK) * PARTS * channels;
  }
};

template <class T>
void load_state(State<T> *s, const T *from, int64_t channels, int64_t lanes) {
  UNROLL for (int c = 0; c < VECTORS; c++) {
    const int64_t at = c * W<T>, left = lanes - at;
    s[c] = {load_lanes(from + at, left), load_lanes(from + channels + at, left),
            load_lanes(from + 2 * channels + at, left), V<T>{}};
  }
}

template <class T>
void store_state(const State<T> *s, T *to, int64_t channels, int64_t lanes) {
  UNROLL for (int c = 0; c < VECTORS; c++) {
    const int64_t at = c * W<T>, left = lanes - at;
    store_lanes(to + at, s[c].n, left), store_lanes(to + channels + at, s[c].d, left);
    store_lanes(to + 2 * channels + at, s[c].top, left);
  }
}

template <class T>
void forward(const Call &call, void *const *arrays) {
  T *const *x = (T *const *)arrays;
  const Layout z = Layout::of(call, T());
  for_each(call, z.tasks, [=](int64_t sequence, int64_t, int64_t task, int) {
    const int64_t first = task * VECTORS * W<T>, lanes = z.channels - first;
    V<T> w[VECTORS], u[VECTORS];
    State<T> s[VECTORS];
    UNROLL for (int c = 0; c < VECTORS; c++) {
      w[c] = load_decay(x[0] + first + c * W<T>, lanes - c * W<T>);
      u[c] = load_lanes(x[1] + first + c * W<T>, lanes - c * W<T>);
    }
    load_state(s, x[4] + sequence * PARTS * z.channels + first, z.channels, lanes);
    const int64_t begin = call.borders[sequence], end = call.borders[sequence + 1];
    for (int64_t t = begin; t < end; t++) {
      if ((t - begin) % CHUNK == 0) {  // saved or not: the bits must not depend on it
        UNROLL for (int c = 0; c < VECTORS; c++) s[c].settle(w[c]);
        if (x[7]) store_state(s, x[7] + z.saved(call, sequence, t) + first, z.channels, lanes);
      }
      UNROLL for (int c = 0; c < VECTORS; c++) {
        const int64_t at = t * z.channels + first + c * W<T>, left = lanes - c * W<T>;
        const V<T> k = load_lanes(x[2] + at, left), v = load_lanes(x[3] + at, left);
        if (const int64_t soon = at + 8 * z.channels; t + 8 < end)  // rows are too far apart for the processor to guess
          __builtin_prefetch(x[2] + soon), __builtin_prefetch(x[3] + soon), __builtin_prefetch(x[5] + soon, 1);
        const Scales<T> now(s[c].exponent(w[c]), u[c] + k);
        store_lanes(x[5] + at, (now.left * s[c].n + now.right * v) / (now.left * s[c].d + now.right), left);
        s[c].add(w[c], k, v);
      }
    }
    UNROLL for (int c = 0; c < VECTORS; c++) s[c].settle(w[c]);
    store_state(s, x[6] + sequence * PARTS * z.channels + first, z.channels, lanes);
  });
}

// One vector of channels of a sequence, from `first` on.
template <class T>
void backward_lanes(const Call &call, T *const *x, const Layout &z, int64_t sequence, int64_t first) {
  const int64_t lanes = z.channels - first, begin = call.borders[sequence], end = call.borders[sequence + 1];
  const int64_t own = sequence * PARTS * z.channels + first;
  const V<T> w = load_decay(x[0] + first, lanes), u = load_lanes(x[1] + first, lanes);
  Gradient<T> g = {load_lanes(x[7] + own, lanes), load_lanes(x[7] + own + z.channels, lanes), {}, {}};
  V<T> dw = {}, du = {};
  for (int64_t chunk = begin + (end - begin - 1) / CHUNK * CHUNK; end > begin && chunk >= begin; chunk -= CHUNK) {
    const int64_t count = lesser(CHUNK, end - chunk);
    const T *kept = x[5] + z.saved(call, sequence, chunk) + first;
    State<T> states[CHUNK], s = {load_lanes(kept, lanes), load_lanes(kept + z.channels, lanes),
                                 load_lanes(kept + 2 * z.channels, lanes), V<T>{}};
    V<T> k[CHUNK], v[CHUNK];
    for (int64_t t = 0; t < count; t++) {
      const int64_t at = (chunk + t) * z.channels + first;
      states[t] = s, k[t] = load_lanes(x[2] + at, lanes), v[t] = load_lanes(x[3] + at, lanes);
      s.add(w, k[t], v[t]);
    }
    g.w = g.u = V<T>{};
    for (int64_t t = count - 1; t >= 0; t--) {
      const int64_t at = (chunk + t) * z.channels + first;
      V<T> dv;
      const V<T> dk = g.back(states[t], w, u, k[t], v[t], load_lanes(x[6] + at, lanes), dv);
      store_lanes(x[10] + at, dk, lanes), store_lanes(x[11] + at, dv, lanes);
    }
    dw += g.w, du += g.u;
  }
  store_lanes(x[8] + sequence * z.channels + first, dw, lanes);
  store_lanes(x[9] + sequence * z.channels + first, du, lanes);
  store_lanes(x[12] + own, g.n, lanes), store_lanes(x[12] + own + z.channels, g.d, lanes);
  store_lanes(x[12] + own + 2 * z.channels, V<T>{}, lanes);
}

template <class T>
void backward(const Call &call, void *const *arrays) {
  T *const *x = (T *const *)arrays;
  const Layout z = Layout::of(call, T());
  for_each(call, z.tasks, [=](int64_t sequence, int64_t, int64_t task, int) {
    for (int c = 0; c < VECTORS; c++) {
      const int64_t first = (task * VECTORS + c) * W<T>;
      if (first < z.channels) backward_lanes(call, x, z, sequence, first);
    }
  });
}

}  // namespace

int wkv4_forward(const Call &call, void *const *arrays) {
  if (call.dtype != F32 && call.dtype != F64) return -1;
  call.dtype == F32 ? forward<float>(call, arrays) : forward<double>(call, arrays);
  return 0;
}

int wkv4_backward(const Call &call, void *const *arrays) {
  if (call.dtype != F32 && call.dtype != F64) return -1;
  call.dtype == F32 ? backward<float>(call, arrays) : backward<double>(call, arrays);
  return 0;
}

int64_t wkv4_workspace(const Call &) { return 0; }

}  // namespace ISA
