// What the instruction sets have in common for blocks with multipliers.
#pragma once
#include "linear/unpack.h"

namespace nf::NF_ARCH {

// K gives kRows, and tile<R>(blocks) for the first R rows, for every R up to it.
template <class K, int R = K::kRows>
inline void each_tile(Blocks b) {
  for (; b.rows >= R; b.rows -= R, b.a += R * b.a_stride, b.starts += R * b.starts_stride, b.sums += R * kPanel)
    K::template tile<R>(b);
  if constexpr (R > 1) {
    if (b.rows) each_tile<K, R - 1>(b);
  }
}

// Modulo 256, as halves of words of 16 bits: x * m + (offset - half * m) has the right last byte whatever stands above.
inline void fold(const int8_t* multipliers, int half, int offset, int64_t quads, uint8_t* operands) {
  constexpr int size = sizeof(Words), outputs = size / 4;
  typedef int8_t Multipliers __attribute__((vector_size(outputs)));
  typedef uint32_t Outputs __attribute__((vector_size(size)));
  typedef uint16_t Pairs __attribute__((vector_size(size)));
  for (int at = 0; at < kQuadBytes; at += size) {
    Multipliers given;
    std::memcpy(&given, multipliers + at / 4, sizeof given);
    const Outputs wide = __builtin_convertvector(given, Outputs);
    const Pairs m = reinterpret_cast<Pairs>((wide & 0xffff) | wide << 16);
    const Pairs c = static_cast<uint16_t>(offset) - static_cast<uint16_t>(half) * m;
    for (int64_t q = 0; q < quads; ++q) {
      uint8_t* to = operands + q * kQuadBytes + at;
      const Pairs x = reinterpret_cast<Pairs>(words(to));
      const Pairs even = ((x & 255) * m + c) & 255, odd = ((x >> 8) * m + c) << 8;
      const Pairs both = even | odd;
      std::memcpy(to, &both, sizeof both);
    }
  }
}

}  // namespace nf::NF_ARCH
