// nf_norm, nf_norm_quantize and nf_two_pass_softmax of every instruction set of this machine against float64.
// Usage: test_norm [seed]. Exits with 1 and says what was wrong.
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

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
int failures = 0;
std::string where;

void expect(bool ok, const char* what, double found = 0, double limit = 0) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAIL %s: %s: %g (limit %g)\n", where.c_str(), what, found, limit);
}

std::mt19937 rng;
std::vector<float> normal(int64_t n, double mean = 0, double spread = 1) {
  std::normal_distribution<double> dist(mean, spread);
  std::vector<float> v((size_t)n);
  for (float& x : v) x = (float)dist(rng);
  return v;
}
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(rng); }

std::vector<double> norm_row(int kind, const std::vector<double>& s, const float* gain, const float* shift, double eps,
                             double c) {
  const size_t d = s.size();
  double sum = 0, squares = 0;
  for (double v : s) sum += v, squares += v * v;
  double mean = 0, factor = 0;
  if (kind == NF_RMS) factor = 1 / std::sqrt(squares / (double)d + eps);
  if (kind == NF_CRMS) factor = 1 / std::sqrt((squares + sum * sum) / (double)(d + 1) + eps);
  if (kind == NF_LAYER || kind == NF_L1) {
    mean = sum / (double)d;
    double spread = 0;
    for (double v : s) spread += kind == NF_L1 ? std::fabs(v - mean) : (v - mean) * (v - mean);
    spread /= (double)d;
    factor = kind == NF_L1 ? 1 / (c * spread + eps) : 1 / std::sqrt(spread + eps);
  }
  std::vector<double> y(d);
  for (size_t i = 0; i < d; i++)
    y[i] = (s[i] - mean) * factor * (gain ? (double)gain[i] : 1) + (shift ? (double)shift[i] : 0);
  return y;
}

// The definition of nf_quantize_rows, in plain float.
float quantize(const float* y, int64_t d, int bits, std::vector<int8_t>& q) {
  const float limit = (float)((1 << (bits - 1)) - 1);
  float top = 0;
  bool finite = true;
  for (int64_t i = 0; i < d; i++) top = std::max(top, std::fabs(y[i])), finite = finite && std::isfinite(y[i]);
  q.assign((size_t)d, 0);
  if (!finite) return kNan;
  if (top == 0) return 1;
  const float inverse = limit / top;
  for (int64_t i = 0; i < d; i++) {
    const float v = y[i] * inverse;
    q[(size_t)i] = std::isnan(v) ? (int8_t)0 : (int8_t)std::nearbyint(std::min(std::max(v, -limit), limit));
  }
  return top / limit;
}

bool same(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)); }

