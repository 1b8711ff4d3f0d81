// The neighbours of the recurrences on a GPU: shift_mix and relu_squared of fused.h; the ops over heads are in
// fused_heads.cu.
#include "fused.cuh"

namespace {

using namespace fused;

// The sequence of a token: the last that begins at or before it.
__device__ __forceinline__ int64_t sequence_of(const Call &call, int64_t t) {
  int64_t low = 0, high = call.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (call.borders[middle] <= t ? low : high) = middle;
  }
  return low;
}

template <int Mixes>
struct Shift {
  Field x, carried, moved;
  Fields<Mixes> mix, y;  // backward: the gradients of y and last
  Field last;

  Shift(void *const *arrays, int of)
      : x(fields<1>(arrays, of, 0)[0]), carried(fields<1>(arrays, of, 1)[0]), moved(fields<1>(arrays, of, 2)[0]),
        mix(fields<Mixes>(arrays, of, 3)), y(fields<Mixes>(arrays, of, 3 + Mixes)),
        last(fields<1>(arrays, of, 3 + 2 * Mixes)[0]) {}

  __device__ __forceinline__ Four factor(const Call &call, const Place &place, int i, int64_t t, Four mix) const {
    if (moved) add(mix, moved.get(i * call.tokens * place.width + place.at(t), place.valid));
    return mix;
  }
};

template <int Mixes>
__global__ void shift_forward_kernel(Call call, Shift<Mixes> in) {
  const Place place(call, call.size);
  Four mix[Mixes];
#pragma unroll
  for (int i = 0; i < Mixes; i++) mix[i] = in.mix[i].get(place.channel, place.valid);
  int64_t s = sequence_of(call, place.begin);
  Tokens tokens = tokens_of(call, s);
  Four before = in.x.get(place.at(place.begin - 1), place.valid && place.begin > tokens.begin);
  for (int64_t t = place.begin; t < place.end; t++) {
    while (t >= tokens.begin + tokens.count && s + 1 < call.sequences) tokens = tokens_of(call, ++s);
    if (t == tokens.begin) before = in.carried.get(s * place.width + place.channel, place.valid);
    const Four own = in.x.get(place.at(t), place.valid);
#pragma unroll
    for (int i = 0; i < Mixes; i++) {
      const Four factor = in.factor(call, place, i, t, mix[i]);
      in.y[i].put(place.at(t), each([&](int j) { return own[j] + (before[j] - own[j]) * factor[j]; }), place.valid);
    }
    before = own;
    if (t + 1 == tokens.begin + tokens.count) in.last.put(s * place.width + place.channel, own, place.valid);
  }
}

// As on the CPU: back = sum dy_i (mix_i + moved_i) goes to the token before, sum dy_i - back to the token itself.
template <int Mixes>
__global__ void shift_backward_kernel(Call call, Shift<Mixes> in, Fields<3> out, float *space) {
  const Place place(call, call.size);
  Four mix[Mixes], dmix[Mixes] = {}, following = {};
#pragma unroll
  for (int i = 0; i < Mixes; i++) mix[i] = in.mix[i].get(place.channel, place.valid);
  if (place.end < call.tokens) {
#pragma unroll
    for (int i = 0; i < Mixes; i++) {
      const Four dy = in.y[i].get(place.at(place.end), place.valid);
      const Four factor = in.factor(call, place, i, place.end, mix[i]);
      add(following, each([&](int j) { return dy[j] * factor[j]; }));
    }
  }
  int64_t s = sequence_of(call, place.end - 1);
  Tokens tokens = tokens_of(call, s);
  Four own = in.x.get(place.at(place.end - 1), place.valid);
  for (int64_t t = place.end - 1; t >= place.begin; t--) {
    while (t < tokens.begin && s > 0) tokens = tokens_of(call, --s);
    const int64_t row = s * place.width + place.channel;
    const bool first = t == tokens.begin;
    const Four before = first ? in.carried.get(row, place.valid) : in.x.get(place.at(t - 1), place.valid);
    Four total = t + 1 == tokens.begin + tokens.count ? in.last.get(row, place.valid) : following, back = {};
#pragma unroll
    for (int i = 0; i < Mixes; i++) {
      const Four dy = in.y[i].get(place.at(t), place.valid), factor = in.factor(call, place, i, t, mix[i]);
      const Four dm = each([&](int j) { return dy[j] * (before[j] - own[j]); });
      add(total, dy), add(dmix[i], dm), add(back, each([&](int j) { return dy[j] * factor[j]; }));
      if (out[2]) out[2].put(i * call.tokens * place.width + place.at(t), dm, place.valid);
    }
    out[0].put(place.at(t), each([&](int j) { return total[j] - back[j]; }), place.valid);
    if (first) out[1].put(row, back, place.valid);
    following = back, own = first ? in.x.get(place.at(t - 1), place.valid && t > place.begin) : before;
  }
#pragma unroll
  for (int i = 0; i < Mixes; i++) place.keep(space, Mixes, i, dmix[i]);
}

