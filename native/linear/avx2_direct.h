// Few rows (decoding): the packed panel is read once, where it lies, and its codes go from the planes to registers.
// Reading the weights is then what takes the time, so that fewer bits are faster.
#pragma once
#include "linear/avx2_ops.h"
#include "linear/planes.h"
#include "linear/tile.h"

namespace nf::NF_ARCH {

NF_INLINE inline __m256i vector(Words w) { return reinterpret_cast<__m256i>(w); }

// The sums of R rows: in registers where there are enough of them.
template <int R>
struct Sums {
  static constexpr bool kKept = R <= 2;
  __m256i c[kKept ? 2 * R : 1];
  int32_t* memory;
  NF_INLINE explicit Sums(int32_t* m) : memory(m) {
    NF_UNROLL for (int i = 0; i < 2 * R; ++i) set(i, _mm256_setzero_si256());
  }
  NF_INLINE __m256i get(int i) const { return kKept ? c[kKept ? i : 0] : load(memory + 8 * i); }
  NF_INLINE void set(int i, __m256i v) {
    if constexpr (kKept) c[i] = v;
    else store(memory + 8 * i, v);
  }
  NF_INLINE void widen(const __m256i (&p)[2 * R]) {
    const __m256i one = _mm256_set1_epi16(1);
    widen(p, {one, one});
  }
  // Times the multipliers of both halves of a panel.
  NF_INLINE void widen(const __m256i (&p)[2 * R], const Halves& by) {
    NF_UNROLL for (int i = 0; i < 2 * R; ++i)
        set(i, _mm256_add_epi32(get(i), _mm256_madd_epi16(p[i], i % 2 ? by.second : by.first)));
  }
  NF_INLINE void shift(int by) {
    const __m128i count = _mm_cvtsi32_si128(by);
    NF_UNROLL for (int i = 0; i < 2 * R; ++i) set(i, _mm256_sll_epi32(get(i), count));
  }
  NF_INLINE void leave() {
    if constexpr (kKept) {
      NF_UNROLL for (int i = 0; i < 2 * R; ++i) store(memory + 8 * i, c[i]);
    }
  }
};

template <int Bits, int R>
inline void direct_rows(const Direct& d, const int8_t* first, int32_t* sums) {
  constexpr int span = Bits <= 4 ? kUnit : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;
  Sums<R> c(sums);
  const Planes<Bits> planes(d.panel, d.packed_quads);
  const int8_t* a[R];
  NF_UNROLL for (int r = 0; r < R; ++r) a[r] = first + r * d.a_stride;
  for (int g = 0; g < d.segment_count; ++g) {
    const Segment& s = d.segments[g];
    if (s.shift) c.shift(s.shift);
    __m256i p[2 * R];
    for (int64_t q = s.begin; q < s.end;) {
      if (q % kUnit == 0 && q + kUnit <= s.end) {
        Planes<Bits> unit = planes;
        unit.four += q / 2 * kQuadBytes, unit.two += q / 4 * kQuadBytes, unit.one += q / 8 * kQuadBytes;
        for (; q + kUnit <= s.end; q += kUnit, unit.skip_unit()) {
          unit.fetch_unit();
          NF_UNROLL for (int j = 0; j < kUnit; ++j) {
            const __m256i w0 = vector(unit.quad(j, 0)), w1 = vector(unit.quad(j, 32));
            NF_UNROLL for (int r = 0; r < R; ++r) {
              const __m256i b = four(a[r] + (q + j) * 4);
              if (j % span == 0) {
                multiply_only(p[2 * r], w0, b);
                multiply_only(p[2 * r + 1], w1, b);
              } else {
                accumulate(p[2 * r], p[2 * r + 1], w0, w1, b);
              }
            }
            if (j % span == span - 1) c.widen(p);
          }
        }
      } else {  // an exponent begins or ends within a unit
        const int64_t whole = (q / span + 1) * span, stop = s.end < whole ? s.end : whole;
        NF_UNROLL for (int i = 0; i < 2 * R; ++i) p[i] = _mm256_setzero_si256();
        for (; q < stop; ++q) {
          const __m256i w0 = vector(planes.quad(q, 0)), w1 = vector(planes.quad(q, 32));
          NF_UNROLL for (int r = 0; r < R; ++r) accumulate(p[2 * r], p[2 * r + 1], w0, w1, four(a[r] + q * 4));
        }
        c.widen(p);
      }
    }
  }
  c.leave();
}

// 8 bits lie as they are multiplied, but for their sign.
template <int R>
inline void direct_bytes(const Direct& d, const int8_t* first, int32_t* sums) {
  __m256i c[2 * R];
  NF_UNROLL for (int i = 0; i < 2 * R; ++i) c[i] = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(-128);
  for (int g = 0; g < d.segment_count; ++g) {
    const __m128i by = _mm_cvtsi32_si128(d.segments[g].shift);
    NF_UNROLL for (int i = 0; i < 2 * R; ++i) c[i] = _mm256_sll_epi32(c[i], by);
    for (int64_t q = d.segments[g].begin; q < d.segments[g].end; ++q) {
      __builtin_prefetch(d.panel + q * kQuadBytes + kAhead);
      const __m256i w0 = _mm256_xor_si256(load(d.panel + q * kQuadBytes), top),
                    w1 = _mm256_xor_si256(load(d.panel + q * kQuadBytes + 32), top);
      NF_UNROLL for (int r = 0; r < R; ++r) {
        const __m256i b = four(first + r * d.a_stride + q * 4), m = _mm256_abs_epi8(b);
        c[2 * r] =
            _mm256_add_epi32(c[2 * r], _mm256_madd_epi16(_mm256_maddubs_epi16(m, _mm256_sign_epi8(w0, b)), ones));
        c[2 * r + 1] =
            _mm256_add_epi32(c[2 * r + 1], _mm256_madd_epi16(_mm256_maddubs_epi16(m, _mm256_sign_epi8(w1, b)), ones));
      }
    }
  }
  NF_UNROLL for (int i = 0; i < 2 * R; ++i) store(sums + 8 * i, c[i]);
}

template <int Bits, int R>
inline void direct_as(const Direct& d) {
  const int64_t left = d.rows % R;
  for (int64_t m = 0; m + R <= d.rows; m += R) {
    if constexpr (Bits == 8) direct_bytes<R>(d, d.a + m * d.a_stride, d.sums + m * kPanel);
    else direct_rows<Bits, R>(d, d.a + m * d.a_stride, d.sums + m * kPanel);
  }
  if constexpr (R > 1) {
    if (left) {
      Direct rest = d;
      rest.a += (d.rows - left) * d.a_stride, rest.sums += (d.rows - left) * kPanel, rest.rows = left;
      if (left > 1 && R > 2) direct_as<Bits, 2>(rest);
      else direct_as<Bits, 1>(rest);
    }
  }
}

inline void direct(const Direct& d) {
  switch (d.bits) {
    case 2: return direct_as<2, 4>(d);
    case 3: return direct_as<3, 4>(d);
    case 4: return direct_as<4, 4>(d);
    case 5: return direct_as<5, 4>(d);
    case 6: return direct_as<6, 4>(d);
    case 7: return direct_as<7, 4>(d);
    default: return direct_as<8, 4>(d);
  }
}

}  // namespace nf::NF_ARCH
