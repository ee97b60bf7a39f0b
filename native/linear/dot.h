// Tiles of the instruction sets that multiply four int8 pairs and add them to an int32 in one instruction. Op gives
//   Vector, kVectors (of a quad of a panel), kRows, zero(), load(int32_t*), store(int32_t*, v), add(a, b), shift(v,
//   by), operand(w): a vector of weights;  dot(sum, operand, a): the quad at a, the same for every column.
#pragma once
#include "linear/tile.h"

namespace nf::NF_ARCH {

template <class Op>
struct DotTile {
  static constexpr int kRows = Op::kRows;

  template <int R>
  static void tile(const Stretch& s, const int8_t* first, int32_t* sums) {
    using Vector = typename Op::Vector;
    constexpr int V = Op::kVectors, N = kPanel / V;
    // Chains of sums over every fourth quad where the rows are too few to hide the latency of an addition.
    constexpr int chains = R * V <= 4 ? 4 : R * V <= 6 ? 2 : 1;
    Vector c[chains * R * V];
    NF_UNROLL for (int i = 0; i < R * V; ++i) c[i] = s.first ? Op::zero() : Op::shift(Op::load(sums + i * N), s.shift);
    NF_UNROLL for (int i = R * V; i < chains * R * V; ++i) c[i] = Op::zero();
    const uint8_t* w = s.w;
    const int8_t* a = first;
    int64_t q = 0;
    for (; q + 4 <= s.quads; q += 4, w += 4 * kQuadBytes, a += 16) {
      NF_UNROLL for (int j = 0; j < 4; ++j)
          quad<R, V>(c + j % chains * R * V, w + j * kQuadBytes, a + j * 4, s.a_stride);
    }
    for (; q < s.quads; ++q, w += kQuadBytes, a += 4) quad<R, V>(c, w, a, s.a_stride);
    NF_UNROLL for (int i = R * V; i < chains * R * V; ++i) c[i % (R * V)] = Op::add(c[i % (R * V)], c[i]);
    NF_UNROLL for (int i = 0; i < R * V; ++i) Op::store(sums + i * N, c[i]);
  }

  template <int R, int V>
  static NF_INLINE void quad(typename Op::Vector* c, const uint8_t* w, const int8_t* a, int64_t stride) {
    typename Op::Vector x[V];
    NF_UNROLL for (int v = 0; v < V; ++v) x[v] = Op::operand(w + v * (kQuadBytes / V));
    NF_UNROLL for (int r = 0; r < R; ++r) Op::template dot<V>(c + r * V, x, a + r * stride);
  }
};

}  // namespace nf::NF_ARCH
