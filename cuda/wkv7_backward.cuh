// The gradient of wkv7_mma.cu, where the algebra is: from the last chunk back, two by two.
//
// The state before a pair of chunks was saved. Forward again through both gives U of each and the state between them.
// Then each chunk takes four steps, with a barrier behind the first two: G row by row; what goes through the states at
// both ends, column by column; what goes through pairs of tokens; the factors of the inputs, and the log decays.
#pragma once

#include "wkv7_chunk.cuh"

namespace wkv7_mma {

template <class T, int N>
struct BackwardShared {
  Stage<T, N, 6> stage[2];
  Squares<T> squares[2];  // of each chunk; then their gradients
  T u[2][LENGTH][N + 8];
  float head[2][N], tail[2][N];
  T s[N][N + 8], g[N][N + 8];
  union {
    T du[LENGTH][N + 8];
    float system[LENGTH * SYSTEM];
  };
};

template <class T>
struct Gradients {
  float *w;
  T *x[5];
};

// U of chunk c (0 or 1) of two, and the scaled state before it: in `before` for the first, in shared memory for the
// second. Leaves in s the state after the first.
template <class T, int N>
__device__ __forceinline__ void again(BackwardShared<T, N> &shared, int c, int turn, Stage<T, N, 6> &stage,
                                      Tile (&s)[N / 16], Operand (&before)[N / 16]) {
  scale_inputs<true>(stage, shared.head[c], shared.tail[c]);
  __syncthreads();
  scale_columns<N>(s, shared.head[c]);
  const int own = 16 * warp_id();
  Products<N> products(turn);
  Tile z = {};
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    const Operand a = load_tile(&stage.x[A][0][16 * n], N + 8);
    products.each([&](int m, Tile &d) {
      const Operand ra = m < AK ? load_tile(&stage.x[R][0][16 * n], N + 8) : a;
      add_product<T>(d, ra, load_tile(&stage.x[m % 2 ? B : K][0][16 * n], N + 8));
    });
    const Operand x = rounded<T>(s[n]);
    if (c == 0) before[n] = x;
    if (c == 1) store_tile(&shared.s[own][16 * n], N + 8, x);
    add_product<T>(z, x, a);
  }
  store_squares<T>(products, shared.squares[c], shared.system);
  __syncthreads();
  const Operand v = load_transposed(&stage.x[V][0][own], N + 8);
  const Operand u = solve<T>(z, v, shared.squares[c]);
  store_tile(&shared.u[c][0][own], N + 8, transposed(u));
  if (c == 0) update(s, stage, v, u, shared.tail[c]);
}

// G before the chunk from that after it, row by row, which leaves dU and the scaled G to other warps. Returns dV^T.
template <class T, int N>
__device__ __forceinline__ Operand step_back(BackwardShared<T, N> &shared, int c, const Stage<T, N, 6> &stage,
                                             Tile (&g)[N / 16]) {
  const int own = 16 * warp_id();
  const auto &squares = shared.squares[c];
  const Operand dy = load_transposed(&stage.x[DY][0][own], N + 8);
  Tile du = {}, dv = {};
  scale_columns<N>(g, shared.tail[c]);
  for_parts<true, T>(squares, QB, [&](const Operand &x) { add_product<T>(du, dy, x); });
  for_parts<true, T>(squares, QK, [&](const Operand &x) { add_product<T>(dv, dy, x); });
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    const Operand x = rounded<T>(g[n]);
    store_tile(&shared.g[own][16 * n], N + 8, x);
    add_product<T>(du, x, load_tile(&stage.x[B][0][16 * n], N + 8));
    add_product<T>(dv, x, load_tile(&stage.x[K][0][16 * n], N + 8));
    add_product<T>(g[n], dy, load_transposed(&stage.x[R][0][16 * n], N + 8));
  }
  add_product<T>(du, rounded<T>(du), load_transposed(squares[AB][0], SQUARE));
  const Operand x = rounded<T>(du);
  store_tile(&shared.du[0][own], N + 8, transposed(x));
  for_parts<true, T>(squares, AK, [&](const Operand &ak) { add_product<T>(dv, x, ak); });
#pragma unroll
  for (int n = 0; n < N / 16; n++) add_product<T>(g[n], x, load_transposed(&stage.x[A][0][16 * n], N + 8));
  scale_columns<N>(g, shared.head[c]);
  return rounded<T>(dv);
}

// Of this warp's 16 channels: gradients of the scaled r, a, k, b, and of the decay over the whole chunk.
struct Columns {
  Tile r, a, k, b;
  float decay[2][2];  // [j][e] of column tile_column(j) + e; in part: to be summed over the rows of lanes
};

// What comes through the states at both ends of the chunk. The gradients of the squares are left in their place.
template <class T, int N>
__device__ __forceinline__ Columns through_states(BackwardShared<T, N> &shared, int c, const Stage<T, N, 6> &stage) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int AT_ONCE = N > 64 ? 8 : 4;  // each the number at which ptxas spills no register
#else
  constexpr int AT_ONCE = 4;
