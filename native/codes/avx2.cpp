// Convolutions of codes on AVX2. vpmaddubsw adds two products in 16 bits with saturation: where two weights of one sign
// stay within 128 that is exact; elsewhere weights are taken as 2 h + l, whose parts do.
#include "codes/codes.h"
#include "isa/isa.h"

#define NF_AVX2
#include "simd/simd.h"

#if NF_BUILT
#include "codes/kernel.h"

namespace nf::avx2 {
namespace {

typedef int32_t Unaligned __attribute__((may_alias, aligned(1)));

NF_INLINE inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// sums of 8 outputs each += four codes at `a` times a quad of 16 outputs
NF_INLINE inline void add_quad(__m256i* sums, const uint8_t* a, __m256i first, const int8_t* second, __m256i ones) {
  __m256i b, t;
  // GCC 12 reorders the intrinsics until sums are spilled.
  asm("vpbroadcastd %[a], %[b]\n\t"
      "vpmaddubsw %[w], %[b], %[t]\n\t"
      "vpmaddubsw %[v], %[b], %[b]\n\t"
      "vpmaddwd %[ones], %[t], %[t]\n\t"
      "vpmaddwd %[ones], %[b], %[b]\n\t"
      "vpaddd %[t], %[x], %[x]\n\t"
      "vpaddd %[b], %[y], %[y]"
      : [x] "+x"(sums[0]), [y] "+x"(sums[1]), [b] "=&x"(b), [t] "=&x"(t)
      : [a] "m"(*reinterpret_cast<const Unaligned*>(a)), [w] "x"(first),
        [v] "m"(*reinterpret_cast<const __m256i_u*>(second)), [ones] "x"(ones));
}

// The same in 16 bits: the first quad of a span, and those behind it.
template <bool First>
NF_INLINE inline void add_words(__m256i* words, const uint8_t* a, __m256i first, const int8_t* second) {
  __m256i b, t;
  if constexpr (First)
    asm("vpbroadcastd %[a], %[b]\n\t"
        "vpmaddubsw %[w], %[b], %[x]\n\t"
        "vpmaddubsw %[v], %[b], %[y]"
        : [x] "=&x"(words[0]), [y] "=&x"(words[1]), [b] "=&x"(b)
        : [a] "m"(*reinterpret_cast<const Unaligned*>(a)), [w] "x"(first),
          [v] "m"(*reinterpret_cast<const __m256i_u*>(second)));
  else
    asm("vpbroadcastd %[a], %[b]\n\t"
        "vpmaddubsw %[w], %[b], %[t]\n\t"
        "vpmaddubsw %[v], %[b], %[b]\n\t"
        "vpaddw %[t], %[x], %[x]\n\t"
        "vpaddw %[b], %[y], %[y]"
        : [x] "+x"(words[0]), [y] "+x"(words[1]), [b] "=&x"(b), [t] "=&x"(t)
        : [a] "m"(*reinterpret_cast<const Unaligned*>(a)), [w] "x"(first),
          [v] "m"(*reinterpret_cast<const __m256i_u*>(second)));
}

// w = 2 h + l, l 0 or 1
struct Halves {
  __m256i h, l;
  explicit Halves(__m256i w) {
    const __m256i sign = _mm256_set1_epi8(0x40);
    const __m256i half = _mm256_and_si256(_mm256_srli_epi16(w, 1), _mm256_set1_epi8(0x7f));
    h = _mm256_sub_epi8(_mm256_xor_si256(half, sign), sign);
    l = _mm256_and_si256(w, _mm256_set1_epi8(1));
  }
  NF_INLINE __m256i times(__m256i codes) const {
    const __m256i twice = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, h), _mm256_set1_epi16(2));
    return _mm256_add_epi32(twice, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, l), _mm256_set1_epi16(1)));
  }
};

NF_INLINE inline __m256i narrow_product(__m256i codes, __m256i w) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, w), _mm256_set1_epi16(1));
}

// 16 codes, saturated to 0..255 and cut.
NF_INLINE inline __m128i packed_codes(__m256 a, __m256 b, __m128i low, __m128i high) {
  const __m256i x = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  const __m256i y = _mm256_permute4x64_epi64(x, 0xd8);
  const __m128i u = _mm_packus_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  return _mm_min_epu8(_mm_max_epu8(u, low), high);
}

NF_INLINE inline __m256 widened(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)); }

