#include "codes/plan.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "linear/linear.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kMost = INT64_C(1) << 40;
constexpr int64_t kFewChannels = 8;  // up to so many, a row of the kernel is read at once
constexpr int64_t kLines = 64;

bool fits(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size > kMost || (size > 0 && product > kMost / size)) return false;
    product *= size;
  }
  return true;
}

}  // namespace

const char* codes_check(const nf_codes_conv* v, bool image) {
  if (!v) return "codes: conv is missing";
  for (const int64_t n : {v->c, v->outputs, v->kh, v->kw, v->stride[0], v->stride[1], v->dilation[0], v->dilation[1],
                          v->groups, image ? v->h : 1, image ? v->w : 1})
    if (n < 1 || n > INT32_MAX)
      return "codes: sizes, strides, dilations and groups must be 1 or more (and fit 31 bits)";
  for (const int64_t n : {v->pad_begin[0], v->pad_begin[1], v->pad_end[0], v->pad_end[1]})
    if (n < 0 || n > INT32_MAX) return "codes: paddings must be 0 or more (and fit 31 bits)";
  if (v->c % v->groups || v->outputs % v->groups) return "codes: c and outputs must be multiples of groups";
  for (const int32_t n : {v->zero, v->low, v->high})
    if (n < 0 || n > 255) return "codes: zero, low and high must be 0..255";
  if (v->low > v->high) return "codes: low must not be above high";
  if (!std::isfinite(v->residual_scale)) return "codes: residual_scale must be finite";
  if (v->function < NF_CODES_NONE || v->function > NF_CODES_SILU)
    return "codes: function must be one of nf_codes_function";
  if (!(std::fabs(v->gain) <= 1e6f) || !(std::fabs(v->offset) <= 1e6f))
    return "codes: gain and offset must be within a million";
  if (!fits({v->kh, v->kw, v->c, v->outputs / v->groups + 64}) || v->kh > kMost / v->dilation[0] ||
      v->kw > kMost / v->dilation[1])
    return "codes: the kernel does not fit in memory";
  if (!image) return nullptr;
  if (v->batch < 0 || v->batch > INT32_MAX) return "codes: batch must be 0 or more (and fit 31 bits)";
  if (v->h + v->pad_begin[0] + v->pad_end[0] < (v->kh - 1) * v->dilation[0] + 1 ||
      v->w + v->pad_begin[1] + v->pad_end[1] < (v->kw - 1) * v->dilation[1] + 1)
    return "codes: the kernel is larger than the padded image";
  if (!fits({v->batch + 1, v->h + v->pad_begin[0] + v->pad_end[0], v->w + v->pad_begin[1] + v->pad_end[1],
             v->c + v->outputs + 64}))
    return "codes: the padded image does not fit in memory";
  return nullptr;
}

const char* CodesPlan::of(const nf_codes_conv& v) {
  channels = v.c / v.groups;
  outputs = v.outputs / v.groups;
  pitch = v.c;
  const bool bordered = v.pad_begin[0] || v.pad_begin[1] || v.pad_end[0] || v.pad_end[1];
  const bool whole = v.c % 4 == 0 && channels % 4 == 0;
  int64_t bytes;  // of weights
  if (channels == 1 && outputs == 1 && v.groups > 1) {
    way = kDepthwise;
    taps = ceil_div(v.kh, 4);
    quads = v.kw;
    panels = ceil_div(v.c, kCodesBlock);
    lanes = round_up(v.c, kCodesBlock);
    bytes = panels * taps * quads * kCodesBlock * 4;
  } else {
    taps = v.kh * v.kw;
    quads = ceil_div(channels, 4);
    if (v.groups == 1 && v.kw > 1 && v.dilation[1] == 1 && v.c <= kFewChannels) {
      way = kRows;
      taps = v.kh;
      quads = ceil_div(v.kw * v.c, 4);
    } else if (taps == 1 && !bordered && whole) {
      way = kDirect;
    } else {
      way = kPixels;
      pitch = round_up(v.c, 4);
    }
    panels = ceil_div(outputs, kCodesPanel);
    lanes = v.groups * panels * kCodesPanel;
    bytes = lanes * taps * quads * 4;
  }
  oh = (v.h + v.pad_begin[0] + v.pad_end[0] - (v.kh - 1) * v.dilation[0] - 1) / v.stride[0] + 1;
  ow = (v.w + v.pad_begin[1] + v.pad_end[1] - (v.kw - 1) * v.dilation[1] - 1) / v.stride[1] + 1;
  at_start = 0;
  at_scale = at_start + lanes * 4;
  at_bias = at_scale + lanes * 4;
  at_narrow = at_bias + lanes * 4;
  at_spans = at_narrow + round_up(lanes / kCodesPanel, kLines);
  at_weights = at_spans + (way == kDepthwise ? 0 : round_up(lanes / kCodesPanel * taps * quads, kLines));
  at_natural = at_weights + bytes;
  size = at_natural;
  // A depthwise convolution of any shape takes the plain loops, which read the weights and the rest as they lie.
  if (way == kDepthwise) size += lanes * 12 + v.kh * v.kw * v.c;
  return nullptr;
}

