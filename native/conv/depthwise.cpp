// Depthwise convolution: each group has one input channel. Weights become floats that hold integers, then a plane at a
// time.
#include <atomic>

#include "conv/conv.h"
#include "isa/isa.h"
#include "linear/linear.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kBandFloats = 1 << 15;  // of a plane that a task holds: half the second-level cache of small machines

struct DepthwiseWeights;
struct DepthwisePlane;
struct DepthwiseImages;

// Code of a channel of a quad for an output, from the planes of 4, 2 and 1 bits.
inline int code_at(const nf_weight& w, int64_t quads, int64_t quad, int64_t channel, int64_t output) {
  const uint8_t* plane = w.packed + output / kPanel * quads * 8 * w.bits + output % kPanel * 4 + channel;
  if (w.bits == 8) return plane[quad * 64] - 128;
  int u = 0, low = 0;
  for (int level = 2; level >= 0; --level) {
    const int width = 1 << level, per = 3 - level;  // 2^per quads in a byte
    if (!(w.bits & width)) continue;
    u |= (plane[(quad >> per) * 64] >> ((quad & ((1 << per) - 1)) << level) & ((1 << width) - 1)) << low;
    plane += quads * 8 * width;
    low += width;
  }
  return u - (1 << (w.bits - 1));
}

// operand[output][tap] = C << (E - e)
void operands_of(const nf_weight& w, float* operand) {
  int64_t quads = 0;
  for (int32_t g = 0; g < w.groups; ++g) quads += ceil_div(w.sizes[g], 4);
  quads = round_up(quads, unit_of(w.bits));
  int64_t position = 0, start = 0;
  for (int32_t g = 0; g < w.groups; ++g) {
    const float factor = static_cast<float>(1 << (w.groups - 1 - g));
    for (int32_t i = 0; i < w.sizes[g]; ++i, ++position) {
      const int64_t tap = w.order ? w.order[position] : position;
      for (int64_t n = 0; n < w.n; ++n)
        operand[n * w.k + tap] = static_cast<float>(code_at(w, quads, start + i / 4, i % 4, n)) * factor;
    }
    start += ceil_div(w.sizes[g], 4);
  }
}

}  // namespace

bool conv_is_depthwise(const ConvCall& call) {
  const ConvShape& s = call.shape;
  if (s.channels != 1 || s.taps > kDepthwiseTaps) return false;
  for (int64_t g = 0; g < s.groups; ++g) {
    const nf_weight& w = call.weights[g];
    const int64_t most = (INT64_C(1) << (w.bits - 1 + w.groups - 1)) * ((1 << (call.activation_bits - 1)) - 1);
    if (most * s.taps >= INT64_C(1) << 24) return false;
  }
  return true;
}

const char* conv_depthwise(const ConvCall& call) {
  const ConvShape& s = call.shape;
  const int64_t each = s.outputs * s.taps, pitch = depthwise_pitch(s);
  float* weights = thread_scratch<DepthwiseWeights>().of<float>(s.groups * each);
  ConvImageCodes* images = thread_scratch<DepthwiseImages>().of<ConvImageCodes>(s.batch);
  if (!weights || !images) return kNoMemory;
  parallel(call.threads, ceil_div(s.groups, 64), [&](int64_t t) {
    for (int64_t g = t * 64; g < s.groups && g < (t + 1) * 64; ++g) operands_of(call.weights[g], weights + g * each);
  });
  conv_image_codes(call, 0, s.batch, images);

  const int64_t halo = (s.kh - 1) * s.dy + 1 - s.sy, fits = kBandFloats / (s.sx * pitch) - halo;
  const int64_t band = fits / s.sy < 4 ? 4 : fits / s.sy;  // output rows of a task
  const int64_t rows = band < s.oh ? band : s.oh, bands = ceil_div(s.oh, rows);
  // Whole planes that are small share a task.
  const int64_t planes = s.batch * s.c, together = bands > 1 ? 1 : 1 + 8192 / (s.oh * s.ow * s.outputs);
  std::atomic<bool> full{false};
  const ConvKernels& kernels = active_kernels().conv;
  parallel(call.threads, bands * ceil_div(planes, together), [&](int64_t task) {
    float* scratch = thread_scratch<DepthwisePlane>().of<float>(depthwise_scratch(s, rows));
    if (!scratch) {
      full = true;
      return;
    }
    const int64_t first = task % bands * rows, begin = task / bands * together;
    for (int64_t p = begin; p < planes && p < begin + together; ++p) {
      const int64_t image = p / s.c, g = p % s.c;
      const nf_weight& w = call.weights[g];
      kernels.depthwise({&s, call.x + p * s.h * s.w, images[image].codes, first,
                         first + rows < s.oh ? first + rows : s.oh, weights + g * each, w.scale, w.bias,
                         images[image].scale, call.epilogue, call.y + p * s.outputs * s.oh * s.ow, scratch});
    }
  });
  return full ? kNoMemory : nullptr;
}

}  // namespace nf
