// What stands between convolutions of codes, and at the ends of a chain.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "codes/codes.h"
#include "codes/plan.h"
#include "conv/transpose.h"
#include "isa/isa.h"
#include "linear/linear.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kTask = 1 << 15;  // bytes
struct Factors;
struct Planes;

bool is_code(int32_t n) { return n >= 0 && n <= 255; }

const char* check_sizes(int64_t batch, int64_t c, int64_t pixels) {
  constexpr int64_t most = INT64_C(1) << 40;
  if (batch < 0 || c < 1 || pixels < 1) return "codes: batch must be 0 or more, channels and pixels 1 or more";
  if (batch > most || c > most || pixels > most / c || (batch && c * pixels > most / batch))
    return "codes: the tensor does not fit in memory";
  return nullptr;
}

const char* check_bounds(float bias, int32_t low, int32_t high) {
  if (!is_code(low) || !is_code(high) || low > high) return "codes: low and high must be 0..255, low not above high";
  return std::fabs(bias) <= 1e6f ? nullptr : "codes: bias must be within a million";
}

struct Steps {
  float scale;
  int32_t zero, top;
};

// Pixels of planes that lie `plane` floats apart, to channels beside each other. False: no memory.
bool quantize_band(const float* x, int64_t plane, int64_t c, int64_t pixels, Steps s, uint8_t* y) {
  constexpr int64_t kChannels = 64;  // that are turned together
  const CodesKernels& kernels = active_kernels().codes;
  const int64_t pitch = pixels + kCodesSlack;
  int8_t* codes = thread_scratch<Planes>().of<int8_t>(kChannels * (pitch + pixels));
  if (!codes) return false;
  int32_t order[kChannels];
  for (int32_t i = 0; i < kChannels; ++i) order[i] = i;
  for (int64_t first = 0; first < c; first += kChannels) {
    const int64_t n = std::min(kChannels, c - first);
    for (int64_t i = 0; i < n; ++i)
      kernels.quantize(x + (first + i) * plane, pixels, s.scale, s.zero, s.top,
                       reinterpret_cast<uint8_t*>(codes + i * pitch));
    if (c == 3) {
      const int8_t *red = codes, *green = red + pitch, *blue = green + pitch;
      for (int64_t p = 0; p < pixels; ++p, y += 3) {
        y[0] = static_cast<uint8_t>(red[p]);
        y[1] = static_cast<uint8_t>(green[p]);
        y[2] = static_cast<uint8_t>(blue[p]);
      }
      return true;
    }
    int8_t* turned = n == c ? reinterpret_cast<int8_t*>(y) : codes + kChannels * pitch;
    transpose_bytes(codes, codes, pitch, order, n, pixels, turned);
    for (int64_t p = 0; p < pixels && n < c; ++p)
      std::memcpy(y + p * c + first, turned + p * n, static_cast<size_t>(n));
  }
  return true;
}

// Channels beside each other, to pixels of planes that lie `plane` floats apart. False: no memory.
bool dequantize_band(const uint8_t* x, int64_t plane, int64_t c, int64_t pixels, Steps s, float* y) {
  constexpr int64_t kPixels = 64;  // that are turned together
  const CodesKernels& kernels = active_kernels().codes;
  int8_t* codes = thread_scratch<Planes>().of<int8_t>(2 * kPixels * c + kCodesSlack);
  if (!codes) return false;
  int8_t* turned = codes + kPixels * c + kCodesSlack;  // bytes behind the last row are read
  int32_t order[kPixels];
  for (int32_t i = 0; i < kPixels; ++i) order[i] = i;
  for (int64_t first = 0; first < pixels; first += kPixels) {
    const int64_t n = std::min(kPixels, pixels - first);
    std::memcpy(codes, x + first * c, static_cast<size_t>(n * c));
    transpose_bytes(codes, codes, c, order, n, c, turned);
    for (int64_t i = 0; i < c; ++i)
      kernels.dequantize(reinterpret_cast<uint8_t*>(turned + i * n), n, s.scale, s.zero, y + i * plane + first);
  }
  return true;
}

// Pixels of a task.
int64_t pixels_of(int64_t c, int64_t pixels) { return std::min(pixels, std::max<int64_t>(64, kTask / c / 64 * 64)); }

}  // namespace
}  // namespace nf

NF_EXPORT const char* nf_codes_max_pool(const nf_threads* threads, const nf_codes_conv* conv, const uint8_t* x,
                                        uint8_t* y) {
  using namespace nf;
  if (const char* wrong = codes_check(conv, true)) return wrong;
  const nf_codes_conv& v = *conv;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = ((axis ? v.kw : v.kh) - 1) * v.dilation[axis] + 1;
    if (v.pad_begin[axis] >= reach || v.pad_end[axis] >= reach) return "codes: a window of padding alone";
    if (v.dilation[axis] != 1 && (v.pad_begin[axis] || v.pad_end[axis]))
      return "codes: padding of a pool with dilation";
  }
  if (v.outputs != v.c) return "codes: a pool has as many outputs as channels";
  if (v.batch == 0) return nullptr;
  if (!x || !y) return "codes: x or y is missing";
  const int64_t oh = (v.h + v.pad_begin[0] + v.pad_end[0] - (v.kh - 1) * v.dilation[0] - 1) / v.stride[0] + 1;
  const int64_t ow = (v.w + v.pad_begin[1] + v.pad_end[1] - (v.kw - 1) * v.dilation[1] - 1) / v.stride[1] + 1;
  const CodesKernels& kernels = active_kernels().codes;
  parallel(threads, v.batch * oh, [&](int64_t i) {
    const int64_t image = i / oh, row = i % oh;
    kernels.max_pool({&v, ow, x + image * v.h * v.w * v.c, y + image * oh * ow * v.c, row, row + 1});
  });
  return nullptr;
}

