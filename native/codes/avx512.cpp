// Convolutions of codes on AVX-512 VNNI: vpdpbusd of unsigned codes and signed weights, exact whatever they are.
#include "codes/codes.h"
#include "isa/isa.h"

#define NF_AVX512
#include "simd/simd.h"

#if NF_BUILT
#include "codes/kernel.h"

namespace nf::avx512 {
namespace {

NF_INLINE inline __m512i four(const uint8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

NF_INLINE inline void dot(__m512i& sum, __m512i codes, __m512i weights) {
#if defined(NORMFUSE_SIMDE)
  sum = _mm512_dpbusd_epi32(sum, codes, weights);
#else
  // GCC 12 copies and spills the sums around its intrinsic.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
#endif
}

inline __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

// Rounded to codes, saturated to 0..255, in the order of a, b, c, d.
NF_INLINE inline __m512i packed_codes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512i x = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
  const __m512i y = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
  return _mm512_packus_epi16(x, y);
}

NF_INLINE inline __m512i in_order(__m512i x) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_epi32(order, x);
}

// The first bytes of a vector; stores with a mask of bytes cost many times as much.
template <int V>
NF_INLINE inline void put(uint8_t* y, __m512i codes, __mmask64 mask, bool whole) {
  if (!whole || V == 3) return _mm512_mask_storeu_epi8(y, mask, codes);
  if (V == 4) _mm512_storeu_si512(y, codes);
  else if (V == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(codes));
  else _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_castsi512_si128(codes));
}

inline void look_up(const uint8_t* table, uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = table[y[i]];
}

// P pixels by V panels.
template <int V, int P>
inline void tile_of(const CodesTile& t, int64_t pixel, int64_t panel) {
  const int64_t size = t.quads * 4, panel_bytes = t.tap_count * t.quads * 64, output = panel * kCodesPanel;
  const int8_t* w = t.weights + panel * panel_bytes;
  const uint8_t* a[P];
  NF_UNROLL for (int p = 0; p < P; ++p) a[p] = t.pixels[pixel + p];
  __m512i acc[P * V];
  NF_UNROLL for (int v = 0; v < V; ++v) {
    const __m512i start = _mm512_loadu_si512(t.start + output + 16 * v);
    NF_UNROLL for (int p = 0; p < P; ++p) acc[p * V + v] = start;
  }
  for (int64_t tap = 0; tap < t.tap_count; ++tap) {
    const int64_t from = t.taps[tap], to = from + size;
    for (int64_t k = from; k < to; k += 4, w += 64) {
      __m512i x[V];
      NF_UNROLL for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_si512(w + v * panel_bytes);
      NF_UNROLL for (int p = 0; p < P; ++p) {
        const __m512i codes = four(a[p] + k);
        NF_UNROLL for (int v = 0; v < V; ++v) dot(acc[p * V + v], codes, x[v]);
      }
    }
  }
  const int64_t left = t.outputs - output;
  const bool whole = left >= 16 * V, bounded = t.low > 0 || t.high < 255;
  const __mmask64 mask = first_bytes(whole ? 16 * V : left);
  const __m512i low = _mm512_set1_epi8(static_cast<char>(t.low)), high = _mm512_set1_epi8(static_cast<char>(t.high));
  const __m512 by = _mm512_set1_ps(t.residual_scale);
  const Behind behind(t.function, t.gain, t.offset);
  __m512 scale[V], bias[V];
  NF_UNROLL for (int v = 0; v < V; ++v) {
    scale[v] = _mm512_loadu_ps(t.scale + output + 16 * v);
    bias[v] = _mm512_loadu_ps(t.bias + output + 16 * v);
  }
  uint8_t* y = t.y + pixel * t.stride + output;
  const uint8_t* r = t.residual ? t.residual + pixel * t.stride + output : nullptr;
  NF_UNROLL for (int p = 0; p < P; ++p, y += t.stride) {
    __m512 f[4];
    NF_UNROLL for (int v = 0; v < V; ++v) f[v] =
        _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[p * V + v]), scale[v]), bias[v]);
    if (r) {
      NF_UNROLL for (int v = 0; v < V; ++v) {
        const __m128i u = whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(r + 16 * v))
                                : _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask >> (16 * v)), r + 16 * v);
        f[v] = _mm512_add_ps(f[v], _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(u)), by));
      }
      r += t.stride;
    }
    if (t.function) {
      NF_UNROLL for (int v = 0; v < V; ++v) f[v] = behind(F32{f[v]}).v;
    }
    __m512i codes = in_order(packed_codes(f[0], f[V > 1 ? 1 : 0], f[V > 2 ? 2 : 0], f[V > 3 ? 3 : 0]));
    if (bounded) codes = _mm512_min_epu8(_mm512_max_epu8(codes, low), high);
    put<V>(y, codes, mask, whole);
  }
  if (t.table) {
    const int64_t n = left < 16 * V ? left : 16 * V;
    for (int p = 1; p <= P; ++p) look_up(t.table, y - p * t.stride, n);
  }
}

