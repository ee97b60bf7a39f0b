// nf_attend against softmax(scale q kᵀ + mask) v in double, on every instruction set that is here: random shapes,
// strides, masks, grouped heads; what is around y stays as it was; rows that see nothing are 0. Exit status 0 when all
// hold. An argument: how many shapes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "normfuse.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
std::mt19937 random_bits(1);
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = draw(random_bits);
  return x;
}

// An array [batch, heads, tokens, dim] in memory of one of several orders, with room between rows.
struct Array {
  int64_t stride[3], size;
  Array(int64_t b, int64_t h, int64_t t, int64_t dim) {
    const int64_t gap = dim + below(3) * 5;
    if (below(2)) {
      stride[2] = h * gap, stride[1] = gap, stride[0] = t * h * gap;  // as a projection writes it
    } else {
      stride[2] = gap, stride[1] = t * gap, stride[0] = h * t * gap;
    }
    size = b * h * t * gap;
  }
  int64_t at(int64_t b, int64_t h, int64_t t) const { return b * stride[0] + h * stride[1] + t * stride[2]; }
};

struct Case {
  nf_attention shape;
  Array q, k, v, y;
  std::vector<float> qs, ks, vs, mask;
  explicit Case(const nf_attention& s)
      : shape(s),
        q(s.batch, s.heads, s.queries, s.head_dim),
        k(s.batch, s.kv_heads, s.keys, s.head_dim),
        v(s.batch, s.kv_heads, s.keys, s.head_dim),
        y(s.batch, s.heads, s.queries, s.head_dim),
        qs(normal(q.size)),
        ks(normal(k.size)),
        vs(normal(v.size)) {
    std::copy_n(q.stride, 3, shape.q_stride), std::copy_n(k.stride, 3, shape.k_stride);
    std::copy_n(v.stride, 3, shape.v_stride), std::copy_n(y.stride, 3, shape.y_stride);
  }
  const float* mask_at() const { return mask.empty() ? nullptr : mask.data(); }
  std::vector<float> run(const nf_threads* threads, const char** error) const {
    std::vector<float> out(static_cast<size_t>(y.size), 12345.0f);
    *error = nf_attend(threads, &shape, qs.data(), ks.data(), vs.data(), mask_at(), out.data());
    return out;
  }
};

// What the scores are made from: q or k, or their codes times their scales.
std::vector<double> operands(const std::vector<float>& x, const Array& at, int64_t batch, int64_t heads, int64_t tokens,
                             int64_t dim, int bits) {
  std::vector<double> out(x.begin(), x.end());
  if (!bits) return out;
  const float limit = static_cast<float>((1 << (bits - 1)) - 1);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < tokens; ++t) {
        const float* row = x.data() + at.at(b, h, t);
        float top = 0;
        for (int64_t d = 0; d < dim; ++d) top = std::max(top, std::abs(row[d]));
        const float scale = top / limit, inverse = limit / top;
        for (int64_t d = 0; d < dim; ++d)
          out[static_cast<size_t>(at.at(b, h, t) + d)] = std::nearbyint(row[d] * inverse) * double(scale);
      }
  return out;
}

