// The contract of what is fused around the recurrences; wkv.h is that of the recurrences themselves.
//
// T tokens of S sequences end to end, H heads of N channels, C = H N. Arithmetic is in float, or in double where
// Call.dtype is F64. Arrays are dense and have a dtype each: those over tokens, (T, C) and marked with a star, F32,
// BF16 or (CUDA) F16; the others F32; in double all are F64. A question mark: null together with the others that have
// one. After the arrays comes one of their dtypes, in the memory of the host.
//
//   shift_mix      previous = the token before x in its sequence, or carried (S, C) before the first
//                  y_i = x + (previous - x) (mix_i + moved_i), with H mixes (C), moved (H, T, C), and N = C
//                  last (S, C) = the last x of a sequence, or what it carried if it has no token
//     forward      x* carried moved*? mix_1 ... mix_H -> y_1* ... y_H* last
//     backward     the same, dy_1* ... dy_H* dlast -> dx* dcarried dmoved*? dmix_1 ... dmix_H workspace
//
//   relu_squared   y = max(x, 0)^2; backward takes max(x, 0) from y, not to have x kept
//     forward      x* -> y*
//     backward     y* dy* -> dx* workspace
//
//   rwkv7_prepare  w = SLOWEST sigmoid(w0 + wl), a = sigmoid(a0 + al), kk = k k_k / |k k_k| of each head
//                  key = k (1 + (a - 1) k_a), value = v + sigmoid(v0 + vl) (v_first - v), A = -kk, B = a kk
//     forward      wl* al* k* w0 a0 k_k k_a vl*? v*? v_first*? v0? -> w key* A* B* value*?
//     backward     the same, dw dkey* dA* dB* dvalue*? -> dwl* dal* dk* dw0 da0 dk_k dk_a dvl*? dv*? dv_first*? dv0?
//                  workspace
//
//   rwkv7_output   out = (norm(y) weight + bias + v sum(r k r_k)) g, with norm and sum over the channels of a head
//     forward      y* g* weight bias r* k* v* r_k -> out*
//     backward     the same, dout* -> dy* dg* dweight dbias dr* dk* dv* dr_k workspace
//
//   rwkv6_output   out = (norm(y) weight + bias) g sigmoid(g)
//     forward      y* g* weight bias -> out*
//     backward     the same, dout* -> dy* dg* dweight dbias workspace
//
// Gradients of parameters are sums over tokens: of BLOCK tokens first, then of the blocks, always in this order.
#pragma once
#include "wkv.h"

constexpr int64_t BLOCK = 32;
constexpr double SLOWEST = -0.60653065971263342;  // -e^(-1/2)
constexpr double GROUP_NORM_EPS = 64e-5;          // whatever the head size
constexpr double NORMALIZE_EPS = 1e-12;           // the least |k k_k|

// As in wkv.h: 0, a CUDA error, or -1 for a size or dtype that it was not built for; workspace in bytes.
#define FUSED_OP(name)                                        \
  int name##_forward(const Call *call, void *const *arrays);  \
  int name##_backward(const Call *call, void *const *arrays); \
  int64_t name##_workspace(const Call *call)

extern "C" {
FUSED_OP(shift_mix);
FUSED_OP(relu_squared);
FUSED_OP(rwkv7_prepare);
FUSED_OP(rwkv7_output);
FUSED_OP(rwkv6_output);
}
