// What F32 and I32 mean, as vectors of one number. The other instruction sets give the same functions.
#pragma once
namespace nf::scalar {

struct I32 {
  static constexpr int N = 1;
  int32_t v;
  static I32 set(int32_t x) { return {x}; }
  static I32 load(const int32_t* p) { return {*p}; }
  void store(int32_t* p) const { *p = v; }
};
inline I32 operator+(I32 a, I32 b) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) + static_cast<uint32_t>(b.v))};
}  // wraps
inline I32 operator-(I32 a, I32 b) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) - static_cast<uint32_t>(b.v))};
}
inline I32 operator&(I32 a, I32 b) { return {a.v & b.v}; }
inline I32 max(I32 a, I32 b) { return {a.v > b.v ? a.v : b.v}; }
template <int S>
inline I32 shift_left(I32 a) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) << S)};
}
inline int32_t highest(I32 a) { return a.v; }

struct Mask {
  bool v;
};

struct F32 {
  static constexpr int N = 1;
  float v;
  static F32 set(float x) { return {x}; }
  static F32 load(const float* p) { return {*p}; }
  static F32 load(const float* p, int64_t n) { return {n > 0 ? *p : 0.f}; }  // the first n; the others are 0
  void store(float* p) const { *p = v; }
  void store(float* p, int64_t n) const {
    if (n > 0) *p = v;
  }
};
inline F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }  // a b + c; the vectors round once
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }   // b where one of them is NaN
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }   // b where one of them is NaN
inline F32 abs(F32 a) { return {std::fabs(a.v)}; }
inline F32 sqrt(F32 a) { return {std::sqrt(a.v)}; }
inline F32 round(F32 a) { return {std::nearbyint(a.v)}; }  // to even
inline F32 copysign(F32 a, F32 sign) { return {std::copysign(a.v, sign.v)}; }
inline Mask operator<(F32 a, F32 b) { return {a.v < b.v}; }
inline Mask ordered(F32 a) { return {!std::isnan(a.v)}; }
inline F32 select(Mask m, F32 a, F32 b) { return m.v ? a : b; }
inline F32 to_float(I32 a) { return {static_cast<float>(a.v)}; }
// To nearest, ties to even. NaN and what does not fit: any number; select first.
inline I32 to_int(F32 a) {
  return {a.v >= -2147483648.f && a.v < 2147483648.f ? static_cast<int32_t>(std::lrintf(a.v)) : INT32_MIN};
}
inline I32 bits_of(F32 a) {
  I32 r;
  std::memcpy(&r.v, &a.v, 4);
  return r;
}
inline F32 float_of(I32 a) {
  F32 r;
  std::memcpy(&r.v, &a.v, 4);
  return r;
}
inline float sum(F32 a) { return a.v; }
inline float highest(F32 a) { return a.v; }
// 4 N codes, each within int8.
inline void store_codes(int8_t* p, I32 a, I32 b, I32 c, I32 d) {
  p[0] = static_cast<int8_t>(a.v);
  p[1] = static_cast<int8_t>(b.v);
  p[2] = static_cast<int8_t>(c.v);
  p[3] = static_cast<int8_t>(d.v);
}

}  // namespace nf::scalar
