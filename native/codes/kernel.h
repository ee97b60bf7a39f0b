// Codes in plain loops over channels, which compilers make vectors of; and the steps that every set takes alike.
// Included after simd.h. Floats are rounded after every product and sum: that is what the definition in PyTorch does.
#pragma once
#include "codes/codes.h"
#include "codes/vectors.h"

namespace nf::NF_ARCH {
namespace {

// v is within 32 bits: nf_codes_pack and the checks of the other functions see to it.
inline uint8_t code_of(float v, int32_t low, int32_t high) {
  const int32_t c = static_cast<int32_t>(std::lrintf(v));
  return static_cast<uint8_t>(c < low ? low : c > high ? high : c);
}

// Codes of up to kCodesBlock values, of which there is memory for whole vectors.
inline void codes_of(float* v, int64_t count, const Behind& behind, int32_t low, int32_t high, const uint8_t* table,
                     uint8_t* y) {
  if (behind.function)
    for (int64_t i = 0; i < count; i += F32::N) behind(F32::load(v + i)).store(v + i);
  for (int64_t i = 0; i < count; ++i) y[i] = code_of(v[i], low, high);
  if (table)
    for (int64_t i = 0; i < count; ++i) y[i] = table[y[i]];
}

inline void finish_codes(const CodesTile& t, const Behind& behind, const int32_t* acc, int64_t output, int64_t count,
                         int64_t pixel) {
  const float *scale = t.scale + output, *bias = t.bias + output;
  const uint8_t* r = t.residual ? t.residual + pixel * t.stride + output : nullptr;
  float v[kCodesPanel] = {};
  for (int64_t o = 0; o < count; ++o) {
    v[o] = static_cast<float>(acc[o]) * scale[o] + bias[o];
    if (r) v[o] = v[o] + static_cast<float>(r[o]) * t.residual_scale;
  }
  codes_of(v, count, behind, t.low, t.high, t.table, t.y + pixel * t.stride + output);
}

inline void tile_codes(const CodesTile& t) {
  const Behind behind(t.function, t.gain, t.offset);
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
      finish_codes(t, behind, acc, output, count, i);
    }
  }
}

inline void depthwise_codes(const CodesDepthwise& d) {
  const nf_codes_conv& v = *d.conv;
  const Behind behind(v.function, v.gain, v.offset);
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
        float f[kCodesBlock] = {};
        for (int64_t c = 0; c < n; ++c) f[c] = static_cast<float>(acc[c]) * d.scale[c0 + c] + d.bias[c0 + c];
        codes_of(f, n, behind, v.low, v.high, d.table, d.y + (oy * d.ow + ox) * v.c + c0);
      }
}

// Locals, because a byte that is written may be anything that is read through a pointer.
inline void largest(const uint8_t* __restrict a, int64_t c, bool first, uint8_t* __restrict y) {
  if (first) std::memcpy(y, a, static_cast<size_t>(c));
  else
    for (int64_t i = 0; i < c; ++i) y[i] = a[i] > y[i] ? a[i] : y[i];
}

inline void max_pool_codes(const CodesPool& p) {
  const nf_codes_conv v = *p.conv;
  for (int64_t oy = p.first; oy < p.last; ++oy)
    for (int64_t ox = 0; ox < p.ow; ++ox) {
      uint8_t* y = p.y + (oy * p.ow + ox) * v.c;
      bool first = true;
      for (int64_t ky = 0; ky < v.kh; ++ky)
        for (int64_t kx = 0; kx < v.kw; ++kx) {
          const int64_t iy = oy * v.stride[0] + ky * v.dilation[0] - v.pad_begin[0];
          const int64_t ix = ox * v.stride[1] + kx * v.dilation[1] - v.pad_begin[1];
          if (iy < 0 || iy >= v.h || ix < 0 || ix >= v.w) continue;
          largest(p.x + (iy * v.w + ix) * v.c, v.c, first, y);
          first = false;
        }
    }
}

inline void quantize_codes(const float* x, int64_t count, float scale, int32_t zero, int32_t top, uint8_t* y) {
  constexpr int N = F32::N;
  const F32 by = F32::set(scale), nothing = F32::set(0.f), offset = F32::set(static_cast<float>(zero));
  const F32 low = F32::set(static_cast<float>(-zero)), high = F32::set(static_cast<float>(top - zero));
  for (int64_t i = 0; i < count; i += N) {
    const F32 v = (count - i < N ? F32::load(x + i, count - i) : F32::load(x + i)) / by;
    save_codes(y + i, round(max(low, min(select(ordered(v), v, nothing), high))) + offset);
  }
}

inline void dequantize_codes(const uint8_t* x, int64_t count, float scale, int32_t zero, float* y) {
  const F32 by = F32::set(scale), nothing = F32::set(static_cast<float>(zero));
  int64_t i = 0;
  for (; i + F32::N <= count; i += F32::N) ((load_codes(x + i) - nothing) * by).store(y + i);
  for (; i < count; ++i) y[i] = static_cast<float>(x[i] - zero) * scale;
}

inline void add_codes(const uint8_t* a, const uint8_t* b, int64_t count, float a_scale, float b_scale, float bias,
                      int32_t low, int32_t high, uint8_t* y) {
  if (count < F32::N) {  // vectors would read beyond
    for (int64_t i = 0; i < count; ++i)
      y[i] = code_of(static_cast<float>(a[i]) * a_scale + static_cast<float>(b[i]) * b_scale + bias, low, high);
    return;
  }
  const F32 by = F32::set(a_scale), too = F32::set(b_scale), offset = F32::set(bias);
  each_code(count, low, high, y,
            [&](int64_t i) NF_INLINE { return load_codes(a + i) * by + load_codes(b + i) * too + offset; });
}

inline void sum_codes(const uint8_t* x, int64_t c, int64_t pixels, int32_t* sums) {
  for (int64_t p = 0; p < pixels; ++p, x += c)
    for (int64_t i = 0; i < c; ++i) sums[i] += x[i];
}

// A gate comes from the model when it runs: each_code bounds what is no number, or too large, before it is rounded.
inline void gate_codes(const uint8_t* x, const float* factor, int64_t c, int64_t pixels, int32_t zero, float bias,
                       int32_t low, int32_t high, uint8_t* y) {
  const F32 offset = F32::set(bias), nothing = F32::set(static_cast<float>(zero));
  for (int64_t p = 0; p < pixels; ++p, x += c, y += c) {
    if (c >= F32::N) {
      each_code(c, low, high, y,
                [&](int64_t i) NF_INLINE { return (load_codes(x + i) - nothing) * F32::load(factor + i) + offset; });
      continue;
    }
    for (int64_t i = 0; i < c; ++i) {
      const float v = static_cast<float>(x[i] - zero) * factor[i] + bias;
      y[i] = code_of(v < 1e6f ? v > -1e6f ? v : -1e6f : 1e6f, low, high);
    }
  }
}

}  // namespace
}  // namespace nf::NF_ARCH
