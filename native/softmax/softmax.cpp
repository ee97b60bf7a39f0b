// nf_two_pass_softmax: rows, and stretches of long rows, as tasks.
#include "softmax/softmax.h"

#include "isa/isa.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kStretch = 1 << 16;  // of a long row; fixed, so that the sums do not depend on the number of threads
constexpr int64_t kInCache = 1 << 18;  // 1 MB in and 1 MB out: so far a pass over a cache costs less than another e^x
constexpr int64_t kTaskFloats = 1 << 14;

// The largest exponent must lie where the argument reduction is good; a NaN or an infinity of the row shows in one of
// the two.
bool usable(SoftmaxSum s) {
  return s.reference > kSoftmaxStart && s.reference <= kSoftmaxMagic + kSoftmaxFarthest && s.sum > 0 && s.sum < 1e30;
}

void long_row(const nf_threads* threads, const SoftmaxKernels& kernels, const float* x, int64_t d, float* y,
              SoftmaxSum* sums) {
  const int64_t stretches = (d + kStretch - 1) / kStretch;
  const auto length = [=](int64_t i) { return i < stretches - 1 ? kStretch : d - i * kStretch; };
  parallel(threads, stretches, [&](int64_t i) { sums[i] = kernels.sum(x + i * kStretch, length(i)); });
  SoftmaxSum total = sums[0];
  for (int64_t i = 1; i < stretches; ++i) total = softmax_add(total, sums[i]);
  if (!usable(total)) return kernels.row(x, d, y);
  parallel(threads, stretches, [&](int64_t i) { kernels.write(x + i * kStretch, length(i), total, y + i * kStretch); });
}

}  // namespace
}  // namespace nf

NF_EXPORT const char* nf_two_pass_softmax(const nf_threads* threads, const float* x, int64_t rows, int64_t d,
                                          float* y) {
  using namespace nf;
  if (rows < 0) return "two_pass_softmax: rows must be 0 or more";
  if (d < 0) return "two_pass_softmax: d must be 0 or more";
  if (rows == 0 || d == 0) return nullptr;
  if (rows > INT64_MAX / 8 / d) return "two_pass_softmax: rows times d does not fit in memory";
  if (!x || !y) return "two_pass_softmax: x or y is missing";
  const SoftmaxKernels& kernels = active_kernels().softmax;
  if (d > kInCache) {
    SoftmaxSum* sums = thread_scratch<struct SoftmaxStretches>().of<SoftmaxSum>((d + kStretch - 1) / kStretch);
    if (!sums) return kNoMemory;
    for (int64_t m = 0; m < rows; ++m) long_row(threads, kernels, x + m * d, d, y + m * d, sums);
    return nullptr;
  }
  const int64_t step = d < kTaskFloats ? kTaskFloats / d : 1;
  parallel(threads, (rows + step - 1) / step, [&](int64_t task) {
    const int64_t last = (task + 1) * step < rows ? (task + 1) * step : rows;
    for (int64_t m = task * step; m < last; ++m) kernels.row(x + m * d, d, y + m * d);
  });
  return nullptr;
}
