// Codes in plain loops over channels, which compilers make vectors of; and the steps that every set takes alike.
// Included after simd.h. Floats are rounded after every product and sum: that is what the definition in PyTorch does.
#pragma once
#include "codes/codes.h"

namespace nf::NF_ARCH {
namespace {

// v is within 32 bits: nf_codes_pack and the checks of the other functions see to it.
inline uint8_t code_of(float v, int32_t low, int32_t high) {
  const int32_t c = static_cast<int32_t>(std::lrintf(v));
  return static_cast<uint8_t>(c < low ? low : c > high ? high : c);
}

inline void finish_codes(const CodesTile& t, const int32_t* acc, int64_t output, int64_t count, int64_t pixel) {
  uint8_t* y = t.y + pixel * t.stride + output;
  const float *scale = t.scale + output, *bias = t.bias + output;
  const uint8_t* r = t.residual ? t.residual + pixel * t.stride + output : nullptr;
  for (int64_t o = 0; o < count; ++o) {
    float v = static_cast<float>(acc[o]) * scale[o] + bias[o];
    if (r) v = v + static_cast<float>(r[o]) * t.residual_scale;
    y[o] = code_of(v, t.low, t.high);
  }
  if (t.table)
    for (int64_t o = 0; o < count; ++o) y[o] = t.table[y[o]];
}

inline void tile_codes(const CodesTile& t) {
  for (int64_t panel = 0; panel < t.panels; ++panel) {
    const int64_t output = panel * kCodesPanel;
    const int64_t count = t.outputs - output < kCodesPanel ? t.outputs - output : kCodesPanel;
    const int8_t* w0 = t.weights + panel * t.tap_count * t.quads * 64;
    for (int64_t i = 0; i < t.count; ++i) {
      int32_t acc[kCodesPanel];
      std::memcpy(acc, t.start + output, sizeof acc);
      const int8_t* w = w0;
      for (int64_t tap = 0; tap < t.tap_count; ++tap) {
        const uint8_t* a = t.pixels[i] + t.taps[tap];
        for (int64_t q = 0; q < t.quads; ++q, w += 64, a += 4)
          for (int64_t o = 0; o < kCodesPanel; ++o) {
            int32_t s = 0;
            for (int64_t j = 0; j < 4; ++j) s += a[j] * w[o * 4 + j];
            acc[o] += s;
          }
      }
      finish_codes(t, acc, output, count, i);
    }
  }
}

inline void depthwise_codes(const CodesDepthwise& d) {
  const nf_codes_conv& v = *d.conv;
  for (int64_t oy = d.first; oy < d.last; ++oy)
    for (int64_t ox = 0; ox < d.ow; ++ox)
      for (int64_t c0 = 0; c0 < v.c; c0 += kCodesBlock) {
        const int64_t n = v.c - c0 < kCodesBlock ? v.c - c0 : kCodesBlock;
        int32_t acc[kCodesBlock];
        std::memcpy(acc, d.start + c0, static_cast<size_t>(n) * sizeof *acc);
        for (int64_t ky = 0; ky < v.kh; ++ky)
          for (int64_t kx = 0; kx < v.kw; ++kx) {
            const int64_t iy = oy * v.stride[0] + ky * v.dilation[0] - v.pad_begin[0];
            const int64_t ix = ox * v.stride[1] + kx * v.dilation[1] - v.pad_begin[1];
            const bool inside = iy >= 0 && iy < v.h && ix >= 0 && ix < v.w;
            const uint8_t* a = inside ? d.x + (iy * v.w + ix) * v.c + c0 : d.border;
            const int8_t* w = d.weights + (ky * v.kw + kx) * v.c + c0;
            for (int64_t c = 0; c < n; ++c) acc[c] += a[c] * w[c];
          }
        uint8_t* y = d.y + (oy * d.ow + ox) * v.c + c0;
        for (int64_t c = 0; c < n; ++c)
          y[c] = code_of(static_cast<float>(acc[c]) * d.scale[c0 + c] + d.bias[c0 + c], v.low, v.high);
        if (d.table)
          for (int64_t c = 0; c < n; ++c) y[c] = d.table[y[c]];
      }
}

inline void max_pool_codes(const CodesPool& p) {
  const nf_codes_conv& v = *p.conv;
  for (int64_t oy = p.first; oy < p.last; ++oy)
    for (int64_t ox = 0; ox < p.ow; ++ox) {
      uint8_t* y = p.y + (oy * p.ow + ox) * v.c;
      bool first = true;
      for (int64_t ky = 0; ky < v.kh; ++ky)
        for (int64_t kx = 0; kx < v.kw; ++kx) {
          const int64_t iy = oy * v.stride[0] + ky * v.dilation[0] - v.pad_begin[0];
          const int64_t ix = ox * v.stride[1] + kx * v.dilation[1] - v.pad_begin[1];
          if (iy < 0 || iy >= v.h || ix < 0 || ix >= v.w) continue;
          const uint8_t* a = p.x + (iy * v.w + ix) * v.c;
          if (first) std::memcpy(y, a, static_cast<size_t>(v.c));
          else
            for (int64_t c = 0; c < v.c; ++c) y[c] = a[c] > y[c] ? a[c] : y[c];
          first = false;
        }
    }
}

inline void quantize_codes(const float* x, int64_t plane, int64_t c, int64_t pixels, float scale, int32_t zero,
                           int32_t top, uint8_t* y) {
  const float low = static_cast<float>(-zero), high = static_cast<float>(top - zero);
  constexpr int64_t kStep = 64;
  uint8_t codes[kStep];
  for (int64_t i = 0; i < c; ++i)
    for (int64_t p0 = 0; p0 < pixels; p0 += kStep) {
      const int64_t n = pixels - p0 < kStep ? pixels - p0 : kStep;
      const float* from = x + i * plane + p0;
      for (int64_t p = 0; p < n; ++p) {
        float v = from[p] / scale;
        v = v == v ? v : 0.f;
        v = v < low ? low : v > high ? high : v;
        codes[p] = static_cast<uint8_t>(static_cast<int32_t>(std::lrintf(v)) + zero);
      }
      for (int64_t p = 0; p < n; ++p) y[(p0 + p) * c + i] = codes[p];
    }
}

inline void dequantize_codes(const uint8_t* x, int64_t c, int64_t pixels, float scale, int32_t zero, float* y,
                             int64_t plane) {
  constexpr int64_t kStep = 16;  // pixels: a line of each plane
  for (int64_t p0 = 0; p0 < pixels; p0 += kStep) {
    const int64_t n = pixels - p0 < kStep ? pixels - p0 : kStep;
    for (int64_t i = 0; i < c; ++i)
      for (int64_t p = 0; p < n; ++p) y[i * plane + p0 + p] = static_cast<float>(x[(p0 + p) * c + i] - zero) * scale;
  }
}

inline void add_codes(const uint8_t* a, const uint8_t* b, int64_t count, float a_scale, float b_scale, float bias,
                      int32_t low, int32_t high, uint8_t* y) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = code_of(static_cast<float>(a[i]) * a_scale + static_cast<float>(b[i]) * b_scale + bias, low, high);
}

inline void sum_codes(const uint8_t* x, int64_t c, int64_t pixels, int32_t* sums) {
  for (int64_t p = 0; p < pixels; ++p, x += c)
    for (int64_t i = 0; i < c; ++i) sums[i] += x[i];
}

inline void gate_codes(const uint8_t* x, const float* factor, int64_t c, int64_t pixels, int32_t zero, float bias,
                       int32_t low, int32_t high, uint8_t* y) {
  for (int64_t p = 0; p < pixels; ++p, x += c, y += c)
    for (int64_t i = 0; i < c; ++i) {
      const float v = static_cast<float>(x[i] - zero) * factor[i] + bias;
      // a gate comes from the model when it runs: what is no number, or too large, must not leave 32 bits
      const float bounded = v < 1e6f ? v > -1e6f ? v : -1e6f : 1e6f;
      y[i] = code_of(bounded, low, high);
    }
}

}  // namespace
}  // namespace nf::NF_ARCH