#endif
  const int own = 16 * warp_id();
  Products<N> products(0);
  Columns d = {};
  Tile both = {};
#pragma unroll (AT_ONCE)
  for (int n = 0; n < N; n += 16) {
    const Operand s = load_transposed(&shared.s[n][own], N + 8), g = load_transposed(&shared.g[n][own], N + 8);
    const Operand dy = load_tile(&stage.x[DY][0][n], N + 8), du = load_tile(&shared.du[0][n], N + 8);
    const Operand v = load_tile(&stage.x[V][0][n], N + 8), u = load_tile(&shared.u[c][0][n], N + 8);
    products.each([&](int m, Tile &d) { add_product<T>(d, either(m < AK, dy, du), either(m % 2, u, v)); });
    add_product<T>(d.r, dy, s);
    add_product<T>(d.a, du, s);
    add_product<T>(d.k, v, g);
    add_product<T>(d.b, u, g);
    add_product<T>(both, s, g);
  }
  products.each([&](int m, Tile &d) {
    mask(d, m);
    store_square<T>(shared.squares[c], m, d);
  });
  const Operand k = load_tile(&stage.x[K][0][own], N + 8), b = load_tile(&stage.x[B][0][own], N + 8);
#pragma unroll
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 2; i++) {
      const float2 kk = unpack2<T>(k.r[2 * j + i]), bb = unpack2<T>(b.r[2 * j + i]);
      d.decay[j][0] += kk.x * d.k.d[j][2 * i] + bb.x * d.b.d[j][2 * i];
      d.decay[j][1] += kk.y * d.k.d[j][2 * i + 1] + bb.y * d.b.d[j][2 * i + 1];
      // The diagonal of S^T G is what the state itself loses by the decay.
      for (int e = 0; e < 2; e++)
        if (i == j && tile_row(i) == tile_column(j) + e) d.decay[j][e] += both.d[j][2 * i + e];
    }
  return d;
}

// What comes through pairs of tokens of the chunk.
template <class T, int N>
__device__ __forceinline__ void through_tokens(const BackwardShared<T, N> &shared, int c,
                                               const Stage<T, N, 6> &stage, Columns &d) {
  const int own = 16 * warp_id();
  const Operand r = load_transposed(&stage.x[R][0][own], N + 8), a = load_transposed(&stage.x[A][0][own], N + 8);
  const Operand k = load_transposed(&stage.x[K][0][own], N + 8), b = load_transposed(&stage.x[B][0][own], N + 8);
  const auto &gradients = shared.squares[c];
  for_parts<false, T>(gradients, QK, [&](const Operand &x) { add_product<T>(d.r, x, k); });
  for_parts<false, T>(gradients, AK, [&](const Operand &x) { add_product<T>(d.a, x, k); });
  for_parts<false, T>(gradients, QB, [&](const Operand &x) { add_product<T>(d.r, x, b); });
  add_product<T>(d.a, load_tile(gradients[AB][0], SQUARE), b);
  for_parts<true, T>(gradients, QK, [&](const Operand &x) { add_product<T>(d.k, x, r); });
  for_parts<true, T>(gradients, QB, [&](const Operand &x) { add_product<T>(d.b, x, r); });
  for_parts<true, T>(gradients, AK, [&](const Operand &x) { add_product<T>(d.k, x, a); });
  add_product<T>(d.b, load_transposed(gradients[AB][0], SQUARE), a);
}

// The gradients of the log decays of this warp's 16 channels, from what each token of w adds to it and all before.
template <int N>
__device__ __forceinline__ void sum_decays(float (*w)[N + 8]) {
  const int t = lane_id() / 4 * 2, channel = 16 * warp_id() + lane_id() % 4 * 4;
  const float4 second = load4(&w[t + 1][channel]), both = load4(&w[t][channel]) + second;
  float sum[4] = {both.x, both.y, both.z, both.w}, after[4] = {};
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2)
    for (int i = 0; i < 4; i++) {
      const float more = __shfl_down_sync(~0u, sum[i], lanes);
      if (lane_id() + lanes < 32) sum[i] += more, after[i] += more;
    }
  store4(&w[t][channel], make_float4(sum[0], sum[1], sum[2], sum[3]));
  store4(&w[t + 1][channel], make_float4(after[0], after[1], after[2], after[3]) + second);
}

