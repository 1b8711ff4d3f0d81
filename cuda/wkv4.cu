// RWKV-4 in float32, token by token (Peng et al. 2023, arXiv:2305.13048, appendix D), w the log decay:
//
//   y = (N + e^(u+k) v) / (D + e^(u+k))        N <- e^w N + e^k v        D <- e^w D + e^k
//
// with N = n e^m and D = d e^m, where m is the largest exponent met, so that nothing overflows. Gradients of n and d
// are taken at the m stored with them; m has none.
//
// m falls by w at each token that brings no larger one. Hundreds of such sums, rounded, would be an error of 1e-5, so m
// is counted as top + (tokens since that top) w. Where it is stored, every 8 tokens, n and d take up what it is rounded
// by.
//
// Channels never mix: each has a thread, which reads the next 8 tokens while it computes on 8, and has all that these
// need in registers.
#include "common.cuh"

namespace {

constexpr int EVERY = 8, THREADS = 64;

// e^left and e^right over the larger of the two, from left - right.
struct Scales {
  float left, right;
};

__device__ __forceinline__ Scales scales(float gap) {
  const float less = expf(-fabsf(gap));
  return gap >= 0 ? Scales{1, less} : Scales{less, 1};
}

struct State {
  float n, d, top, since;  // m = top + since w

  __device__ __forceinline__ void load(const float *from, int64_t channels) {
    n = from[0], d = from[channels], top = from[2 * channels], since = 0;
  }
  __device__ __forceinline__ void store(float *to, int64_t channels) const {
    to[0] = n, to[channels] = d, to[2 * channels] = top;
  }
  // m - k
  __device__ __forceinline__ float gap(float w, float k) const { return fmaf(since, w, top - k); }
  __device__ __forceinline__ void next(float w, float gap, float k, float v) {
    const Scales e = scales(gap + w);
    n = e.left * n + e.right * v;
    d = e.left * d + e.right;
    since = gap + w >= 0 ? since + 1 : 0;
    top = gap + w >= 0 ? top : k;
  }
  // Rounds m to one number; returns what n and d are multiplied by.
  __device__ __forceinline__ float settle(float w) {
    const float m = fmaf(since, w, top), rest = fmaf(since, w, top - m);
    const float factor = fabsf(rest) < 1 ? 1 + rest : 1;  // not less than 1 only if e^m is 0
    n *= factor, d *= factor, top = m, since = 0;
    return factor;
  }
};

// The channel of a thread in its sequence.
struct Place {
  int64_t sequence, channel, channels;

  __device__ __forceinline__ explicit Place(const Call &call) : channels(call.size) {
    const int64_t blocks = ceil_div(channels, THREADS);
    sequence = blockIdx.x / blocks;
    channel = blockIdx.x % blocks * THREADS + threadIdx.x;
  }
  __device__ __forceinline__ int64_t vector(int64_t t) const { return t * channels + channel; }
  __device__ __forceinline__ int64_t state(int64_t number) const { return vector(3 * number); }
};

template <class T>
__device__ __forceinline__ void load(float (&x)[EVERY], const T *from, int64_t stride, int64_t count) {
#pragma unroll
  for (int i = 0; i < EVERY; i++) x[i] = i < count ? to_float(from[i * stride]) : 0;
}

struct Constants {
  const float *w, *u, *state;

  __device__ __forceinline__ float decay(int64_t channel) const { return fmaxf(w[channel], -1e30f); }  // 0 w is 0
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    forward(Call call, Constants in, const T *k, const T *v, T *y, float *last, float *saved) {
  const Place at(call);
  const Tokens tokens = tokens_of(call, at.sequence);
  if (at.channel >= at.channels) return;
  const float w = in.decay(at.channel), u = in.u[at.channel];
  State s;
  s.load(in.state + at.state(at.sequence), at.channels);
  const int64_t first = at.vector(tokens.begin), first_saved = tokens.begin / EVERY + at.sequence;
  float next_k[EVERY], next_v[EVERY];
  load(next_k, k + first, at.channels, tokens.count);
  load(next_v, v + first, at.channels, tokens.count);
  for (int64_t t = 0; t < tokens.count; t += EVERY) {
    float now_k[EVERY], now_v[EVERY];
    memcpy(now_k, next_k, sizeof now_k);
    memcpy(now_v, next_v, sizeof now_v);
    const int64_t after = t + EVERY, from = first + after * at.channels;
    load(next_k, k + from, at.channels, tokens.count - after);
    load(next_v, v + from, at.channels, tokens.count - after);
    if (saved) s.store(saved + at.state(first_saved + t / EVERY), at.channels);
#pragma unroll
    for (int i = 0; i < EVERY; i++) {
      if (t + i >= tokens.count) break;
      const float gap = s.gap(w, now_k[i]);
      const Scales e = scales(gap - u);
      const float out = (e.left * s.n + e.right * now_v[i]) / (e.left * s.d + e.right);
      y[first + (t + i) * at.channels] = from_float<T>(out);
      s.next(w, gap, now_k[i], now_v[i]);
    }
    s.settle(w);
  }
  s.store(last + at.state(at.sequence), at.channels);
}

template <class T>
struct Gradients {
  const T *dy;
  const float *saved, *dstate;
  float *dw, *du;
  T *dk, *dv;
  float *first;
};

// The gradient of a channel, from its last token to its first, with that of n and d.
struct Reverse {
  float w, u, gn, gd;
  Sum dw, du;