NF_INLINE inline __m128i load_first(const uint8_t* p, int64_t n) {
  if (n >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  uint8_t bytes[16] = {};
  std::memcpy(bytes, p, static_cast<size_t>(n));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

NF_INLINE inline void store_first(uint8_t* p, __m128i codes, int64_t n) {
  if (n >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
  if (n == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), codes);
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), codes);
  std::memcpy(p, bytes, static_cast<size_t>(n));
}

template <int P>
inline void finish(const CodesTile& t, const __m256i* sums, int64_t pixel, int64_t panel) {
  const int64_t output = panel * kCodesPanel, n = t.outputs - output < 16 ? t.outputs - output : 16;
  const __m256 s0 = _mm256_loadu_ps(t.scale + output), s1 = _mm256_loadu_ps(t.scale + output + 8);
  const __m256 b0 = _mm256_loadu_ps(t.bias + output), b1 = _mm256_loadu_ps(t.bias + output + 8);
  const __m128i low = _mm_set1_epi8(static_cast<char>(t.low)), high = _mm_set1_epi8(static_cast<char>(t.high));
  const __m256 by = _mm256_set1_ps(t.residual_scale);
  const Behind behind(t.function, t.gain, t.offset);
  uint8_t* y = t.y + pixel * t.stride + output;
  const uint8_t* r = t.residual ? t.residual + pixel * t.stride + output : nullptr;
  for (int p = 0; p < P; ++p, y += t.stride) {
    __m256 f0 = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[2 * p]), s0), b0);
    __m256 f1 = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[2 * p + 1]), s1), b1);
    if (r) {
      const __m128i u = load_first(r, n);
      f0 = _mm256_add_ps(f0, _mm256_mul_ps(widened(u), by));
      f1 = _mm256_add_ps(f1, _mm256_mul_ps(widened(_mm_srli_si128(u, 8)), by));
      r += t.stride;
    }
    if (t.function) {
      f0 = behind(F32{f0}).v;
      f1 = behind(F32{f1}).v;
    }
    store_first(y, packed_codes(f0, f1, low, high), n);
    if (t.table)
      for (int64_t i = 0; i < n; ++i) y[i] = t.table[y[i]];
  }
}

// P pixels by a panel.
template <int P, bool Narrow>
inline void tile_of(const CodesTile& t, int64_t pixel, int64_t panel) {
  const int64_t size = t.quads * 4, output = panel * kCodesPanel;
  const int8_t* w = t.weights + panel * t.tap_count * t.quads * 64;
  const uint8_t* a[P];
  for (int p = 0; p < P; ++p) a[p] = t.pixels[pixel + p];
  __m256i sums[2 * P];
  NF_UNROLL for (int p = 0; p < P; ++p) {
    sums[2 * p] = load(t.start + output);
    sums[2 * p + 1] = load(t.start + output + 8);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t tap = 0; tap < t.tap_count; ++tap) {
    const int64_t from = t.taps[tap], to = from + size;
    for (int64_t k = from; k < to; k += 4, w += 64) {
      const __m256i first = load(w);
      if constexpr (Narrow) {
        NF_UNROLL for (int p = 0; p < P; ++p) add_quad(sums + 2 * p, a[p] + k, first, w + 32, ones);
      } else {
        const Halves x(first), y(load(w + 32));
        NF_UNROLL for (int p = 0; p < P; ++p) {
          const __m256i codes = _mm256_set1_epi32(*reinterpret_cast<const Unaligned*>(a[p] + k));
          sums[2 * p] = _mm256_add_epi32(sums[2 * p], x.times(codes));
          sums[2 * p + 1] = _mm256_add_epi32(sums[2 * p + 1], y.times(codes));
        }
      }
    }
  }
  finish<P>(t, sums, pixel, panel);
}

