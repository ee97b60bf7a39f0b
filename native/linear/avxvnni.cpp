// Integer products of AVX-VNNI: vpdpbusd on 256 bits (processors without AVX-512 that have it). All else is AVX2.
#include "linear/linear.h"

#include "isa/isa.h"

#define NF_AVX2
#include "simd/simd.h"

#if NF_BUILT && NF_HAS_AVXVNNI
#include "linear/blocks.h"
#include "linear/dot.h"
#include "linear/finish.h"
#include "simd/quantize.h"

namespace nf::avx2 {
namespace {

struct Vnni256 {
  using Vector = __m256i;
  static constexpr int kVectors = 2, kRows = 6;
  static NF_INLINE Vector zero() { return _mm256_setzero_si256(); }
  static NF_INLINE Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static NF_INLINE void store(int32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static NF_INLINE Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static NF_INLINE Vector shift(Vector v, int by) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(by)); }
  static NF_INLINE Vector operand(const uint8_t* w) { return load(w); }
  template <int V>
  static NF_INLINE void dot(Vector* c, const Vector* w, const int8_t* a) {
    int32_t x;
    std::memcpy(&x, a, 4);
    const __m256i b = _mm256_set1_epi32(x);
    NF_UNROLL for (int v = 0; v < V; ++v) {
#if defined(NORMFUSE_SIMDE)
      // The same sums of AVX2 on 16 bits, for tests on machines without the instruction.
      const __m256i low = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
      const __m256i even =
          _mm256_mullo_epi16(_mm256_and_si256(w[v], low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
      const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(w[v], 8), _mm256_srai_epi16(b, 8));
      c[v] = add(c[v], add(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
#else
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c[v]) : "x"(w[v]), "x"(b));
#endif
    }
  }
};

void multiply(const Stretch& s) { multiply_rows<DotTile<Vnni256>>(s); }
bool yes(int) { return true; }

}  // namespace

const LinearKernels linear_vnni = {
    yes, 0, unpack, multiply, nullptr, finish, row_sum, quantize_row, quantize_static, nullptr, nullptr, fold, {}};

}  // namespace nf::avx2
#endif
#include "simd/end.h"
