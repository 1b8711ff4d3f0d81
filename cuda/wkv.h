// The contract between Python and every kernel, whatever it runs on: plain C, called through ctypes, no torch header.
//
// A function takes a Call and an array of pointers to dense arrays: the inputs in the order of the public op, then the
// outputs. Tokens of all sequences lie end to end. T tokens, S sequences, H heads, N channels a head.
//
//   token arrays        (T, H, N)      Call.dtype, but log decays w (and their gradients): the state's dtype
//   constants u, w of 4 (H, N)         the state's dtype; their gradients (S, H, N), to be summed over S
//   states              (S, H, N, N)   (value, key); wkv4: (S, 3, N); float, or double where dtype is F64
//
//   wkv4_forward   w u k v state -> y last saved
//   wkv4_backward  w u k v state saved dy dstate -> dw du dk dv first workspace
//   wkv6_forward   r k v w u state -> y last saved
//   wkv6_backward  r k v w u state saved dy dstate -> dr dk dv dw du first workspace
//   wkv7_forward   r w k v a b state -> y last saved
//   wkv7_backward  r w k v a b state saved dy dstate -> dr dw dk dv da db first workspace
//
// `saved` is null when no gradient will be asked for. It holds the state before every `every`-th token of a sequence,
// then `vectors` arrays (T, H, N), all in the state's dtype; state c of sequence s is number borders[s] / every + s + c.
// For wkv4 H is 1 and N the number of channels.
#pragma once
#include <cstdint>

enum Dtype : int32_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

struct Call {
  int64_t sequences, tokens, heads, size;
  const int64_t *borders;  // (S + 1,) from 0 to T, where the arrays are; checked by the host or trapped by the device
  int32_t dtype;
  int32_t threads;  // CPU only
  void *stream;     // CUDA only
};

struct Keeps {
  int64_t every;    // tokens from one saved state to the next
  int64_t vectors;  // arrays (T, H, N) saved beside them
};

// Each op of a library has: 0, or a CUDA error, or -1 for a size or dtype that it was not built for.
#define WKV_OP(name)                                            \
  int name##_forward(const Call *call, void *const *arrays);    \
  int name##_backward(const Call *call, void *const *arrays);   \
  Keeps name##_keeps(int32_t dtype, int64_t size);              \
  int64_t name##_workspace(const Call *call) /* bytes that backward needs */

extern "C" {
WKV_OP(wkv4);
WKV_OP(wkv6);
WKV_OP(wkv7);
WKV_OP(wkv6_mma);
WKV_OP(wkv7_mma);
}

// Sequences cut into pieces, which are sequences of their own for the functions above (pieces.cuh; CUDA only). With P
// pieces, `transition` is what multiplies the state before one, float: wkv4 (P, N), a logarithm; wkv6 (P, H, N); wkv7
// (P, H, N, N), from the right. The other arrays are states (P, ...): `added` is what then comes to it, `starts` the
// state before each piece, `lasts` that after it as forward returned it, `ends` the gradient of that.
//
//   wkvN_summary       the inputs -> transition added
//   wkvN_scan          transition added state -> starts
//   wkvN_summary_back  the inputs, starts dy -> added
//   wkv4_scan_back     transition added starts lasts dstate -> ends
//   wkvN_scan_back     transition added dstate -> ends
//
// A summary's Call has the pieces for sequences. A scan's has the pieces for tokens: `borders` of the sequences count
// pieces, from 0 to P.
#define WKV_PIECES(name)                                          \
  int name##_summary(const Call *call, void *const *arrays);      \
  int name##_scan(const Call *call, void *const *arrays);         \
  int name##_summary_back(const Call *call, void *const *arrays); \
  int name##_scan_back(const Call *call, void *const *arrays)

extern "C" {
WKV_PIECES(wkv4);
WKV_PIECES(wkv6);
WKV_PIECES(wkv7);
}
