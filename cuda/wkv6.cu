// RWKV-6 in float32, token by token (Peng et al. 2024, arXiv:2404.05892, section 4), w the log decay:
//
//   y = (S + v (u k)^T) r        S <- S diag(e^w) + v k^T
//
// and with S the state before the token, G = dL/dS after it, in reverse:
//
//   dr = S^T dy + u k (v.dy)     dk = G^T v + u r (v.dy)     dv = G k + dy (r.u k)     du += r k (v.dy)
//   dw = e^w (S . G summed over the values)                  G <- G diag(e^w) + dy r^T
//
// recurrent.cuh has the scheme.
#include "recurrent.cuh"

namespace recurrent {
namespace {

template <class Scalar, int Size>
struct Wkv6 {
  using T = Scalar;
  static constexpr int N = Size, ROWS = Shape<N>::ROWS, COLUMNS = 3, SUMS = N * sizeof(T) > 128 ? 2 : 4;
  static constexpr bool HAS_CONSTANTS = true;
  enum { W };
  enum { R, K, V, DY };
  using Forward = Stage<T, N, 1, 3>;
  using Backward = Stage<T, N, 1, 4>;
  const Place<N> &at;
  float u[4];
  Sum du[4];

  __device__ __forceinline__ Wkv6(const float *constants, const Place<N> &at) : at(at) {
    read(u, constants + at.head * N + at.key);
  }

  template <class Stage>
  __device__ __forceinline__ void step(Tile<N> &s, const Stage &stage, int slot) const {
    float w[4], k[4], v[ROWS];
    read(w, stage.floats(W, slot) + at.key);
    read(k, stage.values(K, slot) + at.key);
    read(v, stage.values(V, slot) + at.row);
    s.decay(w);
    s.add(v, k);
  }

  __device__ __forceinline__ void forward(float (&y)[ROWS], Tile<N> &s, const Forward &stage, int slot, float *) const {
    float r[4], k[4], v[ROWS], ru[4];
    read(r, stage.values(R, slot) + at.key);
    read(k, stage.values(K, slot) + at.key);
    read(v, stage.values(V, slot) + at.row);
#pragma unroll
    for (int j = 0; j < 4; j++) ru[j] = r[j] * u[j];
    const float ruk = inner(ru, k);
    s.dot(y, r);
#pragma unroll
    for (int i = 0; i < ROWS; i++) y[i] += v[i] * ruk;
    step(s, stage, slot);
  }

  // The gradients as sums of this thread's part: dw dr dk in x.
  __device__ __forceinline__ void backward(float (&x)[COLUMNS][4], float (&dv)[ROWS], const Tile<N> &s, Tile<N> &g,
                                           const Backward &stage, int slot) {
    float r[4], w[4], k[4], v[ROWS], dy[ROWS], ru[4];
    read(r, stage.values(R, slot) + at.key);
    read(w, stage.floats(W, slot) + at.key);
    read(k, stage.values(K, slot) + at.key);
    read(v, stage.values(V, slot) + at.row);
    read(dy, stage.values(DY, slot) + at.row);
    const float vdy = inner(v, dy);
#pragma unroll
    for (int j = 0; j < 4; j++) ru[j] = r[j] * u[j];
    const float ruk = inner(ru, k);
    g.dot(dv, k);
#pragma unroll
    for (int i = 0; i < ROWS; i++) dv[i] += dy[i] * ruk;
    s.dot_state(x[0], g);
    s.dot_values(x[1], dy);
    g.dot_values(x[2], v);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x[0][j] *= w[j];
      x[1][j] += u[j] * k[j] * vdy;
      x[2][j] += ru[j] * vdy;
      du[j].add(r[j] * k[j] * vdy);
    }
    g.decay(w);
    g.add(dy, r);
  }

  __device__ __forceinline__ void constants(float (&x)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = du[j].total;
  }
};

}  // namespace
}  // namespace recurrent

using namespace recurrent;

Keeps wkv6_keeps(int32_t, int64_t) { return {EVERY, 0}; }

int64_t wkv6_workspace(const Call *call) { return partial_bytes(*call, 3, 1); }

// Arrays: r k v w u state -> y last saved.
int wkv6_forward(const Call *call, void *const *x) {
  return with_shape(*call, [&](auto scalar, auto size) {
    using T = decltype(scalar);
    return run_forward<Wkv6<T, size>>(
        *call, {{array<float>(x, 3)}, {array<T>(x, 0), array<T>(x, 1), array<T>(x, 2)}},
        {array<float>(x, 5), array<float>(x, 4), array<T>(x, 6), array<float>(x, 7), array<float>(x, 8), nullptr});
  });
}

// Arrays: r k v w u state saved dy dstate -> dr dk dv dw du first workspace.
int wkv6_backward(const Call *call, void *const *x) {
  return with_shape(*call, [&](auto scalar, auto size) {
    using T = decltype(scalar);
    BackwardArrays<T> out{array<float>(x, 4), array<float>(x, 6), array<float>(x, 8)};
    out.values[0] = array<T>(x, 9);
    out.values[1] = array<T>(x, 10);
    out.dv = array<T>(x, 11);
    out.dw = array<float>(x, 12);
    out.du = array<float>(x, 13);
    out.first = array<float>(x, 14);
    out.partial = array<float>(x, 15);
    return run_backward<Wkv6<T, size>>(
        *call, {{array<float>(x, 3)}, {array<T>(x, 0), array<T>(x, 1), array<T>(x, 2), array<T>(x, 7)}}, out);
  });
}
