// Packed planes to a byte a code, on vectors of words of 64 bits as GCC and Clang know them for every target.
#pragma once
#include "linear/linear.h"

namespace nf::NF_ARCH {

constexpr uint64_t kEveryByte = 0x0101010101010101ull;
constexpr int kWords = F32::N >= 16 ? 8 : F32::N >= 8 ? 4 : 2;
typedef uint64_t Words __attribute__((vector_size(kWords * 8)));

inline Words words(const uint8_t* p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int W, bool First>
inline void unpack_plane(const uint8_t* src, int64_t blocks, int shift, uint8_t* out) {
  constexpr uint64_t mask = ((1ull << W) - 1) * kEveryByte;
  constexpr int per = 8 / W, size = sizeof(Words);
  for (int64_t b = 0; b < blocks; ++b, src += kQuadBytes, out += per * kQuadBytes)
    for (int i = 0; i < kQuadBytes; i += size) {
      const Words v = words(src + i);
      for (int j = 0; j < per; ++j) {
        uint8_t* to = out + j * kQuadBytes + i;
        Words x = v >> (W * j) & mask;
        if (!First) x = x << shift | words(to);
        std::memcpy(to, &x, sizeof x);
      }
    }
}

// Quads [first, first + count) of a panel; both are multiples of the unit.
inline void unpack(int bits, bool is_unsigned, const uint8_t* panel, int64_t quads_in_all, int64_t first, int64_t count,
                   uint8_t* out) {
  const int64_t plane = quads_in_all * 8;  // bytes of a bit
  if (bits == 8) {
    std::memcpy(out, panel + first * 64, static_cast<size_t>(count) * 64);
  } else {
    int low = 0;
    if (bits & 4) {
      unpack_plane<4, true>(panel + first * 32, count / 2, 0, out);
      low = 4;
    }
    if (bits & 2) {
      const uint8_t* src = panel + plane * low + first * 16;
      if (low) unpack_plane<2, false>(src, count / 4, low, out);
      else unpack_plane<2, true>(src, count / 4, 0, out);
      low += 2;
    }
    if (bits & 1) unpack_plane<1, false>(panel + plane * low + first * 8, count / 8, low, out);
  }
  if (is_unsigned) return;
  // Byte by byte u - 2^(bits-1): no borrow leaves a byte because its top bit is set first.
  const uint64_t top = 0x80 * kEveryByte, half = bits == 8 ? 0 : (1ull << (bits - 1)) * kEveryByte;
  for (int64_t i = 0; i < count * kQuadBytes; i += sizeof(Words)) {
    Words x = words(out + i);
    x = bits == 8 ? x ^ top : ((x | top) - half) ^ top;
    std::memcpy(out + i, &x, sizeof x);
  }
}

}  // namespace nf::NF_ARCH
