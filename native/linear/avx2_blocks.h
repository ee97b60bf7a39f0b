// Blocks with multipliers. A span of products is added in 16 bits, where what wraps on the way comes back: it starts at
// -2^(bits-1) Σ A and ends at Σ A C, at most 16 * 127 * 8. vpmaddwd then widens it by the multipliers, as by ones
// elsewhere.
#pragma once
#include "linear/avx2_direct.h"
#include "linear/blocks.h"

namespace nf::NF_ARCH {

// R rows and what their spans start from.
template <int R>
struct BlockRows {
  const int8_t* a[R];
  const int32_t* starts[R];

  NF_INLINE explicit BlockRows(const Blocks& b) {
    NF_UNROLL for (int r = 0; r < R; ++r) a[r] = b.a + r * b.a_stride, starts[r] = b.starts + r * b.starts_stride;
  }
  NF_INLINE void begin(int64_t span, __m256i (&p)[2 * R]) const {
    NF_UNROLL for (int r = 0; r < R; ++r) p[2 * r] = p[2 * r + 1] = _mm256_set1_epi32(starts[r][span]);
  }
  NF_INLINE void add(int64_t q, __m256i w0, __m256i w1, __m256i (&p)[2 * R]) const {
    NF_UNROLL for (int r = 0; r < R; ++r) accumulate(p[2 * r], p[2 * r + 1], w0, w1, four(a[r] + q * 4));
  }
};

template <int Bits>
struct DirectBlocks {
  static constexpr int kRows = 4;
  template <int R>
  static void tile(const Blocks& b) {
    Sums<R> c(b.sums);
    const BlockRows<R> rows(b);
    Planes<Bits> unit(b.w, b.packed_quads);
    const int64_t spans = b.spans();
    for (int64_t s = 0; s < spans; ++s, unit.skip_unit()) {
      __m256i p[2 * R];
      rows.begin(s, p);
      unit.fetch_unit();
      const int64_t quads = b.quads_of(s);
      const auto quad = [&](int64_t j) NF_INLINE {
        rows.add(s * kSpan + j, vector(unit.quad(j, 0)), vector(unit.quad(j, 32)), p);
      };
      if (quads == kSpan) {
        NF_UNROLL for (int j = 0; j < kSpan; ++j) quad(j);
      } else {
        for (int64_t j = 0; j < quads; ++j) quad(j);
      }
      c.widen(p, pairs_of(b.multipliers_of(s)));
    }
    c.leave();
  }
};

struct BlockTile {
  static constexpr int kRows = 6;
  template <int R>
  static void tile(const Blocks& b) {
    int32_t* const sums = b.sums;
    if (b.first) std::memset(sums, 0, R * kPanel * sizeof(int32_t));
    const BlockRows<R> rows(b);
    const int64_t spans = b.spans();
    const uint8_t* w = b.w;
    for (int64_t s = 0; s < spans; ++s, w += kSpan * kQuadBytes) {
      __m256i p[2 * R];
      rows.begin(s, p);
      const int64_t quads = b.quads_of(s);
      const auto quad = [&](int64_t j) NF_INLINE {
        rows.add(s * kSpan + j, load(w + j * kQuadBytes), load(w + j * kQuadBytes + 32), p);
      };
      if (quads == kSpan) {
        NF_UNROLL for (int j = 0; j < kSpan; ++j) quad(j);
      } else {
        for (int64_t j = 0; j < quads; ++j) quad(j);
      }
      const Halves by = pairs_of(b.multipliers_of(s));
      NF_UNROLL for (int i = 0; i < 2 * R; ++i) store(
          sums + 8 * i, _mm256_add_epi32(load(sums + 8 * i), _mm256_madd_epi16(p[i], i % 2 ? by.second : by.first)));
    }
  }
};

inline void direct_blocks(const Blocks& b) {
  switch (b.bits) {
    case 2: return each_tile<DirectBlocks<2>>(b);
    case 3: return each_tile<DirectBlocks<3>>(b);
    default: return each_tile<DirectBlocks<4>>(b);
  }
}

inline void multiply_blocks(const Blocks& b) { each_tile<BlockTile>(b); }

// -half times the sums of both pairs of channels of the quads, which 16 bits hold.
inline int32_t start_of_pairs(const int8_t* a, int64_t count, int half) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < count; i += 4) low += a[i] + a[i + 1], high += a[i + 2] + a[i + 3];
  const uint32_t first = static_cast<uint16_t>(-half * low), second = static_cast<uint16_t>(-half * high);
  return static_cast<int32_t>(first | second << 16);
}

}  // namespace nf::NF_ARCH
