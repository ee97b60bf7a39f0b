// Float vectors of one instruction set. A source file is one instruction set:
//
//   #include <...>            // the standard headers first: what follows compiles for the instruction set
//   #define NF_AVX2           // or NF_AVX512, NF_NEON, NF_SCALAR
//   #include "simd/simd.h"
//   #if NF_BUILT              // 0 where this target has no such thing; the file is then empty
//   namespace nf::NF_ARCH { ... F32 ... }
//   #endif
//   #include "simd/end.h"
//
// Code shared by the instruction sets is a header without a guard's worth of state, included after simd.h and put into
// namespace nf::NF_ARCH, so that no function compiled for one set is linked into another.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// Of a function, or of a lambda after its parameters.
#define NF_INLINE __attribute__((always_inline))
// Before a loop over an array of vectors: written out, so that the array lives in registers.
#define NF_UNROLL _Pragma("GCC unroll 16")

#if defined(NF_AVX512)
#define NF_ARCH avx512
#if defined(NORMFUSE_SIMDE)
#define NF_BUILT 1
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
// Some releases give this name to the masked form.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#elif defined(__x86_64__)
#define NF_BUILT 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header leaves the unused operand of its intrinsics undefined and warns about that wherever they are
// inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define NF_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2"
#else
#define NF_BUILT 0
#endif
#elif defined(NF_AVX2)
#define NF_ARCH avx2
#if defined(__x86_64__)
#define NF_BUILT 1
#include <immintrin.h>
#define NF_TARGET "avx2,fma,bmi2"
#else
#define NF_BUILT 0
#endif
#elif defined(NF_NEON)
#define NF_ARCH neon
#if defined(__aarch64__)
#define NF_BUILT 1
#include <arm_neon.h>
#else
#define NF_BUILT 0
#endif
#elif defined(NF_SCALAR)
#define NF_ARCH scalar
#define NF_BUILT 1
#else
#error "define NF_AVX2, NF_AVX512, NF_NEON or NF_SCALAR before simd.h"
#endif

#if defined(NF_TARGET)
#define NF_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define NF_PUSH(t) NF_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
NF_PUSH(NF_TARGET)
#else
#define NF_PUSH(t) NF_PRAGMA(GCC target(t))
#pragma GCC push_options
NF_PUSH(NF_TARGET)
#endif
#endif

#if defined(NF_AVX512)
#include "simd/avx512.h"
#elif defined(NF_AVX2)
#include "simd/avx2.h"
#elif defined(NF_NEON)
#include "simd/neon.h"
#else
#include "simd/scalar.h"
#endif
#include "simd/functions.h"
