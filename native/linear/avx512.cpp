// Integer products of AVX-512 VNNI: vpdpbusd on 512 bits, unsigned weights u = C + 2^(bits-1) of any number of bits.
#include "linear/linear.h"

#include "isa/isa.h"

#define NF_AVX512
#include "simd/simd.h"

#if NF_BUILT
#include "linear/dot.h"
#include "linear/finish.h"
#include "linear/unpack.h"
#include "simd/quantize.h"

namespace nf::avx512 {
namespace {

typedef int32_t Unaligned __attribute__((may_alias, aligned(1)));

struct Vnni512 {
  using Vector = __m512i;
  static constexpr int kVectors = 1, kRows = 12;
  static NF_INLINE Vector zero() { return _mm512_setzero_si512(); }
  static NF_INLINE Vector load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static NF_INLINE void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
  static NF_INLINE Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static NF_INLINE Vector shift(Vector v, int by) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(by)); }
  static NF_INLINE Vector operand(const uint8_t* w) { return _mm512_loadu_si512(w); }
  template <int V>
  static NF_INLINE void dot(Vector* c, const Vector* w, const int8_t* a) {
#if defined(NORMFUSE_SIMDE)
    int32_t x;
    std::memcpy(&x, a, 4);
    *c = _mm512_dpbusd_epi32(*c, *w, _mm512_set1_epi32(x));
#else
    // GCC 12 copies and spills the sums around its intrinsic; the quad comes from memory, broadcast by the load.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*c) : "v"(*w), "m"(*reinterpret_cast<const Unaligned*>(a)));
#endif
  }
};

void multiply(const Stretch& s) { multiply_rows<DotTile<Vnni512>>(s); }
bool yes(int) { return true; }

}  // namespace

const LinearKernels linear = {
    yes, 0, unpack, multiply, nullptr, finish, row_sum, quantize_row, quantize_static, nullptr, nullptr};

}  // namespace nf::avx512
#endif
#include "simd/end.h"
