#include "vector_level.h"

namespace pk {
namespace {

bool wanted = true;

#ifdef PK_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_avx2() { return false; }
#endif

}  // namespace

bool native_avx512() {
  static const bool available = has_avx512();
  return available && wanted;
}

bool native_bfloat16() {
  static const bool available = has_avx512_bf16();
  return available && wanted;
}

void use_native(bool on) { wanted = on; }

const char* vector_level() {
  if (native_bfloat16()) return "avx512_bf16";
  if (has_avx512()) return "avx512";
  return has_avx2() ? "avx2" : "default";
}

}  // namespace pk
