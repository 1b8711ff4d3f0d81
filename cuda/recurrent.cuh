// The recurrent kernels of wkv6.cu and wkv7.cu, in float32: one token after another, for a state S and G = dL/dS.
//
// Nothing is divided by a decay, which may be 0: forward saves the state before every 16th token, backward computes
// those before tokens 4, 8 and 12 again and keeps them in shared memory, then those within four tokens in registers.
//
// An Op says what a token does to the part of S and G that a thread holds: forward (y, and the next state), step (the
// next state, from what forward has kept) and backward (the gradients, and G before the token). Its types Forward and
// Backward are the vectors that these read; COLUMNS gradients are sums over values, which pass through shared memory
// SUMS tokens at a time. Tokens past the end of a sequence are zeros with decay 1: they change neither S nor G.
#pragma once

#include "strips.cuh"

namespace recurrent {

constexpr int GROUP = 4, GROUPS = EVERY / GROUP;

// Vectors of `EVERY` tokens in shared memory: Floats arrays of float, first the log decay, then Values arrays of T.
template <class T, int N, int Floats, int Values>
struct Stage {
  static constexpr int BYTES = EVERY * N * (Floats * sizeof(float) + Values * sizeof(T));
  struct Inputs {
    const float *floats[Floats];
    const T *values[Values];
  };
  float *shared;

  __device__ __forceinline__ float *floats(int i, int slot) const { return shared + (i * EVERY + slot) * N; }
  __device__ __forceinline__ T *values(int i, int slot) const {
    return reinterpret_cast<T *>(floats(Floats, 0)) + (i * EVERY + slot) * N;
  }
  __device__ __forceinline__ float *end() const { return shared + BYTES / sizeof(float); }
  // Asks for the vectors of `rows` tokens, with zeros for those from `count` on; `from` is that of the first, anywhere.
  __device__ __forceinline__ void copy(const Inputs &in, int64_t from, int64_t stride, int slot, int rows,
                                       int64_t count) const {
    const auto each = [&](int length, auto f) {
      for (int i = length * threadIdx.x; i < rows * N; i += length * blockDim.x) {
        const bool valid = i / N < count;
        f(i, from + (valid ? i / N * stride + i % N : 0), valid);
      }
    };
    each(4, [&](int i, int64_t at, bool valid) {
#pragma unroll
      for (int x = 0; x < Floats; x++) cp_async16(floats(x, slot) + i, in.floats[x] + at, valid);
    });
    each(16 / sizeof(T), [&](int i, int64_t at, bool valid) {
#pragma unroll
      for (int x = 0; x < Values; x++) cp_async16(values(x, slot) + i, in.values[x] + at, valid);
    });
    cp_async_commit();
  }
  // e^w of what this thread has copied, which it may see before others do.
  __device__ __forceinline__ void decay(int slot, int rows) const {
    for (int i = threadIdx.x; i < rows * N / 4; i += blockDim.x) {
      float *w = floats(0, slot) + 4 * i;
      const float4 x = load4(w);
      store4(w, make_float4(expf(x.x), expf(x.y), expf(x.z), expf(x.w)));
    }
  }
};

template <class T>
struct ForwardArrays {
  const float *state, *u;
  T *y;
  float *last, *saved, *vectors;
};

template <class Op>
__global__ void __launch_bounds__(32 * Shape<Op::N>::WARPS, 4)
    forward(Call call, int strips, typename Op::Forward::Inputs inputs, ForwardArrays<typename Op::T> out) {
  using T = typename Op::T;
  constexpr int N = Op::N, BLOCK = EVERY / 2;
  DYNAMIC_SHARED(float, shared);
  const Place<N> at(call, strips);
  const typename Op::Forward stage{shared};
  Op op(out.u, at);
  Tile<N> s;
  s.load(out.state + at.state(at.sequence));

  const int64_t count = at.tokens.count, first = at.first_vector();
  stage.copy(inputs, first, at.stride, 0, BLOCK, count);
  for (int64_t t = 0; t < count; t += BLOCK) {
    const int slot = t % EVERY, rows = count - t < BLOCK ? count - t : BLOCK;
    cp_async_wait<0>();
    stage.decay(slot, BLOCK);
    __syncthreads();
    const int64_t next = t + BLOCK;
    if (next < count) stage.copy(inputs, first + next * at.stride, at.stride, slot ^ BLOCK, BLOCK, count - next);
    if (out.saved && slot == 0) s.store(out.saved + at.first_saved() + t / EVERY * at.stride * N);
    for (int i = 0; i < rows; i++) {
      const int64_t owned = first + (t + i) * at.stride + at.owned();
      float y[Shape<N>::ROWS];
      op.forward(y, s, stage, slot + i, out.vectors && at.owner() ? out.vectors + owned : nullptr);
      const float sum = sum_over_keys<N>(y, at.lane);
      if (at.owner()) out.y[owned] = from_float<T>(sum);
    }
  }
  s.store(out.last + at.state(at.sequence));
}

template <class T>
struct BackwardArrays {
  const float *u, *saved, *dstate;
  float *dw, *du, *first;
  T *values[4], *dv;  // the other gradients that are sums over values, and that of v
  float *partial;     // null, or what the strips of a head add to each of those sums: dw, values, then du
};

// Backward of a strip, from the end. Group i of a chunk is in slots 4 (i ^ flip) and on, with flip 0 or 3, so that
// group 0 of the chunk before, which is needed first, may follow as soon as group 3 is done, and so on.
template <class Op>
struct Reverse {
  using T = typename Op::T;
  static constexpr int N = Op::N, COLUMNS = Op::COLUMNS;
  const Place<N> &at;
  const BackwardArrays<T> &out;
  const int strips;
  const int64_t elements;  // of a token array
  const typename Op::Backward stage;
  float *const sums, *const starts;
  int flip;
  Op op;
  Tile<N> g;

