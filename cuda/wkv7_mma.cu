// RWKV-7 on tensor cores, for 16-bit inputs:  S <- S diag(e^w) + (S a) b^T + v k^T ;  y = S r   (Peng et al. 2025,
// arXiv:2503.14456, section 4), in chunks of 16 tokens, an mma tile (Yang et al. 2024, arXiv:2406.06484, section 3).
//
// Let c_t be the log decay from the middle of a chunk to token t, and r', a', k', b' the rows e^c_t r_t, e^c_(t-1) a_t,
// e^-c_t k_t, e^-c_t b_t; S is the state before the chunk times e^(log decay to the middle). Then u_t = S_(t-1) a_t and
//
//   (I - AB) U = a' S^T + AK V ;  Y = r' S^T + QK V + QB U ;  S <- S + V^T k' + U^T b'
//
// where QK = r' k'^T and QB = r' b'^T with j <= i, AK = a' k'^T and AB = a' b'^T with j < i; S, times the decay of the
// second half, is the state after the chunk. For the gradient G of that, times the same decay,
//
//   (I - AB)^T dU = b' G^T + QB^T dY ;  dV = k' G^T + QK^T dY + AK^T dU ;  G <- G + dY^T r' + dU^T a'
//   r: dY S + [dY V^T] k' + [dY U^T] b'     k: V G + [dY V^T]^T r' + [dU V^T]^T a'
//   a: dU S + [dU V^T] k' + [dU U^T] b'     b: U G + [dY U^T]^T r' + [dU U^T]^T a'
//
// each times its factor of above; a log decay gets what its exponentials get. A block has one head of one sequence. A
// warp has 16 rows of S and G, in float, and 16 columns where a product sums over their rows. Operands are rounded to
// 16 bits, QK to AK of bf16 to twice that: relative errors of 2e-3 to 4e-3 with bf16, 3e-4 to 6e-4 with f16.
// Backward starts from the state before every 32nd token and goes through the two chunks behind it forward, then back.
//
// r' and k' grow by up to e^(8 |w|), where every RWKV-7 has w >= -0.6065. There is room up to w = -1.3 in f16 and up to
// w = -4.5 in bf16 and in the products; below that the answers are NaN.
#include "wkv7_backward.cuh"

namespace wkv7_mma {

template <class T, int N>
struct ForwardShared {
  Stage<T, N, 5> stage[2];
  Squares<T> squares;
  float system[LENGTH * SYSTEM];
  float head[N], tail[N];
};

template <class T, int N>
__global__ void __launch_bounds__(2 * N, N == 64 ? 4 : 2)
    forward(Call call, Inputs<T> in, const float *state, T *y, float *last, float *saved) {
  DYNAMIC_SHARED(void, memory);
  auto &shared = *static_cast<ForwardShared<T, N> *>(memory);
  const Place<N> place(call);
  const int chunks = place.chunks();
  const int own = 16 * warp_id();
  Tile s[N / 16];
  load_state<N>(s, state + place.state());
  if (chunks > 0) fetch(shared.stage[0], in, place, 0);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    Stage<T, N, 5> &stage = shared.stage[chunk % 2], &other = shared.stage[(chunk + 1) % 2];
    cp_async_wait<0>();
    __syncthreads();
    if (chunk > 0) write_rows<T, N>(y, other.x[V], place, chunk - 1);
    if (chunk + 1 < chunks) fetch(other, in, place, chunk + 1);
    if (saved && chunk % 2 == 0) save<N>(saved + place.saved_before(chunk), s);
    scale_inputs<false>(stage, shared.head, shared.tail);
    __syncthreads();
    scale_columns<N>(s, shared.head);
    Products<N> products(chunk);
    Tile z = {}, out = {};
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
      const Operand a = load_tile(&stage.x[A][0][16 * n], N + 8), r = load_tile(&stage.x[R][0][16 * n], N + 8);
      products.each([&](int m, Tile &d) {
        add_product<T>(d, either(m < AK, r, a), load_tile(&stage.x[m % 2 ? B : K][0][16 * n], N + 8));
      });
      const Operand x = rounded<T>(s[n]);
      add_product<T>(z, x, a);
      add_product<T>(out, x, r);
    }
    store_squares<T>(products, shared.squares, shared.system);
    __syncthreads();
    const Operand v = load_transposed(&stage.x[V][0][own], N + 8);
    for_parts<false, T>(shared.squares, QK, [&](const Operand &x) { add_product<T>(out, v, x); });
    const Operand u = solve<T>(z, v, shared.squares);
    add_product<T>(out, u, load_tile(shared.squares[QB][0], SQUARE));
    update(s, stage, v, u, shared.tail);
    store_tile(&stage.x[V][0][own], N + 8, transposed(rounded<T>(out)));
  }
  __syncthreads();
  if (chunks > 0) write_rows<T, N>(y, shared.stage[(chunks + 1) % 2].x[V], place, chunks - 1);
  store_state<N>(last + place.state(), s);
}

template <class T>
Inputs<T> inputs(void *const *arrays) {
  T *const none = nullptr;
  return {array<float>(arrays, 1), {array<T>(arrays, 0), array<T>(arrays, 2), array<T>(arrays, 3),
                                    array<T>(arrays, 4), array<T>(arrays, 5), none}};
}

}  // namespace wkv7_mma

using namespace wkv7_mma;

extern "C" {

int wkv7_mma_forward(const Call *call, void *const *arrays) {
  return with_dtype<bf16, f16>(call->dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_size<16, 32, 64, 128>(call->size, [&](auto n) {
      constexpr int N = n;
      return LAUNCH((forward<T, N>), dim3(call->sequences, call->heads), dim3(2 * N), sizeof(ForwardShared<T, N>),
                    call->stream, *call, inputs<T>(arrays), array<float>(arrays, 6), array<T>(arrays, 7),
                    array<float>(arrays, 8), array<float>(arrays, 9));
    });
  });
}

int wkv7_mma_backward(const Call *call, void *const *arrays) {
  return with_dtype<bf16, f16>(call->dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_size<16, 32, 64, 128>(call->size, [&](auto n) {
      constexpr int N = n;
      Inputs<T> in = inputs<T>(arrays);
      in.x[DY] = array<T>(arrays, 8);
      const Gradients<T> out{array<float>(arrays, 11),
                             {array<T>(arrays, 10), array<T>(arrays, 12), array<T>(arrays, 13),
                              array<T>(arrays, 14), array<T>(arrays, 15)}};
      return LAUNCH((backward<T, N>), dim3(call->sequences, call->heads), dim3(2 * N), sizeof(BackwardShared<T, N>),
                    call->stream, *call, in, array<float>(arrays, 7), array<float>(arrays, 9), out,
                    array<float>(arrays, 16));
    });
  });
}

Keeps wkv7_mma_keeps(int32_t, int64_t) { return {EVERY, 0}; }

int64_t wkv7_mma_workspace(const Call *) { return 0; }

}
