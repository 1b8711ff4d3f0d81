// The preparation and the output of RWKV-7, and the output of RWKV-5 and RWKV-6, on a GPU (fused.h): N / 4 lanes of a
// warp share a head.
#include "fused.cuh"

namespace {

using namespace fused;

enum { WL, AL, K, W0, A0, K_K, K_A, VL, V, V_FIRST, V0, PREPARE };

// What a thread reads again for each token.
struct PrepareParameters {
  Four w0, a0, k_k, k_a, v0;

  __device__ __forceinline__ PrepareParameters(const Fields<PREPARE> &in, const Place &place)
      : w0(in[W0].get(place.channel, place.valid)), a0(in[A0].get(place.channel, place.valid)),
        k_k(in[K_K].get(place.channel, place.valid)), k_a(in[K_A].get(place.channel, place.valid)),
        v0(in[V0].get(place.channel, place.valid && in[V0])) {}
};

__device__ __forceinline__ Four sigmoids(Four base, Four x) {
  return each([&](int i) { return sigmoid(base[i] + x[i]); });
}

// 1 / max(|z|, eps)
template <int N>
__device__ __forceinline__ float inverse_norm(Four z) {
  const float norm = sqrtf(head_sum<N>(each([&](int i) { return z[i] * z[i]; })));
  return 1 / (norm < float(NORMALIZE_EPS) ? float(NORMALIZE_EPS) : norm);
}

template <int N>
__global__ void prepare_forward_kernel(Call call, Fields<PREPARE> in, Fields<5> out) {
  const Place place(call, call.heads * N);
  const PrepareParameters p(in, place);
  for (int64_t t = place.begin; t < place.end; t++) {
    const int64_t at = place.at(t);
    const Four k = in[K].get(at, place.valid), rate = sigmoids(p.a0, in[AL].get(at, place.valid));
    const Four speed = sigmoids(p.w0, in[WL].get(at, place.valid));
    const Four z = each([&](int i) { return k[i] * p.k_k[i]; });
    const float scale = inverse_norm<N>(z);
    out[0].put(at, each([&](int i) { return float(SLOWEST) * speed[i]; }), place.valid);
    out[1].put(at, each([&](int i) { return k[i] * (1 + (rate[i] - 1) * p.k_a[i]); }), place.valid);
    out[2].put(at, each([&](int i) { return -z[i] * scale; }), place.valid);
    out[3].put(at, each([&](int i) { return z[i] * scale * rate[i]; }), place.valid);
    if (!out[4]) continue;
    const Four v = in[V].get(at, place.valid), first = in[V_FIRST].get(at, place.valid);
    const Four mix = sigmoids(p.v0, in[VL].get(at, place.valid));
    out[4].put(at, each([&](int i) { return v[i] + mix[i] * (first[i] - v[i]); }), place.valid);
  }
}

// given: dw dkey dA dB dvalue. out: gradients of the inputs.
template <int N>
__global__ void prepare_backward_kernel(Call call, Fields<PREPARE> in, Fields<5> given, Fields<PREPARE> out,
                                        float *space) {
  const Place place(call, call.heads * N);
  const PrepareParameters p(in, place);
  Four dw0 = {}, da0 = {}, dk_k = {}, dk_a = {}, dv0 = {};
  for (int64_t t = place.begin; t < place.end; t++) {
    const int64_t at = place.at(t);
    const Four k = in[K].get(at, place.valid), rate = sigmoids(p.a0, in[AL].get(at, place.valid));
    const Four own = given[1].get(at, place.valid), da = given[2].get(at, place.valid);
    const Four db = given[3].get(at, place.valid);
    const Four z = each([&](int i) { return k[i] * p.k_k[i]; });
    const Four dunit = each([&](int i) { return db[i] * rate[i] - da[i]; });
    const float scale = inverse_norm<N>(z), product = head_sum<N>(each([&](int i) { return z[i] * dunit[i]; }));
    const float radial = scale < float(1 / NORMALIZE_EPS) ? product * scale * scale : 0;
    const Four dz = each([&](int i) { return (dunit[i] - z[i] * radial) * scale; });
    const Four drate = each([&](int i) {
      return (db[i] * z[i] * scale + own[i] * k[i] * p.k_a[i]) * rate[i] * (1 - rate[i]);
    });
    out[AL].put(at, drate, place.valid);
    const Four dk = each([&](int i) { return own[i] * (1 + (rate[i] - 1) * p.k_a[i]) + dz[i] * p.k_k[i]; });
    out[K].put(at, dk, place.valid);
    add(da0, drate);
    add(dk_k, each([&](int i) { return dz[i] * k[i]; }));
    add(dk_a, each([&](int i) { return own[i] * k[i] * (rate[i] - 1); }));
    const Four speed = sigmoids(p.w0, in[WL].get(at, place.valid)), dw = given[0].get(at, place.valid);
    const Four dspeed = each([&](int i) { return float(SLOWEST) * dw[i] * speed[i] * (1 - speed[i]); });
    out[WL].put(at, dspeed, place.valid);
    add(dw0, dspeed);
    if (!given[4]) continue;
    const Four v = in[V].get(at, place.valid), first = in[V_FIRST].get(at, place.valid);
    const Four mix = sigmoids(p.v0, in[VL].get(at, place.valid)), dvalue = given[4].get(at, place.valid);
    const Four dmix = each([&](int i) { return dvalue[i] * (first[i] - v[i]) * mix[i] * (1 - mix[i]); });
    out[VL].put(at, dmix, place.valid);
    out[V].put(at, each([&](int i) { return dvalue[i] * (1 - mix[i]); }), place.valid);
    out[V_FIRST].put(at, each([&](int i) { return dvalue[i] * mix[i]; }), place.valid);
    add(dv0, dmix);
  }
  place.keep(space, 5, 0, dw0), place.keep(space, 5, 1, da0), place.keep(space, 5, 2, dk_k);
  place.keep(space, 5, 3, dk_a), place.keep(space, 5, 4, dv0);
}

enum { Y, G, WEIGHT, BIAS, R, KEY, VALUE, R_K, OUTPUT };

template <bool Bonus>
constexpr int Inputs = Bonus ? OUTPUT : R;

// What a head of one token is normalised with, and its bonus.
template <int N, bool Bonus>
struct Head {
  Four norm, r, k, v;
  float scale, bonus = 0;

