// What softmax.cpp asks of an instruction set.
#pragma once
#include <cmath>
#include <cstdint>

namespace nf {

constexpr float kSoftmaxMagic = 12582912;   // 1.5 · 2^23: an integer added to it lies in the low bits
constexpr float kSoftmaxFarthest = 144269;  // 1e5 · log2 e: so far the argument reduction is exact to the last bit
constexpr float kSoftmaxStart = kSoftmaxMagic - kSoftmaxFarthest;

// sum · 2^(reference - kSoftmaxMagic): the exponent is kept apart, so nothing over- or underflows.
struct SoftmaxSum {
  float reference;
  double sum;
};

inline SoftmaxSum softmax_add(SoftmaxSum a, SoftmaxSum b) {
  const float top = a.reference > b.reference ? a.reference : b.reference;
  const auto fall = [=](float r) { return r - top >= -1000 ? static_cast<int>(r - top) : -1000; };
  return {top, std::ldexp(a.sum, fall(a.reference)) + std::ldexp(b.sum, fall(b.reference))};
}

struct SoftmaxKernels {
  SoftmaxSum (*sum)(const float* x, int64_t d);
  void (*write)(const float* x, int64_t d, SoftmaxSum total, float* y);
  void (*row)(const float* x, int64_t d, float* y);  // three passes: rows in cache, and what two cannot do
};

}  // namespace nf
