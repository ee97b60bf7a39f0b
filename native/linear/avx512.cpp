// Integer products of AVX-512 VNNI: vpdpbusd on 512 bits, unsigned weights u = C + 2^(bits-1) of any number of bits.
#include "linear/linear.h"

#include "isa/isa.h"

#define NF_AVX512
#include "simd/simd.h"

#if NF_BUILT
#include "linear/blocks.h"
#include "linear/dot.h"
#include "linear/finish.h"
#include "linear/planes.h"
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

// A span of products is added in 32 bits and then multiplied: where rows are few, unpacking would be most of the time.
template <int Bits>
struct DirectBlocks {
  static constexpr int kRows = 8;
  template <int R>
  static void tile(const Blocks& b) {
    __m512i total[R];
    NF_UNROLL for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_si512();
    Planes<Bits> unit(b.w, b.packed_quads);
    for (int64_t s = 0; s < b.spans(); ++s, unit.skip_unit()) {
      const __m512i by = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b.multipliers_of(s))));
      __m512i c[R];
      NF_UNROLL for (int r = 0; r < R; ++r) c[r] = _mm512_set1_epi32(b.starts[r * b.starts_stride + s]);
      unit.fetch_unit();
      const int8_t* a = b.a + s * kSpan * 4;
      const int64_t quads = b.quads_of(s);
      if (quads == kSpan) {
        NF_UNROLL for (int j = 0; j < kSpan; ++j) quad<R>(c, unit.quad(j, 0), a + j * 4, b.a_stride);
      } else {
        for (int64_t j = 0; j < quads; ++j) quad<R>(c, unit.quad(j, 0), a + j * 4, b.a_stride);
      }
      NF_UNROLL for (int r = 0; r < R; ++r) total[r] = _mm512_add_epi32(total[r], _mm512_mullo_epi32(c[r], by));
    }
    NF_UNROLL for (int r = 0; r < R; ++r) _mm512_storeu_si512(b.sums + r * kPanel, total[r]);
  }

  template <int R>
  static NF_INLINE void quad(__m512i* c, Words u, const int8_t* a, int64_t stride) {
    const __m512i w = reinterpret_cast<__m512i>(u);
    NF_UNROLL for (int r = 0; r < R; ++r) Vnni512::dot<1>(c + r, &w, a + r * stride);
  }
};

void direct_blocks(const Blocks& b) {
  switch (b.bits) {
    case 2: return each_tile<DirectBlocks<2>>(b);
    case 3: return each_tile<DirectBlocks<3>>(b);
    default: return each_tile<DirectBlocks<4>>(b);
  }
}

int32_t start(const int8_t* a, int64_t count, int half) { return -half * row_sum(a, count); }

void multiply(const Stretch& s) { multiply_rows<DotTile<Vnni512>>(s); }
bool yes(int) { return true; }

}  // namespace

const LinearKernels linear = {yes,
                              0,
                              unpack,
                              multiply,
                              nullptr,
                              finish,
                              row_sum,
                              quantize_row,
                              quantize_static,
                              nullptr,
                              nullptr,
                              fold,
                              {DirectBlocks<4>::kRows, direct_blocks, nullptr, start}};

}  // namespace nf::avx512
#endif
#include "simd/end.h"
