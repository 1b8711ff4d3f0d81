// RWKV-7 in pieces (see pieces.cuh):  S <- S diag(e^w) + (S a) b^T + v k^T ;  y = S r   (arXiv:2503.14456, section 4).
//
// The rows of S do not see each other, so a piece maps S to S M + C, where M is what the recurrence makes of the rows
// of the identity without v k^T, and C what it makes of zeros. For the gradient G of the state, against time,
//
//   G <- G + dy r^T ;  G <- G diag(e^w) + (G b) a^T
//
// so that a piece maps G to G M^T + E, and E comes of the same kernel with a and b exchanged.
#include "pieces.cuh"

using namespace pieces;

namespace {

// Grid: strips of M, then of C (backward: of E) x heads x pieces. Args: read, write: a, b; backward b, a. left, right:
// v, k; backward dy, r.
template <class T, int N, bool BACK>
__global__ void __launch_bounds__(Tile<N>::THREADS)
    summary(Call call, const float *__restrict__ w, const T *__restrict__ read, const T *__restrict__ write,
            const T *__restrict__ left, const T *__restrict__ right, float *__restrict__ transition,
            float *__restrict__ added) {
  using Rows = Tile<N>;
  constexpr int PARTS = BACK ? Rows::STRIPS : 2 * Rows::STRIPS, GROUP = Rows::GROUP;
  DYNAMIC_SHARED(float, decays);
  float *const reads = decays + GROUP, *const writes = reads + GROUP, *const lefts = writes + GROUP;
  float *const rights = lefts + GROUP, *const raw_decays = rights + GROUP;
  T *const raw = reinterpret_cast<T *>(raw_decays + GROUP);
  const int64_t place = blockIdx.x / PARTS;
  const bool identity = !BACK && blockIdx.x % PARTS < Rows::STRIPS;
  const int top = blockIdx.x % Rows::STRIPS * Rows::HEIGHT;
  const Walk<N> walk(call, place / call.heads, place % call.heads, BACK);

  const auto copy = [&](int64_t from) {
    walk.copy(raw_decays, w, from);
    walk.copy(raw, read, from);
    walk.copy(raw + GROUP, write, from);
    walk.copy(raw + 2 * GROUP, left, from);
    walk.copy(raw + 3 * GROUP, right, from);
    cp_async_commit();
  };
  Rows rows;
  rows.begin(identity, top);
  copy(0);
  for (int64_t from = 0; from < walk.count; from += Rows::TOKENS) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < GROUP; i += Rows::THREADS) decays[i] = expf(raw_decays[i]);
    widen<N>(reads, raw);
    widen<N>(writes, raw + GROUP);
    widen<N>(lefts, raw + 2 * GROUP);
    widen<N>(rights, raw + 3 * GROUP);
    __syncthreads();
    copy(from + Rows::TOKENS);
    const int last = min(int64_t(Rows::TOKENS), walk.count - from) * N;
#pragma unroll 1
    for (int t = 0; t < last; t += N) {
      if (BACK) rows.add(lefts + t + top, rights + t);
      rows.step(decays + t, reads + t, writes + t);
      if (!BACK && !identity) rows.add(lefts + t + top, rights + t);
    }
  }
  rows.store((identity ? transition : added) + (place * N + top) * N);
}

constexpr int HEIGHT = 8;  // rows of the state that a block of `scan` carries
constexpr int GROUPS = 4;  // parts of the sum over the columns of those rows

// S before each piece (backward: G after each). A thread holds a quarter of a column of M (of a row) and asks for that
// of the next piece before it waits for the others. Grid: strips x heads x sequences.
template <int N, bool BACK>
__global__ void __launch_bounds__(GROUPS *N)
    scan(Call call, const float *__restrict__ transition, const float *__restrict__ added,
         const float *__restrict__ state, float *__restrict__ carried) {
  constexpr int DEPTH = N / GROUPS, KEPT = HEIGHT / GROUPS, STRIPS = N / HEIGHT;
  DYNAMIC_SHARED(float, rows);            // (HEIGHT, N)
  float *const sums = rows + HEIGHT * N;  // (GROUPS, HEIGHT, N)
  const int column = threadIdx.x % N, group = threadIdx.x / N;
  const int top = blockIdx.x % STRIPS * HEIGHT + group * KEPT;
  const int64_t head = blockIdx.x / STRIPS % call.heads, sequence = blockIdx.x / STRIPS / call.heads;
  const Tokens pieces = tokens_of(call, sequence);
  const auto at = [&](int64_t of, int row) { return ((of * call.heads + head) * N + row) * N; };

  float m[DEPTH], own[KEPT];
  const auto load = [&](int64_t piece) {
    const float *from = transition + at(piece, 0);
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      const int inner = group * DEPTH + i;
      m[i] = BACK ? from[column * N + inner] : from[inner * N + column];
    }
  };
