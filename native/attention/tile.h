// The pieces of attention, once for every instruction set: products of a block of rows with a panel, packing of panels,
// and the weights of a row of scores. Included after simd.h.
#pragma once
#if NF_BUILT
namespace nf::NF_ARCH {

constexpr float kMinusInfinity = -__builtin_inff();

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// n floats from p are needed soon: heads of a packed projection lie too far apart for the machine to guess where the
// next row is.
inline void soon(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

// 2^x for x <= 0: 0 from -126.5 down, NaN for NaN. The fraction is in [-1/2, 1/2], where the polynomial errs by 2e-7 at
// most.
inline F32 power_of_two(F32 x) {
  // 1.5 * 2^23: the low bits of the sum are the exponent, biased as a float's is.
  const F32 magic = F32::set(12582912.f + 127.f);
  x = max(F32::set(-127.f), x);
  const F32 t = x + magic;
  const F32 f = x - (t - magic);
  F32 p = fma(f, F32::set(1.33952627e-3f), F32::set(9.61807743e-3f));
  p = fma(p, f, F32::set(5.55035211e-2f));
  p = fma(p, f, F32::set(2.40226611e-1f));
  p = fma(p, f, F32::set(6.93147182e-1f));
  p = fma(p, f, F32::set(1.f));
  return p * float_of(shift_left<23>(bits_of(t)));
}

// -- products of R rows with C vectors ------------------------------------------------------------
template <int R, int C>
struct Product {
  F32 sum[R][C];
  void clear() {
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] = F32::set(0.f);
  }
  // sum[r][c] += Σ_i a[r, i] b[i, c]
  void add(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n) {
    for (int64_t i = 0; i < n; ++i, b += ldb) {
      F32 row[C];
      for (int c = 0; c < C; ++c) row[c] = F32::load(b + c * F32::N);
      for (int r = 0; r < R; ++r) {
        const F32 x = F32::set(a[r * lda + i]);
        for (int c = 0; c < C; ++c) sum[r][c] = fma(x, row[c], sum[r][c]);
      }
    }
  }
};

template <int R, int C>
inline void scores(const float* q, int64_t ldq, const float* keys, int64_t dim, float* s, int64_t pitch) {
  Product<R, C> product;
  product.clear();
  product.add(q, ldq, keys, C * F32::N, dim);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) product.sum[r][c].store(s + r * pitch + c * F32::N);
}

