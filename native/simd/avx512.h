// F32 and I32 of AVX-512: see simd/scalar.h for what each function means.
#pragma once
#if NF_BUILT
namespace nf::avx512 {

struct I32 {
  static constexpr int N = 16;
  __m512i v;
  static I32 set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int S>
inline I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, S)};
}
inline __m256i upper(__m512i a) { return _mm512_extracti64x4_epi64(a, 1); }
inline int32_t highest(I32 a) {
  const __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(a.v), upper(a.v));
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1));
  return _mm_cvtsi128_si32(x);
}

struct Mask {
  uint16_t v;
};

struct F32 {
  static constexpr int N = 16;
  __m512 v;
  static uint16_t first(int64_t n) { return static_cast<uint16_t>(n >= 16 ? 0xffffu : (1u << (n < 0 ? 0 : n)) - 1u); }
  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 load(const float* p, int64_t n) {
#if defined(NORMFUSE_SIMDE)
    float x[16] = {};
    std::memcpy(x, p, sizeof(float) * static_cast<size_t>(n > 16 ? 16 : n < 0 ? 0 : n));
    return load(x);
#else
    return {_mm512_maskz_loadu_ps(first(n), p)};
#endif
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const {
#if defined(NORMFUSE_SIMDE)
    float x[16];
    store(x);
    std::memcpy(p, x, sizeof(float) * static_cast<size_t>(n > 16 ? 16 : n < 0 ? 0 : n));
#else
    _mm512_mask_storeu_ps(p, first(n), v);
#endif
  }
};
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 abs(F32 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
inline F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline F32 copysign(F32 a, F32 sign) {
  const __m512i s = _mm512_and_si512(_mm512_castps_si512(sign.v), _mm512_set1_epi32(INT32_MIN));
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(abs(a).v), s))};
}
inline Mask operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask ordered(F32 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q)}; }
inline F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
#if defined(NORMFUSE_SIMDE)
// The emulation follows the rules of C, not the instruction's, where a number is missing.
inline F32 min(F32 a, F32 b) { return select(a < b, a, b); }
inline F32 max(F32 a, F32 b) { return select(b < a, a, b); }
inline F32 to_float(I32 a) {
  alignas(64) int32_t x[16];
  alignas(64) float y[16];
  a.store(x);
  for (int i = 0; i < 16; ++i) y[i] = static_cast<float>(x[i]);
  return F32::load(y);
}
inline I32 to_int(F32 a) {
  alignas(64) float x[16];
  alignas(64) int32_t y[16];
  a.store(x);
  for (int i = 0; i < 16; ++i)
    y[i] = x[i] >= -2147483648.f && x[i] < 2147483648.f ? static_cast<int32_t>(std::lrintf(x[i])) : INT32_MIN;
  return I32::load(y);
}
#else
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
#endif
inline I32 bits_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
inline F32 float_of(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
inline float sum(F32 a) {
  const __m512i i = _mm512_castps_si512(a.v);
  const __m256 y = _mm256_add_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(i)), _mm256_castsi256_ps(upper(i)));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float highest(F32 a) {
  const __m512i i = _mm512_castps_si512(a.v);
  const __m256 y = _mm256_max_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(i)), _mm256_castsi256_ps(upper(i)));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline void store_codes(int8_t* p, I32 a, I32 b, I32 c, I32 d) {
  const __m512i x = _mm512_packs_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, x));
}

}  // namespace nf::avx512
#endif