void norm_case(const nf_threads* threads, int kind, int64_t rows, int64_t d, double mean, double spread, int bits,
               int flags) {
  const bool with_residual = flags & 1, with_sum = flags & 2, with_gain = flags & 4, with_shift = flags & 8;
  const int alias = flags >> 4 & 3;  // sum is x, or the residual
  std::ostringstream name;
  name << nf_isa() << " kind " << kind << " rows " << rows << " d " << d << " mean " << mean << " flags " << flags
       << " bits " << bits;
  where = name.str();
  const float eps = 1e-5f, c = 1.2533141f;
  std::vector<float> x = normal(rows * d, mean, spread), residual = normal(rows * d, 0, spread),
                     gain = normal(d, 1, 0.3), shift = normal(d);
  std::vector<float> sum((size_t)(rows * d), -1), y((size_t)(rows * d), kNan), x0 = x, residual0 = residual;
  const float *g = with_gain ? gain.data() : nullptr, *b = with_shift ? shift.data() : nullptr;
  float* out = !with_sum ? nullptr : alias == 1 ? x.data() : alias == 2 && with_residual ? residual.data() : sum.data();
  const char* error =
      nf_norm(threads, kind, x.data(), with_residual ? residual.data() : nullptr, rows, d, g, b, eps, c, out, y.data());
  expect(!error, error ? error : "");
  double worst = 0;
  for (int64_t m = 0; m < rows; m++) {
    std::vector<double> s((size_t)d);
    for (int64_t i = 0; i < d; i++) {
      const float v =
          with_residual ? x0[(size_t)(m * d + i)] + residual0[(size_t)(m * d + i)] : x0[(size_t)(m * d + i)];
      s[(size_t)i] = (double)v;
      if (out) expect(same(out[m * d + i], v), "sum", (double)out[m * d + i], (double)v);
    }
    const std::vector<double> exact = norm_row(kind, s, g, b, (double)eps, (double)c);
    double top = 1e-30, difference = 0;
    for (int64_t i = 0; i < d; i++) {
      top = std::max(top, std::fabs(exact[(size_t)i]));
      const double e = std::fabs(exact[(size_t)i] - (double)y[(size_t)(m * d + i)]);
      difference = std::isnan(e) ? INFINITY : std::max(difference, e);
    }
    worst = std::max(worst, difference / top);
  }
  expect(worst <= 2e-6, "error relative to the largest of the row", worst, 2e-6);

  x = x0;
  residual = residual0;
  std::vector<int8_t> q((size_t)(rows * d), 99);
  std::vector<float> scale((size_t)rows, -1);
  error = nf_norm_quantize(threads, kind, x.data(), with_residual ? residual.data() : nullptr, rows, d, g, b, eps, c,
                           bits, out, q.data(), scale.data());
  expect(!error, error ? error : "");
  std::vector<int8_t> q2((size_t)(rows * d), 98), row;
  std::vector<float> scale2((size_t)rows, -2);
  nf_quantize_rows(nullptr, y.data(), rows, d, bits, q2.data(), scale2.data());
  for (int64_t m = 0; m < rows; m++) {
    const float one = quantize(y.data() + m * d, d, bits, row);
    expect(same(scale[(size_t)m], one) && same(scale2[(size_t)m], one), "scale", (double)scale[(size_t)m], (double)one);
    expect(std::memcmp(row.data(), q.data() + m * d, (size_t)d) == 0, "integers differ from the definition");
  }
  expect(q == q2, "integers differ from nf_norm followed by nf_quantize_rows");
  if (out && rows > 0)
    expect(same(out[0], with_residual ? x0[0] + residual0[0] : x0[0]), "sum of nf_norm_quantize", (double)out[0], 0);
}

void norm_hazards(const nf_threads* threads) {
  where = std::string(nf_isa()) + " hazards";
  for (int kind = 0; kind < 4; kind++)
    for (int64_t d : {1, 3, 8, 31, 33, 200}) {
      std::vector<float> x = normal(5 * d), y((size_t)(5 * d)), scale(5);
      std::vector<int8_t> q((size_t)(5 * d), 5);
      for (int64_t i = 0; i < d; i++) x[(size_t)(3 * d + i)] = 0;
      x[(size_t)(d - 1)] = kNan;
      x[(size_t)(d + d / 2)] = kInf;
      x[(size_t)(2 * d)] = -kInf;
      nf_norm(threads, kind, x.data(), nullptr, 5, d, nullptr, nullptr, 1e-5f, 1, nullptr, y.data());
      nf_norm_quantize(threads, kind, x.data(), nullptr, 5, d, nullptr, nullptr, 1e-5f, 1, 8, nullptr, q.data(),
                       scale.data());
      for (int64_t i = 0; i < d; i++) expect(std::isnan(y[(size_t)i]), "a row with NaN is NaN", (double)y[(size_t)i]);
      for (int m = 0; m < 3; m++) {
        expect(std::isnan(scale[(size_t)m]), "a row with NaN or Inf has scale NaN", (double)scale[(size_t)m]);
        for (int64_t i = 0; i < d; i++) expect(q[(size_t)(m * d + i)] == 0, "a row with NaN or Inf has codes 0");
      }
      for (int64_t i = 0; i < d; i++)
        expect(y[(size_t)(3 * d + i)] == 0 && q[(size_t)(3 * d + i)] == 0, "a row of zeros is 0");
      expect(scale[3] == 1, "a row of zeros has scale 1", (double)scale[3], 1);
    }
  float one = 1;
  int8_t code;
  expect(!nf_norm(threads, 0, nullptr, nullptr, 0, 8, nullptr, nullptr, 0, 1, nullptr, nullptr), "no rows is no error");
  expect(nf_norm(threads, 4, &one, nullptr, 1, 1, nullptr, nullptr, 0, 1, nullptr, &one) != nullptr,
         "kind 4 is refused");
  expect(nf_norm(threads, 0, &one, nullptr, 1, 0, nullptr, nullptr, 0, 1, nullptr, &one) != nullptr, "d 0 is refused");
  expect(nf_norm(threads, 0, &one, nullptr, -1, 1, nullptr, nullptr, 0, 1, nullptr, &one) != nullptr,
         "-1 rows are refused");
  expect(nf_norm(threads, 0, nullptr, nullptr, 1, 1, nullptr, nullptr, 0, 1, nullptr, &one) != nullptr,
         "x missing is refused");
  expect(nf_norm(threads, 0, &one, nullptr, INT64_MAX, INT64_MAX, nullptr, nullptr, 0, 1, nullptr, &one) != nullptr,
         "2^126 is refused");
  expect(nf_norm_quantize(threads, 0, &one, nullptr, 1, 1, nullptr, nullptr, 0, 1, 9, nullptr, &code, &one) != nullptr,
         "9 bits are refused");
}