  // Of k and v, from the state before the token and m - k.
  __device__ __forceinline__ float2 step(float n, float d, float gap, float v, float dy) {
    const Scales e = scales(gap + w), f = scales(gap - u);
    dw.add(e.left * (gn * n + gd * d));
    const float per = 1 / (f.left * d + f.right), dn = dy * per, y = (f.left * n + f.right * v) * per;
    const float bonus = f.right * dn * (f.left * (d * v - n) * per);  // in brackets v - y, without what cancels
    du.add(bonus);
    const float2 out = make_float2(e.right * (gn * v + gd) + bonus, e.right * gn + f.right * dn);
    gn = e.left * gn + f.left * dn;
    gd = e.left * gd - f.left * dn * y;
    return out;
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    backward(Call call, Constants in, const T *k, const T *v, Gradients<T> out) {
  const Place at(call);
  const Tokens tokens = tokens_of(call, at.sequence);
  if (at.channel >= at.channels) return;
  const float *const end = out.dstate + at.state(at.sequence);
  Reverse g{in.decay(at.channel), in.u[at.channel], end[0], end[at.channels]};
  const int64_t first = at.vector(tokens.begin), first_saved = tokens.begin / EVERY + at.sequence;
  float next[3][EVERY];
  const auto fetch = [&](int64_t chunk) {
    const int64_t from = first + chunk * EVERY * at.channels, count = chunk < 0 ? 0 : tokens.count - chunk * EVERY;
    load(next[0], k + from, at.channels, count);
    load(next[1], v + from, at.channels, count);
    load(next[2], out.dy + from, at.channels, count);
  };
  int64_t chunk = ceil_div(tokens.count, EVERY) - 1;
  fetch(chunk);
  for (; chunk >= 0; chunk--) {
    float now[3][EVERY], n[EVERY], d[EVERY], gap[EVERY];
    memcpy(now, next, sizeof now);
    fetch(chunk - 1);
    const int64_t t = chunk * EVERY;
    State s;
    s.load(out.saved + at.state(first_saved + chunk), at.channels);
#pragma unroll
    for (int i = 0; i < EVERY; i++) {
      if (t + i >= tokens.count) break;
      n[i] = s.n, d[i] = s.d, gap[i] = s.gap(g.w, now[0][i]);
      s.next(g.w, gap[i], now[0][i], now[1][i]);
    }
    const float factor = s.settle(g.w);
    g.gn *= factor, g.gd *= factor;
#pragma unroll
    for (int i = EVERY - 1; i >= 0; i--) {
      if (t + i >= tokens.count) continue;
      const float2 grads = g.step(n[i], d[i], gap[i], now[1][i], now[2][i]);
      out.dk[first + (t + i) * at.channels] = from_float<T>(grads.x);
      out.dv[first + (t + i) * at.channels] = from_float<T>(grads.y);
    }
  }
  out.dw[at.vector(at.sequence)] = g.dw.total;
  out.du[at.vector(at.sequence)] = g.du.total;
  float *const begin = out.first + at.state(at.sequence);
  begin[0] = g.gn, begin[at.channels] = g.gd, begin[2 * at.channels] = 0;
}

dim3 grid(const Call &call) { return dim3(call.sequences * ceil_div(call.size, THREADS)); }

}  // namespace

Keeps wkv4_keeps(int32_t, int64_t) { return {EVERY, 0}; }

int64_t wkv4_workspace(const Call *) { return 0; }

// Arrays: w u k v state -> y last saved.
int wkv4_forward(const Call *call, void *const *x) {
  return with_dtype<float, bf16, f16>(call->dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Constants in{array<float>(x, 0), array<float>(x, 1), array<float>(x, 4)};
    return LAUNCH(forward<T>, grid(*call), THREADS, 0, call->stream, *call, in, array<T>(x, 2), array<T>(x, 3),
                  array<T>(x, 5), array<float>(x, 6), array<float>(x, 7));
  });
}

// Arrays: w u k v state saved dy dstate -> dw du dk dv first workspace.
int wkv4_backward(const Call *call, void *const *x) {
  return with_dtype<float, bf16, f16>(call->dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Constants in{array<float>(x, 0), array<float>(x, 1), array<float>(x, 4)};
    const Gradients<T> out{array<T>(x, 6),      array<float>(x, 5), array<float>(x, 7), array<float>(x, 8),
                           array<float>(x, 9), array<T>(x, 10),    array<T>(x, 11),   array<float>(x, 12)};
    return LAUNCH(backward<T>, grid(*call), THREADS, 0, call->stream, *call, in, array<T>(x, 2), array<T>(x, 3), out);
  });
}
