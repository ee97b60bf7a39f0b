// softmax(scale q kᵀ + mask) v by tiles of keys with a running maximum (Milakov and Gimelshein 2018; Rabe and Staats
// 2021). Two ways through a task:
//   packed    keys and values of a tile are copied into panels that stay in the caches while blocks of rows pass;
//   streamed  few rows: nothing would use a panel twice, so that keys and values are read where they lie, once.
// Included after simd.h by one source file an instruction set.
#pragma once
#include "attention/attention.h"
#include "attention/tile.h"
#include "simd/quantize.h"
#if NF_BUILT
namespace nf::NF_ARCH {

// B, the blocking of an instruction set: rows and columns of vectors of a product, block_rows whose scores are alive at
// once, few_rows at most that are streamed, and what F32 does not have: transpose (of N x N floats) and sums (of four
// vectors).
template <class B>
struct Attention {
  static constexpr int64_t W = F32::N, panel = B::columns * W;

  // A row of the task: its head and query. Counted up, because dividing costs as much as a vector of exponentials.
  struct Row {
    int64_t head, query;
    Row(const AttendPlan& p, int64_t kv, int64_t row)
        : head(kv * p.group + row / p.shape.queries), query(row % p.shape.queries) {}
    void next(const AttendPlan& p) {
      if (++query == p.shape.queries) query = 0, ++head;
    }
    int64_t at(const int64_t* stride, int64_t b) const { return b * stride[0] + head * stride[1] + query * stride[2]; }
    const float* mask(const AttendPlan& p, int64_t b, int64_t key0) const {
      return p.mask ? p.mask + at(p.shape.mask_stride, b) + key0 : nullptr;
    }
    // Scores of n keys from key0 on: capped, and -inf before its window.
    void bound(const AttendPlan& p, int64_t key0, int64_t n, float* s) const {
      const int64_t low = p.shape.window ? query + p.shape.keys - p.shape.queries + 1 - p.shape.window - key0 : 0;
      bounded(s, p.shape.softcap, most(0, least(n, low)), n);
    }
    // How many of n keys from key0 on it sees.
    int64_t seen(const AttendPlan& p, int64_t key0, int64_t n) const {
      return p.shape.causal ? most(0, least(n, query + p.shape.keys - p.shape.queries + 1 - key0)) : n;
    }
  };

  // scale * q, one row after the other in whole vectors
  static void scaled_queries(const AttendPlan& p, int64_t b, Row row, int64_t rows, float* to) {
    const int64_t dim = p.shape.head_dim;
    const F32 scale = F32::set(p.shape.scale);
    for (int64_t r = 0; r < rows; ++r, to += p.padded_dim, row.next(p)) {
      const float* from = p.q + row.at(p.shape.q_stride, b);
      int64_t d = 0;
      for (; d + W <= dim; d += W) (scale * F32::load(from + d)).store(to + d);
      if (d < dim) (scale * F32::load(from + d, dim - d)).store(to + d);
    }
  }

  // A row of floats as codes, two int16 to a float of `to`: those of two neighbouring vectors. Returns its scale.
  static float coded(const float* x, int64_t dim, int32_t bits, float* to) {
    float inverse, scale;
    row_scale_of(highest_bits(x, dim), bits, &inverse, &scale);
    const F32 by = F32::set(inverse), limit = F32::set(static_cast<float>((1 << (bits - 1)) - 1));
    const auto codes = [&](int64_t d) {
      return to_code(d + W <= dim ? F32::load(x + d) : F32::load(x + d, most(0, dim - d)), by, limit);
    };
    for (int64_t d = 0; d < dim; d += 2 * W, to += W)
      float_of((codes(d) & I32::set(0xffff)) + shift_left<16>(codes(d + W))).store(to);
    return scale;
  }