// The largest error of y relative to the largest |v|; infinity if a NaN is where none should be, or y's surroundings
// changed.
double error_of(const Case& c, const std::vector<float>& out) {
  const nf_attention& s = c.shape;
  double worst = 0;
  const std::vector<double> qs = operands(c.qs, c.q, s.batch, s.heads, s.queries, s.head_dim, s.bits);
  const std::vector<double> ks = operands(c.ks, c.k, s.batch, s.kv_heads, s.keys, s.head_dim, s.bits);
  std::vector<char> written(out.size(), 0);
  std::vector<double> w(static_cast<size_t>(s.keys));
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.queries; ++i) {
        const int64_t kv = h / (s.heads / s.kv_heads),
                      seen = s.causal ? std::clamp<int64_t>(i + 1 + s.keys - s.queries, 0, s.keys) : s.keys;
        double top = -INFINITY, sum = 0;
        for (int64_t j = 0; j < seen; ++j) {
          double x = 0;
          for (int64_t d = 0; d < s.head_dim; ++d)
            x += qs[static_cast<size_t>(c.q.at(b, h, i) + d)] * ks[static_cast<size_t>(c.k.at(b, kv, j) + d)];
          x *= s.scale;
          if (!c.mask.empty())
            x += c.mask[static_cast<size_t>(b * s.mask_stride[0] + h * s.mask_stride[1] + i * s.mask_stride[2] + j)];
          w[static_cast<size_t>(j)] = x;
          top = std::max(top, x);
        }
        for (int64_t j = 0; j < seen; ++j) sum += w[static_cast<size_t>(j)] = std::exp(w[static_cast<size_t>(j)] - top);
        for (int64_t d = 0; d < s.head_dim; ++d) {
          const size_t at = static_cast<size_t>(c.y.at(b, h, i) + d);
          written[at] = 1;
          double want = 0;
          for (int64_t j = 0; j < seen; ++j)
            want += w[static_cast<size_t>(j)] / sum * c.vs[static_cast<size_t>(c.v.at(b, kv, j) + d)];
          if (seen == 0 || top == -INFINITY) {
            if (out[at] != 0) return INFINITY;
          } else if (std::isnan(sum)) {
            if (!std::isnan(out[at])) return INFINITY;
          } else {
            const double e = std::abs(out[at] - want);
            if (!(e < 1e30)) return INFINITY;
            worst = std::max(worst, e);
          }
        }
      }
  for (size_t i = 0; i < out.size(); ++i)
    if (!written[i] && out[i] != 12345.0f) return INFINITY;
  return worst / 4;  // normal numbers: the largest of many is near 4
}

int failures = 0;
void expect(bool ok, const char* isa, const std::string& what) {
  if (ok) return;
  std::printf("FAILED (%s): %s\n", isa, what.c_str());
  ++failures;
}

nf_attention shape_of(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t dim,
                      bool causal) {
  nf_attention s{};
  s.batch = batch, s.heads = heads, s.kv_heads = kv_heads, s.queries = queries, s.keys = keys, s.head_dim = dim;
  s.scale = 1.0f / std::sqrt(static_cast<float>(dim)), s.causal = causal;
  return s;
}

std::string name_of(const nf_attention& s, bool mask) {
  std::ostringstream o;
  o << "B " << s.batch << " H " << s.heads << "/" << s.kv_heads << " T " << s.queries << " keys " << s.keys << " D "
    << s.head_dim << (s.causal ? " causal" : "") << " bits " << s.bits << (mask ? " mask" : "");
  return o.str();
}

// Strides of 0 along any of the three axes; some -inf, never a whole row unless `whole`.
void add_mask(Case& c, bool whole) {
  nf_attention& s = c.shape;
  const int64_t row = s.keys + below(3), b = below(2), h = below(2), i = below(2);
  s.mask_stride[2] = i * row;
  s.mask_stride[1] = h * (i ? s.queries : 1) * row;
  s.mask_stride[0] = b * (h ? s.heads : 1) * (i ? s.queries : 1) * row;
  c.mask = normal((b ? s.batch : 1) * (h ? s.heads : 1) * (i ? s.queries : 1) * row);
  for (size_t j = 0; j < c.mask.size(); ++j)
    if (below(3) == 0 && j % static_cast<size_t>(row) != 0) c.mask[j] = -kInfinity;
  if (whole) std::fill_n(c.mask.begin(), s.keys, -kInfinity);
}

void random_shapes(const char* isa, int count) {
  static const int64_t dims[] = {1, 3, 8, 16, 20, 32, 64, 64, 72, 80, 96, 100, 128, 160};
  static const int64_t tokens[] = {1, 2, 5, 7, 13, 16, 24, 31, 50, 64, 100, 197, 333, 400, 700};
  for (int n = 0; n < count; ++n) {
    const int64_t kv = 1 + below(2), group = 1 + below(3), dim = dims[below(14)], keys = tokens[below(15)];
    const int64_t queries = below(3) ? tokens[below(15)] : 1 + below(4);
    Case c(shape_of(1 + below(2), kv * group, kv, queries, keys, dim, below(3) == 0));
    if (below(2)) add_mask(c, below(4) == 0);
    if (below(3) == 0) c.shape.bits = below(2) ? 8 : static_cast<int32_t>(2 + below(7));
    const char* error;
    const std::vector<float> y = c.run(below(2) ? nf_pool(2) : nullptr, &error);
    expect(!error, isa, error ? error : "");
    const double e = error_of(c, y);
    expect(e < 2e-6, isa, name_of(c.shape, !c.mask.empty()) + ": error " + std::to_string(e));
  }
}

