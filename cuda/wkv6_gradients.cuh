// The gradients of a chunk in wkv6_mma.cu: through the states on both sides of it, and between its tokens.
#pragma once

#include "wkv6_chunk.cuh"

namespace wkv6_mma {

// Gradients of this warp's 16 channels. That of w is still to be joined with what both tokens of a lane get alike.
struct Channels {
  Tile r, k, w;
  float both[2][2];

  // Adds to w the sums of x, of a lane's two tokens in column j of row i, over the tokens behind each, or before it,
  // among the nearest 2 << steps. Returns the sum over all of these.
  __device__ __forceinline__ float add_sums(int i, int j, const Tile &x, bool behind, int steps) {
    const float first = x.d[j][2 * i], second = x.d[j][2 * i + 1];
    if (behind) w.d[j][2 * i] += second;
    if (!behind) w.d[j][2 * i + 1] += first;
    float sum = first + second;
#pragma unroll
    for (int lanes = 1; lanes < 1 << steps; lanes *= 2) {
      const float other = __shfl_xor_sync(~0u, sum, lanes);
      if (bool(lane_id() & lanes) != behind) both[i][j] += other;
      sum += other;
    }
    return sum;
  }
  __device__ __forceinline__ void join() {
    for (int j = 0; j < 2; j++)
      for (int e = 0; e < 4; e++) w.d[j][e] += both[e / 2][j];
  }
};

// From what comes through the state before the chunk and its gradient after it: a decay stands between every earlier
// token and r, k and every later one, and the two states.
template <class T>
__device__ __forceinline__ void through_states(Channels &d, const Vectors<T> &x, const Decays &decays,
                                               const float (&cross)[2]) {
  const Tile r = unrounded<T>(x.r) * d.r, k = unrounded<T>(x.k) * d.k;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float later[2], earlier[2];
    for (int j = 0; j < 2; j++) {
      d.both[i][j] = cross[i] * decays.total[i];
      later[j] = d.add_sums(i, j, r, true, 2), earlier[j] = d.add_sums(i, j, k, false, 2);
    }
    d.both[i][0] += later[1], d.both[i][1] += earlier[0];
  }
}

// From the products between the halves of blocks of 2 << level tokens: scores are symmetric here, so that one product
// gives the gradient of r in right halves and of k in left ones.
template <class T>
__device__ __forceinline__ void through_halves(Channels &d, int level, const Vectors<T> &x, const Decays &decays,
                                               const Operand &scores) {
  Tile dx = {};
  add_product<T>(dx, x.decayed(level, decays), scores);
  dx = dx * decays.level[level];
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) {
      if (in_right_half(level, j, e)) d.r.d[j][e] += dx.d[j][e];
      if (!in_right_half(level, j, e)) d.k.d[j][e] += dx.d[j][e];
    }
  if (level == 0) return;
  dx = unrounded<T>(x.half(level)) * dx;
#pragma unroll
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) d.add_sums(i, j, dx, in_right_half(level, j, 0), level - 1);
}

// The symmetric matrix of the gradients of scores, from its lower triangle.
template <class T>
struct ScoreGradients {
  uint32_t triangle[2], corner;
  float diagonal[2];  // in the lanes that have it

  ScoreGradients() = default;
  __device__ __forceinline__ explicit ScoreGradients(const Tile &d) : corner(pack2<T>(d.d[0][2], d.d[0][3])) {
    const int row = tile_row(0), column = tile_column(0);
    for (int i = 0; i < 2; i++) {
      const uint32_t lower = pack2<T>(d.d[i][2 * i], d.d[i][2 * i + 1]), upper = movmatrix_trans(lower);
      const uint32_t mask = halves(row > column, row > column + 1);
      triangle[i] = (lower & mask) | (upper & ~mask);
      diagonal[i] = row % 2 ? d.d[i][2 * i + 1] : d.d[i][2 * i];
    }
  }
  // The part of it that is between the halves of blocks of 2 << level tokens.
  __device__ __forceinline__ Operand between(int level) const {
    if (level == LEVELS - 1) return {0, corner, movmatrix_trans(corner), 0};
    const uint32_t mask = halves(belongs(tile_row(0), tile_column(0), level),
                                 belongs(tile_row(0), tile_column(0) + 1, level));
    return {triangle[0] & mask, 0, 0, triangle[1] & mask};
  }
  __device__ __forceinline__ float own(int j, int e) const {
    return __shfl_sync(~0u, diagonal[j], (tile_column(0) + e) * 4 + lane_id() % 4);
  }
  __device__ static uint32_t halves(bool low, bool high) { return (low ? 0xffff : 0) | (high ? 0xffff0000 : 0); }
};

// From the diagonal of scores: what a token reads of its own value.
template <class T>
__device__ __forceinline__ void through_bonus(Channels &d, float (&du)[2], const Vectors<T> &x,
                                              const ScoreGradients<T> &scores, const float *u) {
  const Tile r = unrounded<T>(x.r), k = unrounded<T>(x.k);
#pragma unroll
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 2; e++) {
      const float score = scores.own(j, e);
      for (int i = 0; i < 2; i++) {
        const int at = 2 * i + e;
        const float bonus = u[16 * warp_id() + tile_row(i)];
        d.r.d[j][at] += score * bonus * k.d[j][at], d.k.d[j][at] += score * bonus * r.d[j][at];
        du[i] += score * r.d[j][at] * k.d[j][at];
      }
    }
}

