// The C entry points of the CPU kernels: the widest instruction set that was compiled and that the processor has.
#include "wkv.h"

#define DECLARE_OP(name)                                      \
  int name##_forward(const Call &call, void *const *arrays);  \
  int name##_backward(const Call &call, void *const *arrays); \
  int64_t name##_workspace(const Call &call);
#define DECLARE(isa)          \
  namespace isa {             \
  DECLARE_OP(wkv4)            \
  DECLARE_OP(wkv6)            \
  DECLARE_OP(wkv7)            \
  DECLARE_OP(shift_mix)       \
  DECLARE_OP(relu_squared)    \
  DECLARE_OP(rwkv7_prepare)   \
  DECLARE_OP(rwkv7_output)    \
  DECLARE_OP(rwkv6_output)    \
  }

#ifdef HAVE_AVX512
DECLARE(avx512)
#define TRY_AVX512(call) \
  if (level() >= 2) return avx512::call;
#else
#define TRY_AVX512(call)
#endif
#ifdef HAVE_AVX2
DECLARE(avx2)
#define TRY_AVX2(call) \
  if (level() >= 1) return avx2::call;
#else
#define TRY_AVX2(call)
#endif
DECLARE(plain)

namespace {

inline int level() {
#ifdef __x86_64__
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return avx2 + avx512;
#else
  return 0;
#endif
}

}  // namespace

#define CHOOSE(call) TRY_AVX512(call) TRY_AVX2(call) return plain::call;
#define DEFINE_OP(name)                                                                             \
  int name##_forward(const Call *call, void *const *arrays) { CHOOSE(name##_forward(*call, arrays)) }   \
  int name##_backward(const Call *call, void *const *arrays) { CHOOSE(name##_backward(*call, arrays)) } \
  int64_t name##_workspace(const Call *call) { CHOOSE(name##_workspace(*call)) }

extern "C" {
DEFINE_OP(wkv4)
DEFINE_OP(wkv6)
DEFINE_OP(wkv7)
DEFINE_OP(shift_mix)
DEFINE_OP(relu_squared)
DEFINE_OP(rwkv7_prepare)
DEFINE_OP(rwkv7_output)
DEFINE_OP(rwkv6_output)

Keeps wkv4_keeps(int32_t, int64_t) { return {32, 0}; }
Keeps wkv6_keeps(int32_t, int64_t) { return {32, 0}; }
Keeps wkv7_keeps(int32_t, int64_t) { return {32, 1}; }
}
