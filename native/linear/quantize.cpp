// Quantization of activations: arguments and threads. The arithmetic is in simd/quantize.h.
#include "isa/isa.h"
#include "linear/linear.h"
#include "parallel.h"

namespace {
constexpr int64_t kAtOnce = 16384;  // floats of a task
}

NF_EXPORT const char* nf_quantize_rows(const nf_threads* threads, const float* x, int64_t rows, int64_t k, int32_t bits,
                                       int8_t* q, float* scale) {
  if (rows < 0 || k < 1) return "nf_quantize_rows: rows must be >= 0 and k >= 1";
  if (rows > (INT64_MAX >> 2) / k) return "nf_quantize_rows: the bytes of the rows leave 63 bits";
  if (bits < 2 || bits > 8) return "nf_quantize_rows: bits must be 2..8";
  if (rows == 0) return nullptr;
  if (!x || !q || !scale) return "nf_quantize_rows: x, q or scale is null";
  const nf::LinearKernels& kernels = nf::active_kernels().linear;
  const int64_t step = k >= kAtOnce ? 1 : kAtOnce / k;
  nf::parallel(threads, nf::ceil_div(rows, step), [&](int64_t t) {
    for (int64_t r = t * step; r < rows && r < (t + 1) * step; ++r)
      kernels.quantize_row(x + r * k, k, bits, q + r * k, scale + r);
  });
  return nullptr;
}

NF_EXPORT const char* nf_quantize_static(const nf_threads* threads, const float* x, int64_t count, float scale,
                                         int32_t bits, int8_t* q) {
  if (count < 0 || count > INT64_MAX >> 2) return "nf_quantize_static: count must be 0..2^61";
  if (bits < 2 || bits > 8) return "nf_quantize_static: bits must be 2..8";
  if (!(scale > 0.f)) return "nf_quantize_static: scale must be above 0";
  if (count == 0) return nullptr;
  if (!x || !q) return "nf_quantize_static: x or q is null";
  const nf::LinearKernels& kernels = nf::active_kernels().linear;
  nf::parallel(threads, nf::ceil_div(count, kAtOnce), [&](int64_t t) {
    const int64_t begin = t * kAtOnce, size = count - begin < kAtOnce ? count - begin : kAtOnce;
    kernels.quantize_static(x + begin, size, scale, bits, q + begin);
  });
  return nullptr;
}