// Gradients of the inputs of this warp's channels, left in the place of the inputs.
template <class T, int N>
__device__ __forceinline__ void finish(Stage<T, N, 6> &stage, Columns &d) {
  const int own = 16 * warp_id();
  const Operand r = load_tile(&stage.x[R][0][own], N + 8), a = load_tile(&stage.x[A][0][own], N + 8);
  const Operand k = load_tile(&stage.x[K][0][own], N + 8), b = load_tile(&stage.x[B][0][own], N + 8);
  Tile decay, next;
#pragma unroll
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 2; i++) {
      const int t = tile_row(i), channel = own + tile_column(j), at = 2 * j + i;
      const float2 before = *reinterpret_cast<const float2 *>(&stage.w[t][channel]);
      const float2 now = *reinterpret_cast<const float2 *>(&stage.w[t + 1][channel]);
      const float2 rr = unpack2<T>(r.r[at]), aa = unpack2<T>(a.r[at]);
      const float2 kk = unpack2<T>(k.r[at]), bb = unpack2<T>(b.r[at]);
      for (int e = 0; e < 2; e++) {
        float &dr = d.r.d[j][2 * i + e], &da = d.a.d[j][2 * i + e];
        float &dk = d.k.d[j][2 * i + e], &db = d.b.d[j][2 * i + e];
        const float p = e ? now.y : now.x, down = fast_exp(-p);
        decay.d[j][2 * i + e] = (e ? rr.y : rr.x) * dr - (e ? kk.y : kk.x) * dk - (e ? bb.y : bb.x) * db;
        next.d[j][2 * i + e] = (e ? aa.y : aa.x) * da;
        dr *= fast_exp(p), da *= fast_exp(e ? before.y : before.x), dk *= down, db *= down;
      }
    }
#pragma unroll
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 2; e++) {
      for (int lanes = 4; lanes < 32; lanes *= 2) d.decay[j][e] += __shfl_xor_sync(~0u, d.decay[j][e], lanes);
      // What a token's a sees is decayed up to the token before: row g takes that of row g + 1.
      const float low = __shfl_sync(~0u, next.d[j][e], lane_id() + 4);
      const float high = __shfl_sync(~0u, next.d[j][2 + e], lane_id() + 4);
      decay.d[j][e] += lane_id() < 28 ? low : high;
      decay.d[j][2 + e] += lane_id() < 28 ? high : d.decay[j][e];
    }
  store_tile(&stage.x[R][0][own], N + 8, rounded<T>(d.r));
  store_tile(&stage.x[A][0][own], N + 8, rounded<T>(d.a));
  store_tile(&stage.x[K][0][own], N + 8, rounded<T>(d.k));
  store_tile(&stage.x[B][0][own], N + 8, rounded<T>(d.b));
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 2; i++)
      *reinterpret_cast<float2 *>(&stage.w[tile_row(i)][own + tile_column(j)]) =
          make_float2(decay.d[j][2 * i], decay.d[j][2 * i + 1]);
  __syncwarp();
  sum_decays<N>(stage.w);
}

template <class T, int N>
__device__ __forceinline__ void write(const Gradients<T> &out, const Stage<T, N, 6> &stage, const Place<N> &place,
                                      int chunk) {
  write_rows<float, N>(out.w, stage.w, place, chunk);
#pragma unroll
  for (int i = R; i <= B; i++) write_rows<T, N>(out.x[i], stage.x[i], place, chunk);
}

template <class T, int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? 3 : 1)
    backward(Call call, Inputs<T> in, const float *saved, const float *dstate, Gradients<T> out, float *first) {
  DYNAMIC_SHARED(void, memory);
  auto &shared = *static_cast<BackwardShared<T, N> *>(memory);
  const Place<N> place(call);
  const int own = 16 * warp_id();
  Tile g[N / 16];
  load_state<N>(g, dstate + place.state());
  // By pairs of chunks, the last one maybe empty. The second of a pair is done, written and replaced before the first.
  const auto stage_of = [&](int chunk) -> Stage<T, N, 6> & { return shared.stage[(chunk ^ chunk / 2) & 1]; };
  int even = (place.chunks() - 1) / 2 * 2;
  if (place.count > 0) fetch(stage_of(even), in, place, even);
#pragma unroll 1
  for (; even >= 0 && place.count > 0; even -= 2) {
    Operand before[N / 16];
    {
      Tile s[N / 16];
      load_saved<N>(s, saved + place.saved_before(even));
#pragma unroll 1
      for (int chunk = even; chunk < even + 2; chunk++) {
        const int c = chunk - even;
        cp_async_wait<0>();
        __syncthreads();
        if (c == 0 && chunk + 2 < place.chunks()) write(out, stage_of(chunk + 2), place, chunk + 2);
        if (c == 0) fetch(stage_of(chunk + 1), in, place, chunk + 1);
        again(shared, c, chunk, stage_of(chunk), s, before);
      }
    }
#pragma unroll 1
    for (int chunk = even + 1; chunk >= even; chunk--) {
      const int c = chunk - even;
      Stage<T, N, 6> &stage = stage_of(chunk);
      if (c == 0)
        for (int n = 0; n < N / 16; n++) store_tile(&shared.s[own][16 * n], N + 8, before[n]);
      const Operand dv = step_back(shared, c, stage, g);
      __syncthreads();
      if (c == 0) write(out, stage_of(chunk + 1), place, chunk + 1);
      if (c == 0 && chunk > 0) fetch(stage_of(chunk - 2), in, place, chunk - 2);
      Columns d = through_states(shared, c, stage);
      __syncthreads();
      store_tile(&stage.x[V][0][own], N + 8, transposed(dv));
      through_tokens(shared, c, stage, d);
      finish(stage, d);
    }
  }
  __syncthreads();
  if (place.count > 0) write(out, stage_of(0), place, 0);
  store_state<N>(first + place.state(), g);
}

}  // namespace wkv7_mma
