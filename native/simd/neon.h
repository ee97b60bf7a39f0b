// F32 and I32 of NEON: see simd/scalar.h for what each function means.
#pragma once
#if NF_BUILT
namespace nf::neon {

struct I32 {
  static constexpr int N = 4;
  int32x4_t v;
  static I32 set(int32_t x) { return {vdupq_n_s32(x)}; }
  static I32 load(const int32_t* p) { return {vld1q_s32(p)}; }
  void store(int32_t* p) const { vst1q_s32(p, v); }
};
inline I32 operator+(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {vsubq_s32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {vandq_s32(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {vmaxq_s32(a.v, b.v)}; }
template <int S>
inline I32 shift_left(I32 a) {
  return {vshlq_n_s32(a.v, S)};
}
inline int32_t highest(I32 a) { return vmaxvq_s32(a.v); }

struct Mask {
  uint32x4_t v;
};

struct F32 {
  static constexpr int N = 4;
  float32x4_t v;
  static F32 set(float x) { return {vdupq_n_f32(x)}; }
  static F32 load(const float* p) { return {vld1q_f32(p)}; }
  static F32 load(const float* p, int64_t n) {
    float x[4] = {};
    for (int64_t i = 0; i < n && i < 4; ++i) x[i] = p[i];
    return load(x);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(float* p, int64_t n) const {
    float x[4];
    store(x);
    for (int64_t i = 0; i < n && i < 4; ++i) p[i] = x[i];
  }
};
inline F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline F32 abs(F32 a) { return {vabsq_f32(a.v)}; }
inline F32 sqrt(F32 a) { return {vsqrtq_f32(a.v)}; }
inline F32 round(F32 a) { return {vrndnq_f32(a.v)}; }
inline F32 copysign(F32 a, F32 sign) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, a.v)}; }
inline Mask operator<(F32 a, F32 b) { return {vcltq_f32(a.v, b.v)}; }
inline Mask ordered(F32 a) { return {vceqq_f32(a.v, a.v)}; }
inline F32 select(Mask m, F32 a, F32 b) { return {vbslq_f32(m.v, a.v, b.v)}; }
inline F32 to_float(I32 a) { return {vcvtq_f32_s32(a.v)}; }
inline I32 to_int(F32 a) { return {vcvtnq_s32_f32(a.v)}; }
inline I32 bits_of(F32 a) { return {vreinterpretq_s32_f32(a.v)}; }
inline F32 float_of(I32 a) { return {vreinterpretq_f32_s32(a.v)}; }
inline float sum(F32 a) { return vaddvq_f32(a.v); }
inline float highest(F32 a) { return vmaxvq_f32(a.v); }
inline void store_codes(int8_t* p, I32 a, I32 b, I32 c, I32 d) {
  const int16x8_t x = vcombine_s16(vqmovn_s32(a.v), vqmovn_s32(b.v));
  const int16x8_t y = vcombine_s16(vqmovn_s32(c.v), vqmovn_s32(d.v));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(x), vqmovn_s16(y)));
}

}  // namespace nf::neon
#endif