template <int V, int P>
inline void rest_of(const CodesTile& t, int64_t pixel, int64_t rows, int64_t panel) {
  if constexpr (P > 0) {
    if (rows == P) tile_of<V, P>(t, pixel, panel);
    else rest_of<V, P - 1>(t, pixel, rows, panel);
  } else {
    (void)t, (void)pixel, (void)rows, (void)panel;
  }
}

// Tiles cut evenly: 49 = 4 · 6 + 5 · 5.
template <int V, int P>
inline void tiles_of(const CodesTile& t, int64_t panel) {
  const int64_t tiles = (t.count + P - 1) / P, base = t.count / tiles, more = t.count % tiles;
  for (int64_t i = 0, pixel = 0; i < tiles; ++i) {
    const int64_t rows = base + (i < more);
    if (rows == P) tile_of<V, P>(t, pixel, panel);
    else rest_of<V, P - 1>(t, pixel, rows, panel);
    pixel += rows;
  }
}

void tile(const CodesTile& t) {
  if (!t.count) return;
  int64_t panel = 0;
  for (; t.panels - panel >= 4; panel += 4) tiles_of<4, 6>(t, panel);
  switch (t.panels - panel) {
    case 3: return tiles_of<3, 8>(t, panel);
    case 2: return tiles_of<2, 12>(t, panel);
    case 1: return tiles_of<1, 14>(t, panel);
    default: return;
  }
}

// -- depthwise ------------------------------------------------------------------------------------

// The codes of four rows of a column, those of a channel beside each other: vectors v of lanes of channels, as
// codes_lane says.
struct Column {
  __m512i v[4];
};

NF_INLINE inline Column column_of(__m512i r0, __m512i r1, __m512i r2, __m512i r3) {
  const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
  const __m512i c = _mm512_unpacklo_epi8(r2, r3), d = _mm512_unpackhi_epi8(r2, r3);
  return {{_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
           _mm512_unpackhi_epi16(b, d)}};
}

