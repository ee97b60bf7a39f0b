// What norm.cpp and softmax/softmax.cpp ask of an instruction set.
#pragma once
#include <cmath>

#include "normfuse.h"

namespace nf {

struct NormRows {
  int32_t kind;
  const float *x, *residual;
  int64_t d;
  const float *gain, *shift;
  float eps, scale_const;
  float* sum;
  float* y;  // nullptr: q and scale
  int32_t bits;
  int8_t* q;
  float* scale;
};

constexpr float kSoftmaxMagic = 12582912;               // 1.5 · 2^23: an integer added to it lies in the low bits
constexpr float kSoftmaxFarthest = 144269;              // 1e5 · log2 e: so far the argument reduction is exact to the last bit
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

struct NormKernels {
  // Rows first..last-1; `row` holds d floats, used where neither y nor sum can hold the row.
  void (*norm)(const NormRows&, int64_t first, int64_t last, float* row);
  SoftmaxSum (*softmax_sum)(const float* x, int64_t d);
  void (*softmax_write)(const float* x, int64_t d, SoftmaxSum total, float* y);
  void (*softmax_row)(const float* x, int64_t d, float* y);  // three passes: rows in cache, and what two cannot do
};

extern const NormKernels norm_scalar;
#if defined(__x86_64__)
extern const NormKernels norm_avx2;
#endif
#if defined(__x86_64__) || defined(NORMFUSE_SIMDE)
extern const NormKernels norm_avx512;
#endif
#if defined(__aarch64__)
extern const NormKernels norm_neon;
#endif
const NormKernels& norm_kernels();  // of the active instruction set

}  // namespace nf