namespace {

// Do products of pairs of a quad of every output stay in 16 bits, whatever the codes are?
bool is_narrow(const int8_t* w, int64_t pairs) {
  bool narrow = true;
  for (int64_t i = 0; i < pairs; ++i, w += 2) {
    const int up = (w[0] > 0 ? w[0] : 0) + (w[1] > 0 ? w[1] : 0), down = (w[0] < 0 ? w[0] : 0) + (w[1] < 0 ? w[1] : 0);
    narrow = narrow && up <= 128 && down >= -128;
  }
  return narrow;
}

// How many quads of a panel, up to `most`, add up in 16 bits: of the weights of each output at an even and at an odd
// pair of bytes, what is positive is 128 at most, and what is negative.
int64_t span_of(const int8_t* w, int64_t most) {
  int up[kCodesPanel * 2] = {0}, down[kCodesPanel * 2] = {0};
  int64_t length = 0;
  for (; length < most && length < 255; ++length) {
    bool inside = true;
    for (int64_t i = 0; i < kCodesPanel * 4; ++i, ++w) {
      int& sum = *w > 0 ? up[i / 2] : down[i / 2];
      sum += *w > 0 ? *w : -*w;
      inside = inside && sum <= 128;
    }
    if (!inside) break;
  }
  return length;
}

struct Packing {
  const nf_codes_conv& v;
  const CodesPlan& p;
  const int8_t* from;
  uint8_t* to;

  // The weight of an output at a tap of the plan and a byte of its quads; 0 where the padding of a quad is.
  int8_t weight(int64_t output, int64_t tap, int64_t byte) const {
    const int8_t* w = from + output * v.kh * v.kw * p.channels;
    if (p.way == CodesPlan::kRows) return byte < v.kw * v.c ? w[tap * v.kw * v.c + byte] : 0;
    return byte < p.channels ? w[tap * p.channels + byte] : 0;
  }

  void panel(int64_t index) const {
    const int64_t group = index / p.panels, first = index % p.panels * kCodesPanel;
    int8_t* out = reinterpret_cast<int8_t*>(to + p.at_weights) + index * p.taps * p.quads * 64;
    bool wide = false;
    for (int64_t tap = 0; tap < p.taps; ++tap)
      for (int64_t q = 0; q < p.quads; ++q)
        for (int64_t o = first; o < first + kCodesPanel; ++o)
          for (int64_t j = 0; j < 4; ++j) *out++ = o < p.outputs ? weight(group * p.outputs + o, tap, q * 4 + j) : 0;
    const int8_t* w = out - p.taps * p.quads * 64;
    uint8_t* spans = to + p.at_spans + index * p.taps * p.quads;
    int64_t count = 0;
    for (int64_t tap = 0; tap < p.taps; ++tap)
      for (int64_t q = 0; q < p.quads; ++count) {
        const int64_t length = span_of(w + (tap * p.quads + q) * 64, p.quads - q);
        spans[count] = static_cast<uint8_t>(length);
        q += length ? length : 1;
        wide = wide || !length;
      }
    to[p.at_narrow + index] = wide ? kCodesWide : 2 * count <= p.taps * p.quads ? kCodesSpans : kCodesPairs;
  }

