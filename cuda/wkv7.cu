// RWKV-7 in float32, token by token (Peng et al. 2025, arXiv:2503.14456, section 4), w the log decay:
//
//   S <- S diag(e^w) + (S a) b^T + v k^T        y = S r
//
// and with G = dL/dS, S' the state before the token, p = G b, in reverse:
//
//   G += dy r^T     dr = S^T dy     dk = G^T v     dv = G k     db = G^T (S' a)     da = S'^T p
//   dw = e^w (S' . G summed over the values)       G <- G diag(e^w) + p a^T
//
// Forward saves S a, so that backward computes states again without a sum across threads. recurrent.cuh has the scheme.
#include "recurrent.cuh"

namespace recurrent {
namespace {

template <class Scalar, int Size>
struct Wkv7 {
  using T = Scalar;
  static constexpr int N = Size, ROWS = Shape<N>::ROWS, COLUMNS = 5, SUMS = N * sizeof(T) > 128 ? 2 : 4;
  static constexpr bool HAS_CONSTANTS = false;
  enum { W, SA };
  enum { R, K, V, A, B, DY };
  using Forward = Stage<T, N, 1, 5>;
  using Backward = Stage<T, N, 2, 6>;
  const Place<N> &at;

  __device__ __forceinline__ Wkv7(const float *, const Place<N> &at) : at(at) {}

  template <class Stage>
  __device__ __forceinline__ void update(Tile<N> &s, const float (&sa)[ROWS], const Stage &stage, int slot) const {
    float w[4], k[4], b[4], v[ROWS];
    read(w, stage.floats(W, slot) + at.key);
    read(k, stage.values(K, slot) + at.key);
    read(b, stage.values(B, slot) + at.key);
    read(v, stage.values(V, slot) + at.row);
    s.decay(w);
    s.add(sa, b);
    s.add(v, k);
  }

  __device__ __forceinline__ void forward(float (&y)[ROWS], Tile<N> &s, const Forward &stage, int slot,
                                          float *keep) const {
    float a[4], r[4], sa[ROWS];
    read(a, stage.values(A, slot) + at.key);
    s.dot(sa, a);
    const float owned = sum_over_keys<N>(sa, at.lane);
    if (keep) *keep = owned;
    share<N>(sa, owned, at.lane);
    update(s, sa, stage, slot);
    read(r, stage.values(R, slot) + at.key);
    s.dot(y, r);
  }

  __device__ __forceinline__ void step(Tile<N> &s, const Backward &stage, int slot) const {
    float sa[ROWS];
    read(sa, stage.floats(SA, slot) + at.row);
    update(s, sa, stage, slot);
  }

  // The gradients as sums of this thread's part: dw dr dk da db in x.
  __device__ __forceinline__ void backward(float (&x)[COLUMNS][4], float (&dv)[ROWS], const Tile<N> &s, Tile<N> &g,
                                           const Backward &stage, int slot) const {
    float r[4], w[4], k[4], a[4], b[4], v[ROWS], sa[ROWS], dy[ROWS], p[ROWS];
    read(r, stage.values(R, slot) + at.key);
    read(k, stage.values(K, slot) + at.key);
    read(b, stage.values(B, slot) + at.key);
    read(dy, stage.values(DY, slot) + at.row);
    g.add(dy, r);
    g.dot(p, b);
    g.dot(dv, k);
    share<N>(p, sum_over_keys<N>(p, at.lane), at.lane);

    read(w, stage.floats(W, slot) + at.key);
    read(v, stage.values(V, slot) + at.row);
    read(sa, stage.floats(SA, slot) + at.row);
    g.dot_values(x[2], v);
    g.dot_values(x[4], sa);
    s.dot_values(x[3], p);
    s.dot_values(x[1], dy);
    s.dot_state(x[0], g);
    const float vdy = inner(v, dy), sady = inner(sa, dy);
    read(a, stage.values(A, slot) + at.key);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x[1][j] = w[j] * x[1][j] + sady * b[j] + vdy * k[j];  // the state after the token is not at hand
      x[0][j] *= w[j];
    }
    g.decay(w);
    g.add(p, a);
  }
};

}  // namespace
}  // namespace recurrent

using namespace recurrent;

Keeps wkv7_keeps(int32_t, int64_t) { return {EVERY, 1}; }

int64_t wkv7_workspace(const Call *call) { return partial_bytes(*call, 5, 0); }

// Arrays: r w k v a b state -> y last saved.
int wkv7_forward(const Call *call, void *const *x) {
  return with_shape(*call, [&](auto scalar, auto size) {
    using T = decltype(scalar);
    float *const saved = array<float>(x, 9), *const vectors = saved ? saved + saved_size(*call) : nullptr;
    return run_forward<Wkv7<T, size>>(
        *call, {{array<float>(x, 1)}, {array<T>(x, 0), array<T>(x, 2), array<T>(x, 3), array<T>(x, 4), array<T>(x, 5)}},
        {array<float>(x, 6), nullptr, array<T>(x, 7), array<float>(x, 8), saved, vectors});
  });
}

// Arrays: r w k v a b state saved dy dstate -> dr dw dk dv da db first workspace.
int wkv7_backward(const Call *call, void *const *x) {
  return with_shape(*call, [&](auto scalar, auto size) {
    using T = decltype(scalar);
    const float *const saved = array<float>(x, 7), *const sa = saved + saved_size(*call);
    BackwardArrays<T> out{nullptr, saved, array<float>(x, 9)};
    out.values[0] = array<T>(x, 10);
    out.dw = array<float>(x, 11);
    out.values[1] = array<T>(x, 12);
    out.dv = array<T>(x, 13);
    out.values[2] = array<T>(x, 14);
    out.values[3] = array<T>(x, 15);
    out.first = array<float>(x, 16);
    out.partial = array<float>(x, 17);
    return run_backward<Wkv7<T, size>>(
        *call,
        {{array<float>(x, 1), sa},
         {array<T>(x, 0), array<T>(x, 2), array<T>(x, 3), array<T>(x, 4), array<T>(x, 5), array<T>(x, 8)}},
        out);
  });
}