void oracles() {
  where = std::string(nf_isa()) + " oracles";
  const float x[4] = {1, 2, 3, 6}, l1[4] = {-4.f / 3, -2.f / 3, 0, 2};
  float y[4];
  nf_norm(nullptr, NF_L1, x, nullptr, 1, 4, nullptr, nullptr, 0, 1, nullptr, y);
  for (int i = 0; i < 4; i++) expect(std::fabs(y[i] - l1[i]) < 1e-6f, "L1", (double)y[i], (double)l1[i]);
  const float full[4] = {1, -2, 4, -3};  // CRMS of the first three is RMS of all four, whose sum is 0
  float crms[3];
  nf_norm(nullptr, NF_CRMS, full, nullptr, 1, 3, nullptr, nullptr, 1e-5f, 1, nullptr, crms);
  nf_norm(nullptr, NF_RMS, full, nullptr, 1, 4, nullptr, nullptr, 1e-5f, 1, nullptr, y);
  for (int i = 0; i < 3; i++) expect(std::fabs(y[i] - crms[i]) < 1e-6f, "CRMS", (double)crms[i], (double)y[i]);
}

// PyTorch's: x - max, which for a row without a finite maximum is NaN.
void softmax_case(const nf_threads* threads, const std::vector<float>& x, int64_t rows, int64_t d, const char* what) {
  where = std::string(nf_isa()) + " softmax " + what + " rows " + std::to_string(rows) + " d " + std::to_string(d);
  std::vector<float> y((size_t)(rows * d), -1);
  const char* error = nf_two_pass_softmax(threads, x.data(), rows, d, y.data());
  expect(!error, error ? error : "");
  for (int64_t m = 0; m < rows; m++) {
    double top = -INFINITY, total = 0;
    bool nan = false;
    for (int64_t i = 0; i < d; i++) {
      const double v = (double)x[(size_t)(m * d + i)];
      nan = nan || std::isnan(v);
      top = std::max(top, v);
    }
    nan = nan || std::isinf(top);
    for (int64_t i = 0; i < d; i++) total += std::exp((double)x[(size_t)(m * d + i)] - top);
    double worst = 0, small = 0;
    for (int64_t i = 0; i < d; i++) {
      const double p = (double)y[(size_t)(m * d + i)], exact = std::exp((double)x[(size_t)(m * d + i)] - top) / total;
      if (nan) {
        expect(std::isnan(p), "NaN expected", p);
      } else {
        expect(p >= 0 && p <= 1.000001, "not a probability", p);
        if (exact > 1e-35) worst = std::max(worst, std::fabs(p - exact) / exact);
        small = std::max(small, std::fabs(p - exact));
      }
    }
    // x - max rounds to 2^-24 of itself: what is 80 below the maximum may lose 5e-6.
    expect(worst <= 1e-5, "relative error", worst, 1e-5);
    expect(small <= 1e-6, "absolute error", small, 1e-6);
  }
}