  void block(int64_t index) const {
    int8_t* out = reinterpret_cast<int8_t*>(to + p.at_weights) + index * p.taps * p.quads * kCodesBlock * 4;
    bool narrow = true;
    for (int64_t g = 0; g < p.taps; ++g)
      for (int64_t kx = 0; kx < v.kw; ++kx)
        for (int64_t i = 0; i < kCodesBlock; ++i) {
          const int64_t c = index * kCodesBlock + codes_lane(i);
          int8_t column[4] = {0, 0, 0, 0};
          for (int64_t r = 0; r < 4 && g * 4 + r < v.kh && c < v.c; ++r)
            column[r] = from[(c * v.kh + g * 4 + r) * v.kw + kx];
          std::memcpy(out, column, 4);
          out += 4;
          narrow = narrow && is_narrow(column, 2);
        }
    to[p.at_narrow + index] = narrow;
  }
};

template <class T>
T* at(uint8_t* packed, int64_t offset) {
  return reinterpret_cast<T*>(packed + offset);
}

}  // namespace
}  // namespace nf

NF_EXPORT int64_t nf_codes_bytes(const nf_codes_conv* conv) {
  if (nf::codes_check(conv, false)) return -1;
  nf::CodesPlan plan;
  plan.of(*conv);
  return plan.size;
}

NF_EXPORT const char* nf_codes_pack(const nf_threads* threads, const nf_codes_conv* conv, const int8_t* weights,
                                    const float* scale, const float* bias, uint8_t* packed) {
  using namespace nf;
  if (const char* wrong = codes_check(conv, false)) return wrong;
  if (!weights || !scale || !bias || !packed) return "codes: weights, scale, bias or packed is missing";
  const nf_codes_conv& v = *conv;
  CodesPlan p;
  p.of(v);
  const int64_t k = v.kh * v.kw * p.channels;
  std::memset(packed, 0, static_cast<size_t>(p.size));
  bool outside = false;
  const bool depthwise = p.way == CodesPlan::kDepthwise;
  float* const factors = reinterpret_cast<float*>(packed + p.at_natural);
  for (int64_t o = 0; o < v.outputs; ++o) {
    int64_t sum = 0, size = 0;
    for (int64_t i = 0; i < k; ++i) {
      sum += weights[o * k + i];
      size += weights[o * k + i] < 0 ? -weights[o * k + i] : weights[o * k + i];
    }
    // The vectors convert floats to 32 bits without asking, so that none may be beyond.
    const double most = 255.0 * static_cast<double>(size) * std::fabs(static_cast<double>(scale[o])) +
                        std::fabs(static_cast<double>(bias[o])) +
                        255.0 * std::fabs(static_cast<double>(v.residual_scale));
    outside =
        outside || !(most * (v.function ? std::fabs(static_cast<double>(v.gain)) : 1) < 1e9) || size * 255 >= INT32_MAX;
    const int32_t start = static_cast<int32_t>(-sum * v.zero);
    int64_t lane = o / p.outputs * p.panels * kCodesPanel + o % p.outputs;
    if (depthwise) {
      lane = o / kCodesBlock * kCodesBlock;
      for (int64_t i = 0; i < kCodesBlock; ++i)
        if (codes_lane(i) == o % kCodesBlock) lane += i;
      std::memcpy(factors + o, &start, 4);
      std::memcpy(factors + p.lanes + o, scale + o, 4);
      std::memcpy(factors + 2 * p.lanes + o, bias + o, 4);
      for (int64_t t = 0; t < k; ++t)
        packed[p.at_natural + p.lanes * 12 + t * v.c + o] = static_cast<uint8_t>(weights[o * k + t]);
    }
    std::memcpy(packed + p.at_start + 4 * lane, &start, 4);
    std::memcpy(packed + p.at_scale + 4 * lane, scale + o, 4);
    std::memcpy(packed + p.at_bias + 4 * lane, bias + o, 4);
  }
  if (outside) return "codes: scale, bias and residual_scale must be finite, and no sum beyond a billion codes";
  const Packing packing{v, p, weights, packed};
  if (depthwise) parallel(threads, p.panels, [&](int64_t i) { packing.block(i); });
  else parallel(threads, v.groups * p.panels, [&](int64_t i) { packing.panel(i); });
  return nullptr;
}