void special_values(const char* isa) {
  for (const int64_t queries : {1, 30}) {
    const char* error;
    Case c(shape_of(1, 2, 1, queries, 700, 64, false));
    c.mask.assign(700, std::numeric_limits<float>::lowest());  // all alike: the plain mean, not NaN
    std::vector<float> y = c.run(nullptr, &error);
    double mean = 0;
    for (int64_t j = 0; j < 700; ++j) mean += c.vs[static_cast<size_t>(c.v.at(0, 0, j))] / 700.0;
    expect(std::abs(y[0] - mean) < 1e-6, isa, "a mask of the lowest float everywhere is no mask");

    c.mask.assign(700, -kInfinity);
    c.mask[699] = 0.5f;  // tiles that are masked altogether come first
    y = c.run(nullptr, &error);
    expect(y[0] == c.vs[static_cast<size_t>(c.v.at(0, 0, 699))], isa, "one visible key gives its value exactly");

    c.mask.assign(700, 0.0f);
    c.ks[static_cast<size_t>(c.k.at(0, 0, 311) + 5)] = NAN;
    y = c.run(nullptr, &error);
    expect(std::isnan(y[0]), isa, "a NaN among the keys gives NaN");
    c.mask[311] = -kInfinity;
    y = c.run(nullptr, &error);
    expect(std::isnan(y[0]), isa, "a masked NaN among the keys gives NaN, as NaN - inf is");
    c.mask.assign(700, -kInfinity);
    y = c.run(nullptr, &error);
    expect(std::isnan(y[0]), isa, "a NaN among keys that are all masked gives NaN");
    c.ks[static_cast<size_t>(c.k.at(0, 0, 311) + 5)] = 1;
    y = c.run(nullptr, &error);
    expect(y[0] == 0, isa, "keys that are all masked give 0");
  }
  // Large scores: nothing overflows, differences are kept
  Case c(shape_of(1, 1, 1, 9, 50, 16, false));
  c.shape.scale = 300.0f;
  const char* error;
  expect(error_of(c, c.run(nullptr, &error)) < 1e-4, isa, "large scores");
  c.shape.scale = -0.5f;
  expect(error_of(c, c.run(nullptr, &error)) < 1e-6, isa, "a negative scale");
}

void wrong_arguments(const char* isa) {
  const auto refused = [&](nf_attention s, const char* word) {
    std::vector<float> x(4096, 1.0f), y(4096);
    const char* error = nf_attend(nullptr, &s, x.data(), x.data(), x.data(), nullptr, y.data());
    expect(error && std::strstr(error, word), isa, std::string("an error that names ") + word);
  };
  refused(shape_of(1, 3, 2, 4, 4, 8, false), "kv_heads");
  refused(shape_of(1, 2, 0, 4, 4, 8, false), "kv_heads");
  refused(shape_of(1, 2, 2, 4, 0, 8, false), "key");
  refused(shape_of(1, 2, 2, 4, 4, 0, false), "head_dim");
  refused(shape_of(-1, 2, 2, 4, 4, 8, false), "batch");
  nf_attention nine = shape_of(1, 2, 2, 4, 4, 8, false);
  nine.bits = 9;
  refused(nine, "bits");
  nf_attention empty = shape_of(0, 2, 2, 4, 4, 8, false);
  expect(!nf_attend(nullptr, &empty, nullptr, nullptr, nullptr, nullptr, nullptr), isa,
         "an empty batch is nothing to do");
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  std::istringstream names(nf_isa_available());
  for (std::string isa; names >> isa;) {
    if (const char* error = nf_force_isa(isa.c_str())) {
      std::printf("%s: %s\n", isa.c_str(), error);
      return 1;
    }
    random_shapes(isa.c_str(), count);
    special_values(isa.c_str());
    wrong_arguments(isa.c_str());
    std::printf("%s: %s\n", isa.c_str(), failures ? "failed" : "ok");
  }
  return failures != 0;
}
