// Codes to vectors of floats and back, on the vectors of the file's instruction set. Included after simd.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace nf::NF_ARCH {
namespace {

// float(p[i]) for F32::N codes
inline F32 load_codes(const uint8_t* p) {
#if defined(NF_AVX512) && !defined(NORMFUSE_SIMDE)
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif defined(NF_AVX2)
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#else
  float x[F32::N];
  for (int i = 0; i < F32::N; ++i) x[i] = static_cast<float>(p[i]);
  return F32::load(x);
#endif
}

// rne(v), within 0..255, for F32::N values
inline void save_codes(uint8_t* p, F32 v) {
#if defined(NF_AVX512) && !defined(NORMFUSE_SIMDE)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
#elif defined(NF_AVX2)
  const __m256i x = _mm256_cvtps_epi32(v.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  int32_t x[F32::N];
  to_int(v).store(x);
  for (int i = 0; i < F32::N; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

// v · σ(v) and v · clamp(v / 6 + 1/2, 0, 1), every operation rounded by itself: normfuse/ops/codes/_codes.py does the
// same ones.
inline F32 function_of(int32_t function, F32 v) {
  const F32 zero = F32::set(0.f), one = F32::set(1.f);
  if (function == NF_CODES_HARDSWISH) return v * max(zero, min(one, v * F32::set(0.16666667f) + F32::set(0.5f)));
  const F32 a = max(F32::set(-87.f), min(F32::set(87.f), zero - v));
  const F32 n = round(a * F32::set(1.44269504f));
  const F32 r = a - n * F32::set(0.693359375f) + n * F32::set(2.12194440e-4f);
  F32 p = F32::set(0.001381446490995586f);
  p = p * r + F32::set(0.008368780836462975f);
  p = p * r + F32::set(0.04166839271783829f);
  p = p * r + F32::set(0.1666651964187622f);
  p = p * r + F32::set(0.4999999403953552f);
  p = p * r * r + r + one;
  return v * (one / (p * float_of(shift_left<23>(to_int(n) + I32::set(127))) + one));
}

inline F32 behind_function(int32_t function, F32 v, float gain, float offset) {
  return function_of(function, v) * F32::set(gain) + F32::set(offset);
}

// y[i] = clamp(rne(value(i)), low, high); value(i) gives F32::N values, NaN gives high. At least F32::N: the last
// vector overlaps the one before it, so that y must not be what is read.
template <class Value>
inline void each_code(int64_t count, int32_t low, int32_t high, uint8_t* y, const Value& value) {
  constexpr int N = F32::N;
  const F32 least = F32::set(static_cast<float>(low)), most = F32::set(static_cast<float>(high));
  int64_t i = 0;
  for (; i + N <= count; i += N) save_codes(y + i, max(least, min(value(i), most)));
  if (i < count) save_codes(y + count - N, max(least, min(value(count - N), most)));
}

}  // namespace
}  // namespace nf::NF_ARCH
