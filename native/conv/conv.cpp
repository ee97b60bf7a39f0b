// nf_conv2d: arguments, the scale of each image, and the choice between depthwise sums and products.
#include "conv/conv.h"

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "isa/isa.h"
#include "linear/panel.h"
#include "parallel.h"

namespace nf {

void conv_image_codes(const ConvCall& call, int64_t first, int64_t count, ConvImageCodes* out) {
  const float limit = static_cast<float>((1 << (call.activation_bits - 1)) - 1);
  if (call.static_scale > 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = {{call.static_scale, limit, true}, call.static_scale};
    return;
  }
  constexpr int64_t kTask = 1 << 15;
  const ConvKernels& kernels = active_kernels().conv;
  const int64_t size = call.shape.c * call.shape.h * call.shape.w, tasks = ceil_div(size, kTask);
  for (int64_t i = 0; i < count; ++i) {
    const float* x = call.x + (first + i) * size;
    std::atomic<int32_t> top{0};
    parallel(call.threads, tasks, [&](int64_t t) {
      const int64_t begin = t * kTask;
      const int32_t found = kernels.highest(x + begin, size - begin < kTask ? size - begin : kTask);
      int32_t known = top.load(std::memory_order_relaxed);
      while (found > known && !top.compare_exchange_weak(known, found)) {
      }
    });
    // As nf_quantize_rows does for a row.
    const int32_t bits = top.load();
    float largest;
    std::memcpy(&largest, &bits, 4);
    if (bits >= 0x7f800000) out[i] = {{0, limit, false}, std::numeric_limits<float>::quiet_NaN()};
    else if (bits == 0) out[i] = {{0, limit, false}, 1};
    else out[i] = {{limit / largest, limit, false}, largest / limit};
  }
}

namespace {

constexpr int64_t kMost = INT64_C(1) << 40;  // of any number of elements: products of two sizes stay far from overflow

bool product_fits(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size > kMost || (size > 0 && product > kMost / size)) return false;
    product *= size;
  }
  return true;
}

const char* check_weights(const nf_weight* weights, const ConvShape& s) {
  for (int64_t g = 0; g < s.groups; ++g) {
    if (weights[g].k != s.taps * s.channels) return "conv2d: k of a weight must be kh * kw * c / conv_groups";
    if (weights[g].n != weights[0].n) return "conv2d: the weights of all groups must have the same n";
    if (const char* wrong = check_weight(&weights[g])) return wrong;
    if (weights[g].multipliers) return "nf_conv2d: a convolution takes no multipliers";
  }
  return nullptr;
}

const char* shape_of(const nf_conv& c, ConvShape* s) {
  for (const int64_t size :
       {c.c, c.h, c.w, c.kh, c.kw, c.stride[0], c.stride[1], c.dilation[0], c.dilation[1], c.conv_groups})
    if (size < 1 || size > INT32_MAX)
      return "conv2d: sizes, strides, dilations and groups must be 1 or more (and fit 31 bits)";
  for (const int64_t pad : {c.pad_begin[0], c.pad_begin[1], c.pad_end[0], c.pad_end[1]})
    if (pad < 0 || pad > INT32_MAX) return "conv2d: paddings must be 0 or more (and fit 31 bits)";
  if (c.batch < 0 || c.batch > INT32_MAX) return "conv2d: batch must be 0 or more (and fit 31 bits)";
  if (c.c % c.conv_groups != 0) return "conv2d: c must be a multiple of conv_groups";
  *s = {c.batch,
        c.c,
        c.h,
        c.w,
        c.kh,
        c.kw,
        c.stride[0],
        c.stride[1],
        c.dilation[0],
        c.dilation[1],
        c.pad_begin[0],
        c.pad_begin[1],
        c.conv_groups,
        c.c / c.conv_groups,
        0,
        0,
        0,
        0,
        0,
        0};
  if (!product_fits({c.kh, c.kw, s->channels}) || c.kh > kMost / c.dilation[0] || c.kw > kMost / c.dilation[1])
    return "conv2d: the kernel does not fit in memory";
  s->taps = c.kh * c.kw;
  const int64_t rows = c.h + c.pad_begin[0] + c.pad_end[0] - (c.kh - 1) * c.dilation[0] - 1;
  const int64_t columns = c.w + c.pad_begin[1] + c.pad_end[1] - (c.kw - 1) * c.dilation[1] - 1;
  if (rows < 0 || columns < 0) return "conv2d: the kernel is larger than the padded image";
  s->oh = rows / s->sy + 1;
  s->ow = columns / s->sx + 1;
  s->hp = (s->oh - 1) * s->sy + (s->kh - 1) * s->dy + 1;
  s->wp = (s->ow - 1) * s->sx + (s->kw - 1) * s->dx + 1;
  if (!product_fits({s->hp, s->wp, s->c}) || !product_fits({c.batch, c.c, c.h, c.w}))
    return "conv2d: the padded image does not fit in memory";
  return nullptr;
}

}  // namespace
}  // namespace nf

NF_EXPORT const char* nf_conv2d(const nf_threads* threads, const nf_conv* conv, const nf_weight* weights,
                                const float* x, int32_t activation_bits, float static_scale, int32_t epilogue,
                                float* y) {
  using namespace nf;
  if (!conv || !weights) return "conv2d: conv or weights is missing";
  if (activation_bits < 2 || activation_bits > 8) return "conv2d: activation_bits must be 2..8";
  if (epilogue < NF_NONE || epilogue > NF_SILU) return "conv2d: epilogue must be one of nf_epilogue";
  if (!(static_scale <= 3e38f)) return "conv2d: static_scale must be finite (0 or less: one scale an image)";
  ConvCall call = {threads, {}, weights, x, activation_bits, static_scale, epilogue, y};
  if (const char* wrong = shape_of(*conv, &call.shape)) return wrong;
  if (const char* wrong = check_weights(weights, call.shape)) return wrong;
  call.shape.outputs = weights[0].n;
  if (!product_fits({conv->batch, call.shape.groups, call.shape.outputs}) ||
      !product_fits({conv->batch * call.shape.groups * call.shape.outputs, call.shape.oh, call.shape.ow}))
    return "conv2d: y does not fit in memory";
  if (conv->batch == 0) return nullptr;
  if (!x || !y) return "conv2d: x or y is missing";
  return conv_is_depthwise(call) ? conv_depthwise(call) : conv_products(call);
}
