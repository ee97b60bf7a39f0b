// nf_norm and nf_norm_quantize: arguments, tasks of rows, and the choice of an instruction set.
#include "norm/norm.h"

#include <atomic>

#include "isa/isa.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kTaskFloats = 1 << 15;  // a few microseconds: what makes waking a thread worth it

const char* norm_all(const nf_threads* threads, const NormRows& r, int64_t rows) {
  if (r.kind < NF_LAYER || r.kind > NF_L1) return "norm: kind must be 0 (layer), 1 (RMS), 2 (CRMS) or 3 (L1)";
  if (rows < 0) return "norm: rows must be 0 or more";
  if (r.d < 1) return "norm: d must be 1 or more";
  if (rows > INT64_MAX / 8 / r.d) return "norm: rows times d does not fit in memory";
  if (rows == 0) return nullptr;
  if (!r.x) return "norm: x is missing";
  const NormKernels& kernels = active_kernels().norm;
  const int64_t step = r.d < kTaskFloats ? kTaskFloats / r.d : 1;
  std::atomic<bool> full{false};
  parallel(threads, (rows + step - 1) / step, [&](int64_t task) {
    const int64_t first = task * step, last = first + step < rows ? first + step : rows;
    float* row = r.y ? nullptr : thread_scratch<struct NormRow>().of<float>(r.d);
    if (!r.y && !row) full = true;
    else kernels.norm(r, first, last, row);
  });
  return full ? kNoMemory : nullptr;
}

}  // namespace
}  // namespace nf

NF_EXPORT const char* nf_norm(const nf_threads* threads, int32_t kind, const float* x, const float* residual,
                              int64_t rows, int64_t d, const float* gain, const float* shift, float eps,
                              float scale_const, float* sum, float* y) {
  if (!y && rows > 0) return "norm: y is missing";
  return nf::norm_all(threads, {kind, x, residual, d, gain, shift, eps, scale_const, sum, y, 8, nullptr, nullptr},
                      rows);
}

NF_EXPORT const char* nf_norm_quantize(const nf_threads* threads, int32_t kind, const float* x, const float* residual,
                                       int64_t rows, int64_t d, const float* gain, const float* shift, float eps,
                                       float scale_const, int32_t bits, float* sum, int8_t* q, float* scale) {
  if (bits < 2 || bits > 8) return "norm_quantize: bits must be 2..8";
  if ((!q || !scale) && rows > 0) return "norm_quantize: q or scale is missing";
  return nf::norm_all(threads, {kind, x, residual, d, gain, shift, eps, scale_const, sum, nullptr, bits, q, scale},
                      rows);
}