void softmax_all(const nf_threads* threads) {
  const float masks[] = {-kInf, -1e30f, -std::numeric_limits<float>::max(), -1e5f, -1e6f};
  for (int64_t d : {1, 2, 7, 8, 9, 63, 64, 65, 129, 1000, 32768, 65537, 262145, 300001}) {
    const int64_t rows = d > 2000 ? 1 : 5;
    softmax_case(threads, normal(rows * d), rows, d, "normal");
    softmax_case(threads, normal(rows * d, 0, 30), rows, d, "wide");
    softmax_case(threads, normal(rows * d, 90000, 5), rows, d, "high");
    softmax_case(threads, normal(rows * d, -99980, 5), rows, d, "at -1e5");
    softmax_case(threads, normal(rows * d, -1e6, 5), rows, d, "below -1e5");
    softmax_case(threads, normal(rows * d, 3e7, 50), rows, d, "3e7");
    softmax_case(threads, std::vector<float>((size_t)(rows * d), 1e30f), rows, d, "all 1e30");
    for (float mask : masks) {
      std::vector<float> x = normal(rows * d);
      for (float& v : x) v = below(3) ? v : mask;
      x[0] = 1;
      softmax_case(threads, x, rows, d, "masked");
      softmax_case(threads, std::vector<float>((size_t)(rows * d), mask), rows, d, "all masked");
      std::fill(x.begin(), x.end(), mask);
      for (int64_t m = 0; m < rows; m++) x[(size_t)(m * d + below(d))] = 3;
      softmax_case(threads, x, rows, d, "one left");
    }
    for (float bad : {kNan, kInf}) {
      std::vector<float> x = normal(rows * d);
      x[(size_t)below((int64_t)x.size())] = bad;
      softmax_case(threads, x, rows, d, std::isnan(bad) ? "NaN" : "+Inf");
    }
    std::vector<float> rising((size_t)(rows * d));
    for (int64_t i = 0; i < rows * d; i++) rising[(size_t)i] = (float)(i % d) * 0.05f;
    softmax_case(threads, rising, rows, d, "rising");
  }
  expect(!nf_two_pass_softmax(threads, nullptr, 0, 5, nullptr), "no rows is no error");
  float one = 1;
  expect(nf_two_pass_softmax(threads, &one, -1, 1, &one) != nullptr, "-1 rows are refused");
  expect(nf_two_pass_softmax(threads, &one, 1, -1, &one) != nullptr, "d -1 is refused");
  expect(nf_two_pass_softmax(threads, nullptr, 1, 1, &one) != nullptr, "x missing is refused");
}

// The same bits for any number of threads.
void threads_agree() {
  where = std::string(nf_isa()) + " threads";
  const int64_t d = 300000;
  const std::vector<float> x = normal(2 * d);
  std::vector<float> a((size_t)(2 * d)), b = a;
  nf_two_pass_softmax(nullptr, x.data(), 2, d, a.data());
  nf_two_pass_softmax(nf_pool(3), x.data(), 2, d, b.data());
  expect(a == b, "softmax depends on the number of threads");
  nf_norm(nullptr, NF_LAYER, x.data(), nullptr, 600, d / 300, nullptr, nullptr, 1e-5f, 1, nullptr, a.data());
  nf_norm(nf_pool(3), NF_LAYER, x.data(), nullptr, 600, d / 300, nullptr, nullptr, 1e-5f, 1, nullptr, b.data());
  expect(a == b, "norm depends on the number of threads");
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(argc > 1 ? (unsigned)std::atoi(argv[1]) : 1u);
  std::istringstream names(nf_isa_available());
  for (std::string name; names >> name;) {
    if (const char* error = nf_force_isa(name.c_str())) {
      std::printf("FAIL %s: %s\n", name.c_str(), error);
      return 1;
    }
    oracles();
    for (int kind = 0; kind < 4; kind++) {
      for (int64_t d : {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 768, 769, 4095, 4097, 9001})
        for (int flags : {0, 15, 5, 10, 31, 47}) norm_case(nullptr, kind, 3, d, 0.3, 1, 8, flags);
      for (int i = 0; i < 150; i++) {
        const double mean = i % 3 ? 0.1 : std::pow(10, (double)below(5));
        norm_case(i % 2 ? nullptr : nf_pool(2), kind, below(6), 1 + below(300), mean,
                  std::pow(10, (double)below(4) - 2), 2 + (int)below(7), (int)below(64));
      }
      norm_case(nf_pool(2), kind, 70, 1024, 100, 1, 8, 15);
      norm_case(nullptr, kind, 1, 1 << 20, 3, 2, 8, 5);
    }
    norm_hazards(nullptr);
    softmax_all(nullptr);
    threads_agree();
    std::printf("%s done\n", name.c_str());
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