// P pixels by a panel whose spans add up in 16 bits; the sums lie in the cache.
template <int P>
inline void span_tile_of(const CodesTile& t, int64_t pixel, int64_t panel) {
  const int64_t size = t.quads * 4, output = panel * kCodesPanel;
  const int8_t* w = t.weights + panel * t.tap_count * t.quads * 64;
  const uint8_t* span = t.spans + panel * t.tap_count * t.quads;
  const uint8_t* a[P];
  for (int p = 0; p < P; ++p) a[p] = t.pixels[pixel + p];
  __m256i sums[2 * P];
  for (int p = 0; p < P; ++p) {
    sums[2 * p] = load(t.start + output);
    sums[2 * p + 1] = load(t.start + output + 8);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t tap = 0; tap < t.tap_count; ++tap) {
    const int64_t from = t.taps[tap], to = from + size;
    for (int64_t k = from; k < to;) {
      const int64_t end = k + 4 * *span++;
      __m256i words[2 * P];
      __m256i first = load(w);
      NF_UNROLL for (int p = 0; p < P; ++p) add_words<true>(words + 2 * p, a[p] + k, first, w + 32);
      for (k += 4, w += 64; k < end; k += 4, w += 64) {
        first = load(w);
        NF_UNROLL for (int p = 0; p < P; ++p) add_words<false>(words + 2 * p, a[p] + k, first, w + 32);
      }
      NF_UNROLL for (int i = 0; i < 2 * P; ++i) sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(words[i], ones));
    }
  }
  finish<P>(t, sums, pixel, panel);
}

template <int P, CodesNarrow Narrow>
inline void tile_as(const CodesTile& t, int64_t pixel, int64_t panel) {
  if constexpr (Narrow == kCodesSpans) span_tile_of<P>(t, pixel, panel);
  else tile_of<P, Narrow == kCodesPairs>(t, pixel, panel);
}

template <int P, CodesNarrow Narrow>
inline void rest_of(const CodesTile& t, int64_t pixel, int64_t rows, int64_t panel) {
  if constexpr (P > 0) {
    if (rows == P) tile_as<P, Narrow>(t, pixel, panel);
    else rest_of<P - 1, Narrow>(t, pixel, rows, panel);
  } else {
    (void)t, (void)pixel, (void)rows, (void)panel;
  }
}

// Tiles cut evenly: 49 = 4 · 6 + 5 · 5.
template <int P, CodesNarrow Narrow>
inline void tiles_of(const CodesTile& t, int64_t panel) {
  const int64_t tiles = (t.count + P - 1) / P, base = t.count / tiles, more = t.count % tiles;
  for (int64_t i = 0, pixel = 0; i < tiles; ++i) {
    const int64_t rows = base + (i < more);
    rest_of<P, Narrow>(t, pixel, rows, panel);
    pixel += rows;
  }
}

void tile(const CodesTile& t) {
  if (!t.count) return;
  for (int64_t panel = 0; panel < t.panels; ++panel)
    if (t.narrow[panel] == kCodesSpans) tiles_of<6, kCodesSpans>(t, panel);
    else if (t.narrow[panel] == kCodesPairs) tiles_of<6, kCodesPairs>(t, panel);
    else tiles_of<4, kCodesWide>(t, panel);
}

// -- depthwise ------------------------------------------------------------------------------------

// 32 bytes, of which n are there.
NF_INLINE inline __m256i load_channels(const uint8_t* p, int64_t n) {
  if (n >= 32) return load(p);
  if (n == 16) return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  uint8_t bytes[32] = {};
  std::memcpy(bytes, p, static_cast<size_t>(n));
  return load(bytes);
}

NF_INLINE inline void store_channels(uint8_t* p, __m256i codes, int64_t n) {
  if (n >= 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
  if (n == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(codes));
  uint8_t bytes[32];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), codes);
  std::memcpy(p, bytes, static_cast<size_t>(n));
}

// The codes of four rows of a column, those of a channel beside each other: see codes_lane; this is half of its lanes.
struct Column {
  __m256i v[4];
};

NF_INLINE inline Column column_of(__m256i r0, __m256i r1, __m256i r2, __m256i r3) {
  const __m256i a = _mm256_unpacklo_epi8(r0, r1), b = _mm256_unpackhi_epi8(r0, r1);
  const __m256i c = _mm256_unpacklo_epi8(r2, r3), d = _mm256_unpackhi_epi8(r2, r3);
  return {{_mm256_unpacklo_epi16(a, c), _mm256_unpackhi_epi16(a, c), _mm256_unpacklo_epi16(b, d),
           _mm256_unpackhi_epi16(b, d)}};
}