  __device__ __forceinline__ Reverse(const Call &call, const Place<N> &at, const BackwardArrays<T> &out, int strips,
                                     float *shared)
      : at(at), out(out), strips(strips), elements(call.tokens * at.stride), stage{shared}, sums(stage.end()),
        starts(sums + Op::SUMS * row_of_sums() + at.tile()), flip(0), op(out.u, at) {
    g.load(out.dstate + at.state(at.sequence));
  }

  __device__ __forceinline__ int row_of_sums() const { return COLUMNS * at.warps * N; }
  __device__ __forceinline__ float *start(int group) const {
    return starts + (group - 1) * at.warps * at.WARP_ROWS * N;
  }
  __device__ __forceinline__ int slot(int group) const { return (group ^ flip) * GROUP; }
  __device__ __forceinline__ void fetch(const typename Op::Backward::Inputs &inputs, int64_t t, int slot) const {
    stage.copy(inputs, at.first_vector() + t * at.stride, at.stride, slot, GROUP, at.tokens.count - t);
  }

  // The states before groups 1 and on.
  __device__ __forceinline__ void find_starts(const float *saved, int groups) {
    cp_async_wait<1>();
    for (int i = 0; i < GROUPS - 1; i++) stage.decay(slot(i), GROUP);
    __syncthreads();
    Tile<N> s;
    s.load(saved);
    for (int i = 1; i < groups; i++) {
#pragma unroll
      for (int j = 0; j < GROUP; j++) op.step(s, stage, slot(i - 1) + j);
      s.store(start(i));
    }
    cp_async_wait<0>();
    stage.decay(slot(GROUPS - 1), GROUP);
    __syncthreads();
  }

  // The tokens from t on that are in `slot` and on.
  __device__ __forceinline__ void group(const float *start, int64_t t, int slot) {
    Tile<N> before[GROUP];
    before[0].load(start);
#pragma unroll
    for (int j = 0; j + 1 < GROUP; j++) {
      before[j + 1] = before[j];
      op.step(before[j + 1], stage, slot + j);
    }
#pragma unroll
    for (int j = GROUP - 1; j >= 0; j--) {
      float x[COLUMNS][4], dv[Shape<N>::ROWS];
      op.backward(x, dv, before[j], g, stage, slot + j);
      const float owned = sum_over_keys<N>(dv, at.lane);
      if (at.owner() && t + j < at.tokens.count)
        out.dv[at.first_vector() + (t + j) * at.stride + at.owned()] = from_float<T>(owned);
      sum_over_values(x, sums + j % Op::SUMS * row_of_sums(), at);
      if (j % Op::SUMS > 0) continue;
      __syncthreads();
      write_sums(t + j);
      __syncthreads();
    }
  }

  // Adds what the warps found for SUMS tokens from t on.
  __device__ __forceinline__ void write_sums(int64_t t) const {
    for (int i = 4 * threadIdx.x; i < Op::SUMS * N; i += 4 * blockDim.x) {
      if (t + i / N >= at.tokens.count) break;
      const float *from = sums + i / N * row_of_sums() + i % N;
      const int64_t to = at.first_vector() + (t + i / N) * at.stride + i % N;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        const float4 x = sum_of_warps<N>(from + c * at.warps * N, at);
        if (out.partial) {
          store4(out.partial + (c * strips + at.strip) * elements + to, x);
        } else if (c == 0) {
          store4(out.dw + to, x);
        } else {
          store4(out.values[c - 1] + to, x);
        }
      }
    }
  }

  __device__ __forceinline__ void finish(int64_t sequences) {
    g.store(out.first + at.state(at.sequence));
    if constexpr (Op::HAS_CONSTANTS) {
      float x[1][4];
      op.constants(x[0]);
      sum_over_values(x, sums, at);
      __syncthreads();
      const int64_t to = (at.sequence * at.heads + at.head) * N;
      float *const partial = out.partial + COLUMNS * strips * elements + at.strip * sequences * at.stride;
      float *const du = (out.partial ? partial : out.du) + to;
      for (int i = 4 * threadIdx.x; i < N; i += 4 * blockDim.x) store4(du + i, sum_of_warps<N>(sums + i, at));
    }
  }
};

