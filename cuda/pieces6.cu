// RWKV-5 and RWKV-6 in pieces (see pieces.cuh):  S <- S diag(e^w) + v k^T   (arXiv:2404.05892, section 4).
//
// A piece maps S to S diag(d) + C, with d = e^(sum of w) and C = sum_t v_t (k_t e^(sum of w after t))^T, and the
// gradient G of the state after it to G diag(d) + E, with E = sum_t dy_t (r_t e^(sum of w before t))^T: outer products,
// under a running sum of log decays that begins at the end of the piece, or at its start. Never a difference of such
// sums, so any decay is right, -inf included.
#include "pieces.cuh"

using namespace pieces;

namespace {

// Grid: strips x heads x pieces. Args: left, right: v, k; backward dy, r. decay: null backward.
template <class T, int N, bool BACK>
__global__ void __launch_bounds__(Tile<N>::THREADS)
    summary(Call call, const float *__restrict__ w, const T *__restrict__ left, const T *__restrict__ right,
            float *__restrict__ decay, float *__restrict__ added) {
  using Rows = Tile<N>;
  constexpr int GROUP = Rows::GROUP;
  DYNAMIC_SHARED(float, lefts);
  float *const rights = lefts + GROUP, *const raw_decays = rights + GROUP;
  T *const raw = reinterpret_cast<T *>(raw_decays + GROUP);
  const int top = blockIdx.x % Rows::STRIPS * Rows::HEIGHT;
  const int64_t place = blockIdx.x / Rows::STRIPS;
  const Walk<N> walk(call, place / call.heads, place % call.heads, !BACK);

  const auto copy = [&](int64_t from) {
    walk.copy(raw_decays, w, from);
    walk.copy(raw, left, from);
    walk.copy(raw + GROUP, right, from);
    cp_async_commit();
  };
  Rows rows;
  rows.begin(false, 0);
  float passed = 0;  // the log decays of the tokens walked over, summed, in the channel of this thread
  copy(0);
  for (int64_t from = 0; from < walk.count; from += Rows::TOKENS) {
    const int last = min(int64_t(Rows::TOKENS), walk.count - from) * N;
    cp_async_wait<0>();
    __syncthreads();
    widen<N>(lefts, raw);
    if (threadIdx.x < N)
      for (int i = threadIdx.x; i < last; i += N) {
        rights[i] = to_float(raw[GROUP + i]) * expf(passed);
        passed += raw_decays[i];
      }
    __syncthreads();
    copy(from + Rows::TOKENS);
#pragma unroll 1
    for (int t = 0; t < last; t += N) rows.add(lefts + t + top, rights + t);
  }
  rows.store(added + (place * N + top) * N);
  if (!BACK && top == 0 && threadIdx.x < N) decay[place * N + threadIdx.x] = expf(passed);
}

constexpr int THREADS = 64;

// S before each piece (backward: G after each), an element a thread. Grid: parts of a head x heads x sequences.
template <int N, bool BACK>
__global__ void __launch_bounds__(THREADS)
    scan(Call call, const float *__restrict__ decay, const float *__restrict__ added,
         const float *__restrict__ state, float *__restrict__ carried) {
  const int64_t place = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const int element = place % (N * N);
  const int64_t head = place / (N * N) % call.heads;
  const Tokens pieces = tokens_of(call, place / (N * N) / call.heads);
  float own = state[place];
#pragma unroll 4
  for (int64_t i = 0; i < pieces.count; i++) {
    const int64_t at = (pieces.begin + (BACK ? pieces.count - 1 - i : i)) * call.heads + head;
    carried[at * N * N + element] = own;
    own = own * decay[at * N + element % N] + added[at * N * N + element];
  }
}

template <bool BACK>
int launch_summary(const Call &call, const float *w, void *const (&tokens)[2], void *decay, void *added) {
  return dispatch(call, [&](auto type, auto n) {
    using T = decltype(type);
    constexpr int N = n;
    const dim3 grid(call.sequences * call.heads * Tile<N>::STRIPS);
    const size_t shared = Tile<N>::GROUP * (3 * sizeof(float) + 2 * sizeof(T));
    return LAUNCH((summary<T, N, BACK>), grid, dim3(Tile<N>::THREADS), shared, call.stream, call, w,
                  array<T>(tokens, 0), array<T>(tokens, 1), static_cast<float *>(decay), static_cast<float *>(added));
  });
}

template <bool BACK>
int launch_scan(const Call &call, void *const *arrays) {
  if (call.dtype == F64) return -1;
  return with_size<16, 32, 64, 128>(call.size, [&](auto n) {
    constexpr int N = n;
    return LAUNCH((scan<N, BACK>), dim3(call.sequences * call.heads * (N * N / THREADS)), dim3(THREADS), 0, call.stream,
                  call, array<float>(arrays, 0), array<float>(arrays, 1), array<float>(arrays, 2),
                  array<float>(arrays, 3));
  });
}

}  // namespace

extern "C" {

int wkv6_summary(const Call *call, void *const *arrays) {
  auto [r, k, v, w, u, decay, added] = *reinterpret_cast<void *const(*)[7]>(arrays);
  return launch_summary<false>(*call, static_cast<float *>(w), {v, k}, decay, added);
}

int wkv6_summary_back(const Call *call, void *const *arrays) {
  auto [r, k, v, w, u, starts, dy, added] = *reinterpret_cast<void *const(*)[8]>(arrays);
  return launch_summary<true>(*call, static_cast<float *>(w), {dy, r}, nullptr, added);
}

int wkv6_scan(const Call *call, void *const *arrays) { return launch_scan<false>(*call, arrays); }

int wkv6_scan_back(const Call *call, void *const *arrays) { return launch_scan<true>(*call, arrays); }

}
