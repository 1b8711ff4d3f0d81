// Products of 16x16 tiles by one warp on tensor cores: 16-bit operands, float sums.
//
// There is one product, d += x y^T. An mma takes its left factor by rows and its right one by columns, so x and y lie
// in registers in the same way; and a result, rounded, lies so too: it is an operand on either side without a move.
// Operands from shared memory come by ldmatrix, as they lie or transposed, which gives the other products of x and y.
// A row in shared memory is an odd number of 16 bytes, which spreads the rows of a tile over all banks.
#pragma once

#include "device.cuh"

namespace tiles {

// With g = lane / 4 and q = lane % 4 a lane holds, of rows g (i = 0) and g + 8 (i = 1), columns 8j + 2q and one more:
// d[j][2i], d[j][2i + 1] of a Tile, the low and high half of r[2j + i] of an Operand.
struct Tile {
  float d[2][4];
};
struct Operand {
  uint32_t r[4];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ int tile_row(int i) { return lane_id() / 4 + 8 * i; }
__device__ __forceinline__ int tile_column(int j) { return lane_id() % 4 * 2 + 8 * j; }

template <class T>
__device__ __forceinline__ void add_product(Tile &d, const Operand &x, const Operand &y) {
  const uint32_t left[2] = {y.r[0], y.r[2]}, right[2] = {y.r[1], y.r[3]};
  mma16816<T>(d.d[0], x.r, left);
  mma16816<T>(d.d[1], x.r, right);
}

template <class T>
__device__ __forceinline__ Operand rounded(const Tile &x) {
  Operand y;
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 2; i++) y.r[2 * j + i] = pack2<T>(x.d[j][2 * i], x.d[j][2 * i + 1]);
  return y;
}

// What y, rounded, lacks of x, rounded.
template <class T>
__device__ __forceinline__ Operand left(const Tile &x, const Operand &y) {
  Operand z;
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 2; i++) {
      const float2 pair = unpack2<T>(y.r[2 * j + i]);
      z.r[2 * j + i] = pack2<T>(x.d[j][2 * i] - pair.x, x.d[j][2 * i + 1] - pair.y);
    }
  return z;
}

template <class T>
__device__ __forceinline__ Operand load_tile(const T *tile, int stride) {
  Operand x;
  ldmatrix_x4(x.r, tile + lane_id() % 16 * stride + lane_id() / 16 * 8);
  return x;
}

// The same addresses as load_tile, so that a lane needs no others: the matrices off the diagonal change places.
template <class T>
__device__ __forceinline__ Operand load_transposed(const T *tile, int stride) {
  uint32_t r[4];
  ldmatrix_x4_trans(r, tile + lane_id() % 16 * stride + lane_id() / 16 * 8);
  return {r[0], r[2], r[1], r[3]};
}

template <class T>
__device__ __forceinline__ void store_tile(T *tile, int stride, const Operand &x) {
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 2; i++)
      *reinterpret_cast<uint32_t *>(tile + tile_row(i) * stride + tile_column(j)) = x.r[2 * j + i];
}

// By value: a reference to one of two would put both on the stack.
__device__ __forceinline__ Operand either(bool first, const Operand &x, const Operand &y) {
  return {first ? x.r[0] : y.r[0], first ? x.r[1] : y.r[1], first ? x.r[2] : y.r[2], first ? x.r[3] : y.r[3]};
}

__device__ __forceinline__ Operand transposed(const Operand &x) {
  return {movmatrix_trans(x.r[0]), movmatrix_trans(x.r[2]), movmatrix_trans(x.r[1]), movmatrix_trans(x.r[3])};
}

}  // namespace tiles