// 32 channels from c0 on of an output row; K: size of the kernel; S: step between output columns.
template <int K, int S, bool Narrow>
inline void depthwise_row(const CodesDepthwise& d, int64_t oy, int64_t c0) {
  constexpr int R = K > 4 ? 2 : 1;  // row groups
  const nf_codes_conv& v = *d.conv;
  const int64_t n = v.c - c0 < 32 ? v.c - c0 : 32, block = c0 / kCodesBlock, half = c0 % kCodesBlock / 32;
  const int8_t* w = d.columns + block * R * K * kCodesBlock * 4 + 32 * half;
  const __m256i border = _mm256_set1_epi8(static_cast<char>(v.zero));
  const uint8_t* rows[R * 4];
  for (int64_t i = 0; i < R * 4; ++i) {
    const int64_t iy = oy * v.stride[0] - v.pad_begin[0] + i;
    rows[i] = iy >= 0 && iy < v.h && i < K ? d.x + iy * v.w * v.c + c0 : d.border;
  }
  const auto column = [&](int64_t ix, int g) NF_INLINE {
    if (ix < 0 || ix >= v.w) return column_of(border, border, border, border);
    const int64_t at = ix * v.c;
    __m256i r[4];
    NF_UNROLL for (int i = 0; i < 4; ++i) r[i] = g * 4 + i < K ? load_channels(rows[g * 4 + i] + at, n) : border;
    return column_of(r[0], r[1], r[2], r[3]);
  };
  const int64_t lanes = block * kCodesBlock + 8 * half;
  const float *scale = d.scale_columns + lanes, *bias = d.bias_columns + lanes;
  const int32_t* start = d.start_columns + lanes;
  const __m256i low = _mm256_set1_epi8(static_cast<char>(v.low)), high = _mm256_set1_epi8(static_cast<char>(v.high));
  uint8_t* y = d.y + oy * d.ow * v.c + c0;
  Column ring[R][K];
  int64_t ix = -v.pad_begin[1];
  for (int g = 0; g < R; ++g)
    for (int k = S; k < K; ++k) ring[g][k] = column(ix + k - S, g);
  const Behind behind(v.function, v.gain, v.offset);
  for (int64_t ox = 0; ox < d.ow; ++ox, ix += S, y += v.c) {
    NF_UNROLL for (int g = 0; g < R; ++g) {
      NF_UNROLL for (int k = 0; k < K; ++k) {
        if (k + S < K) ring[g][k] = ring[g][k + S];
        else ring[g][k] = column(ix + k, g);
      }
    }
    __m256 f[4];
    NF_UNROLL for (int i = 0; i < 4; ++i) {
      __m256i sum = load(start + 16 * i);
      NF_UNROLL for (int g = 0; g < R; ++g) {
        NF_UNROLL for (int k = 0; k < K; ++k) {
          const __m256i x = load(w + (g * K + k) * kCodesBlock * 4 + 64 * i);
          sum = _mm256_add_epi32(sum, Narrow ? narrow_product(ring[g][k].v[i], x) : Halves(x).times(ring[g][k].v[i]));
        }
      }
      f[i] = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scale + 16 * i)),
                           _mm256_loadu_ps(bias + 16 * i));
    }
    if (v.function) {
      NF_UNROLL for (int i = 0; i < 4; ++i) f[i] = behind(F32{f[i]}).v;
    }
    const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(f[0]), _mm256_cvtps_epi32(f[1]));
    const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(f[2]), _mm256_cvtps_epi32(f[3]));
    const __m256i codes = _mm256_min_epu8(_mm256_max_epu8(_mm256_packus_epi16(a, b), low), high);
    store_channels(y, codes, n);
    if (d.table)
      for (int64_t i = 0; i < n; ++i) y[i] = d.table[y[i]];
  }
}

template <int K, int S>
inline void depthwise_of(const CodesDepthwise& d) {
  for (int64_t oy = d.first; oy < d.last; ++oy)
    for (int64_t c0 = 0; c0 < d.conv->c; c0 += 32)
      if (d.narrow[c0 / kCodesBlock]) depthwise_row<K, S, true>(d, oy, c0);
      else depthwise_row<K, S, false>(d, oy, c0);
}

void depthwise(const CodesDepthwise& d) {
  const nf_codes_conv& v = *d.conv;
  const bool square = v.kh == v.kw && v.stride[0] == v.stride[1] && v.dilation[0] == 1 && v.dilation[1] == 1;
  switch (square ? v.kh * 10 + v.stride[1] : 0) {
    case 31: return depthwise_of<3, 1>(d);
    case 32: return depthwise_of<3, 2>(d);
    case 51: return depthwise_of<5, 1>(d);
    case 52: return depthwise_of<5, 2>(d);
    default: return depthwise_codes(d);
  }
}

}  // namespace

const CodesKernels codes = {tile,      depthwise, max_pool_codes, quantize_codes, dequantize_codes,
                            add_codes, sum_codes, gate_codes};

}  // namespace nf::avx2
#endif
#include "simd/end.h"
