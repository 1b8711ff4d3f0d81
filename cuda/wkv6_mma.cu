// RWKV-5 and RWKV-6 on tensor cores, for 16-bit inputs:  y = (S + v (u k)^T) r ;  S <- S diag(e^w) + v k^T   (Peng et
// al. 2024, arXiv:2404.05892, section 4), in chunks of 16 tokens, an mma tile (Yang et al. 2024, arXiv:2312.06635,
// section 4).
//
// Let W_jt be the decay between tokens j < t of a chunk, the product of e^w over the tokens between them, W that of the
// whole chunk, and r' and k' the rows r_t, k_t times the decay between the chunk's begin, or its end, and t. Then
//
//   A_tj = r_t W_jt k_j ;  A_tt = r_t u k_t ;  Y = A V + r' S^T ;  S <- S W + V^T k'
//
// and with B = dY V^T, and G the gradient of the state after the chunk,
//
//   dV = A^T dY + k' G^T ;  G <- G W + dY^T r'
//   dr_t = (dY S)_t, decayed as r' is, + sum_j B_tj W_jt k_j ;  dk_j = (V G)_j, as k', + sum_t B_tj W_jt r_t
//
// Decays are unbounded, so W_jt is no quotient of two prefix products, and no gradient of w a difference of two sums:
// as in infctx/ops/chunked6.py the chunk is halved, and those halves again. A block of 2, 4, 8 or 16 tokens has a
// middle between its halves, and W_jt is the decay from j to the middle of the one that parts them times that from
// there to t: one product of matrices for blocks of each size. A w gets what passes over it: the sums of r_t dr_t over
// later tokens t of a right half, or of k_j dk_j over earlier ones of a left half, and once what S and G say to each
// other.
//
// A block of threads has one head of one sequence. In forward a warp has 16 values (rows) of S, and in backward 16 keys
// (columns) of G, both in float; for what stands between tokens it has 16 channels everywhere. What warps tell each
// other, sums of products over all keys, decayed vectors and G, goes through shared memory between two barriers in a
// chunk.
//
// Operands are rounded to 16 bits: errors of 2e-3 to 3e-3 with bf16, and 4e-4 with f16, where S and G must stay below
// 65504. Backward needs S rounded in the same way and nothing else of it, so forward saves it before every 16th token
// in 16 bits: the room of a float state every 32 tokens, and no pass to make the states again.
#include "wkv6_gradients.cuh"

