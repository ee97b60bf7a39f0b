// Attention with AVX-512: 12 rows by 2 vectors of sums.
#include "isa/isa.h"

#define NF_AVX512
#if defined(__GNUC__) && !defined(__clang__)
// The intrinsics of GCC 12 start from a register that they leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "simd/simd.h"

#include "attention/kernel.h"
#if NF_BUILT
namespace nf::avx512 {
namespace {

struct Blocks {
  static constexpr int rows = 12, columns = 2, block_rows = 24, few_rows = 4;
  static I32 pairs(I32 sum, F32 a, F32 b) {
#if defined(NORMFUSE_SIMDE)
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
#else
    // Not the intrinsic: GCC 12 copies the sums of a tile around it.
    asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
#endif
  }
  static __m128 folded(F32 x) {
    return _mm_add_ps(_mm_add_ps(_mm512_castps512_ps128(x.v), _mm512_extractf32x4_ps(x.v, 2)),
                      _mm_add_ps(_mm512_extractf32x4_ps(x.v, 1), _mm512_extractf32x4_ps(x.v, 3)));
  }
  static void sums(const F32* x, float* to) {
    __m128 a = folded(x[0]), b = folded(x[1]), c = folded(x[2]), d = folded(x[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
  }
  // Rows i, i + 4, i + 8 and i + 12 side by side: what crosses lanes is done by the loads.
  static __m512 four(const float* from, int64_t stride) {
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(from));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from + 4 * stride), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from + 8 * stride), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(from + 12 * stride), 3);
  }
  static void transpose(const float* from, int64_t stride, float* to, int64_t ld) {
    for (int h = 0; h < 16; h += 4, from += 4, to += 4 * ld) {
      const __m512 a = four(from, stride), b = four(from + stride, stride);
      const __m512 c = four(from + 2 * stride, stride), d = four(from + 3 * stride, stride);
      const __m512 ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b);
      const __m512 cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
      _mm512_storeu_ps(to, _mm512_shuffle_ps(ab0, cd0, 0x44));
      _mm512_storeu_ps(to + ld, _mm512_shuffle_ps(ab0, cd0, 0xEE));
      _mm512_storeu_ps(to + 2 * ld, _mm512_shuffle_ps(ab1, cd1, 0x44));
      _mm512_storeu_ps(to + 3 * ld, _mm512_shuffle_ps(ab1, cd1, 0xEE));
    }
  }
};

}  // namespace

const AttendKernels attention = Attention<Blocks>::kernels();

}  // namespace nf::avx512
#endif
#include "simd/end.h"