#pragma unroll
  for (int r = 0; r < KEPT; r++) own[r] = state[at(sequence, top + r) + column];
  if (pieces.count > 0) load(BACK ? pieces.begin + pieces.count - 1 : pieces.begin);
  for (int64_t i = 0; i < pieces.count; i++) {
    const int64_t piece = pieces.begin + (BACK ? pieces.count - 1 - i : i);
    float plus[KEPT], sum[HEIGHT] = {};
#pragma unroll
    for (int r = 0; r < KEPT; r++) {
      carried[at(piece, top + r) + column] = own[r];
      rows[(group * KEPT + r) * N + column] = own[r];
      plus[r] = added[at(piece, top + r) + column];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < DEPTH; j += 4)
#pragma unroll
      for (int r = 0; r < HEIGHT; r++) {
        const float4 x = load4(rows + r * N + group * DEPTH + j);
        sum[r] += x.x * m[j];
        sum[r] += x.y * m[j + 1];
        sum[r] += x.z * m[j + 2];
        sum[r] += x.w * m[j + 3];
      }
#pragma unroll
    for (int r = 0; r < HEIGHT; r++) sums[(group * HEIGHT + r) * N + column] = sum[r];
    if (i + 1 < pieces.count) load(BACK ? piece - 1 : piece + 1);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < KEPT; r++) {
      own[r] = plus[r];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) own[r] += sums[(g * HEIGHT + group * KEPT + r) * N + column];
    }
  }
}

template <bool BACK>
int launch_summary(const Call &call, const float *w, void *const (&tokens)[4], void *transition, void *added) {
  return dispatch(call, [&](auto type, auto n) {
    using T = decltype(type);
    constexpr int N = n;
    const dim3 grid(call.sequences * call.heads * Tile<N>::STRIPS * (BACK ? 1 : 2));
    const size_t shared = Tile<N>::GROUP * (6 * sizeof(float) + 4 * sizeof(T));
    return LAUNCH((summary<T, N, BACK>), grid, dim3(Tile<N>::THREADS), shared, call.stream, call, w,
                  array<T>(tokens, 0), array<T>(tokens, 1), array<T>(tokens, 2), array<T>(tokens, 3),
                  static_cast<float *>(transition), static_cast<float *>(added));
  });
}

template <bool BACK>
int launch_scan(const Call &call, void *const *arrays) {
  if (call.dtype == F64) return -1;
  return with_size<16, 32, 64, 128>(call.size, [&](auto n) {
    constexpr int N = n;
    const dim3 grid(call.sequences * call.heads * (N / HEIGHT));
    return LAUNCH((scan<N, BACK>), grid, dim3(GROUPS * N), (1 + GROUPS) * HEIGHT * N * sizeof(float), call.stream,
                  call, array<float>(arrays, 0), array<float>(arrays, 1), array<float>(arrays, 2),
                  array<float>(arrays, 3));
  });
}

}  // namespace

extern "C" {

int wkv7_summary(const Call *call, void *const *arrays) {
  auto [r, w, k, v, a, b, transition, added] = *reinterpret_cast<void *const(*)[8]>(arrays);
  return launch_summary<false>(*call, static_cast<float *>(w), {a, b, v, k}, transition, added);
}

int wkv7_summary_back(const Call *call, void *const *arrays) {
  auto [r, w, k, v, a, b, starts, dy, added] = *reinterpret_cast<void *const(*)[9]>(arrays);
  return launch_summary<true>(*call, static_cast<float *>(w), {b, a, dy, r}, nullptr, added);
}

int wkv7_scan(const Call *call, void *const *arrays) { return launch_scan<false>(*call, arrays); }

int wkv7_scan_back(const Call *call, void *const *arrays) { return launch_scan<true>(*call, arrays); }

}