  __device__ __forceinline__ Head(const Fields<Inputs<Bonus>> &in, int64_t at, bool valid, Four r_k) {
    const Four y = in[Y].get(at, valid);
    const float mean = head_sum<N>(y) / N;
    const float squares = head_sum<N>(each([&](int i) { return (y[i] - mean) * (y[i] - mean); }));
    scale = 1 / sqrtf(squares / N + float(GROUP_NORM_EPS));
    norm = each([&](int i) { return (y[i] - mean) * scale; });
    if constexpr (Bonus) {
      r = in[R].get(at, valid), k = in[KEY].get(at, valid), v = in[VALUE].get(at, valid);
      bonus = head_sum<N>(each([&](int i) { return r[i] * k[i] * r_k[i]; }));
    }
  }
};

template <int N, bool Bonus>
__global__ void output_forward_kernel(Call call, Fields<Inputs<Bonus>> in, Field out) {
  const Place place(call, call.heads * N);
  const Four weight = in[WEIGHT].get(place.channel, place.valid), bias = in[BIAS].get(place.channel, place.valid);
  Four r_k = {};
  if constexpr (Bonus) r_k = in[R_K].get(place.channel, place.valid);
  for (int64_t t = place.begin; t < place.end; t++) {
    const int64_t at = place.at(t);
    const Head<N, Bonus> head(in, at, place.valid, r_k);
    const Four g = in[G].get(at, place.valid);
    out.put(at, each([&](int i) {
      const float x = head.norm[i] * weight[i] + bias[i];
      if constexpr (Bonus) return (x + head.bonus * head.v[i]) * g[i];
      else return x * g[i] * sigmoid(g[i]);
    }), place.valid);
  }
}

template <int N, bool Bonus>
__global__ void output_backward_kernel(Call call, Fields<Inputs<Bonus>> in, Field given, Fields<Inputs<Bonus>> out,
                                       float *space) {
  const Place place(call, call.heads * N);
  const Four weight = in[WEIGHT].get(place.channel, place.valid), bias = in[BIAS].get(place.channel, place.valid);
  Four r_k = {}, dweight = {}, dbias = {}, dr_k = {};
  if constexpr (Bonus) r_k = in[R_K].get(place.channel, place.valid);
  for (int64_t t = place.begin; t < place.end; t++) {
    const int64_t at = place.at(t);
    const Head<N, Bonus> head(in, at, place.valid, r_k);
    const Four g = in[G].get(at, place.valid), dy = given.get(at, place.valid);
    Four gate = g, slope = each([](int) { return 1; });
    if constexpr (!Bonus) {
      const Four s = each([&](int i) { return sigmoid(g[i]); });
      gate = each([&](int i) { return g[i] * s[i]; });
      slope = each([&](int i) { return s[i] * (1 + g[i] * (1 - s[i])); });
    }
    const Four dx = each([&](int i) { return dy[i] * gate[i]; });
    Four x = each([&](int i) { return head.norm[i] * weight[i] + bias[i]; });
    if constexpr (Bonus) {
      add(x, each([&](int i) { return head.bonus * head.v[i]; }));
      const float dbonus = head_sum<N>(each([&](int i) { return dx[i] * head.v[i]; }));
      out[VALUE].put(at, each([&](int i) { return dx[i] * head.bonus; }), place.valid);
      out[R].put(at, each([&](int i) { return dbonus * head.k[i] * r_k[i]; }), place.valid);
      out[KEY].put(at, each([&](int i) { return dbonus * head.r[i] * r_k[i]; }), place.valid);
      add(dr_k, each([&](int i) { return dbonus * head.r[i] * head.k[i]; }));
    }
    out[G].put(at, each([&](int i) { return dy[i] * slope[i] * x[i]; }), place.valid);
    add(dweight, each([&](int i) { return dx[i] * head.norm[i]; }));
    add(dbias, dx);
    const Four dnorm = each([&](int i) { return dx[i] * weight[i]; });
    const float mean = head_sum<N>(dnorm) / N;
    const float radial = head_sum<N>(each([&](int i) { return dnorm[i] * head.norm[i]; })) / N;
    out[Y].put(at, each([&](int i) { return head.scale * (dnorm[i] - mean - head.norm[i] * radial); }), place.valid);
  }
  constexpr int rows = Bonus ? 3 : 2;
  place.keep(space, rows, 0, dweight), place.keep(space, rows, 1, dbias);
  if constexpr (Bonus) place.keep(space, rows, 2, dr_k);
}

template <bool Bonus>
int output_forward(const Call &call, void *const *arrays) {
  constexpr int of = Inputs<Bonus> + 1;
  return with_size<16, 32, 64, 128>(call.size, [&](auto size) {
    if (!fits(call, arrays, of)) return -1;
    const auto in = fields<Inputs<Bonus>>(arrays, of, 0);
    return LAUNCH((output_forward_kernel<size, Bonus>), grid_of(call, call.heads * size), dim3(Threads), 0,
                  call.stream, call, in, fields<1>(arrays, of, of - 1)[0]);
  });
}

template <bool Bonus>
int output_backward(const Call &call, void *const *arrays) {
  constexpr int n = Inputs<Bonus>, of = 2 * n + 2, rows = Bonus ? 3 : 2;
  return with_size<16, 32, 64, 128>(call.size, [&](auto size) {
    if (!fits(call, arrays, of)) return -1;
    float *space = array<float>(arrays, of - 1);
    const auto out = fields<n>(arrays, of, n + 1);
    const auto in = fields<n>(arrays, of, 0);
    const int error = LAUNCH((output_backward_kernel<size, Bonus>), grid_of(call, call.heads * size), dim3(Threads), 0,
                             call.stream, call, in, fields<1>(arrays, of, n)[0], out, space);
    Fields<rows> sums{out[WEIGHT], out[BIAS]};
    if constexpr (Bonus) sums.x[2] = out[R_K];
    return error ? error : total(call, space, rows, call.heads * size, sums);
  });
}

}  // namespace

