// What forward and backward of wkv6_mma.cu share: a chunk of 16 tokens in shared memory, its decays, and how much each
// of its tokens reads of another. The algebra is in wkv6_mma.cu.
#pragma once

#include "common.cuh"
#include "tiles.cuh"

namespace wkv6_mma {

using namespace tiles;

constexpr int LENGTH = 16;            // tokens of a chunk: a tile
constexpr int EVERY = 2 * LENGTH;     // tokens whose two states share the room of one in float
constexpr int LEVELS = 4;             // blocks of 2, 4, 8 and 16 tokens
constexpr int COLUMNS = LENGTH + 8;   // row of a channel by token matrix in shared memory

enum Array { R, K, V, DY };  // of a stage

// A saved state is tiles of 16 keys by 16 values, of each what the lanes hold, 16 bytes, in the order of the lanes.
template <int N>
constexpr int SAVED_ROW = N / 16 * 32;  // in units of these, from one row of tiles to the next

// Inputs of a chunk, in whose place the outputs go.
template <class T, int N, int Count>
struct Stage {
  float w[LENGTH][N + 4];
  T x[Count][LENGTH][N + 8];
};

// One head of one sequence: block number sequence * heads + head. Token numbers fit 31 bits, since arrays of more do
// not fit a GPU; what they are multiplied to does not.
template <int N>
struct Place {
  int heads, head;
  unsigned stride;   // numbers from one token to the next
  int begin, saved;  // its first token and first saved state
  int chunks, rest;  // rest: tokens of the last chunk

  __device__ explicit Place(const Call &call) : heads(call.heads), head(blockIdx.x % heads), stride(heads * N) {
    const unsigned sequence = blockIdx.x / heads;
    const Tokens tokens = tokens_of(call, sequence);
    begin = tokens.begin;
    saved = tokens.begin / EVERY + sequence;
    chunks = ceil_div(tokens.count, LENGTH);
    rest = tokens.count - (chunks - 1) * int64_t(LENGTH);
  }
  __device__ unsigned valid(int chunk) const { return chunk + 1 < chunks ? LENGTH : rest; }
  __device__ int64_t row(int chunk) const { return (begin + chunk * LENGTH) * int64_t(stride) + head * N; }
  __device__ int64_t vector() const { return int64_t(blockIdx.x) * N; }
  __device__ int64_t state() const { return vector() * N; }
  // The place of this lane in the first tile of the 16-bit state before a chunk, in units of 16 bytes.
  __device__ int64_t state_before(int chunk) const {
    return (2 * (int64_t(saved + chunk / 2) * heads + head) + chunk % 2) * (N * N / 8) + lane_id();
  }
};

// Calls f(token, column, distance in memory from the chunk's begin) for each piece of 16 bytes of a chunk's rows: for
// the same ones by a thread every time, so that a thread that has read its pieces may overwrite them.
template <class T, int N, class F>
__device__ __forceinline__ void for_pieces(const Place<N> &place, F f) {
  constexpr int Pieces = N * sizeof(T) / 16, Rows = 2 * N / Pieces;
#pragma unroll
  for (int first = 0; first < LENGTH; first += Rows) {
    const unsigned t = first + threadIdx.x / Pieces, column = threadIdx.x % Pieces * (16 / sizeof(T));
    f(t, column, t * place.stride + column);
  }
}

template <class T, int N, int Row>
__device__ __forceinline__ void fetch_rows(T (*rows)[Row], const T *global, const Place<N> &place, int chunk) {
  global += place.row(chunk);
  for_pieces<T>(place, [&](unsigned t, unsigned column, unsigned at) {
    cp_async16(&rows[t][column], global + at, t < place.valid(chunk));
  });
}

template <class T, int N, int Row>
__device__ __forceinline__ void write_rows(T *global, const T (*rows)[Row], const Place<N> &place, int chunk) {
  global += place.row(chunk);
  for_pieces<T>(place, [&](unsigned t, unsigned column, unsigned at) {
    if (t < place.valid(chunk))
      *reinterpret_cast<uint4 *>(global + at) = *reinterpret_cast<const uint4 *>(&rows[t][column]);
  });
}

template <class T>
struct Inputs {
  const float *w, *u;
  const T *x[4];
};

// Tokens behind the last one are zeros: they do not decay, write or read.
template <class T, int N, int Count>
__device__ __forceinline__ void fetch(Stage<T, N, Count> &stage, const Inputs<T> &in, const Place<N> &place,
                                      int chunk) {
  fetch_rows<float, N>(stage.w, in.w, place, chunk);
#pragma unroll
  for (int i = 0; i < Count; i++) fetch_rows<T, N>(stage.x[i], in.x[i], place, chunk);
  cp_async_commit();
}

// What load_tile and load_transposed give, but for the other factor of a product: without a move from the registers
// that ldmatrix fills to those that mma reads.
template <class T>
__device__ __forceinline__ Operand load_right(const T *tile, int stride) {
  uint32_t r[4];
  ldmatrix_x4(r, tile + (lane_id() % 8 + lane_id() / 16 * 8) * stride + lane_id() / 8 % 2 * 8);
  return {r[0], r[2], r[1], r[3]};
}

template <class T>
__device__ __forceinline__ Operand load_transposed_left(const T *tile, int stride) {
  Operand x;
  ldmatrix_x4_trans(x.r, tile + (lane_id() % 8 + lane_id() / 16 * 8) * stride + lane_id() / 8 % 2 * 8);
  return x;
}

template <class T>
__device__ __forceinline__ Tile unrounded(const Operand &x) {
  Tile y;
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 2; i++) {
      const float2 pair = unpack2<T>(x.r[2 * j + i]);
      y.d[j][2 * i] = pair.x, y.d[j][2 * i + 1] = pair.y;
    }
  return y;
}

