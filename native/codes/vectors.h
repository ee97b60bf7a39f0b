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

// Of |v| (σ(|v|) - 1/2) by a polynomial of the second degree in each stretch of 1 / 1.6, the last of which never ends;
// within 0.0004. normfuse/ops/codes/_codes.py has the same numbers.
constexpr float kSilu[3][16] = {
    {-0.000142579025f, -0.0330983326f, -0.172428131f, -0.37292704f, -0.523376584f, -0.573301852f, -0.538828135f,
     -0.458126843f, -0.363486856f, -0.274308056f, -0.199311599f, -0.140574887f, -0.096789062f, -0.0653236732f,
     -0.043348778f, -0.00039999999f},
    {0.00395741034f, 0.103330672f, 0.326614559f, 0.543224931f, 0.665712714f, 0.698693156f, 0.680647075f, 0.643791914f,
     0.6058743f, 0.57409066f, 0.550029278f, 0.532897294f, 0.521191061f, 0.513426542f, 0.508391738f, 0.5f},
    {0.236781463f, 0.160606518f, 0.070688799f, 0.012058245f, -0.0128980204f, -0.0183442328f, -0.0159821268f,
     -0.0117725432f, -0.00797339622f, -0.00514073297f, -0.0032104142f, -0.00196097f, -0.00117843796f, -0.000699376862f,
     -0.000410960056f, 0.f}};

// table[i], i within 0..15
inline F32 look_up(const float* table, I32 i) {
#if defined(NF_AVX512) && !defined(NORMFUSE_SIMDE)
  return {_mm512_permutexvar_ps(i.v, _mm512_loadu_ps(table))};
#elif defined(NF_AVX2)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i.v);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i.v);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i.v, 28)))};
#else
  int32_t at[F32::N];
  float x[F32::N];
  i.store(at);
  for (int k = 0; k < F32::N; ++k) x[k] = table[at[k]];
  return F32::load(x);
#endif
}

// f(v) · gain + offset, every operation rounded by itself: normfuse/ops/codes/_codes.py does the same ones.
// v · σ(v) is v / 2 + |v| (σ(|v|) - 1/2).
struct Behind {
  int32_t function;
  F32 gain, offset;
  float silu[3][16];

  Behind(int32_t f, float by, float more) : function(f), gain(F32::set(by)), offset(F32::set(more)) {
    if (function != NF_CODES_SILU) return;
    for (int i = 0; i < 16; ++i) {
      silu[0][i] = kSilu[0][i] * by + more;
      silu[1][i] = kSilu[1][i] * by;
      silu[2][i] = kSilu[2][i] * by;
    }
  }

  NF_INLINE F32 operator()(F32 v) const {
    if (function == NF_CODES_HARDSWISH) {
      const F32 gate = max(F32::set(0.f), min(F32::set(1.f), v * F32::set(0.16666667f) + F32::set(0.5f)));
      return v * gate * gain + offset;
    }
    const F32 a = abs(v);
    const I32 i = to_int(min(F32::set(15.f), a * F32::set(1.6f) - F32::set(0.5f)));
    const F32 even = (look_up(silu[2], i) * a + look_up(silu[1], i)) * a + look_up(silu[0], i);
    return v * (gain * F32::set(0.5f)) + even;
  }
};

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
