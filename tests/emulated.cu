// Small kernels for test_emulator.py, right ones and wrong ones.
#include "device.cuh"

enum Layout { ROWS_X4, ROWS_X2, COLUMNS_X2, NO_LDMATRIX };  // how b lies in memory and how it is loaded

constexpr int NEVER = -1;

// The fragments of a tile (16, 16) of a and of both halves of one of b, element by element.
template <class T>
__device__ void load_fragments(uint32_t (&x)[4], uint32_t (&y)[2][2], const T *a, const T *b) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const T *pair_a = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8, *pair_b = b + (t + i % 2 * 8) * 16 + g + i / 2 * 8;
    x[i] = pack2<T>(to_float(pair_a[0]), to_float(pair_a[1]));
    y[i / 2][i % 2] = pack2<T>(to_float(pair_b[0]), to_float(pair_b[16]));
  }
}

// c (m, n) = a (m, k) b (k, n): a warp makes a tile of 16 by 16 and loads the next tiles of a and b meanwhile.
template <class T, int B, int InFlight>
__global__ void __launch_bounds__(32) product(float *c, const T *a, const T *b, int n, int k) {
  DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x, top = blockIdx.y * 16, left = blockIdx.x * 16;
  const auto load = [&](int step) {
    T *tile = shared + step % 2 * 512 + lane * 8;
    const int row = lane / 2, column = lane % 2 * 8;
    const T *from_b = B == COLUMNS_X2 ? b + (left + row) * k + step * 16 : b + (step * 16 + row) * n + left;
    cp_async16(tile, a + (top + row) * k + step * 16 + column, step * 16 < k);
    cp_async16(tile + 256, from_b + column, step * 16 < k);
    cp_async_commit();
  };
  float d[2][4] = {};
  load(0);
  for (int step = 0; step * 16 < k; step++) {
    load(step + 1);
    if constexpr (InFlight != NEVER) cp_async_wait<InFlight>();
    __syncwarp();
    const T *tile_a = shared + step % 2 * 512, *tile_b = tile_a + 256;
    uint32_t x[4], y[2][2];
    if (B != NO_LDMATRIX) ldmatrix_x4(x, tile_a + lane % 16 * 16 + lane / 16 * 8);
    if (B == NO_LDMATRIX) load_fragments(x, y, tile_a, tile_b);
    if (B == ROWS_X4) {
      uint32_t both[4];
      ldmatrix_x4_trans(both, tile_b + lane % 16 * 16 + lane / 16 * 8);
      for (int i = 0; i < 4; i++) y[i / 2][i % 2] = both[i];
    }
    for (int half = 0; half < 2; half++) {
      if (B == ROWS_X2) ldmatrix_x2_trans(y[half], tile_b + lane % 16 * 16 + half * 8);
      if (B == COLUMNS_X2) ldmatrix_x2(y[half], tile_b + (half * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
      mma16816<T>(d[half], x, y[half]);
    }
    __syncwarp();
  }
  for (int i = 0; i < 8; i++)
    c[(top + lane / 4 + i / 2 % 2 * 8) * n + left + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i / 4][i % 4];
}

// c (16, 8) = a (16, 8) b (8, 8)
__global__ void product_tf32(float *c, const float *a, const float *b) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t x[4], y[2];
  float d[4] = {};
  for (int i = 0; i < 4; i++) x[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; i++) y[i] = to_tf32(b[(t + i * 4) * 8 + g]);
  mma1688_tf32(d, x, y);
  for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

__global__ void transpose(uint32_t *out, const uint32_t *in) { out[threadIdx.x] = movmatrix_trans(in[threadIdx.x]); }

template <class T>
__global__ void shuffles(T *out, const T *in) {
  const int i = threadIdx.x, size = blockDim.x;
  out[i] = __shfl_sync(~0u, in[i], 5);
  out[size + i] = __shfl_xor_sync(~0u, in[i], 3);
  out[2 * size + i] = __shfl_up_sync(~0u, in[i], 2);
  out[3 * size + i] = __shfl_down_sync(~0u, in[i], 3);
}

template <class T>
__global__ void convert(T *narrow, uint32_t *pairs, float2 *wide, const float2 *in, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  narrow[2 * i] = from_float<T>(in[i].x);
  narrow[2 * i + 1] = from_float<T>(in[i].y);
  pairs[i] = pack2<T>(in[i].x, in[i].y);
  wide[i] = make_float2(unpack2<T>(pairs[i]).x, to_float(narrow[2 * i + 1]));
}

template <bool Barrier>
__global__ void turn(float *out, const float *in) {
  DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < 32) __syncwarp();  // one warp alone
  if (Barrier) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

template <bool Barrier>
__global__ void swap_neighbours(float *out, const float *in) {
  DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = in[threadIdx.x];
  if (Barrier) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Copies over what others may still be reading; the copy is waited for late.
template <bool Barrier>
__global__ void refill(float *out, const float *in) {
  DYNAMIC_SHARED(float, shared);
  const int i = threadIdx.x, last = blockDim.x - 1;
  shared[i] = in[i];
  __syncthreads();
  const float before = shared[last - i];
  if (Barrier) __syncthreads();
  cp_async16(shared + i / 4 * 4, in + blockDim.x + i / 4 * 4, true);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  __syncthreads();
  out[i] = before + 100 * shared[last - i];
}

__global__ void peek(float *out) {
  DYNAMIC_SHARED(float, shared);
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
}

__global__ void place(int *out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int size = blockDim.x * blockDim.y * blockDim.z;
  out[block * size + thread] = block * size + thread;
}

__global__ void misuse(int which, const float *in) {
  DYNAMIC_SHARED(float, shared);
  const int i = threadIdx.x;
  uint32_t r[4] = {};
  float d[4] = {};
  shared[i] = 0;
  if (which == 0 && i == 40) shared[64] = 0;
  if (which == 1 && i == 40) shared[-1] = 0;
  if (which == 2 && i < 32) __syncthreads();
  if (which == 2 && i >= 32)
    __syncthreads();
  if (which == 3 && i == 40) return;
  if (which == 3) __syncthreads();
  if (which == 4 && i % 32 == 7) return;
  if (which == 4) shared[i] = __shfl_xor_sync(~0u, shared[i], 1);
  if (which == 5 && i == 40) __trap();
  if (which == 6) cp_async16(shared + 1, in, true);
  if (which == 7) cp_async16(shared, in + 1, true);
  if (which == 8) cp_async16(shared + 64, in, false);
  if (which == 9) ldmatrix_x4(r, shared + 4 * i);
  if (which == 10) __syncwarp(0xffff);
  if (which == 11) mma16816<bf16>(d, r, {r[0], r[1]});
  if (which == 12) shared[i] = i % 2 ? __shfl_sync(~0u, shared[i], 1) : __shfl_xor_sync(~0u, shared[i], 1);
}

template <class T, int InFlight>
int product_of(int layout, float *c, const void *a, const void *b, int m, int n, int k) {
  const auto kernel = layout == ROWS_X4      ? product<T, ROWS_X4, InFlight>
                      : layout == ROWS_X2    ? product<T, ROWS_X2, InFlight>
                      : layout == COLUMNS_X2 ? product<T, COLUMNS_X2, InFlight>
                                             : product<T, NO_LDMATRIX, InFlight>;
  const auto x = static_cast<const T *>(a), y = static_cast<const T *>(b);
  return LAUNCH(kernel, dim3(n / 16, m / 16), 32, 2048, nullptr, c, x, y, n, k);
}

extern "C" {

int run_product(int half, int layout, float *c, const void *a, const void *b, int m, int n, int k) {
  return half ? product_of<f16, 1>(layout, c, a, b, m, n, k) : product_of<bf16, 1>(layout, c, a, b, m, n, k);
}

// Reads tiles that it has not waited for: the last ones, or any.
int run_hasty_product(int in_flight, float *c, const void *a, const void *b, int m, int n, int k) {
  if (in_flight == 2) return product_of<bf16, 2>(ROWS_X4, c, a, b, m, n, k);
  return product_of<bf16, NEVER>(ROWS_X4, c, a, b, m, n, k);
}

int run_product_tf32(float *c, const float *a, const float *b) {
  return LAUNCH(product_tf32, 1, 32, 0, nullptr, c, a, b);
}

int run_transpose(uint32_t *out, const uint32_t *in) { return LAUNCH(transpose, 1, 32, 0, nullptr, out, in); }

int run_shuffles(int wide, void *out, const void *in, int threads) {
  if (wide) {
    const auto x = static_cast<const double *>(in);
    return LAUNCH(shuffles<double>, 1, threads, 0, nullptr, static_cast<double *>(out), x);
  }
  return LAUNCH(shuffles<float>, 1, threads, 0, nullptr, static_cast<float *>(out), static_cast<const float *>(in));
}

int run_convert(int half, void *narrow, uint32_t *pairs, float2 *wide, const float2 *in, int64_t count) {
  const dim3 grid((count + 255) / 256);
  if (half) return LAUNCH(convert<f16>, grid, 256, 0, nullptr, static_cast<f16 *>(narrow), pairs, wide, in, count);
  return LAUNCH(convert<bf16>, grid, 256, 0, nullptr, static_cast<bf16 *>(narrow), pairs, wide, in, count);
}

int run_exchange(int which, int barrier, float *out, const float *in) {
  const auto kernel = which == 0   ? barrier ? turn<true> : turn<false>
                      : which == 1 ? barrier ? swap_neighbours<true> : swap_neighbours<false>
                      : barrier    ? refill<true>
                                   : refill<false>;
  return LAUNCH(kernel, 1, 64, 256, nullptr, out, in);
}

int run_peek(float *out, int blocks, int threads, int bytes) {
  return LAUNCH(peek, blocks, threads, bytes, nullptr, out);
}

int run_place(int *out) { return LAUNCH(place, dim3(3, 2, 5), dim3(4, 3, 7), 0, nullptr, out); }

int run_misuse(int which, const float *in) {
  return LAUNCH(misuse, dim3(2, 3), which == 11 ? 48 : 64, 256, nullptr, which, in);
}
}