namespace wkv6_mma {
namespace {

template <class T, int N>
struct ForwardShared {
  Stage<T, N, 3> stage[2];
  T head[N][COLUMNS], tail[N][COLUMNS];  // r and k, decayed from and to the borders of the chunk
  float total[N], u[N];
  float2 scores[N / 16][3][32];
};

template <class T>
struct Gradients {
  float *w, *u;
  T *x[3];
};

// Calls f(row, column, n, j, e) for the pairs s[n].d[j][e], s[n].d[j][e + 1] that a lane holds of a state's 16 rows of
// this warp, values in forward and keys in backward.
template <int N, class F>
__device__ __forceinline__ void for_state(F f) {
#pragma unroll
  for (int n = 0; n < N / 16; n++)
    for (int j = 0; j < 2; j++)
      for (int i = 0; i < 2; i++) f(16 * warp_id() + tile_row(i), 16 * n + tile_column(j), n, j, 2 * i);
}

// The warp's 16 channels of a chunk go to shared memory as the products with the state and between tokens take them.
template <class T, int N>
__device__ __forceinline__ void prepare(ForwardShared<T, N> &shared, const Stage<T, N, 3> &stage) {
  const int own = 16 * warp_id();
  const Vectors<T> x(stage);
  const Decays decays = make_decays(load_channels<N>(stage.w));
  add_scores<T, false>(shared.scores, stage, x, decays, shared.u);
  store_tile(shared.head[own], COLUMNS, rounded<T>(unrounded<T>(x.r) * decays.head));
  store_tile(shared.tail[own], COLUMNS, rounded<T>(unrounded<T>(x.k) * decays.tail));
  if (lane_id() % 4 == 0)
    for (int i = 0; i < 2; i++) shared.total[own + tile_row(i)] = decays.total[i];
}

// y of 16 values, and the state after the chunk. Args: saved: where the state before it goes, if anywhere.
template <class T, int N>
__device__ __forceinline__ Tile step(const ForwardShared<T, N> &shared, const T *v, Tile (&s)[N / 16], uint4 *saved) {
  Tile y = {};
  add_product<T>(y, sum_scores<T, N, false>(shared.scores), load_transposed(v, N + 8));
  const Operand values = load_transposed_left(v, N + 8);
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    const Operand before = rounded<T>(s[n]);
    add_product<T>(y, load_transposed_left(shared.head[16 * n], COLUMNS), before);
    if (saved) {
      const Operand x = transposed(before);
      saved[n * SAVED_ROW<N>] = make_uint4(x.r[0], x.r[1], x.r[2], x.r[3]);
    }
    for (int j = 0; j < 2; j++) {
      const float2 total = *reinterpret_cast<const float2 *>(&shared.total[16 * n + tile_column(j)]);
      for (int e = 0; e < 4; e += 2) s[n].d[j][e] *= total.x, s[n].d[j][e + 1] *= total.y;
    }
    add_product<T>(s[n], values, load_right(shared.tail[16 * n], COLUMNS));
  }
  return y;
}

template <class T, int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? 4 : 1)
    forward(Call call, Inputs<T> in, const float *state, T *y, float *last, uint4 *saved) {
  DYNAMIC_SHARED(void, memory);
  auto &shared = *static_cast<ForwardShared<T, N> *>(memory);
  const Place<N> place(call);
  const int chunks = place.chunks, own = 16 * warp_id();
  Tile s[N / 16];
  for_state<N>([&](int value, int key, int n, int j, int e) {
    const float2 pair = *reinterpret_cast<const float2 *>(state + place.state() + value * N + key);
    s[n].d[j][e] = pair.x, s[n].d[j][e + 1] = pair.y;
  });
  if (threadIdx.x < N) shared.u[threadIdx.x] = in.u[place.head * N + threadIdx.x];
  if (chunks > 0) fetch(shared.stage[0], in, place, 0);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    Stage<T, N, 3> &stage = shared.stage[chunk % 2], &other = shared.stage[(chunk + 1) % 2];
    cp_async_wait<0>();
    __syncthreads();
    if (chunk > 0) write_rows(y, other.x[V], place, chunk - 1);
    if (chunk + 1 < chunks) fetch(other, in, place, chunk + 1);
    prepare(shared, stage);
    __syncthreads();
    T *const v = &stage.x[V][0][own];
    uint4 *const before = saved ? saved + place.state_before(chunk) + warp_id() * 32 : nullptr;
    store_tile(v, N + 8, rounded<T>(step(shared, v, s, before)));
  }
  __syncthreads();
  if (chunks > 0) write_rows(y, shared.stage[(chunks - 1) % 2].x[V], place, chunks - 1);
  for_state<N>([&](int value, int key, int n, int j, int e) {
    *reinterpret_cast<float2 *>(last + place.state() + value * N + key) =
        make_float2(s[n].d[j][e], s[n].d[j][e + 1]);
  });
}

template <class T, int N>
__device__ __forceinline__ void fetch_before(BackwardShared<T, N> &shared, const uint4 *saved, const Place<N> &place,
                                             int chunk) {
  saved += place.state_before(chunk) + warp_id() * SAVED_ROW<N>;
  for (int n = 0; n < N / 16; n++) cp_async16(shared.of_lane(n), saved + n * 32, true);
  cp_async_commit();
}

template <class T, int N>
__device__ __forceinline__ void write(const Gradients<T> &out, const Stage<T, N, 4> &stage, const Place<N> &place,
                                      int chunk) {
  write_rows(out.w, stage.w, place, chunk);
#pragma unroll
  for (int i = R; i <= V; i++) write_rows(out.x[i], stage.x[i], place, chunk);
}

