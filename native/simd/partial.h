// What norms and softmax need beside simd.h: partial vectors, and a multiply-add that rounds once everywhere.
#pragma once
#include <limits>

#include "simd/quantize.h"

namespace nf::NF_ARCH {
namespace {

// Never left to the compiler to contract, so that two kernels built from the same calls give the same bits.
#if defined(NF_SCALAR)
inline F32 fused(F32 a, F32 b, F32 c) {
  return {static_cast<float>(static_cast<double>(a.v) * static_cast<double>(b.v) + static_cast<double>(c.v))};
}
#else
inline F32 fused(F32 a, F32 b, F32 c) { return fma(a, b, c); }
#endif

// n of F32::N lanes; a constant n == F32::N costs nothing.
inline F32 load(const float* p, int64_t n) { return n == F32::N ? F32::load(p) : F32::load(p, n); }
inline void store(float* p, F32 v, int64_t n) { n == F32::N ? v.store(p) : v.store(p, n); }

// The first n lanes, the others 0 (or `fill`).
inline F32 keep(F32 v, int64_t n, float fill = 0) {
  float lanes[F32::N];
  v.store(lanes);
  for (int64_t i = n; i < F32::N; ++i) lanes[i] = fill;
  return F32::load(lanes);
}

// codes_of for floats whose largest magnitude gave `inverse` = limit / largest: no product is NaN, and none rounds
// beyond the limit.
inline void codes_within(const float* x, int64_t k, float inverse, float limit, int8_t* q) {
  constexpr int N = F32::N;
  const F32 by = F32::set(inverse);
  if (!(inverse <= std::numeric_limits<float>::max())) return codes_of(x, k, inverse, limit, q);
  int64_t i = 0;
  for (; i + 4 * N <= k; i += 4 * N)
    store_codes(q + i, to_int(F32::load(x + i) * by), to_int(F32::load(x + i + N) * by),
                to_int(F32::load(x + i + 2 * N) * by), to_int(F32::load(x + i + 3 * N) * by));
  if (i < k) codes_of(x + i, k - i, inverse, limit, q + i);
}

}  // namespace
}  // namespace nf::NF_ARCH