__device__ __forceinline__ Tile operator*(const Tile &x, const Tile &y) {
  Tile z;
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) z.d[j][e] = x.d[j][e] * y.d[j][e];
  return z;
}

// Tiles of channels by tokens: this warp's 16 channels, and all tokens. A token is in the right half of its block of
// 2 << level tokens or in the left one.
__device__ __forceinline__ bool in_right_half(int level, int j, int e) {
  return level == 0 ? e % 2 : level == LEVELS - 1 ? j : lane_id() & level;
}

template <int N>
__device__ __forceinline__ Tile load_channels(const float (*x)[N + 4]) {
  Tile y;
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) y.d[j][e] = x[tile_column(j) + e % 2][16 * warp_id() + tile_row(e / 2)];
  return y;
}

template <int N>
__device__ __forceinline__ void store_channels(float (*x)[N + 4], const Tile &y) {
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) x[tile_column(j) + e % 2][16 * warp_id() + tile_row(e / 2)] = y.d[j][e];
}

struct Decays {
  Tile level[LEVELS];  // between a token and the middle of its block: 1 in blocks of 2
  Tile head, tail;     // between the chunk's first border, or its last, and a token
  float total[2];      // over the chunk
};

// What lies between two places decays by a product, over 2, 4, 8 tokens of two halves: no factor is above 1, and
// nothing is divided by one, so that any log decay down to -inf is right. Only the total is e^(sum): a state meets one
// in every chunk, and roundings of decays next to 1 would add up.
__device__ __forceinline__ Decays make_decays(const Tile &w) {
  Decays d;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float before[2][2], behind[2][2], product[2], sum = 0;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float first = fast_exp(w.d[j][2 * i]), second = fast_exp(w.d[j][2 * i + 1]);
      before[j][0] = 1, before[j][1] = first, behind[j][0] = second, behind[j][1] = 1;
      product[j] = first * second, sum += w.d[j][2 * i] + w.d[j][2 * i + 1];
#pragma unroll
      for (int level = 1; level < LEVELS; level++) {
        const bool right = in_right_half(level, j, 0);
        for (int e = 0; e < 2; e++) d.level[level].d[j][2 * i + e] = right ? before[j][e] : behind[j][e];
        if (level == LEVELS - 1) break;
        const float other = __shfl_xor_sync(~0u, product[j], level);
        for (int e = 0; e < 2; e++) before[j][e] *= right ? other : 1, behind[j][e] *= right ? 1 : other;
        product[j] *= other;
      }
      for (int e = 0; e < 2; e++) d.level[0].d[j][2 * i + e] = 1;
    }
    for (int e = 0; e < 2; e++) {
      d.head.d[0][2 * i + e] = before[0][e], d.head.d[1][2 * i + e] = product[0] * before[1][e];
      d.tail.d[0][2 * i + e] = behind[0][e] * product[1], d.tail.d[1][2 * i + e] = behind[1][e];
    }
    for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    d.total[i] = expf(sum);
  }
  return d;
}