  // One function on purpose: cut into its steps, GCC 12 inlines other tiles, and 197 tokens take 2 % longer on AVX-512.
  static void packed(const AttendPlan& p, int64_t b, int64_t kv, int64_t row0, int64_t row1, float* scratch) {
    const nf_attention& a = p.shape;
    const int64_t rows = row1 - row0, dim = a.head_dim, ldo = p.padded_dim;
    float* keys = scratch;
    float* values = keys + ceil_div(p.tile_keys, W) * W * ldo;
    float* s = values + p.tile_keys * ldo;
    float* q = s + B::block_rows * p.pitch;
    float* o = q + B::block_rows * ldo;
    Running* running = reinterpret_cast<Running*>(o + (p.tile_keys < a.keys ? rows * ldo : 0));
    const int64_t pairs = ceil_div(dim, 2 * W) * W;
    float* k_scale = reinterpret_cast<float*>(running + rows);
    float* k_codes = k_scale + ceil_div(p.tile_keys, W) * W;
    for (int64_t r = 0; r < rows; ++r) running[r] = {kMinusInfinity, 0.f};
    for (int64_t key0 = 0; key0 < a.keys; key0 += p.tile_keys) {
      const int64_t n = least(p.tile_keys, a.keys - key0);
      const float* k = p.k + b * a.k_stride[0] + kv * a.k_stride[1] + key0 * a.k_stride[2];
      if (a.bits) {
        for (int64_t j = 0; j < n; ++j) {
          if (j + 8 < n) soon(k + (j + 8) * a.k_stride[2], dim);
          k_scale[j] = coded(k + j * a.k_stride[2], dim, a.bits, k_codes + j * pairs);
        }
        for (int64_t j = n; j < ceil_div(n, W) * W; ++j) k_scale[j] = 0.f;
        pack_keys<B>(k_codes, pairs, n, pairs, keys);
      } else {
        pack_keys<B>(k, a.k_stride[2], n, dim, keys);
      }
      pack_values<B>(p.v + b * a.v_stride[0] + kv * a.v_stride[1] + key0 * a.v_stride[2], a.v_stride[2], n, dim,
                     values);
      Row row(p, kv, row0);
      for (int64_t r0 = 0; r0 < rows; r0 += B::block_rows) {
        const int64_t block = least(B::block_rows, rows - r0);
        if (!a.bits) scaled_queries(p, b, row, block, q);
        float q_scale[B::block_rows];
        const float* row_mask[B::block_rows];
        int64_t row_seen[B::block_rows], row_y[B::block_rows];
        int64_t seen[B::block_rows] = {};  // [r]: the most that one of the rows r to r + B::rows sees
        for (int64_t r = 0; r < block; ++r, row.next(p)) {
          if (a.bits) q_scale[r] = a.scale * coded(p.q + row.at(a.q_stride, b), dim, a.bits, q + r * ldo);
          row_mask[r] = row.mask(p, b, key0);
          row_seen[r] = row.seen(p, key0, n);
          row_y[r] = row.at(a.y_stride, b);
          seen[r / B::rows * B::rows] = most(seen[r / B::rows * B::rows], row_seen[r]);
        }
        for (int64_t j = 0; j < n; j += panel)
          for (int64_t r = 0; r < block; r += B::rows)
            if (j < seen[r]) {
              const int64_t count = least(B::rows, block - r), vectors = least(B::columns, ceil_div(n - j, W));
              if (a.bits)
                code_scores_of<B, B::rows, B::columns>(count, vectors, q + r * ldo, ldo, keys + j * pairs, pairs,
                                                       q_scale + r, k_scale + j, s + r * p.pitch + j, p.pitch);
              else
                scores_of<B::rows, B::columns>(count, vectors, q + r * ldo, ldo, keys + j * dim, dim,
                                               s + r * p.pitch + j, p.pitch);
            }
        float top[B::block_rows], carry[B::block_rows], finish[B::block_rows];
        if (a.window || a.softcap > 0) {
          Row bounds(p, kv, row0 + r0);
          for (int64_t r = 0; r < block; ++r, bounds.next(p)) bounds.bound(p, key0, row_seen[r], s + r * p.pitch);
        }
        for (int64_t r = 0; r < block; ++r) top[r] = masked(s + r * p.pitch, row_mask[r], row_seen[r]);
        for (int64_t r = 0; r < block; ++r) {
          carry[r] = weigh(s + r * p.pitch, top[r], row_seen[r], seen[r / B::rows * B::rows], running[r0 + r]);
          finish[r] = running[r0 + r].finish();
        }
        for (int64_t d = 0; d < dim; d += panel) {
          const int64_t vectors = least(B::columns, ceil_div(dim - d, W));
          for (int64_t r = 0; r < block; r += B::rows) {
            const Mixed to{o + (r0 + r) * ldo + d,
                           ldo,
                           key0 ? carry + r : nullptr,
                           key0 + n == a.keys ? finish + r : nullptr,
                           p.y + d,
                           row_y + r,
                           dim - d};
            mix_of<B::rows, B::columns>(least(B::rows, block - r), vectors, s + r * p.pitch, p.pitch, values + d * n,
                                        vectors * W, seen[r], to);
          }
        }
      }
    }
  }

  // s[j] = q · k[j]
  static void dots(const float* q, const float* k, int64_t stride, int64_t n, int64_t dim, float* s) {
    const int64_t whole = dim / W * W, left = dim - whole;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4, k += 4 * stride) {
      F32 x[4] = {F32::set(0.f), F32::set(0.f), F32::set(0.f), F32::set(0.f)};
      for (int64_t d = 0; d < whole; d += W)
        for (int i = 0; i < 4; ++i) x[i] = fma(F32::load(q + d), F32::load(k + i * stride + d), x[i]);
      if (left)
        for (int i = 0; i < 4; ++i) x[i] = fma(F32::load(q + whole), F32::load(k + i * stride + whole, left), x[i]);
      B::sums(x, s + j);
    }
    for (; j < n; ++j, k += stride) {
      F32 x = F32::set(0.f);
      for (int64_t d = 0; d < whole; d += W) x = fma(F32::load(q + d), F32::load(k + d), x);
      if (left) x = fma(F32::load(q + whole), F32::load(k + whole, left), x);
      s[j] = sum(x);
    }
  }