// The same for codes: a "float" of q and keys is two int16, which B::pairs multiplies and adds; exact. The scores are
// the sums times the scales of their rows.
template <class B, int R, int C>
inline void code_scores(const float* q, int64_t ldq, const float* keys, int64_t pairs, const float* q_scale,
                        const float* k_scale, float* s, int64_t pitch) {
  I32 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = I32::set(0);
  for (int64_t i = 0; i < pairs; ++i, keys += C * F32::N) {
    F32 row[C];
    for (int c = 0; c < C; ++c) row[c] = F32::load(keys + c * F32::N);
    for (int r = 0; r < R; ++r) {
      const F32 x = F32::set(q[r * ldq + i]);
      for (int c = 0; c < C; ++c) sum[r][c] = B::pairs(sum[r][c], x, row[c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      (to_float(sum[r][c]) * (F32::set(q_scale[r]) * F32::load(k_scale + c * F32::N)))
          .store(s + r * pitch + c * F32::N);
}

// Where weighted values go. carry [r] multiplies what is at o already, from earlier keys (nullptr: nothing is). finish
// [r], after the last keys: what the sums are multiplied by on their way to y + row [r], `columns` of them; else
// nullptr, and they stay at o.
struct Mixed {
  float* o;
  int64_t ldo;
  const float* carry;
  const float* finish;
  float* y;
  const int64_t* row;
  int64_t columns;
};

template <int R, int C>
inline void mix(const float* w, int64_t pitch, const float* values, int64_t ldv, int64_t n, const Mixed& to) {
  Product<R, C> product;
  if (to.carry) {
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) product.sum[r][c] = F32::load(to.o + r * to.ldo + c * F32::N) * F32::set(to.carry[r]);
  } else {
    product.clear();
  }
  product.add(w, pitch, values, ldv, n);
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      if (!to.finish) {
        product.sum[r][c].store(to.o + r * to.ldo + c * F32::N);
        continue;
      }
      const F32 y = product.sum[r][c] * F32::set(to.finish[r]);
      float* at = to.y + to.row[r] + c * F32::N;
      const int64_t left = to.columns - c * F32::N;
      if (left >= F32::N) y.store(at);
      else y.store(at, left);
    }
  }
}

// The template's numbers from numbers.
template <int R, int C>
inline void scores_of(int64_t r, int64_t c, const float* q, int64_t ldq, const float* keys, int64_t dim, float* s,
                      int64_t pitch) {
  if constexpr (R > 1)
    if (r < R) return scores_of<R - 1, C>(r, c, q, ldq, keys, dim, s, pitch);
  if constexpr (C > 1)
    if (c < C) return scores_of<R, C - 1>(r, c, q, ldq, keys, dim, s, pitch);
  scores<R, C>(q, ldq, keys, dim, s, pitch);
}
template <class B, int R, int C>
inline void code_scores_of(int64_t r, int64_t c, const float* q, int64_t ldq, const float* keys, int64_t pairs,
                           const float* q_scale, const float* k_scale, float* s, int64_t pitch) {
  if constexpr (R > 1)
    if (r < R) return code_scores_of<B, R - 1, C>(r, c, q, ldq, keys, pairs, q_scale, k_scale, s, pitch);
  if constexpr (C > 1)
    if (c < C) return code_scores_of<B, R, C - 1>(r, c, q, ldq, keys, pairs, q_scale, k_scale, s, pitch);
  code_scores<B, R, C>(q, ldq, keys, pairs, q_scale, k_scale, s, pitch);
}
template <int R, int C>
inline void mix_of(int64_t r, int64_t c, const float* w, int64_t pitch, const float* values, int64_t ldv, int64_t n,
                   const Mixed& to) {
  if constexpr (R > 1)
    if (r < R) return mix_of<R - 1, C>(r, c, w, pitch, values, ldv, n, to);
  if constexpr (C > 1)
    if (c < C) return mix_of<R, C - 1>(r, c, w, pitch, values, ldv, n, to);
  mix<R, C>(w, pitch, values, ldv, n, to);
}

// -- panels ---------------------------------------------------------------------------------------
// keys [n, dim] -> [panel of C vectors of keys][dim][keys of the panel]; the last panel has as many vectors as it
// needs, the last vector zeros.
template <class B>
inline void pack_keys(const float* k, int64_t stride, int64_t n, int64_t dim, float* to) {
  constexpr int64_t W = F32::N, panel = B::columns * W;
  const int64_t whole = dim / W * W;
  for (int64_t first = 0; first < n; first += panel) {
    const int64_t vectors = least(B::columns, ceil_div(n - first, W)), ld = vectors * W;
    for (int64_t c = 0; c < vectors; ++c) {
      const int64_t key = first + c * W, count = least(W, n - key);
      const float* from = k + key * stride;
      float* at = to + c * W;
      for (int64_t j = 2 * W; j < least(3 * W, n - key); ++j) soon(from + j * stride, dim);
      if (count == W)
        for (int64_t d = 0; d < whole; d += W) B::transpose(from + d, stride, at + d * ld, ld);
      for (int64_t d = count == W ? whole : 0; d < dim; ++d)
        for (int64_t j = 0; j < W; ++j) at[d * ld + j] = j < count ? from[j * stride + d] : 0.f;
    }
    to += ld * dim;
  }
}

// values [n, dim] -> [panel of C vectors of features][n][features of the panel]
template <class B>
inline void pack_values(const float* v, int64_t stride, int64_t n, int64_t dim, float* to) {
  constexpr int64_t W = F32::N, panel = B::columns * W;
  for (int64_t j = 0; j < n; ++j, v += stride) {
    if (j + 8 < n) soon(v + 8 * stride, dim);
    for (int64_t first = 0; first < dim; first += panel) {
      const int64_t vectors = least(B::columns, ceil_div(dim - first, W));
      float* at = to + first * n + j * vectors * W;
      for (int64_t c = 0; c < vectors; ++c) {
        const float* from = v + first + c * W;
        const int64_t left = dim - first - c * W;
        (left >= W ? F32::load(from) : F32::load(from, left)).store(at + c * W);
      }
    }
  }
}

// -- weights --------------------------------------------------------------------------------------
// Of a row, over the keys so far.
struct Running {
  float maximum, sum;
  // What the sums of values are multiplied by in the end. The largest score weighs 1: a sum of 0 has seen no key.
  float finish() const { return sum == 0.f ? 0.f : 1.f / sum; }
};

// Of the scores s [n]: c tanh(s / c) where the cap c is not 0, and -inf for the first `low`.
inline void bounded(float* s, float cap, int64_t low, int64_t n) {
  constexpr int64_t W = F32::N;
  if (cap > 0) {
    const F32 c = F32::set(cap), inverse = F32::set(1.f / cap);
    for (int64_t j = 0; j < n; j += W) (c * tanh(F32::load(s + j) * inverse)).store(s + j);
  }
  for (int64_t j = 0; j < low; ++j) s[j] = kMinusInfinity;
}

// Adds the mask to the scores s [seen], fills the last vector up with -inf, and gives the largest score.
inline float masked(float* s, const float* mask, int64_t seen) {
  constexpr int64_t W = F32::N;
  static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t whole = seen / W * W, left = seen - whole;
  F32 top = F32::set(kMinusInfinity), other = top;
  if (left) {
    F32 x = F32::load(s + whole);
    if (mask) x = x + F32::load(mask + whole, left);
    top = select(F32::load(kLane) < F32::set(static_cast<float>(left)), x, top);
    top.store(s + whole);
  }
  int64_t j = 0;
  if (mask) {
    for (; j < whole; j += W) {
      const F32 x = F32::load(s + j) + F32::load(mask + j);
      x.store(s + j);
      top = max(top, x);
    }
    return highest(top);
  }
  for (; j + 2 * W <= whole; j += 2 * W) {
    top = max(top, F32::load(s + j));
    other = max(other, F32::load(s + j + W));
  }
  if (j < whole) top = max(top, F32::load(s + j));
  return highest(max(top, other));
}

// What `masked` left becomes exp(score - maximum), and zero from there up to n, where `top` is the largest score.
// Returns what sums of earlier keys are to be multiplied by.
inline float weigh(float* s, float top, int64_t seen, int64_t n, Running& row) {
  constexpr int64_t W = F32::N;
  const int64_t end = ceil_div(seen, W) * W;
  const float before = row.maximum, maximum = top > before ? top : before;
  // All masked so far: subtracting -inf would make NaN where later keys may be seen.
  const F32 shift = F32::set(maximum == kMinusInfinity ? 0.f : maximum), log2e = F32::set(1.44269504f);
  F32 total = F32::set(0.f), other = total;
  int64_t j = 0;
  for (; j + 2 * W <= end; j += 2 * W) {
    const F32 x = power_of_two((F32::load(s + j) - shift) * log2e),
              y = power_of_two((F32::load(s + j + W) - shift) * log2e);
    x.store(s + j);
    y.store(s + j + W);
    total = total + x;
    other = other + y;
  }
  if (j < end) {
    const F32 x = power_of_two((F32::load(s + j) - shift) * log2e);
    x.store(s + j);
    total = total + x;
  }
  for (j = end; j < n; ++j) s[j] = 0.f;
  float carry = 0.f;
  if (before != kMinusInfinity) {
    float x[W];
    power_of_two(F32::set(before - maximum) * log2e).store(x);
    carry = x[0];
  }
  row.maximum = maximum;
  row.sum = row.sum * carry + sum(total + other);
  return carry;
}

}  // namespace nf::NF_ARCH
#endif