template <class Op>
__global__ void __launch_bounds__(32 * Shape<Op::N>::WARPS, 2)
    backward(Call call, int strips, typename Op::Backward::Inputs inputs, BackwardArrays<typename Op::T> out) {
  DYNAMIC_SHARED(float, shared);
  const Place<Op::N> at(call, strips);
  Reverse<Op> reverse(call, at, out, strips, shared);
  const int64_t count = at.tokens.count, last = (ceil_div(count, EVERY) - 1) * EVERY;
  for (int i = 0; i < GROUPS && last >= 0; i++) reverse.fetch(inputs, last + i * GROUP, i * GROUP);
  for (int64_t chunk = last; chunk >= 0; chunk -= EVERY) {
    const int groups = count - chunk < EVERY ? ceil_div(count - chunk, GROUP) : GROUPS;
    const float *const saved = out.saved + at.first_saved() + chunk / EVERY * at.stride * Op::N;
    reverse.find_starts(saved, groups);
    for (int i = GROUPS - 1; i >= 0; i--) {
      const int slot = reverse.slot(i);
      if (i < groups) reverse.group(i > 0 ? reverse.start(i) : saved, chunk + i * GROUP, slot);
      if (chunk > 0) reverse.fetch(inputs, chunk - EVERY + (GROUPS - 1 - i) * GROUP, slot);
    }
    reverse.flip ^= GROUPS - 1;
  }
  reverse.finish(call.sequences);
}

template <class T>
__global__ void sum_strips(const float *partial, T *to, int64_t elements) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < elements / 4; i += int64_t(gridDim.x) * blockDim.x) {
    const float *from = partial + 4 * i;
    const float4 low = load4(from) + load4(from + elements);
    store4(to + 4 * i, low + (load4(from + 2 * elements) + load4(from + 3 * elements)));
  }
}

inline int64_t saved_size(const Call &call) { return saved_states(call, EVERY) * call.heads * call.size * call.size; }

// f of a value of the dtype and of the size as a constant, or -1.
template <class F>
int with_shape(const Call &call, F f) {
  return with_dtype<float, bf16, f16>(call.dtype, [&](auto scalar) {
    return with_size<16, 32, 64, 128>(call.size, [&](auto size) { return f(scalar, size); });
  });
}

// Of `columns` partial sums for each token, and `constants` for each sequence.
inline int64_t partial_bytes(const Call &call, int columns, int constants) {
  const int strips = with_size<16, 32, 64, 128>(call.size, [&](auto size) { return Shape<size>::strips(call); });
  const int64_t numbers = (columns * call.tokens + constants * call.sequences) * call.heads * call.size;
  return strips > 1 ? strips * numbers * sizeof(float) : 0;
}

template <class Op>
int run_forward(const Call &call, const typename Op::Forward::Inputs &inputs,
                const ForwardArrays<typename Op::T> &out) {
  const int strips = Shape<Op::N>::strips(call);
  const dim3 grid(call.sequences * call.heads * strips), block(Shape<Op::N>::threads(strips));
  return LAUNCH((forward<Op>), grid, block, Op::Forward::BYTES, call.stream, call, strips, inputs, out);
}

template <class Op>
int run_backward(const Call &call, const typename Op::Backward::Inputs &inputs,
                 BackwardArrays<typename Op::T> out) {
  constexpr int N = Op::N, COLUMNS = Op::COLUMNS;
  const int strips = Shape<N>::strips(call), warps = Shape<N>::threads(strips) / 32;
  const dim3 grid(call.sequences * call.heads * strips), block(32 * warps);
  if (strips == 1) out.partial = nullptr;
  const size_t sums = Op::SUMS * COLUMNS * warps, starts = (GROUPS - 1) * warps * Shape<N>::WARP_ROWS;
  const size_t shared = Op::Backward::BYTES + (sums + starts) * N * sizeof(float);
  int code = LAUNCH((backward<Op>), grid, block, shared, call.stream, call, strips, inputs, out);

  const float *partial = out.partial;
  const auto sum = [&](auto *to, int64_t elements) {
    if (code || !partial || !elements) return;
    using Type = std::remove_pointer_t<decltype(to)>;
    const dim3 blocks(min(ceil_div(elements, 4 * 256), int64_t{4096}));
    code = LAUNCH(sum_strips<Type>, blocks, 256, 0, call.stream, partial, to, elements);
    partial += strips * elements;
  };
  sum(out.dw, call.tokens * call.heads * N);
  for (int i = 0; i + 1 < COLUMNS; i++) sum(out.values[i], call.tokens * call.heads * N);
  if (Op::HAS_CONSTANTS) sum(out.du, call.sequences * call.heads * N);
  return code;
}

}  // namespace recurrent
