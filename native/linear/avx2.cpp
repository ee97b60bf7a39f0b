// Integer products of AVX2. vpmaddubsw multiplies unsigned weights u = C + 2^(bits-1) with signed activations and adds
// pairs into 16 bits: 2 (2^bits - 1) 127. As many of these as 16 bits hold are added before vpmaddwd widens them;
// nothing ever saturates.
#include "linear/linear.h"

#include "isa/isa.h"

#define NF_AVX2
#include "simd/simd.h"

#if NF_BUILT
#include "linear/avx2_blocks.h"
#include "linear/avx2_ops.h"
#include "linear/finish.h"
#include "linear/tile.h"
#include "linear/unpack.h"
#include "simd/quantize.h"

namespace nf::avx2 {
namespace {

template <int R>
NF_INLINE inline void begin_sums(const Stretch& s, int32_t* sums) {
  if (s.first) {
    for (int i = 0; i < 2 * R; ++i) store(sums + 8 * i, _mm256_setzero_si256());
  } else if (s.shift) {
    const __m128i by = _mm_cvtsi32_si128(s.shift);
    for (int i = 0; i < 2 * R; ++i) store(sums + 8 * i, _mm256_sll_epi32(load(sums + 8 * i), by));
  }
}

template <int Span>
struct Narrow {
  static constexpr int kRows = 6;

  template <int R>
  static NF_INLINE void quad(__m256i (&p)[2 * R], const int8_t* const (&a)[R], int64_t at, const uint8_t* w) {
    const __m256i w0 = load(w), w1 = load(w + 32);
    NF_UNROLL for (int r = 0; r < R; ++r) {
      const __m256i b = four(a[r] + at);
      accumulate(p[2 * r], p[2 * r + 1], w0, w1, b);
    }
  }

  // Products of a span of quads, added in 16 bits and then to the sums.
  template <int R, bool Whole>
  static NF_INLINE void span(const int8_t* const (&a)[R], int64_t at, const uint8_t* w, int quads, int32_t* sums) {
    __m256i p[2 * R];
    const __m256i w0 = load(w), w1 = load(w + 32);
    NF_UNROLL for (int r = 0; r < R; ++r) {
      const __m256i b = four(a[r] + at);
      multiply_only(p[2 * r], w0, b);
      multiply_only(p[2 * r + 1], w1, b);
    }
    if constexpr (Whole && Span <= 8) {
      NF_UNROLL for (int q = 1; q < Span; ++q) quad<R>(p, a, at + q * 4, w + q * kQuadBytes);
    } else {
      for (int q = 1; q < (Whole ? Span : quads); ++q) quad<R>(p, a, at + q * 4, w + q * kQuadBytes);
    }
    const __m256i ones = _mm256_set1_epi16(1);
    NF_UNROLL for (int i = 0; i < 2 * R; ++i)
        store(sums + 8 * i, _mm256_add_epi32(load(sums + 8 * i), _mm256_madd_epi16(p[i], ones)));
  }