// A block of channels of one or two (Two) output rows; K: size of the kernel; S: step between output columns.
template <int K, int S, bool Two>
inline void depthwise_row(const CodesDepthwise& d, int64_t oy, int64_t block) {
  constexpr int R = K > 4 ? 2 : 1;  // row groups
  const nf_codes_conv& v = *d.conv;
  const int64_t c0 = block * kCodesBlock, n = v.c - c0 < kCodesBlock ? v.c - c0 : kCodesBlock;
  const __mmask64 mask = first_bytes(n);
  const int8_t* w = d.columns + block * R * K * kCodesBlock * 4;
  const __m512i border = _mm512_set1_epi8(static_cast<char>(v.zero));
  const uint8_t* rows[R * 4];
  for (int64_t i = 0; i < R * 4; ++i) {
    const int64_t iy = oy * v.stride[0] - v.pad_begin[0] + i;
    rows[i] = iy >= 0 && iy < v.h && i < K + Two ? d.x + iy * v.w * v.c + c0 : d.border;
  }
  const auto column = [&](int64_t ix, int g) NF_INLINE {
    if (ix < 0 || ix >= v.w) return column_of(border, border, border, border);
    const int64_t at = ix * v.c;
    __m512i r[4];
    NF_UNROLL for (int i = 0; i < 4; ++i) r[i] =
        g * 4 + i < K + Two ? _mm512_maskz_loadu_epi8(mask, rows[g * 4 + i] + at) : border;
    return column_of(r[0], r[1], r[2], r[3]);
  };
  const float *scale = d.scale_columns + c0, *bias = d.bias_columns + c0;
  const __m512i low = _mm512_set1_epi8(static_cast<char>(v.low)), high = _mm512_set1_epi8(static_cast<char>(v.high));
  const Behind behind(v.function, v.gain, v.offset);
  const auto finish = [&](const __m512i* acc, uint8_t* y) NF_INLINE {
    __m512 f[4];
    NF_UNROLL for (int i = 0; i < 4; ++i) f[i] = _mm512_add_ps(
        _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i]), _mm512_loadu_ps(scale + 16 * i)), _mm512_loadu_ps(bias + 16 * i));
    if (v.function) {
      NF_UNROLL for (int i = 0; i < 4; ++i) f[i] = behind(F32{f[i]}).v;
    }
    const __m512i codes = _mm512_min_epu8(_mm512_max_epu8(packed_codes(f[0], f[1], f[2], f[3]), low), high);
    put<4>(y, codes, mask, n == kCodesBlock);
    if (d.table) look_up(d.table, y, n);
  };
  uint8_t* y = d.y + oy * d.ow * v.c + c0;
  Column ring[R][K];
  int64_t ix = -v.pad_begin[1];
  for (int g = 0; g < R; ++g)
    for (int k = S; k < K; ++k) ring[g][k] = column(ix + k - S, g);
  for (int64_t ox = 0; ox < d.ow; ++ox, ix += S, y += v.c) {
    __m512i acc[4], lower[4];
    NF_UNROLL for (int i = 0; i < 4; ++i) acc[i] = lower[i] = _mm512_loadu_si512(d.start_columns + c0 + 16 * i);
    NF_UNROLL for (int g = 0; g < R; ++g) {
      NF_UNROLL for (int k = 0; k < K; ++k) {
        if (k + S < K) ring[g][k] = ring[g][k + S];
        else ring[g][k] = column(ix + k, g);
        const int8_t* at = w + (g * K + k) * kCodesBlock * 4;
        NF_UNROLL for (int i = 0; i < 4; ++i) {
          const __m512i x = _mm512_loadu_si512(at + 64 * i);
          dot(acc[i], ring[g][k].v[i], x);
          if (Two) dot(lower[i], ring[g][k].v[i], _mm512_slli_epi32(x, 8));
        }
      }
    }
    finish(acc, y);
    if (Two) finish(lower, y + d.ow * v.c);
  }
}

template <int K, int S>
inline void depthwise_of(const CodesDepthwise& d) {
  const int64_t blocks = (d.conv->c + kCodesBlock - 1) / kCodesBlock;
  for (int64_t oy = d.first; oy < d.last; ++oy)
    for (int64_t block = 0; block < blocks; ++block) depthwise_row<K, S, false>(d, oy, block);
}

// Two output rows at once, which share the columns.
inline void depthwise_pairs(const CodesDepthwise& d) {
  const int64_t blocks = (d.conv->c + kCodesBlock - 1) / kCodesBlock;
  int64_t oy = d.first;
  for (; oy + 2 <= d.last; oy += 2)
    for (int64_t block = 0; block < blocks; ++block) depthwise_row<3, 1, true>(d, oy, block);
  for (int64_t block = 0; oy < d.last && block < blocks; ++block) depthwise_row<3, 1, false>(d, oy, block);
}

void depthwise(const CodesDepthwise& d) {
  const nf_codes_conv& v = *d.conv;
  const bool square = v.kh == v.kw && v.stride[0] == v.stride[1] && v.dilation[0] == 1 && v.dilation[1] == 1;
  const int64_t key = square ? v.kh * 10 + v.stride[1] : 0;
  switch (key) {
    case 31: return depthwise_pairs(d);
    case 32: return depthwise_of<3, 2>(d);
    case 51: return depthwise_of<5, 1>(d);
    case 52: return depthwise_of<5, 2>(d);
    default: return depthwise_codes(d);
  }
}

}  // namespace

const CodesKernels codes = {tile,      depthwise, max_pool_codes, quantize_codes, dequantize_codes,
                            add_codes, sum_codes, gate_codes};

}  // namespace nf::avx512
#endif
#include "simd/end.h"