extern "C" {

int rwkv7_prepare_forward(const Call *call, void *const *arrays) {
  return with_size<16, 32, 64, 128>(call->size, [&](auto size) {
    if (!fits(*call, arrays, PREPARE + 5)) return -1;
    const auto in = fields<PREPARE>(arrays, PREPARE + 5, 0);
    return LAUNCH(prepare_forward_kernel<size>, grid_of(*call, call->heads * size), dim3(Threads), 0, call->stream,
                  *call, in, fields<5>(arrays, PREPARE + 5, PREPARE));
  });
}

int rwkv7_prepare_backward(const Call *call, void *const *arrays) {
  constexpr int of = 2 * PREPARE + 6;
  return with_size<16, 32, 64, 128>(call->size, [&](auto size) {
    if (!fits(*call, arrays, of)) return -1;
    const int64_t width = call->heads * size;
    float *space = array<float>(arrays, of - 1);
    const auto in = fields<PREPARE>(arrays, of, 0), out = fields<PREPARE>(arrays, of, PREPARE + 5);
    const int error = LAUNCH(prepare_backward_kernel<size>, grid_of(*call, width), dim3(Threads), 0, call->stream,
                             *call, in, fields<5>(arrays, of, PREPARE), out, space);
    if (error) return error;
    if (!arrays[V0]) return total<4>(*call, space, 5, width, {out[W0], out[A0], out[K_K], out[K_A]});
    return total<5>(*call, space, 5, width, {out[W0], out[A0], out[K_K], out[K_A], out[V0]});
  });
}

int64_t rwkv7_prepare_workspace(const Call *call) { return workspace(*call, 5, call->heads * call->size); }
int rwkv7_output_forward(const Call *call, void *const *arrays) { return output_forward<true>(*call, arrays); }
int rwkv7_output_backward(const Call *call, void *const *arrays) { return output_backward<true>(*call, arrays); }
int64_t rwkv7_output_workspace(const Call *call) { return workspace(*call, 3, call->heads * call->size); }
int rwkv6_output_forward(const Call *call, void *const *arrays) { return output_forward<false>(*call, arrays); }
int rwkv6_output_backward(const Call *call, void *const *arrays) { return output_backward<false>(*call, arrays); }
int64_t rwkv6_output_workspace(const Call *call) { return workspace(*call, 2, call->heads * call->size); }
}
