// RWKV-4 in pieces (see pieces.cuh), with numerator N = n e^m and denominator D = d e^m:
//
//   y_t = (N + e^(u+k) v) / (D + e^(u+k)) ;  N <- e^w N + e^k v ;  D <- e^w D + e^k   (arXiv:2305.13048, appendix D)
//
// A piece of L tokens adds L w to the exponent of the state before it, then the sums that it makes of nothing. The
// gradients of n and d gain e^(m + L w - m') on the way from its end, at exponent m', to its start, at exponent m. To
// them it adds E, a sum in the order of time too, but one that depends on the state, through the denominators.
#include "pieces.cuh"

namespace {

constexpr int THREADS = 64;
constexpr int AHEAD = 8;           // tokens that a thread asks for at a time
constexpr float EMPTY = -1e38f;    // the exponent of an empty sum
constexpr float FASTEST = -1e30f;  // a log decay that 0 tokens still make 0, unlike -inf

struct Sums {
  float n, d, m;

  static __device__ __forceinline__ Sums load(const float *state, int64_t width) {
    return {state[0], state[width], state[2 * width]};
  }
  __device__ __forceinline__ void store(float *state, int64_t width) const {
    state[0] = n, state[width] = d, state[2 * width] = m;
  }
  // These under a decay, and others.
  __device__ __forceinline__ Sums after(float decay, Sums added) const {
    const float top = fmaxf(m + decay, added.m);
    const float before = expf(m + decay - top), now = expf(added.m - top);
    return {before * n + now * added.n, before * d + now * added.d, top};
  }
};

// What a thread works at: a channel of a sequence (or piece).
struct Place {
  int64_t sequence, channel;
  __device__ __forceinline__ explicit Place(const Call &call) {
    const int64_t parts = ceil_div(call.size, THREADS);
    sequence = blockIdx.x / parts;
    channel = blockIdx.x % parts * THREADS + threadIdx.x;
  }
};

// The next tokens of some arrays, asked for before the last ones are used.
template <class T, int COUNT>
struct Ahead {
  T values[COUNT][AHEAD];

