// Floats to int8 codes, on the vectors of the file's instruction set (normfuse.h says what the codes are).
#pragma once
#include "simd/simd.h"

#if NF_BUILT
namespace nf::NF_ARCH {

// The largest |x| as the bits of a float: ordered as integers are, and at or above infinity's where something is not
// finite.
inline int32_t highest_bits(const float* x, int64_t k) {
  constexpr int N = F32::N;
  const I32 magnitude = I32::set(0x7fffffff);
  I32 m[4] = {I32::set(0), I32::set(0), I32::set(0), I32::set(0)};
  int64_t i = 0;
  for (; i + 4 * N <= k; i += 4 * N)
    for (int j = 0; j < 4; ++j) m[j] = max(m[j], bits_of(F32::load(x + i + j * N)) & magnitude);
  for (; i + N <= k; i += N) m[0] = max(m[0], bits_of(F32::load(x + i)) & magnitude);
  if (i < k) m[1] = max(m[1], bits_of(F32::load(x + i, k - i)) & magnitude);
  return highest(max(max(m[0], m[1]), max(m[2], m[3])));
}

// q = code(x) for vectors of x.
template <class Code>
inline void write_codes(const float* x, int64_t k, int8_t* q, const Code& code) {
  constexpr int N = F32::N;
  int64_t i = 0;
  for (; i + 4 * N <= k; i += 4 * N)
    store_codes(q + i, code(F32::load(x + i)), code(F32::load(x + i + N)), code(F32::load(x + i + 2 * N)),
                code(F32::load(x + i + 3 * N)));
  for (; i < k; i += N) {
    int32_t c[N];
    const int64_t left = k - i < N ? k - i : N;
    code(F32::load(x + i, left)).store(c);
    for (int64_t j = 0; j < left; ++j) q[i + j] = static_cast<int8_t>(c[j]);
  }
}

// q = clamp(rne(x * inverse), ±limit); a NaN product gives 0.
inline void codes_of(const float* x, int64_t k, float inverse, float limit, int8_t* q) {
  const F32 by = F32::set(inverse), to = F32::set(limit);
  write_codes(x, k, q, [=](F32 v) NF_INLINE { return to_code(v, by, to); });
}

// From the largest |x| of a row: its scale, and what to multiply by (0 where all codes are 0).
inline void row_scale_of(int32_t bits_of_highest, int bits, float* inverse, float* scale) {
  const float limit = static_cast<float>((1 << (bits - 1)) - 1);
  float highest;
  std::memcpy(&highest, &bits_of_highest, 4);
  *inverse = 0.f;
  *scale = 1.f;
  if (bits_of_highest >= 0x7f800000) {
    const int32_t nan = 0x7fc00000;
    std::memcpy(scale, &nan, 4);
  } else if (bits_of_highest != 0) {
    *inverse = limit / highest;
    *scale = highest / limit;
  }
}

inline void quantize_row(const float* x, int64_t k, int bits, int8_t* q, float* scale) {
  float inverse;
  row_scale_of(highest_bits(x, k), bits, &inverse, scale);
  if (inverse == 0.f) std::memset(q, 0, static_cast<size_t>(k));
  else codes_of(x, k, inverse, static_cast<float>((1 << (bits - 1)) - 1), q);
}

// x / scale, not x * (1 / scale): what QuantizeLinear computes.
inline void quantize_static(const float* x, int64_t count, float scale, int bits, int8_t* q) {
  const F32 by = F32::set(scale), one = F32::set(1.f), to = F32::set(static_cast<float>((1 << (bits - 1)) - 1));
  write_codes(x, count, q, [=](F32 v) NF_INLINE { return to_code(v / by, one, to); });
}

}  // namespace nf::NF_ARCH
#endif
