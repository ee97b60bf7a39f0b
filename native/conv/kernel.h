// Codes of an image, and the depthwise convolution. Included after simd.h.
//
// The depthwise sums are taken in float32: codes and weights are integers, and no partial sum reaches 2^24, so that
// every one is exact (conv_is_depthwise sees to it). Vectors run along a row of output pixels, whatever the layout of
// channels is.
#pragma once
#include "conv/conv.h"
#include "linear/finish.h"
#include "simd/partial.h"
#include "simd/quantize.h"

namespace nf::NF_ARCH {
namespace {

inline void image_codes(const float* x, int64_t count, ConvCodes codes, int8_t* q) {
  const float limit = codes.limit;
  if (codes.factor == 0) {
    std::memset(q, 0, static_cast<size_t>(count));
  } else if (codes.divide) {
    int bits = 2;
    while (static_cast<float>((1 << (bits - 1)) - 1) < limit) ++bits;
    quantize_static(x, count, codes.factor, bits, q);
  } else {
    codes_within(x, count, codes.factor, limit, q);
  }
}

// The codes of a row of pixels as floats.
inline void float_codes(const float* x, int64_t count, ConvCodes codes, float* q) {
  constexpr int N = F32::N;
  const F32 f = F32::set(codes.factor), one = F32::set(1), limit = F32::set(codes.limit);
  int64_t i = 0;
  if (codes.divide || !(codes.factor <= std::numeric_limits<float>::max())) {
    for (; i < count; i += N) {
      const int64_t n = count - i < N ? count - i : N;
      const F32 v = load(x + i, n);
      store(q + i, to_float(codes.divide ? to_code(v / f, one, limit) : to_code(v, f, limit)), n);
    }
    return;
  }
  for (; i + N <= count; i += N) round(F32::load(x + i) * f).store(q + i);  // as codes_within
  if (i < count) round(F32::load(x + i, count - i) * f).store(q + i, count - i);
}

// Rows y0.. of the padded plane, each cut into the phases of the stride: column X lies in phase X mod sx at X / sx.
inline void fill_plane(const Depthwise& d, int64_t y0, int64_t rows, int64_t pitch, float* plane, float* row) {
  const ConvShape& s = *d.shape;
  std::memset(plane, 0, static_cast<size_t>(rows * s.sx * pitch) * sizeof(float));
  if (d.codes.factor == 0) return;
  const int64_t columns = s.wp - s.pad_left < s.w ? s.wp - s.pad_left : s.w;
  if (columns <= 0) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = y0 + r - s.pad_top;
    if (y < 0 || y >= s.h) continue;
    float* to = plane + r * s.sx * pitch;
    if (s.sx == 1) {
      float_codes(d.x + y * s.w, columns, d.codes, to + s.pad_left);
      continue;
    }
    float_codes(d.x + y * s.w, columns, d.codes, row);
    for (int64_t phase = 0; phase < s.sx && phase < columns; ++phase) {
      const int64_t column = s.pad_left + phase;
      float* dst = to + column % s.sx * pitch + column / s.sx;
      for (int64_t i = phase; i < columns; i += s.sx) *dst++ = row[i];
    }
  }
}

struct Place {
  const float* from;
  float* to;
  int64_t n;
};

// Up to 4 vectors of output pixels at once, which hides the latency of the sums.
template <int E>
inline void depthwise_places(const Place* places, int count, const float* w, const int64_t* offsets, int64_t taps,
                             F32 scale, F32 bias, bool add) {
  const float *p0 = places[0].from, *p1 = places[1].from, *p2 = places[2].from, *p3 = places[3].from;
  F32 a[4];
  for (F32& v : a) v = F32::set(0);
  for (int64_t t = 0; t < taps; ++t) {
    const F32 k = F32::set(w[t]);
    const int64_t at = offsets[t];
    a[0] = fused(F32::load(p0 + at), k, a[0]);
    a[1] = fused(F32::load(p1 + at), k, a[1]);
    a[2] = fused(F32::load(p2 + at), k, a[2]);
    a[3] = fused(F32::load(p3 + at), k, a[3]);
  }
  for (int j = 0; j < count; ++j) {
    F32 v = a[j] * scale;
    if (add) v = v + bias;
    store(places[j].to, activate<E>(v), places[j].n);
  }
}

template <int E>
inline void depthwise_as(const Depthwise& d) {
  constexpr int N = F32::N;
  const ConvShape& s = *d.shape;
  const int64_t pitch = depthwise_pitch(s), y0 = d.first * s.sy;
  const int64_t rows = (d.last - d.first - 1) * s.sy + (s.kh - 1) * s.dy + 1;
  float* plane = d.scratch;
  fill_plane(d, y0, rows, pitch, plane, plane + rows * s.sx * pitch);
  int64_t offsets[kDepthwiseTaps];
  for (int64_t t = 0; t < s.taps; ++t) {
    const int64_t x = t % s.kw * s.dx;
    offsets[t] = (t / s.kw * s.dy * s.sx + x % s.sx) * pitch + x / s.sx;
  }
  for (int64_t o = 0; o < s.outputs; ++o) {
    const F32 scale = F32::set(d.image_scale * d.scale[o]), bias = F32::set(d.bias ? d.bias[o] : 0);
    Place places[4];
    int count = 0;
    for (int64_t oy = d.first; oy < d.last; ++oy)
      for (int64_t ox = 0; ox < s.ow; ox += N) {
        places[count++] = {plane + (oy - d.first) * s.sy * s.sx * pitch + ox, d.y + (o * s.oh + oy) * s.ow + ox,
                           s.ow - ox < N ? s.ow - ox : N};
        if (count < 4) continue;
        depthwise_places<E>(places, 4, d.weights + o * s.taps, offsets, s.taps, scale, bias, d.bias);
        count = 0;
      }
    if (!count) continue;
    for (int j = count; j < 4; ++j) places[j] = places[0];
    depthwise_places<E>(places, count, d.weights + o * s.taps, offsets, s.taps, scale, bias, d.bias);
  }
}

inline void depthwise(const Depthwise& d) {
  with_epilogue(d.epilogue, [&](auto e) { depthwise_as<e>(d); });
}

}  // namespace
}  // namespace nf::NF_ARCH
