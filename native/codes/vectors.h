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