// A chunk's r and k of this warp's channels, and both together as the products within blocks take them: of tokens in
// right halves r, of those in left ones k, decayed to the middle of the block.
template <class T>
struct Vectors {
  Operand r, k;

  template <int N, int Count>
  __device__ __forceinline__ explicit Vectors(const Stage<T, N, Count> &stage)
      : r(load_transposed(&stage.x[R][0][16 * warp_id()], N + 8)),
        k(load_transposed(&stage.x[K][0][16 * warp_id()], N + 8)) {}

  __device__ __forceinline__ Operand half(int level) const {
    Operand x;
    for (int i = 0; i < 4; i++) {
      x.r[i] = in_right_half(level, i / 2, 0) ? r.r[i] : k.r[i];
      if (level == 0) x.r[i] = (k.r[i] & 0xffff) | (r.r[i] & 0xffff0000);
    }
    return x;
  }
  __device__ __forceinline__ Operand decayed(int level, const Decays &decays) const {
    return level == 0 ? half(0) : rounded<T>(unrounded<T>(half(level)) * decays.level[level]);
  }
};

// Whether the pair of two tokens is one of the two halves of a block of 2 << level tokens.
__device__ __forceinline__ bool belongs(int t, int j, int level) { return (t ^ j) >> level == 1; }

// How much a token (row) reads of the value of another (column); or the transpose, if Back. The products of this warp's
// channels go to shared memory; after a barrier everyone adds them. Two of the four quarters are triangles, one is
// zero.
template <class T, bool Back, int N, int Count>
__device__ __forceinline__ void add_scores(float2 (*scores)[3][32], const Stage<T, N, Count> &stage,
                                           const Vectors<T> &x, const Decays &decays, const float *u) {
  const int own = 16 * warp_id(), row = tile_row(0), column = tile_column(0);
  const Operand r = load_tile(&stage.x[R][0][own], N + 8), k = load_tile(&stage.x[K][0][own], N + 8);
  Tile ur = unrounded<T>(r), sum = {};
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) ur.d[j][e] *= u[own + tile_column(j) + e % 2];
  add_product<T>(sum, rounded<T>(ur), k);
  float2 quarter[3] = {{sum.d[0][0], sum.d[0][1]}, {sum.d[1][2], sum.d[1][3]}, {}};
#pragma unroll
  for (int level = 0; level < LEVELS; level++) {
    const Operand half = level == 0 ? (row % 2 ? r : k) : transposed(x.decayed(level, decays));
    Tile d = {};
    add_product<T>(d, half, half);
    if (level == LEVELS - 1) quarter[2] = Back ? float2{d.d[1][0], d.d[1][1]} : float2{d.d[0][2], d.d[0][3]};
    if (belongs(row, column, level)) quarter[0].x = d.d[0][0], quarter[1].x = d.d[1][2];
    if (belongs(row, column + 1, level)) quarter[0].y = d.d[0][1], quarter[1].y = d.d[1][3];
  }
  for (int i = 0; i < 2; i++) {
    if (Back ? row > column : row < column) quarter[i].x = 0;
    if (Back ? row > column + 1 : row < column + 1) quarter[i].y = 0;
  }
  for (int i = 0; i < 3; i++) scores[warp_id()][i][lane_id()] = quarter[i];
}

template <class T, int N, bool Back>
__device__ __forceinline__ Operand sum_scores(const float2 (*scores)[3][32]) {
  float2 sum[3];
#pragma unroll
  for (int i = 0; i < 3; i++) {
    sum[i] = scores[0][i][lane_id()];
    for (int warp = 1; warp < N / 16; warp++) {
      const float2 x = scores[warp][i][lane_id()];
      sum[i].x += x.x, sum[i].y += x.y;
    }
  }
  const uint32_t corner = pack2<T>(sum[2].x, sum[2].y);
  return {pack2<T>(sum[0].x, sum[0].y), Back ? 0 : corner, Back ? corner : 0, pack2<T>(sum[1].x, sum[1].y)};
}

}  // namespace wkv6_mma
