// Norms, one row at a time: the row is read once from memory, then lives in the first-level cache. Included after
// simd.h.
//
// Where the mean is larger than the spread it is a pair (high, low): low is the mean of x - high, which is exact or
// nearly so, and y does not lose what a float32 mean loses. Such rows take two more passes over the cache.
#pragma once
#include "norm/norm.h"
#include "normfuse.h"
#include "simd/partial.h"
#include "simd/quantize.h"

namespace nf::NF_ARCH {
namespace {

// float32 lanes are flushed into doubles this often: the error of a sum does not grow with d.
constexpr int64_t kFlush = 512 * F32::N;

struct Sums {
  double a, b;
};

// op(i, n, a, b) adds elements i.. (n of them in the last, partial vector; F32::N otherwise) to its two accumulators.
template <class Op>
inline Sums reduce(int64_t d, const Op& op) {
  constexpr int N = F32::N;
  Sums total = {0, 0};
  for (int64_t start = 0; start < d; start += kFlush) {
    const int64_t end = d - start < kFlush ? d : start + kFlush;
    F32 a0 = F32::set(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    int64_t i = start;
    for (; i + 4 * N <= end; i += 4 * N) {
      op(i, N, a0, b0);
      op(i + N, N, a1, b1);
      op(i + 2 * N, N, a2, b2);
      op(i + 3 * N, N, a3, b3);
    }
    for (; i + N <= end; i += N) op(i, N, a0, b0);
    if (i < end) op(i, static_cast<int>(end - i), a1, b1);
    total.a += static_cast<double>(sum((a0 + a1) + (a2 + a3)));
    total.b += static_cast<double>(sum((b0 + b1) + (b2 + b3)));
  }
  return total;
}

// Reads x (+ residual), keeps it at `s` unless s is x itself, and takes Σs and Σs² if asked.
template <bool plus, bool write, bool first, bool square>
inline Sums read(const float* x, const float* residual, float* s, int64_t d) {
  return reduce(d, [=](int64_t i, int n, F32& a, F32& b) NF_INLINE {
    F32 v = load(x + i, n);
    if (plus) v = v + load(residual + i, n);
    if (write) store(s + i, v, n);
    if (first) a = a + v;
    if (square) b = fused(v, v, b);
  });
}
template <bool first, bool square>
inline Sums read(const float* x, const float* residual, float* s, int64_t d) {
  if (residual) return read<true, true, first, square>(x, residual, s, d);
  if (s) return read<false, true, first, square>(x, residual, s, d);
  return read<false, false, first, square>(x, residual, s, d);
}

// Σ|t| or Σt² of t = (s - high) - low.
template <bool absolute>
inline double spread(const float* s, int64_t d, float high, float low) {
  const F32 h = F32::set(high), l = F32::set(low), one = F32::set(1);
  if (low == 0)
    return reduce(d,
                  [=](int64_t i, int n, F32& a, F32&) NF_INLINE {
                    F32 t = load(s + i, n) - h;
                    if (n != F32::N) t = keep(t, n);
                    a = absolute ? fused(abs(t), one, a)
                                 : fused(t, t, a);  // a sum by fma: the adders have the difference to take
                  })
        .a;
  return reduce(d,
                [=](int64_t i, int n, F32& a, F32&) NF_INLINE {
                  F32 t = (load(s + i, n) - h) - l;
                  if (n != F32::N) t = keep(t, n);
                  a = absolute ? a + abs(t) : fused(t, t, a);
                })
      .a;
}

// Σ(s - high)
inline double drift(const float* s, int64_t d, float high) {
  const F32 h = F32::set(high);
  return reduce(d,
                [=](int64_t i, int n, F32& a, F32&) NF_INLINE {
                  const F32 t = load(s + i, n) - h;
                  a = a + (n == F32::N ? t : keep(t, n));
                })
      .a;
}

struct Statistic {
  float high, factor, offset;  // (s - high) · factor + offset
};

// `s` is where the row lies after the first pass; `write` is s, or nullptr if that is x.
inline Statistic statistic(const NormRows& r, const float* x, const float* residual, float* write, const float* s) {
  const int64_t d = r.d;
  const double count = static_cast<double>(d), eps = static_cast<double>(r.eps);
  if (r.kind == NF_RMS || r.kind == NF_CRMS) {
    const Sums p =
        r.kind == NF_RMS ? read<false, true>(x, residual, write, d) : read<true, true>(x, residual, write, d);
    const double mean = r.kind == NF_RMS ? p.b / count : (p.b + p.a * p.a) / (count + 1);
    return {0, static_cast<float>(1 / std::sqrt(mean + eps)), 0};
  }
  const bool absolute = r.kind == NF_L1;
  const float high = static_cast<float>(read<true, false>(x, residual, write, d).a / count);
  double low = 0, mean = (absolute ? spread<true>(s, d, high, 0) : spread<false>(s, d, high, 0)) / count;
  const double far = static_cast<double>(high);
  if (absolute ? std::fabs(far) > mean : far * far > mean) {
    low = drift(s, d, high) / count;
    const float l = static_cast<float>(low);
    if (l != 0) mean = (absolute ? spread<true>(s, d, high, l) : spread<false>(s, d, high, l)) / count;
  }
  const double factor = absolute ? 1 / (static_cast<double>(r.scale_const) * mean + eps) : 1 / std::sqrt(mean + eps);
  return {high, static_cast<float>(factor), static_cast<float>(-low * factor)};
}

// y = the row normalized; if asked, the bits of the largest |y|: those of NaN are above Inf's, and Inf's above all
// others.
template <bool centered, bool gain, bool shift, bool track>
inline int32_t write_row(const float* s, int64_t d, Statistic stat, const float* g, const float* b, float* y) {
  constexpr int N = F32::N;
  const F32 h = F32::set(stat.high), f = F32::set(stat.factor), o = F32::set(stat.offset);
  I32 top = I32::set(0), second = top;
  const auto one = [=](int64_t i, int n, I32& most) NF_INLINE {
    F32 v = load(s + i, n);
    if (centered) {
      v = fused(v - h, f, o);
      if (gain && shift) v = fused(v, load(g + i, n), load(b + i, n));
      else if (gain) v = v * load(g + i, n);
      else if (shift) v = v + load(b + i, n);
    } else if (gain) {
      v = v * f;
      v = shift ? fused(v, load(g + i, n), load(b + i, n)) : v * load(g + i, n);
    } else {
      v = shift ? fused(v, f, load(b + i, n)) : v * f;
    }
    store(y + i, v, n);
    if (track) most = max(most, bits_of(abs(n == N ? v : keep(v, n))));
  };
  int64_t i = 0;
  for (; i + 2 * N <= d; i += 2 * N) {
    one(i, N, top);
    one(i + N, N, second);
  }
  for (; i + N <= d; i += N) one(i, N, top);
  if (i < d) one(i, static_cast<int>(d - i), second);
  return track ? highest(max(top, second)) : 0;
}
template <bool centered, bool track>
inline int32_t write_row(const NormRows& r, const float* s, Statistic stat, float* y) {
  if (r.gain && r.shift) return write_row<centered, true, true, track>(s, r.d, stat, r.gain, r.shift, y);
  if (r.gain) return write_row<centered, true, false, track>(s, r.d, stat, r.gain, nullptr, y);
  if (r.shift) return write_row<centered, false, true, track>(s, r.d, stat, nullptr, r.shift, y);
  return write_row<centered, false, false, track>(s, r.d, stat, nullptr, nullptr, y);
}

inline void norm_rows(const NormRows& r, int64_t first, int64_t last, float* row) {
  const bool centered = r.kind == NF_LAYER || r.kind == NF_L1;
  for (int64_t m = first; m < last; ++m) {
    const float* x = r.x + m * r.d;
    const float* residual = r.residual ? r.residual + m * r.d : nullptr;
    float* y = r.y ? r.y + m * r.d : row;
    float* write = r.sum ? r.sum + m * r.d : residual ? y : nullptr;
    const float* s = write ? write : x;
    const Statistic stat = statistic(r, x, residual, write, s);
    if (r.y) {
      centered ? write_row<true, false>(r, s, stat, y) : write_row<false, false>(r, s, stat, y);
    } else {
      const int32_t top = centered ? write_row<true, true>(r, s, stat, y) : write_row<false, true>(r, s, stat, y);
      int8_t* q = r.q + m * r.d;
      float inverse;
      row_scale_of(top, r.bits, &inverse, r.scale + m);
      if (inverse == 0) std::memset(q, 0, static_cast<size_t>(r.d));
      else codes_within(y, r.d, inverse, static_cast<float>((1 << (r.bits - 1)) - 1), q);
    }
  }
}

}  // namespace
}  // namespace nf::NF_ARCH
