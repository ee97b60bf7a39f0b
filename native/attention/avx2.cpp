// Attention with AVX2 and FMA: 6 rows by 2 vectors of sums leave 4 of the 16 registers for the operands.
#include "isa/isa.h"

#define NF_AVX2
#include "simd/simd.h"

#include "attention/kernel.h"
#if NF_BUILT
namespace nf::avx2 {
namespace {

struct Blocks {
  static constexpr int rows = 6, columns = 2, block_rows = 18, few_rows = 4;
  static void sums(const F32* x, float* to) {
    const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
  }
  static I32 pairs(I32 sum, F32 a, F32 b) {
    // Not the intrinsics: GCC 12 puts all products first and has no registers left for the sums.
    __m256i product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum.v), "=&x"(product) : "x"(a.v), "x"(b.v));
    return sum;
  }
  static __m256 pair(const float* low, const float* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }
  static void transpose(const float* from, int64_t stride, float* to, int64_t ld) {
    // Rows i and i + 4 side by side: what crosses lanes is done by the loads.
    for (int h = 0; h < 8; h += 4, from += 4, to += 4 * ld) {
      const __m256 a = pair(from, from + 4 * stride), b = pair(from + stride, from + 5 * stride);
      const __m256 c = pair(from + 2 * stride, from + 6 * stride), d = pair(from + 3 * stride, from + 7 * stride);
      const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
      const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
      _mm256_storeu_ps(to, _mm256_shuffle_ps(ab0, cd0, 0x44));
      _mm256_storeu_ps(to + ld, _mm256_shuffle_ps(ab0, cd0, 0xEE));
      _mm256_storeu_ps(to + 2 * ld, _mm256_shuffle_ps(ab1, cd1, 0x44));
      _mm256_storeu_ps(to + 3 * ld, _mm256_shuffle_ps(ab1, cd1, 0xEE));
    }
  }
};

}  // namespace

const AttendKernels attention = Attention<Blocks>::kernels();

}  // namespace nf::avx2
#endif
#include "simd/end.h"