  // y[d] = finish (carry o[d] + Σ_j w[j] v[j, d]) for C vectors of features, the values where they lie
  static void mix_row(const float* w, const float* v, int64_t stride, int64_t n, Mixed to) {
    int64_t d = 0;
    const int64_t dim = to.columns;
    const auto step = [&](int64_t by) { d += by, to.o += by, to.y += by, to.columns -= by; };
    for (; d + 8 * W <= dim; step(8 * W)) mix<1, 8>(w, 0, v + d, stride, n, to);
    for (; d + 4 * W <= dim; step(4 * W)) mix<1, 4>(w, 0, v + d, stride, n, to);
    for (; d + W <= dim; step(W)) mix<1, 1>(w, 0, v + d, stride, n, to);
    if (d == dim) return;
    F32 x = to.carry ? F32::load(to.o) * F32::set(*to.carry) : F32::set(0.f);
    for (int64_t j = 0; j < n; ++j) x = fma(F32::set(w[j]), F32::load(v + j * stride + d, dim - d), x);
    if (to.finish) (x * F32::set(*to.finish)).store(to.y + *to.row, dim - d);
    else x.store(to.o);
  }

  static void streamed(const AttendPlan& p, int64_t b, int64_t kv, int64_t row0, int64_t row1, float* scratch) {
    const nf_attention& a = p.shape;
    const int64_t rows = row1 - row0, dim = a.head_dim, ldo = p.padded_dim;
    float* q = scratch;
    float* o = q + rows * ldo;
    float* s = o + rows * ldo;
    Running* running = reinterpret_cast<Running*>(s + rows * p.pitch);
    scaled_queries(p, b, Row(p, kv, row0), rows, q);
    for (int64_t r = 0; r < rows; ++r) running[r] = {kMinusInfinity, 0.f};
    for (int64_t key0 = 0; key0 < a.keys; key0 += p.tile_keys) {
      const int64_t n = least(p.tile_keys, a.keys - key0);
      const float* k = p.k + b * a.k_stride[0] + kv * a.k_stride[1] + key0 * a.k_stride[2];
      const float* v = p.v + b * a.v_stride[0] + kv * a.v_stride[1] + key0 * a.v_stride[2];
      Row row(p, kv, row0);
      for (int64_t r = 0; r < rows; ++r, row.next(p)) {
        const int64_t seen = row.seen(p, key0, n), row_y = row.at(a.y_stride, b);
        dots(q + r * ldo, k, a.k_stride[2], seen, dim, s + r * p.pitch);
        if (a.window || a.softcap > 0) row.bound(p, key0, seen, s + r * p.pitch);
        const float top = masked(s + r * p.pitch, row.mask(p, b, key0), seen);
        const float carry = weigh(s + r * p.pitch, top, seen, seen, running[r]);
        const float finish = running[r].finish();
        mix_row(s + r * p.pitch, v, a.v_stride[2], seen,
                {o + r * ldo, ldo, key0 ? &carry : nullptr, key0 + n == a.keys ? &finish : nullptr, p.y, &row_y, dim});
      }
    }
  }

  static int64_t scratch(const AttendPlan& p) {
    const int64_t rows = p.rows_per_task;
    if (p.streamed) return rows * (2 * p.padded_dim + p.pitch + 2);
    const int64_t kept = p.tile_keys < p.shape.keys ? rows * p.padded_dim : 0;
    return ceil_div(p.tile_keys, W) * W * p.padded_dim + p.tile_keys * p.padded_dim +
           B::block_rows * (p.pitch + p.padded_dim) + kept + 2 * rows +
           (p.shape.bits ? ceil_div(p.tile_keys, W) * W + p.tile_keys * p.padded_dim : 0);
  }

  static void attend(const AttendPlan& p, int64_t b, int64_t kv, int64_t row0, int64_t row1, float* scratch) {
    (p.streamed ? streamed : packed)(p, b, kv, row0, row1, scratch);
  }