template <class T, int N>
struct BackwardShared {
  Stage<T, N, 4> stage[2];
  T tail[N][COLUMNS];
  float u[N];
  T g[N][N + 8];  // (key, value); first, tile by tile, the state before the chunk, as the lanes hold it
  float2 scores[N / 16][3][32];

  __device__ __forceinline__ T *of_lane(int n) {
    return &g[16 * warp_id() + lane_id() / 2][16 * n + lane_id() % 2 * 8];
  }
};

// Products with the states: gradients of r and k that are still to be decayed, of scores, and the states' own product.
template <class T, int N>
__device__ __forceinline__ void multiply_states(BackwardShared<T, N> &shared, const Stage<T, N, 4> &stage,
                                                const Tile (&g)[N / 16], Channels &d, ScoreGradients<T> &scores,
                                                float (&cross)[2]) {
  d = {}, cross[0] = cross[1] = 0;
  Tile products = {};
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    const uint4 lane = *reinterpret_cast<const uint4 *>(shared.of_lane(n));
    const Operand before = {lane.x, lane.y, lane.z, lane.w}, after = rounded<T>(g[n]);
    __syncwarp();
    store_tile(&shared.g[16 * warp_id()][16 * n], N + 8, after);
    const T *const dy = &stage.x[DY][0][16 * n];
    const Operand v = load_right(&stage.x[V][0][16 * n], N + 8);
    add_product<T>(d.r, before, load_right(dy, N + 8));
    add_product<T>(d.k, after, v);
    add_product<T>(products, load_tile(dy, N + 8), v);
    const Tile product = unrounded<T>(before) * g[n];
    for (int j = 0; j < 2; j++)
      for (int e = 0; e < 4; e++) cross[e / 2] += product.d[j][e];
  }
  scores = ScoreGradients<T>(products);
  for (int i = 0; i < 2; i++)
    for (int lanes = 1; lanes < 4; lanes *= 2) cross[i] += __shfl_xor_sync(~0u, cross[i], lanes);
}

// The gradient of v of 16 values, and that of the state before the chunk.
template <class T, int N>
__device__ __forceinline__ Tile update(const BackwardShared<T, N> &shared, const Stage<T, N, 4> &stage,
                                       const Operand &head, const float (&total)[2], Tile (&g)[N / 16]) {
  const int own = 16 * warp_id();
  Tile dv = {};
  add_product<T>(dv, sum_scores<T, N, true>(shared.scores), load_transposed(&stage.x[DY][0][own], N + 8));
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    add_product<T>(dv, load_transposed_left(shared.tail[16 * n], COLUMNS),
                   load_transposed(&shared.g[16 * n][own], N + 8));
    for (int j = 0; j < 2; j++)
      for (int e = 0; e < 4; e++) g[n].d[j][e] *= total[e / 2];
    add_product<T>(g[n], head, load_transposed(&stage.x[DY][0][16 * n], N + 8));
  }
  return dv;
}

// The gradients of a chunk in place of its inputs, and that of the state before it. Args: ahead: whether inputs of
// another chunk are on their way, behind the state.
template <class T, int N>
__device__ __forceinline__ void step_back(BackwardShared<T, N> &shared, Stage<T, N, 4> &stage, Tile (&g)[N / 16],
                                          float (&du)[2], bool ahead) {
  const int own = 16 * warp_id();
  Vectors<T> x(stage);
  Decays decays = make_decays(load_channels<N>(stage.w));
  add_scores<T, true>(shared.scores, stage, x, decays, shared.u);
  store_channels<N>(stage.w, decays.level[LEVELS - 1]);  // for a while: registers are short
  store_tile(shared.tail[own], COLUMNS, rounded<T>(unrounded<T>(x.k) * decays.tail));
  const Operand head = rounded<T>(unrounded<T>(x.r) * decays.head);
  Channels d;
  ScoreGradients<T> scores;
  float cross[2];
  ahead ? cp_async_wait<1>() : cp_async_wait<0>();
  multiply_states(shared, stage, g, d, scores, cross);
  d.r = d.r * decays.head, d.k = d.k * decays.tail;
  __syncthreads();
  x = Vectors<T>(stage);  // read again for the same reason
  const Tile dv = update(shared, stage, head, decays.total, g);
  store_tile(&stage.x[V][0][own], N + 8, rounded<T>(dv));
  through_states(d, x, decays, cross);
  through_bonus(d, du, x, scores, shared.u);
  decays.level[LEVELS - 1] = load_channels<N>(stage.w);
#pragma unroll
  for (int level = LEVELS - 1; level >= 0; level--) through_halves(d, level, x, decays, scores.between(level));
  store_tile(&stage.x[R][0][own], N + 8, transposed(rounded<T>(d.r)));
  store_tile(&stage.x[K][0][own], N + 8, transposed(rounded<T>(d.k)));
  d.join();
  store_channels<N>(stage.w, d.w);
}

}  // namespace wkv6_mma
