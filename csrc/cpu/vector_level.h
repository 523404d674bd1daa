// Which of the compiled versions runs on this CPU.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define PK_NATIVE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace pk {

// Whether functions marked PK_AVX512 run; whether bfloat16 runs on the dot product instruction of
// AVX512-BF16, in functions marked PK_NATIVE. Tests turn both off: all paths obey the same rule.
bool native_avx512();
bool native_bfloat16();
void use_native(bool on);

// "avx512_bf16" (float32 by avx512), "avx512", "avx2" or "default".
const char* vector_level();

}  // namespace pk
