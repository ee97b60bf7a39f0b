// Floats to int8 codes, on the vectors of the file's instruction set (normfuse.h says what the codes are).
#pragma once
#include "simd/simd.h"

#if NF_BUILT
namespace nf::NF_ARCH {

// The largest |x| as the bits of a float: ordered as integers are, and at or above infinity's where something is not finite.
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

// q = clamp(rne(x * inverse), ±limit); a NaN product gives 0.
inline void codes_of(const float* x, int64_t k, float inverse, float limit, int8_t* q) {
  constexpr int N = F32::N;
  const F32 by = F32::set(inverse), to = F32::set(limit);
  int64_t i = 0;
  for (; i + 4 * N <= k; i += 4 * N)
    store_codes(q + i, to_code(F32::load(x + i), by, to), to_code(F32::load(x + i + N), by, to), to_code(F32::load(x + i + 2 * N), by, to),
                to_code(F32::load(x + i + 3 * N), by, to));
  for (; i < k; i += N) {
    int32_t c[N];
    const int64_t left = k - i < N ? k - i : N;
    to_code(F32::load(x + i, left), by, to).store(c);
    for (int64_t j = 0; j < left; ++j) q[i + j] = static_cast<int8_t>(c[j]);
  }
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
  constexpr int N = F32::N;
  const F32 by = F32::set(scale), one = F32::set(1.f), to = F32::set(static_cast<float>((1 << (bits - 1)) - 1));
  int64_t i = 0;
  for (; i + 4 * N <= count; i += 4 * N)
    store_codes(q + i, to_code(F32::load(x + i) / by, one, to), to_code(F32::load(x + i + N) / by, one, to),
                to_code(F32::load(x + i + 2 * N) / by, one, to), to_code(F32::load(x + i + 3 * N) / by, one, to));
  for (; i < count; i += N) {
    int32_t c[N];
    const int64_t left = count - i < N ? count - i : N;
    to_code(F32::load(x + i, left) / by, one, to).store(c);
    for (int64_t j = 0; j < left; ++j) q[i + j] = static_cast<int8_t>(c[j]);
  }
}

}  // namespace nf::NF_ARCH
#endif
