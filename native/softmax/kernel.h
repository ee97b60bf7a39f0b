// Softmax. e^x = m · 2^n with n = round(x log2 e), kept as an integer in the low bits of the float n + 1.5 · 2^23.
// Dukhan and Ablavatski (arXiv 2001.04438) add pairs (m, n) one by one; here a lane keeps one reference, the largest n
// it met, and sums m · 2^(n - reference), so that the exponents are aligned once for 8 vectors. The second pass writes
// m · 2^(n - reference) / sum. Below reference - 126 a term is 0: -inf, -1e30 and the like never reach the argument
// reduction. Included after simd.h.
#pragma once
#include <limits>

#include "simd/partial.h"
#include "softmax/softmax.h"

namespace nf::NF_ARCH {
namespace {

constexpr int64_t kSumBlock = 256 * F32::N;
constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62E43p-1f, kLn2Low = -0x1.05C61p-29f;

// 2^(n - reference) and the x below which it is 0.
struct Reference {
  I32 base;
  F32 lowest;
  explicit Reference(F32 r)
      : base(bits_of(r) - I32::set(127)), lowest((r - F32::set(kSoftmaxMagic + 127)) * F32::set(kLn2High)) {}
  F32 power(F32 r) const { return float_of(shift_left<23>(bits_of(r) - base)); }
};

struct Exponential {
  F32 m, scale;  // e^x = m · scale, relative to the reference
};

NF_INLINE inline Exponential exponential(F32 x, const Reference& reference) {
  x = max(reference.lowest, x);  // NaN stays
  const F32 r = fused(x, F32::set(kLog2e), F32::set(kSoftmaxMagic));
  const F32 n = r - F32::set(kSoftmaxMagic);
  F32 t = fused(n, F32::set(-kLn2High), x);
  t = fused(n, F32::set(-kLn2Low), t);
  F32 p = fused(F32::set(0x1.0F9F9Cp-7f), t, F32::set(0x1.573A1Ap-5f));
  p = fused(p, t, F32::set(0x1.555A80p-3f));
  p = fused(p, t, F32::set(0x1.FFFDC6p-2f));
  p = fused(p, t, F32::set(0x1.FFFFF6p-1f));
  p = fused(p, t, F32::set(1));
  return {p, reference.power(r)};
}

inline F32 load_masked(const float* p, int64_t n) {
  return n == F32::N ? F32::load(p) : keep(F32::load(p, n), n, -std::numeric_limits<float>::infinity());
}

// Sums of one reference a lane.
struct Lanes {
  F32 reference, sum;
};

// 2^(from - to) for integers above the magic constant, from <= to; 0 where they are 127 or more apart.
inline F32 fall(F32 from, F32 to) {
  return Reference(F32::set(kSoftmaxMagic)).power(max(F32::set(-127), from - to) + F32::set(kSoftmaxMagic));
}

// Up to 8 vectors, the last one of `tail` elements. Two accumulators share the reference.
NF_INLINE inline void add_group(const float* p, int count, int64_t tail, F32& reference, F32& a, F32& b) {
  constexpr int N = F32::N;
  F32 best = load_masked(p + (count - 1) * N, tail);
  for (int v = 0; v < count - 1; ++v) best = max(F32::load(p + v * N), best);
  const F32 next = max(fused(best, F32::set(kLog2e), F32::set(kSoftmaxMagic)), reference);
  const F32 scale = fall(reference, next);
  a = a * scale;
  b = b * scale;
  reference = next;
  const Reference at(reference);
  for (int v = 0; v < count; ++v) {
    const Exponential e = exponential(v < count - 1 ? F32::load(p + v * N) : load_masked(p + v * N, tail), at);
    F32& sum = v & 1 ? b : a;
    sum = fused(e.m, e.scale, sum);
  }
}

inline Lanes add_block(const float* x, int64_t d) {
  constexpr int N = F32::N;
  F32 reference = F32::set(kSoftmaxStart), a = F32::set(0), b = a;
  int64_t i = 0;
  for (; i + 8 * N <= d; i += 8 * N) add_group(x + i, 8, N, reference, a, b);
  if (i < d) {
    const int count = static_cast<int>((d - i + N - 1) / N);
    add_group(x + i, count, d - i - (count - 1) * N, reference, a, b);
  }
  return {reference, a + b};
}

// By blocks, whose sums are added: the rounding of a sum does not grow with d.
inline SoftmaxSum softmax_sum(const float* x, int64_t d) {
  constexpr int N = F32::N;
  Lanes all = {F32::set(kSoftmaxStart), F32::set(0)};
  for (int64_t i = 0; i < d; i += kSumBlock) {
    const Lanes part = add_block(x + i, d - i < kSumBlock ? d - i : kSumBlock);
    const F32 next = max(part.reference, all.reference);
    all.sum = fused(part.sum, fall(part.reference, next), all.sum * fall(all.reference, next));
    all.reference = next;
  }
  float references[N], sums[N];
  all.reference.store(references);
  all.sum.store(sums);
  SoftmaxSum total = {references[0], static_cast<double>(sums[0])};
  for (int l = 1; l < N; ++l) total = softmax_add(total, {references[l], static_cast<double>(sums[l])});
  return total;
}

inline void softmax_write(const float* x, int64_t d, SoftmaxSum total, float* y) {
  constexpr int N = F32::N;
  const Reference at(F32::set(total.reference));
  const F32 inverse = F32::set(static_cast<float>(1 / total.sum));
  int64_t i = 0;
  for (; i + N <= d; i += N) {
    const Exponential e = exponential(F32::load(x + i), at);
    (e.m * inverse * e.scale).store(y + i);
  }
  if (i < d) {
    const Exponential e = exponential(load_masked(x + i, d - i), at);
    (e.m * inverse * e.scale).store(y + i, d - i);
  }
}

// Three passes: the largest, the exponentials and their sum, the division.
inline void softmax_row(const float* x, int64_t d, float* y) {
  constexpr int N = F32::N;
  constexpr float none = -std::numeric_limits<float>::infinity();
  F32 best = F32::set(none), other = best;
  int64_t i = 0;
  for (; i + 2 * N <= d; i += 2 * N) {
    best = max(F32::load(x + i), best);
    other = max(F32::load(x + i + N), other);
  }
  for (; i < d; i += N) best = max(load_masked(x + i, d - i < N ? d - i : N), best);
  const F32 top = F32::set(highest(max(other, best)));
  const Reference at(F32::set(kSoftmaxMagic));
  const auto one = [&](int64_t j, int64_t n, F32& sum) NF_INLINE {
    const Exponential e = exponential(load_masked(x + j, n) - top, at);
    const F32 p = e.m * e.scale;
    store(y + j, p, n);
    sum = sum + (n == N ? p : keep(p, n));
  };
  double total = 0;
  for (int64_t start = 0; start < d; start += kSumBlock) {
    const int64_t end = d - start < kSumBlock ? d : start + kSumBlock;
    F32 a = F32::set(0), b = a;
    for (i = start; i + 2 * N <= end; i += 2 * N) {
      one(i, N, a);
      one(i + N, N, b);
    }
    for (; i < end; i += N) one(i, end - i < N ? end - i : N, a);
    total += static_cast<double>(sum(a + b));
  }
  const F32 inverse = F32::set(static_cast<float>(1 / total));
  for (i = 0; i + N <= d; i += N) (F32::load(y + i) * inverse).store(y + i);
  if (i < d) (F32::load(y + i, d - i) * inverse).store(y + i, d - i);
}

}  // namespace
}  // namespace nf::NF_ARCH