  __device__ __forceinline__ void load(const T *const (&arrays)[COUNT], Tokens tokens, int64_t from, int64_t width) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
      for (int j = 0; j < COUNT; j++)
        values[j][i] = from + i < tokens.count ? arrays[j][(tokens.begin + from + i) * width] : from_float<T>(0);
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    summary(Call call, const float *__restrict__ w, const T *__restrict__ k, const T *__restrict__ v,
            float *__restrict__ decay, float *__restrict__ added) {
  const Place at(call);
  const Tokens tokens = tokens_of(call, at.sequence);
  if (at.channel >= call.size) return;
  const float rate = fmaxf(w[at.channel], FASTEST);
  const T *const arrays[] = {k + at.channel, v + at.channel};
  Sums sums{0, 0, EMPTY};
  Ahead<T, 2> next;
  next.load(arrays, tokens, 0, call.size);
  for (int64_t from = 0; from < tokens.count; from += AHEAD) {
    const Ahead<T, 2> now = next;
    next.load(arrays, tokens, from + AHEAD, call.size);
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (from + i < tokens.count) sums = sums.after(rate, {to_float(now.values[1][i]), 1, to_float(now.values[0][i])});
  }
  sums.store(added + at.sequence * 3 * call.size + at.channel, call.size);
  decay[at.sequence * call.size + at.channel] = tokens.count * rate;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    summary_back(Call call, const float *__restrict__ w, const float *__restrict__ u, const T *__restrict__ k,
                 const T *__restrict__ v, const float *__restrict__ starts, const T *__restrict__ dy,
                 float *__restrict__ added) {
  const Place at(call);
  const Tokens tokens = tokens_of(call, at.sequence);
  if (at.channel >= call.size) return;
  const float rate = fmaxf(w[at.channel], FASTEST), bonus = u[at.channel];
  const T *const arrays[] = {k + at.channel, v + at.channel, dy + at.channel};
  Sums sums = Sums::load(starts + at.sequence * 3 * call.size + at.channel, call.size);
  const float first = sums.m;
  float gn = 0, gd = 0;
  Ahead<T, 3> next;
  next.load(arrays, tokens, 0, call.size);
  for (int64_t from = 0; from < tokens.count; from += AHEAD) {
    const Ahead<T, 3> now = next;
    next.load(arrays, tokens, from + AHEAD, call.size);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (from + i >= tokens.count) break;
      const float key = to_float(now.values[0][i]), value = to_float(now.values[1][i]);
      const Sums read = sums.after(0, {value, 1, bonus + key});
      const float dn = expf(first + (from + i) * rate - read.m) * to_float(now.values[2][i]) / read.d;
      gn += dn;
      gd -= dn * (read.n / read.d);
      sums = sums.after(rate, {value, 1, key});
    }
  }
  Sums{gn, gd, 0}.store(added + at.sequence * 3 * call.size + at.channel, call.size);
}

__global__ void __launch_bounds__(THREADS)
    scan(Call call, const float *__restrict__ decay, const float *__restrict__ added, const float *__restrict__ state,
         float *__restrict__ starts) {
  const Place at(call);
  const Tokens pieces = tokens_of(call, at.sequence);
  if (at.channel >= call.size) return;
  Sums sums = Sums::load(state + at.sequence * 3 * call.size + at.channel, call.size);
#pragma unroll 4
  for (int64_t i = pieces.begin; i < pieces.begin + pieces.count; i++) {
    const int64_t place = i * 3 * call.size + at.channel;
    sums.store(starts + place, call.size);
    sums = sums.after(decay[i * call.size + at.channel], Sums::load(added + place, call.size));
  }
}

// A gradient comes from the piece behind at the exponent of its first state, by the scan; it is wanted at that of the
// last state of the piece itself, by the ordinary kernel (`lasts`), whose rounding differs.
__global__ void __launch_bounds__(THREADS)
    scan_back(Call call, const float *__restrict__ decay, const float *__restrict__ added,
              const float *__restrict__ starts, const float *__restrict__ lasts, const float *__restrict__ dstate,
              float *__restrict__ ends) {
  const Place at(call);
  const Tokens pieces = tokens_of(call, at.sequence);
  if (at.channel >= call.size) return;
  Sums g = Sums::load(dstate + at.sequence * 3 * call.size + at.channel, call.size);
#pragma unroll 4
  for (int64_t i = pieces.begin + pieces.count - 1; i >= pieces.begin; i--) {
    const int64_t place = i * 3 * call.size + at.channel;
    const float start = starts[place + 2 * call.size], last = lasts[place + 2 * call.size];
    const bool given = i == pieces.begin + pieces.count - 1;
    const float moved = given ? 1 : expf(last - g.m), kept = expf(start + decay[i * call.size + at.channel] - last);
    g = {g.n * moved, g.d * moved, 0};
    g.store(ends + place, call.size);
    const Sums gained = Sums::load(added + place, call.size);
    g = {g.n * kept + gained.n, g.d * kept + gained.d, start};
  }
}

template <class F>
int with_tokens(const Call &call, F f) {
  return with_dtype<float, bf16, f16>(call.dtype, f);
}

dim3 grid(const Call &call) { return dim3(call.sequences * ceil_div(call.size, THREADS)); }

}  // namespace

extern "C" {

int wkv4_summary(const Call *call, void *const *arrays) {
  return with_tokens(*call, [&](auto type) {
    using T = decltype(type);
    return LAUNCH(summary<T>, grid(*call), dim3(THREADS), 0, call->stream, *call, array<float>(arrays, 0),
                  array<T>(arrays, 2), array<T>(arrays, 3), array<float>(arrays, 4), array<float>(arrays, 5));
  });
}

int wkv4_summary_back(const Call *call, void *const *arrays) {
  return with_tokens(*call, [&](auto type) {
    using T = decltype(type);
    return LAUNCH(summary_back<T>, grid(*call), dim3(THREADS), 0, call->stream, *call, array<float>(arrays, 0),
                  array<float>(arrays, 1), array<T>(arrays, 2), array<T>(arrays, 3), array<float>(arrays, 4),
                  array<T>(arrays, 5), array<float>(arrays, 6));
  });
}

int wkv4_scan(const Call *call, void *const *arrays) {
  if (call->dtype == F64) return -1;
  return LAUNCH(scan, grid(*call), dim3(THREADS), 0, call->stream, *call, array<float>(arrays, 0),
                array<float>(arrays, 1), array<float>(arrays, 2), array<float>(arrays, 3));
}

int wkv4_scan_back(const Call *call, void *const *arrays) {
  if (call->dtype == F64) return -1;
  return LAUNCH(scan_back, grid(*call), dim3(THREADS), 0, call->stream, *call, array<float>(arrays, 0),
                array<float>(arrays, 1), array<float>(arrays, 2), array<float>(arrays, 3), array<float>(arrays, 4),
                array<float>(arrays, 5));
}

}