template <class T, int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? 3 : 1)
    backward(Call call, Inputs<T> in, const uint4 *saved, const float *dstate, Gradients<T> out, float *first) {
  DYNAMIC_SHARED(void, memory);
  auto &shared = *static_cast<BackwardShared<T, N> *>(memory);
  const Place<N> place(call);
  const int own = 16 * warp_id();
  Tile g[N / 16];
  for_state<N>([&](int key, int value, int n, int j, int e) {
    const float *const at = dstate + place.state() + value * N + key;
    g[n].d[j][e] = at[0], g[n].d[j][e + 1] = at[N];
  });
  if (threadIdx.x < N) shared.u[threadIdx.x] = in.u[place.head * N + threadIdx.x];
  float du[2] = {};
  const int end = place.chunks - 1;
  if (end >= 0) fetch(shared.stage[end % 2], in, place, end);
#pragma unroll 1
  for (int chunk = end; chunk >= 0; chunk--) {
    Stage<T, N, 4> &stage = shared.stage[chunk % 2], &other = shared.stage[(chunk + 1) % 2];
    cp_async_wait<0>();
    __syncthreads();
    fetch_before(shared, saved, place, chunk);
    if (chunk < end) write(out, other, place, chunk + 1);
    if (chunk > 0) fetch(other, in, place, chunk - 1);
    step_back(shared, stage, g, du, chunk > 0);
  }
  __syncthreads();
  if (end >= 0) write(out, shared.stage[0], place, 0);
  for (int i = 0; i < 2; i++) {
    for (int lanes = 1; lanes < 4; lanes *= 2) du[i] += __shfl_xor_sync(~0u, du[i], lanes);
    if (lane_id() % 4 == 0) out.u[place.vector() + own + tile_row(i)] = du[i];
  }
  for_state<N>([&](int key, int value, int n, int j, int e) {
    float *const at = first + place.state() + value * N + key;
    at[0] = g[n].d[j][e], at[N] = g[n].d[j][e + 1];
  });
}

template <class T>
Inputs<T> inputs(void *const *arrays) {
  return {array<float>(arrays, 3), array<float>(arrays, 4),
          {array<T>(arrays, 0), array<T>(arrays, 1), array<T>(arrays, 2), nullptr}};
}

}  // namespace
}  // namespace wkv6_mma

using namespace wkv6_mma;

extern "C" {

int wkv6_mma_forward(const Call *call, void *const *arrays) {
  return with_dtype<bf16, f16>(call->dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_size<16, 32, 64, 128>(call->size, [&](auto n) {
      constexpr int N = n;
      return LAUNCH((forward<T, N>), dim3(call->sequences * call->heads), dim3(2 * N), sizeof(ForwardShared<T, N>),
                    call->stream, *call, inputs<T>(arrays), array<float>(arrays, 5), array<T>(arrays, 6),
                    array<float>(arrays, 7), array<uint4>(arrays, 8));
    });
  });
}

int wkv6_mma_backward(const Call *call, void *const *arrays) {
  return with_dtype<bf16, f16>(call->dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_size<16, 32, 64, 128>(call->size, [&](auto n) {
      constexpr int N = n;
      Inputs<T> in = inputs<T>(arrays);
      in.x[DY] = array<T>(arrays, 7);
      const Gradients<T> out{array<float>(arrays, 12), array<float>(arrays, 13),
                             {array<T>(arrays, 9), array<T>(arrays, 10), array<T>(arrays, 11)}};
      return LAUNCH((backward<T, N>), dim3(call->sequences * call->heads), dim3(2 * N), sizeof(BackwardShared<T, N>),
                    call->stream, *call, in, array<uint4>(arrays, 6), array<float>(arrays, 8), out,
                    array<float>(arrays, 14));
    });
  });
}

Keeps wkv6_mma_keeps(int32_t, int64_t) { return {EVERY, 0}; }

int64_t wkv6_mma_workspace(const Call *) { return 0; }

}
