// The few operations the AVX2 products are made of.
#pragma once
#include "linear/tile.h"

namespace nf::NF_ARCH {

NF_INLINE inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
NF_INLINE inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
NF_INLINE inline __m256i four(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}

// p += w b and q += v b in 16 bits; b is used up. Left to themselves, compilers reorder the sums of a tile until they
// no longer fit the registers.
NF_INLINE inline void accumulate(__m256i& p, __m256i& q, __m256i w, __m256i v, __m256i b) {
  __m256i x;
  asm volatile(
      "vpmaddubsw %[b], %[w], %[x]\n\tvpmaddubsw %[b], %[v], %[b]\n\tvpaddw %[x], %[p], %[p]\n\tvpaddw %[b], %[q], %[q]"
      : [p] "+x"(p), [q] "+x"(q), [x] "=&x"(x), [b] "+x"(b)
      : [w] "x"(w), [v] "x"(v));
}
// The same of pairs of 16 bits, in 32.
NF_INLINE inline void accumulate_pairs(__m256i& p, __m256i& q, __m256i w, __m256i v, __m256i b) {
  __m256i x;
  asm volatile(
      "vpmaddwd %[b], %[w], %[x]\n\tvpmaddwd %[b], %[v], %[b]\n\tvpaddd %[x], %[p], %[p]\n\tvpaddd %[b], %[q], %[q]"
      : [p] "+x"(p), [q] "+x"(q), [x] "=&x"(x), [b] "+x"(b)
      : [w] "x"(w), [v] "x"(v));
}
NF_INLINE inline void multiply_only(__m256i& p, __m256i w, __m256i b) {
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(p) : "x"(w), "x"(b));
}

// Multipliers of 16 outputs for vpmaddwd: a pair of 16 bits for each.
struct Halves {
  __m256i first, second;
};
NF_INLINE inline __m256i twice(const int8_t* multipliers) {
  const __m256i m = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(multipliers)));
  return _mm256_blend_epi16(m, _mm256_slli_epi32(m, 16), 0xaa);
}
NF_INLINE inline Halves pairs_of(const int8_t* multipliers) { return {twice(multipliers), twice(multipliers + 8)}; }

}  // namespace nf::NF_ARCH