NF_EXPORT const char* nf_codes_quantize(const nf_threads* threads, const float* x, int64_t batch, int64_t c,
                                        int64_t pixels, float scale, int32_t zero, int32_t top, uint8_t* y) {
  using namespace nf;
  if (const char* wrong = check_sizes(batch, c, pixels)) return wrong;
  if (!(scale > 0) || !std::isfinite(scale)) return "codes: scale must be finite and above 0";
  if (!is_code(zero) || !is_code(top) || zero > top) return "codes: zero and top must be 0..255, zero not above top";
  if (batch && (!x || !y)) return "codes: x or y is missing";
  const int64_t step = pixels_of(c, pixels), tasks = ceil_div(pixels, step);
  std::atomic<bool> full{false};
  parallel(threads, batch * tasks, [&](int64_t i) {
    const int64_t image = i / tasks, first = i % tasks * step, count = std::min(step, pixels - first);
    full = full | !quantize_band(x + image * c * pixels + first, pixels, c, count, {scale, zero, top},
                                 y + (image * pixels + first) * c);
  });
  return full ? kNoMemory : nullptr;
}

NF_EXPORT const char* nf_codes_dequantize(const nf_threads* threads, const uint8_t* x, int64_t batch, int64_t c,
                                          int64_t pixels, float scale, int32_t zero, float* y) {
  using namespace nf;
  if (const char* wrong = check_sizes(batch, c, pixels)) return wrong;
  if (!is_code(zero)) return "codes: zero must be 0..255";
  if (batch && (!x || !y)) return "codes: x or y is missing";
  const int64_t step = pixels_of(c, pixels), tasks = ceil_div(pixels, step);
  std::atomic<bool> full{false};
  parallel(threads, batch * tasks, [&](int64_t i) {
    const int64_t image = i / tasks, first = i % tasks * step;
    full = full | !dequantize_band(x + (image * pixels + first) * c, pixels, c, std::min(step, pixels - first),
                                   {scale, zero, 255}, y + image * c * pixels + first);
  });
  return full ? kNoMemory : nullptr;
}

NF_EXPORT const char* nf_codes_add(const nf_threads* threads, const uint8_t* a, const uint8_t* b, int64_t count,
                                   float a_scale, float b_scale, float bias, int32_t low, int32_t high, uint8_t* y) {
  using namespace nf;
  if (count < 0) return "codes: count must be 0 or more";
  if (const char* wrong = check_bounds(bias, low, high)) return wrong;
  if (!(std::fabs(a_scale) <= 1e6f) || !(std::fabs(b_scale) <= 1e6f)) return "codes: scales must be within a million";
  if (count && (!a || !b || !y)) return "codes: a, b or y is missing";
  const CodesKernels& kernels = active_kernels().codes;
  parallel(threads, ceil_div(count, kTask), [&](int64_t i) {
    const int64_t first = i * kTask;
    kernels.add(a + first, b + first, std::min(kTask, count - first), a_scale, b_scale, bias, low, high, y + first);
  });
  return nullptr;
}

NF_EXPORT const char* nf_codes_mean(const nf_threads* threads, const uint8_t* x, int64_t batch, int64_t c,
                                    int64_t pixels, float scale, int32_t zero, float* y) {
  using namespace nf;
  if (const char* wrong = check_sizes(batch, c, pixels)) return wrong;
  if (pixels > INT32_MAX / 255) return "codes: too many pixels for a sum in 32 bits";
  if (!is_code(zero)) return "codes: zero must be 0..255";
  if (batch && (!x || !y)) return "codes: x or y is missing";
  const CodesKernels& kernels = active_kernels().codes;
  std::atomic<bool> full{false};
  parallel(threads, batch, [&](int64_t image) {
    float* to = y + image * c;
    int32_t* sums = thread_scratch<Factors>().of<int32_t>(c);
    if (!sums) {
      full = true;
      return;
    }
    std::memset(sums, 0, static_cast<size_t>(c) * 4);
    kernels.sums(x + image * c * pixels, c, pixels, sums);
    const float factor = scale / static_cast<float>(pixels);
    const int32_t shift = static_cast<int32_t>(pixels) * zero;
    for (int64_t i = 0; i < c; ++i) to[i] = static_cast<float>(sums[i] - shift) * factor;
  });
  return full ? kNoMemory : nullptr;
}

NF_EXPORT const char* nf_codes_gate(const nf_threads* threads, const uint8_t* x, const float* gate, int64_t batch,
                                    int64_t c, int64_t pixels, float scale, int32_t zero, float bias, int32_t low,
                                    int32_t high, uint8_t* y) {
  using namespace nf;
  if (const char* wrong = check_sizes(batch, c, pixels)) return wrong;
  if (const char* wrong = check_bounds(bias, low, high)) return wrong;
  if (!is_code(zero)) return "codes: zero must be 0..255";
  if (batch && (!x || !gate || !y)) return "codes: x, gate or y is missing";
  const int64_t step = pixels_of(c, pixels), tasks = ceil_div(pixels, step);
  float* factors = thread_scratch<Factors>().of<float>(batch * c + 1);
  if (!factors) return kNoMemory;
  for (int64_t i = 0; i < batch * c; ++i) factors[i] = gate[i] * scale;
  const CodesKernels& kernels = active_kernels().codes;
  parallel(threads, batch * tasks, [&](int64_t i) {
    const int64_t image = i / tasks, first = i % tasks * step;
    const int64_t at = (image * pixels + first) * c;
    kernels.gate(x + at, factors + image * c, c, std::min(step, pixels - first), zero, bias, low, high, y + at);
  });
  return nullptr;
}
