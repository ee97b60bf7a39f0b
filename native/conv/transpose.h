// Turning bytes and floats around, with what every processor of its kind has.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nf {

// 8 x 8 bytes: byte j of r[i] becomes byte i of r[j] (little-endian words), halving the block three times.
inline void transpose_8x8(uint64_t* r) {
  constexpr uint64_t quarter = 0x00000000ffffffffull, pair = 0x0000ffff0000ffffull, one = 0x00ff00ff00ff00ffull;
  for (int i = 0; i < 4; ++i) {
    const uint64_t t = (r[i] >> 32 ^ r[i + 4]) & quarter;
    r[i + 4] ^= t;
    r[i] ^= t << 32;
  }
  for (int i = 0; i < 8; ++i) {
    if (i & 2) continue;
    const uint64_t t = (r[i] >> 16 ^ r[i + 2]) & pair;
    r[i + 2] ^= t;
    r[i] ^= t << 16;
  }
  for (int i = 0; i < 8; i += 2) {
    const uint64_t t = (r[i] >> 8 ^ r[i + 1]) & one;
    r[i + 1] ^= t;
    r[i] ^= t << 8;
  }
}

#if defined(__x86_64__)
// 16 rows of 16 bytes to 16 columns, `stride` apart: interleaving i with i + 8 four times turns the block.
inline void transpose_16x16(const int8_t* const* rows, int64_t at, int8_t* to, int64_t stride) {
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at));
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
      a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
    }
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * stride), a[i]);
}
#endif

// to[pixel][position] = from[channels[position] · step + pixel], or 0 where that is -1. Up to 15 bytes after a row may
// be read.
inline void transpose_bytes(const int8_t* from, const int8_t* zeros, int64_t step, const int32_t* channels,
                            int64_t size, int64_t pixels, int8_t* to) {
  const int8_t* rows[16];
  int64_t p = 0;
#if defined(__x86_64__)
  for (; p + 16 <= size; p += 16) {
    for (int i = 0; i < 16; ++i) rows[i] = channels[p + i] < 0 ? zeros : from + channels[p + i] * step;
    int64_t x = 0;
    for (; x + 16 <= pixels; x += 16) transpose_16x16(rows, x, to + x * size + p, size);
    if (x == pixels) continue;
    int8_t last[256];
    transpose_16x16(rows, x, last, 16);
    for (int64_t i = 0; x < pixels; ++x, ++i) std::memcpy(to + x * size + p, last + i * 16, 16);
  }
#endif
  for (; p < size; p += 8) {
    const int64_t n = std::min<int64_t>(8, size - p);
    for (int64_t i = 0; i < 8; ++i) rows[i] = i < n && channels[p + i] >= 0 ? from + channels[p + i] * step : zeros;
    for (int64_t x = 0; x < pixels; x += 8) {
      uint64_t block[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&block[i], rows[i] + x, 8);
      transpose_8x8(block);
      for (int64_t i = 0; i < 8 && x + i < pixels; ++i)
        std::memcpy(to + (x + i) * size + p, &block[i], static_cast<size_t>(n));
    }
  }
}

// to[column · stride + row] = from[row · pitch + column]
inline void transpose_columns(const float* from, int64_t pitch, int64_t rows, int columns, float* to, int64_t stride) {
  int64_t r = 0;
#if defined(__x86_64__) || defined(__aarch64__)
  for (; r + 4 <= rows; r += 4)
    for (int c = 0; c < columns; c += 4) {
      const float* f = from + r * pitch + c;
      float* t = to + c * stride + r;
#if defined(__x86_64__)
      __m128 v[4] = {_mm_loadu_ps(f), _mm_loadu_ps(f + pitch), _mm_loadu_ps(f + 2 * pitch),
                     _mm_loadu_ps(f + 3 * pitch)};
      _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
      for (int i = 0; i < 4 && c + i < columns; ++i) _mm_storeu_ps(t + i * stride, v[i]);
#else
      const float32x4x2_t a = vtrnq_f32(vld1q_f32(f), vld1q_f32(f + pitch)),
                          b = vtrnq_f32(vld1q_f32(f + 2 * pitch), vld1q_f32(f + 3 * pitch));
      const float32x4_t v[4] = {vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])),
                                vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])),
                                vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])),
                                vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]))};
      for (int i = 0; i < 4 && c + i < columns; ++i) vst1q_f32(t + i * stride, v[i]);
#endif
    }
#endif
  for (; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[c * stride + r] = from[r * pitch + c];
}

}  // namespace nf
