// The packed planes of a panel, read where they lie: a quad at a time, on vectors of words of 64 bits.
#pragma once
#include "linear/unpack.h"

namespace nf::NF_ARCH {

constexpr int kUnit = 8;  // quads after which every plane ends at a whole block
// How far ahead weights are asked for. A panel is the next one's neighbour, so that this is right across panels as
// well; the processor's own prefetching stops at every page.
constexpr int64_t kAhead = 1024;

// Where the planes of a panel begin.
template <int Bits>
struct Planes {
  const uint8_t* four;
  const uint8_t* two;
  const uint8_t* one;
  Planes(const uint8_t* panel, int64_t quads)
      : four(panel), two(panel + quads * 8 * (Bits & 4)), one(panel + quads * 8 * (Bits & 6)) {}

  // u = C + 2^(Bits-1) of a quad, a vector from byte `at` on.
  NF_INLINE Words quad(int64_t q, int at) const {
    Words x = {};
    if constexpr (Bits & 4) x = words(four + q / 2 * kQuadBytes + at) >> (4 * (q % 2)) & 15 * kEveryByte;
    if constexpr (Bits & 2) x |= (words(two + q / 4 * kQuadBytes + at) >> (2 * (q % 4)) & 3 * kEveryByte) << (Bits & 4);
    if constexpr (Bits & 1) x |= (words(one + q / 8 * kQuadBytes + at) >> (q % 8) & kEveryByte) << (Bits & 6);
    return x;
  }
  void skip_unit() { four += 4 * kQuadBytes, two += 2 * kQuadBytes, one += kQuadBytes; }
  NF_INLINE void fetch_unit() const {
    if constexpr (Bits & 4) {
      NF_UNROLL for (int i = 0; i < 4; ++i) __builtin_prefetch(four + kAhead + i * 64);
    }
    if constexpr (Bits & 2) {
      NF_UNROLL for (int i = 0; i < 2; ++i) __builtin_prefetch(two + kAhead + i * 64);
    }
    if constexpr (Bits & 1) __builtin_prefetch(one + kAhead);
  }
};

}  // namespace nf::NF_ARCH