// Sequences without a token hand on what they are given.
__global__ void empty_kernel(Call call, const float *from, float *to) {
  const int64_t s = blockIdx.x, channel = int64_t(blockIdx.y) * Channels + threadIdx.x * 4;
  if (tokens_of(call, s).count || channel >= call.size) return;
  store4(to + s * call.size + channel, load4(from + s * call.size + channel));
}

int pass_empty(const Call &call, void *from, void *to) {
  const dim3 grid(unsigned(call.sequences), unsigned(ceil_div(call.size, Channels)));
  return LAUNCH(empty_kernel, grid, dim3(Threads), 0, call.stream, call, static_cast<const float *>(from),
                static_cast<float *>(to));
}

__global__ void relu_forward_kernel(int64_t count, Field x, Field y) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i >= count) return;
  const Four own = x.get(i);
  y.put(i, each([&](int j) { return own[j] < 0 ? 0 : own[j] * own[j]; }));
}

__global__ void relu_backward_kernel(int64_t count, Field y, Field dy, Field dx) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i >= count) return;
  const Four made = y.get(i), grad = dy.get(i);
  dx.put(i, each([&](int j) { return 2 * sqrtf(made[j]) * grad[j]; }));
}

}  // namespace

extern "C" {

int shift_mix_forward(const Call *call, void *const *arrays) {
  return with_size<1, 2, 3, 4, 5, 6>(call->heads, [&](auto mixes) {
    constexpr int n = mixes;
    if (!fits(*call, arrays, 4 + 2 * n)) return -1;
    const int error = pass_empty(*call, arrays[1], arrays[3 + 2 * n]);
    if (error) return error;
    const Shift<n> in(arrays, 4 + 2 * n);
    return LAUNCH(shift_forward_kernel<n>, grid_of(*call, call->size), dim3(Threads), 0, call->stream, *call, in);
  });
}

int shift_mix_backward(const Call *call, void *const *arrays) {
  return with_size<1, 2, 3, 4, 5, 6>(call->heads, [&](auto mixes) {
    constexpr int n = mixes, of = 8 + 3 * n;
    if (!fits(*call, arrays, of)) return -1;
    int error = pass_empty(*call, arrays[3 + 2 * n], arrays[5 + 2 * n]);
    if (error) return error;
    const Shift<n> in(arrays, of);
    float *space = array<float>(arrays, of - 1);
    error = LAUNCH(shift_backward_kernel<n>, grid_of(*call, call->size), dim3(Threads), 0, call->stream, *call, in,
                   fields<3>(arrays, of, 4 + 2 * n), space);
    return error ? error : total(*call, space, n, call->size, fields<n>(arrays, of, 7 + 2 * n));
  });
}

int64_t shift_mix_workspace(const Call *call) { return workspace(*call, call->heads, call->size); }

int relu_squared_forward(const Call *call, void *const *arrays) {
  if (!fits(*call, arrays, 2)) return -1;
  const int64_t count = call->tokens * call->heads * call->size;
  const auto x = fields<2>(arrays, 2, 0);
  const dim3 grid(unsigned(ceil_div(count, 1024)));
  return LAUNCH(relu_forward_kernel, grid, dim3(256), 0, call->stream, count, x[0], x[1]);
}

int relu_squared_backward(const Call *call, void *const *arrays) {
  if (!fits(*call, arrays, 4)) return -1;
  const int64_t count = call->tokens * call->heads * call->size;
  const auto x = fields<3>(arrays, 4, 0);
  const dim3 grid(unsigned(ceil_div(count, 1024)));
  return LAUNCH(relu_backward_kernel, grid, dim3(256), 0, call->stream, count, x[0], x[1], x[2]);
}

int64_t relu_squared_workspace(const Call *) { return 0; }
}