  template <int R>
  static void tile(const Stretch& s, const int8_t* first, int32_t* sums) {
    begin_sums<R>(s, sums);
    const int8_t* a[R];
    NF_UNROLL for (int r = 0; r < R; ++r) a[r] = first + r * s.a_stride;
    const uint8_t* w = s.w;
    int64_t at = 0;
    const int64_t whole = s.quads / Span * Span * 4;
    for (; at < whole; at += Span * 4, w += Span * kQuadBytes) span<R, true>(a, at, w, Span, sums);
    if (const int left = static_cast<int>(s.quads % Span)) span<R, false>(a, at, w, left, sums);
  }
};

// 8 bits: |a| times the weights with the sign of a; a pair is at most 2 * 127 * 127 and is widened at once.
struct Wide {
  static constexpr int kRows = 4;
  template <int R>
  static void tile(const Stretch& s, const int8_t* first, int32_t* sums) {
    begin_sums<R>(s, sums);
    const int8_t* a[R];
    NF_UNROLL for (int r = 0; r < R; ++r) a[r] = first + r * s.a_stride;
    __m256i c[2 * R];
    NF_UNROLL for (int i = 0; i < 2 * R; ++i) c[i] = load(sums + 8 * i);
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t* w = s.w;
    for (int64_t q = 0; q < s.quads; ++q, w += kQuadBytes) {
      const __m256i w0 = load(w), w1 = load(w + 32);
      NF_UNROLL for (int r = 0; r < R; ++r) {
        const __m256i b = four(a[r] + q * 4), m = _mm256_abs_epi8(b);
        c[2 * r] =
            _mm256_add_epi32(c[2 * r], _mm256_madd_epi16(_mm256_maddubs_epi16(m, _mm256_sign_epi8(w0, b)), ones));
        c[2 * r + 1] =
            _mm256_add_epi32(c[2 * r + 1], _mm256_madd_epi16(_mm256_maddubs_epi16(m, _mm256_sign_epi8(w1, b)), ones));
      }
    }
    NF_UNROLL for (int i = 0; i < 2 * R; ++i) store(sums + 8 * i, c[i]);
  }
};

// 8 bits, rows and weights as int16: half the instructions of Wide for twice the bytes, which many rows share.
struct Pairs {
  static constexpr int kRows = 6;
  template <int R>
  static void tile(const Stretch& s, const int8_t* first, int32_t* sums) {
    begin_sums<R>(s, sums);
    const int8_t* a[R];
    NF_UNROLL for (int r = 0; r < R; ++r) a[r] = first + r * s.a_stride;
    __m256i c[2 * R];
    NF_UNROLL for (int i = 0; i < 2 * R; ++i) c[i] = load(sums + 8 * i);
    const uint8_t* w = s.w;
    for (int64_t at = 0; at < s.quads * 8; at += 8, w += 2 * kQuadBytes) {
      NF_UNROLL for (int pair = 0; pair < 2; ++pair) {
        const __m256i w0 = load(w + pair * kQuadBytes), w1 = load(w + pair * kQuadBytes + 32);
        NF_UNROLL for (int r = 0; r < R; ++r)
            accumulate_pairs(c[2 * r], c[2 * r + 1], w0, w1, four(a[r] + at + pair * 4));
      }
    }
    NF_UNROLL for (int i = 0; i < 2 * R; ++i) store(sums + 8 * i, c[i]);
  }
};

void multiply_pairs(const Stretch& s) { multiply_rows<Pairs>(s); }

// A quad becomes its first two channels of every column, then the other two.
void unpack_pairs(const uint8_t* panel, int64_t first, int64_t count, uint8_t* out) {
  const __m256i top = _mm256_set1_epi8(-128);
  const __m256i order = _mm256_set_epi8(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0, 15, 13, 14, 12, 11, 9, 10,
                                        8, 7, 5, 6, 4, 3, 1, 2, 0);
  const uint8_t* from = panel + first * kQuadBytes;
  for (int64_t q = 0; q < count; ++q, from += kQuadBytes, out += 2 * kQuadBytes) {
    for (int half = 0; half < 64; half += 32) {
      const __m256i x = _mm256_shuffle_epi8(_mm256_xor_si256(load(from + half), top), order);
      store(out + half, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
      store(out + kQuadBytes + half, _mm256_srai_epi16(x, 8));
    }
  }
}

void multiply(const Stretch& s) {
  switch (s.bits) {
    case 2: return multiply_rows<Narrow<32>>(s);
    case 3: return multiply_rows<Narrow<16>>(s);
    case 4: return multiply_rows<Narrow<8>>(s);
    case 5: return multiply_rows<Narrow<4>>(s);
    case 6: return multiply_rows<Narrow<2>>(s);
    case 7: return multiply_rows<Narrow<1>>(s);
    default: return multiply_rows<Wide>(s);
  }
}

bool is_unsigned(int bits) { return bits < 8; }

}  // namespace

constexpr int kDirectRows = 4;

const LinearKernels linear = {is_unsigned,
                              kDirectRows,
                              unpack,
                              multiply,
                              direct,
                              finish,
                              row_sum,
                              quantize_row,
                              quantize_static,
                              unpack_pairs,
                              multiply_pairs,
                              fold,
                              {kDirectRows, direct_blocks, multiply_blocks, start_of_pairs}};

}  // namespace nf::avx2
#endif
#include "simd/end.h"