  // s[r][j] = q[r] · k[j] for R rows: a key is loaded once for all of them.
  template <int R>
  static void dots_of(const float* q, int64_t ldq, const float* k, int64_t n, int64_t dim, float* s, int64_t pitch) {
    const int64_t whole = dim / W * W, left = dim - whole;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4, k += 4 * dim) {
      F32 x[R][4];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i) x[r][i] = F32::set(0.f);
      for (int64_t d = 0; d < whole; d += W)
        for (int i = 0; i < 4; ++i) {
          const F32 key = F32::load(k + i * dim + d);
          for (int r = 0; r < R; ++r) x[r][i] = fma(F32::load(q + r * ldq + d), key, x[r][i]);
        }
      if (left)
        for (int i = 0; i < 4; ++i) {
          const F32 key = F32::load(k + i * dim + whole, left);
          for (int r = 0; r < R; ++r) x[r][i] = fma(F32::load(q + r * ldq + whole), key, x[r][i]);
        }
      for (int r = 0; r < R; ++r) B::sums(x[r], s + r * pitch + j);
    }
    for (int r = 0; r < R && j < n; ++r) dots(q + r * ldq, k, dim, n - j, dim, s + r * pitch + j);
  }
  template <int R>
  static void dots_of_rows(int64_t rows, const float* q, int64_t ldq, const float* k, int64_t n, int64_t dim, float* s,
                           int64_t pitch) {
    if constexpr (R > 1)
      if (rows < R) return dots_of_rows<R - 1>(rows, q, ldq, k, n, dim, s, pitch);
    dots_of<R>(q, ldq, k, n, dim, s, pitch);
  }

  // A row's slots [low, high) of n from key0 on, and nothing else, count.
  static void weigh_part(const CachedPlan& p, int64_t b, int64_t row, int64_t key0, int64_t n, float* s, float* to) {
    const int64_t at = p.start[b] + row % p.shape.tokens;
    const int64_t window = p.shape.window ? at + 1 - p.shape.window : 0;
    const int64_t low = most(0, most(p.first[b], window) - key0), high = most(0, least(n, at + 1 - key0));
    bounded(s, p.shape.softcap, least(low, high), high);
    const float top = masked(s, p.bias[b] ? p.bias[b] + key0 : nullptr, high);
    Running running{kMinusInfinity, 0.f};
    weigh(s, top, high, n, running);
    to[0] = running.maximum, to[1] = running.sum;
  }

  static void attend_part(const CachedPlan& p, int64_t b, int64_t kv, int64_t part, float* s) {
    const nf_cache& a = p.shape;
    const int64_t dim = a.head_dim, ldo = p.padded_dim, head = b * a.kv_heads + kv, place = head * p.parts + part;
    const int64_t low = most(p.first[b], a.window ? p.start[b] + 1 - a.window : 0);
    const int64_t key0 = most(part * p.part, low), n = least((part + 1) * p.part, p.start[b] + a.tokens) - key0;
    float* const weights = p.weight + 2 * place * p.rows;
    if (n <= 0) {  // nobody sees it
      for (int64_t r = 0; r < p.rows; ++r) weights[2 * r] = kMinusInfinity, weights[2 * r + 1] = 0.f;
      return;
    }
    const int64_t offset = (head * a.present + key0) * dim;
    for (int64_t r0 = 0; r0 < p.rows; r0 += B::few_rows) {
      const int64_t rows = least(B::few_rows, p.rows - r0), row = place * p.rows + r0;
      dots_of_rows<B::few_rows>(rows, p.q + (head * p.rows + r0) * ldo, ldo, p.key + offset, n, dim, s, p.pitch);
      for (int64_t r = 0; r < rows; ++r) weigh_part(p, b, r0 + r, key0, n, s + r * p.pitch, weights + 2 * (r0 + r));
      for (int64_t d = 0; d < dim; d += panel) {
        const Mixed to{p.found + row * ldo + d, ldo, nullptr, nullptr, nullptr, nullptr, dim - d};
        mix_of_cache(rows, s, p.pitch, p.value + offset + d, dim, n, to);
      }
    }
  }

  // As mix_of, but the values lie where they are: the last vector of a row may not be whole.
  static void mix_of_cache(int64_t rows, const float* w, int64_t pitch, const float* v, int64_t ldv, int64_t n,
                           const Mixed& to) {
    const int64_t vectors = to.columns / W;
    if (vectors >= B::columns) {
      mix_of<B::few_rows, B::columns>(rows, B::columns, w, pitch, v, ldv, n, to);
      return;
    }
    for (int64_t c = 0; c < ceil_div(to.columns, W); ++c)
      for (int64_t r = 0; r < rows; ++r) {
        F32 sum = F32::set(0.f);
        for (int64_t j = 0; j < n; ++j)
          sum = fma(F32::set(w[r * pitch + j]), F32::load(v + j * ldv + c * W, to.columns - c * W), sum);
        sum.store(to.o + r * to.ldo + c * W);
      }
  }

  static constexpr AttendKernels kernels() {
    return {W, panel, B::block_rows, B::few_rows, scratch, attend, attend_part};
  }
};

}  // namespace nf::NF_ARCH
#endif
