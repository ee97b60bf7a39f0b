// How a stretch is cut into tiles of rows: the same for every instruction set. K gives kRows, the rows of a full tile,
// and tile<R>(stretch, a, sums) for every R up to it. Up to 6 rows of 16 sums fill 16 registers of 256 bits.
#pragma once
#include "linear/linear.h"

namespace nf::NF_ARCH {

template <class K, int R>
inline void rest(const Stretch& s, int64_t rows, const int8_t* a, int32_t* sums) {
  if constexpr (R > 0) {
    if (rows == R) K::template tile<R>(s, a, sums);
    else rest<K, R - 1>(s, rows, a, sums);
  } else {
    (void)s, (void)rows, (void)a, (void)sums;
  }
}

template <class K>
inline void multiply_rows(const Stretch& s) {
  int64_t m = 0;
  const int8_t* a = s.a;
  int32_t* sums = s.sums;
  float* y = s.y;
  for (; m + K::kRows <= s.rows; m += K::kRows, a += K::kRows * s.a_stride, sums += K::kRows * kPanel) {
    if (y)  // the lines the epilogue will write, fetched while the tile is computed
      for (int r = 0; r < K::kRows; ++r, y += s.y_stride) __builtin_prefetch(y, 1);
    K::template tile<K::kRows>(s, a, sums);
  }
  rest<K, K::kRows - 1>(s, s.rows - m, a, sums);
}

}  // namespace nf::NF_ARCH
