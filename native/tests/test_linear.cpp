// Tests every integer product of every instruction set this machine has, on random shapes, against sums made one by
// one. tests/README.md says how to build it. Prints what fails; exit status 1 if anything did. An argument: how many
// random cases.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "weights.h"

namespace {

int failures = 0;
int checks = 0;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 30) std::printf("FAILED %s\n", what.c_str());
}

std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (std::string all = nf_isa_available(); !all.empty();) {
    const size_t space = all.find(' ');
    found.push_back(all.substr(0, space));
    all = space == std::string::npos ? "" : all.substr(space + 1);
  }
  return found;
}

bool same(const float* a, const float* b, size_t n) { return std::memcmp(a, b, n * sizeof(float)) == 0; }

double activated(double x, int epilogue) {
  switch (epilogue) {
    case NF_RELU: return x > 0 ? x : 0;
    case NF_GELU: return 0.5 * x * (1 + std::erf(x * 0.7071067811865476));
    case NF_GELU_TANH: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case NF_SILU: return x / (1 + std::exp(-x));
    default: return x;
  }
}

struct Case {
  int64_t m, n, k;
  int bits, groups, threads, epilogue;
  bool full_scale, bias, residual, one_scale;
  int block = 0;
};

void test_case(const Case& c, std::mt19937& rng) {
  Weights w(c.n, c.k, c.bits, c.groups, rng, c.full_scale);
  if (c.block) w.multiply(c.block, rng, c.full_scale);
  const nf_weight view = w.view(c.bias);
  const size_t outputs = static_cast<size_t>(c.m * c.n), inputs = static_cast<size_t>(c.m * c.k);
  std::vector<int8_t> q(inputs);
  for (auto& x : q)
    x = static_cast<int8_t>(c.full_scale ? (rng() % 2 ? 127 : -127) : static_cast<int>(rng() % 255) - 127);
  std::vector<float> row_scale(static_cast<size_t>(c.m));
  for (auto& s : row_scale) s = 0.0001f * static_cast<float>(1 + rng() % 100);
  std::vector<float> residual(outputs);
  for (auto& r : residual) r = static_cast<float>(rng() % 1000) * 0.01f;
  std::vector<int32_t> want(outputs);
  std::vector<float> want_y(outputs), tolerance(outputs);
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      const size_t i = static_cast<size_t>(m * c.n + n);
      want[i] = static_cast<int32_t>(w.sum(q.data() + m * c.k, n));
      const float rs = row_scale[static_cast<size_t>(c.one_scale ? 0 : m)] * w.scale[static_cast<size_t>(n)];
      volatile float product = static_cast<float>(want[i]) * rs;  // rounded before the sum
      const float y = c.bias ? product + w.bias[static_cast<size_t>(n)] : product;
      const double a = activated(y, c.epilogue);
      want_y[i] = static_cast<float>(a) + (c.residual ? residual[i] : 0.f);
      tolerance[i] = c.epilogue <= NF_RELU ? 0.f : 1e-6f * (std::fabs(y) + std::fabs(want_y[i]) + 0.1f);
    }
  const nf_threads* threads = c.threads == 1 ? nullptr : nf_pool(c.threads);
  std::vector<float> x(inputs);
  for (auto& v : x) v = (static_cast<float>(rng() % 20001) - 10000.f) * 0.001f;
  if (c.m > 1) std::fill(x.begin(), x.begin() + c.k, 0.f);
  std::vector<int8_t> first_q, first_out;
  std::vector<float> first_scale, first_linear, first_out_scale;

  for (const std::string& isa : isas()) {
    nf_force_isa(isa.c_str());
    char text[200];
    std::snprintf(text, sizeof text, "%s m=%d n=%d k=%d bits=%d groups=%d block=%d threads=%d epilogue=%d%s",
                  isa.c_str(), int(c.m), int(c.n), int(c.k), c.bits, c.groups, c.block, c.threads, c.epilogue,
                  c.full_scale ? " full scale" : "");
    const std::string where = text;
    std::vector<int32_t> got(outputs, 77);
    const char* wrong = nf_matmul_i32(threads, &view, q.data(), c.m, got.data());
    check(!wrong, where + ": " + (wrong ? wrong : ""));
    size_t bad = 0, at = 0;
    for (size_t i = outputs; i-- > 0;)
      if (got[i] != want[i]) ++bad, at = i;
    check(bad == 0, where + ": " + std::to_string(bad) + " sums differ, first at " + std::to_string(at) + ": " +
                        std::to_string(bad ? got[at] : 0) + " for " + std::to_string(bad ? want[at] : 0));

    std::vector<float> y(residual);
    check(!nf_matmul(threads, &view, q.data(), row_scale.data(), c.one_scale ? 0 : 1, c.m, c.epilogue,
                     c.residual ? y.data() : nullptr, y.data()),
          where + ": matmul");
    bad = 0;
    for (size_t i = outputs; i-- > 0;)
      if (!(std::fabs(y[i] - want_y[i]) <= tolerance[i])) ++bad, at = i;
    check(bad == 0, where + ": " + std::to_string(bad) + " outputs differ, first at " + std::to_string(at) + ": " +
                        std::to_string(bad ? y[at] : 0) + " for " + std::to_string(bad ? want_y[at] : 0));

    // Quantized again: the same as in two steps.
    std::vector<float> plain(outputs), out_scale(static_cast<size_t>(c.m)), two_scale(static_cast<size_t>(c.m));
    std::vector<int8_t> out(outputs), two(outputs);
    nf_matmul(nullptr, &view, q.data(), row_scale.data(), 1, c.m, c.epilogue, nullptr, plain.data());
    nf_quantize_rows(nullptr, plain.data(), c.m, c.n, 8, two.data(), two_scale.data());
    check(!nf_matmul_quantize(threads, &view, q.data(), row_scale.data(), 1, c.m, c.epilogue, 8, out.data(),
                              out_scale.data()),
          where + ": matmul_quantize");
    check(out == two && same(out_scale.data(), two_scale.data(), out_scale.size()),
          where + ": matmul_quantize is not matmul, then quantize_rows");

    // Floats in: the same as in two steps.
    std::vector<int8_t> codes(inputs);
    std::vector<float> scales(static_cast<size_t>(c.m)), linear(outputs), steps(outputs);
    const int ab = 4 + c.bits % 5;
    nf_quantize_rows(threads, x.data(), c.m, c.k, ab, codes.data(), scales.data());
    nf_matmul(nullptr, &view, codes.data(), scales.data(), 1, c.m, c.epilogue, nullptr, steps.data());
    check(!nf_linear(threads, &view, x.data(), c.m, ab, 0.f, c.epilogue, nullptr, linear.data()), where + ": linear");
    check(same(linear.data(), steps.data(), outputs), where + ": linear is not quantize_rows, then matmul");
    const float fixed = 0.05f;
    std::vector<int8_t> static_codes(inputs);
    nf_quantize_static(threads, x.data(), static_cast<int64_t>(inputs), fixed, ab, static_codes.data());
    nf_matmul(nullptr, &view, static_codes.data(), &fixed, 0, c.m, c.epilogue, nullptr, steps.data());
    check(!nf_linear(threads, &view, x.data(), c.m, ab, fixed, c.epilogue, nullptr, linear.data()),
          where + ": static linear");
    check(same(linear.data(), steps.data(), outputs), where + ": linear is not quantize_static, then matmul");
    const int limit = (1 << (ab - 1)) - 1;
    bad = 0;
    for (int64_t m = 0; m < c.m; ++m) {
      float highest = 0;
      for (int64_t i = 0; i < c.k; ++i) highest = std::max(highest, std::fabs(x[static_cast<size_t>(m * c.k + i)]));
      const float inverse = highest > 0 ? static_cast<float>(limit) / highest : 0.f,
                  scale = highest > 0 ? highest / static_cast<float>(limit) : 1.f;
      bad += scales[static_cast<size_t>(m)] != scale;
      for (int64_t i = 0; i < c.k; ++i) {
        const size_t j = static_cast<size_t>(m * c.k + i);
        bad += codes[j] != std::min<long>(limit, std::max<long>(-limit, std::lrintf(x[j] * inverse)));
        bad += static_codes[j] != std::min<long>(limit, std::max<long>(-limit, std::lrintf(x[j] / fixed)));
      }
    }
    check(bad == 0, where + ": " + std::to_string(bad) + " codes or scales differ");
  }
  nf_force_isa(nullptr);
}

// Rows that are zero, tiny, NaN or infinite.
void test_special_rows() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const std::string& isa : isas()) {
    nf_force_isa(isa.c_str());
    for (int64_t k : {1, 3, 7, 8, 31, 32, 33, 64, 100}) {
      for (float special : {inf, -inf, nan, -nan}) {
        for (int64_t at = 0; at < k; ++at) {
          std::vector<float> x(static_cast<size_t>(2 * k), 0.5f);
          x[static_cast<size_t>(at)] = special;
          std::vector<int8_t> q(static_cast<size_t>(2 * k), 9);
          float scale[2];
          nf_quantize_rows(nullptr, x.data(), 2, k, 8, q.data(), scale);
          bool good = std::isnan(scale[0]) && scale[1] == 0.5f / 127.f;
          for (int64_t i = 0; i < k; ++i)
            good = good && q[static_cast<size_t>(i)] == 0 && q[static_cast<size_t>(k + i)] == 127;
          check(good, isa + ": a row with NaN or infinity, k=" + std::to_string(k) + " at " + std::to_string(at));
          nf_quantize_static(nullptr, x.data(), k, 0.01f, 8, q.data());
          check(q[static_cast<size_t>(at)] == (std::isnan(special) ? 0
                                               : special > 0       ? 127
                                                                   : -127),
                isa + ": static code of NaN or infinity");
        }
      }
      std::vector<float> x(static_cast<size_t>(k), 0.f);
      std::vector<int8_t> q(static_cast<size_t>(k), 9);
      float scale;
      nf_quantize_rows(nullptr, x.data(), 1, k, 8, q.data(), &scale);
      bool good = scale == 1.f;
      for (int8_t c : q) good = good && c == 0;
      check(good, isa + ": a row of zeros");
      x[static_cast<size_t>(k - 1)] = 1e-42f;  // subnormal: its inverse is infinite
      nf_quantize_rows(nullptr, x.data(), 1, k, 8, q.data(), &scale);
      good = q[static_cast<size_t>(k - 1)] == 127;
      for (int64_t i = 0; i + 1 < k; ++i) good = good && q[static_cast<size_t>(i)] == 0;
      check(good, isa + ": a subnormal row");
    }
  }
  nf_force_isa(nullptr);
}

void test_arguments() {
  std::mt19937 rng(3);
  const Weights w(5, 9, 4, 2, rng);
  nf_weight v = w.view();
  std::vector<int8_t> q(9), out(5);
  std::vector<float> x(9), y(5);
  float scale = 1.f;
  std::vector<int32_t> sums(5);
  check(nf_packed_bytes(5, 4, 2, w.sizes.data()) == static_cast<int64_t>(w.packed.size()), "packed_bytes");
  check(nf_packed_bytes(5, 9, 2, w.sizes.data()) == -1 && nf_packed_bytes(0, 4, 2, w.sizes.data()) == -1 &&
            nf_packed_bytes(5, 4, 2, nullptr) == -1,
        "packed_bytes of wrong arguments");
  auto refused = [&](const nf_weight* bad, const char* what) {
    check(nf_matmul_i32(nullptr, bad, q.data(), 1, sums.data()) &&
              nf_matmul(nullptr, bad, q.data(), &scale, 1, 1, 0, nullptr, y.data()) &&
              nf_linear(nullptr, bad, x.data(), 1, 8, 0.f, 0, nullptr, y.data()) &&
              nf_matmul_quantize(nullptr, bad, q.data(), &scale, 1, 1, 0, 8, out.data(), &scale),
          std::string("not refused: ") + what);
  };
  refused(nullptr, "no weight");
  nf_weight b = v;
  b.bits = 1, refused(&b, "1 bit");
  b.bits = 9, refused(&b, "9 bits");
  b = v, b.groups = 0, refused(&b, "no group");
  b = v, b.groups = 17, refused(&b, "17 groups");
  b = v, b.order = nullptr, refused(&b, "no order");
  b = v, b.k = 10, refused(&b, "sizes that do not add up");
  b = v, b.packed = nullptr, refused(&b, "no codes");
  b = v, b.scale = nullptr, refused(&b, "no scale");
  b = v, b.n = 0, refused(&b, "no outputs");
  Weights blocked(5, 40, 4, 1, rng);
  blocked.multiply(32, rng);
  q.resize(40), x.resize(40);
  v = blocked.view();
  b = v, b.block = 48, refused(&b, "blocks of 48");
  b = v, b.bits = 5, refused(&b, "blocks of 5 bits");
  b = w.view(), b.multipliers = v.multipliers, b.block = 32, refused(&b, "blocks of two groups");
  v = w.view();
  check(nf_matmul(nullptr, &v, nullptr, &scale, 1, 1, 0, nullptr, y.data()) &&
            nf_matmul(nullptr, &v, q.data(), nullptr, 1, 1, 0, nullptr, y.data()) &&
            nf_matmul(nullptr, &v, q.data(), &scale, 1, 1, 0, nullptr, nullptr) &&
            nf_matmul(nullptr, &v, q.data(), &scale, 2, 1, 0, nullptr, y.data()) &&
            nf_matmul(nullptr, &v, q.data(), &scale, 1, 1, 5, nullptr, y.data()) &&
            nf_matmul(nullptr, &v, q.data(), &scale, 1, -1, 0, nullptr, y.data()) &&
            nf_linear(nullptr, &v, x.data(), 1, 9, 0.f, 0, nullptr, y.data()) &&
            nf_linear(nullptr, &v, nullptr, 1, 8, 0.f, 0, nullptr, y.data()) &&
            nf_matmul_quantize(nullptr, &v, q.data(), &scale, 1, 1, 0, 1, out.data(), &scale) &&
            nf_quantize_rows(nullptr, x.data(), 1, 9, 1, q.data(), &scale) &&
            nf_quantize_rows(nullptr, nullptr, 1, 9, 8, q.data(), &scale) &&
            nf_quantize_static(nullptr, x.data(), 9, 0.f, 8, q.data()),
        "wrong arguments that are not refused");
  check(!nf_matmul(nullptr, &v, nullptr, nullptr, 1, 0, 0, nullptr, nullptr) &&
            !nf_quantize_rows(nullptr, nullptr, 0, 9, 8, nullptr, nullptr),
        "no rows");
  check(nf_force_isa("z80") && !nf_force_isa("scalar") && !std::strcmp(nf_isa(), "scalar") && !nf_force_isa(nullptr),
        "force_isa");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  std::printf("instruction sets: %s\n", nf_isa_available());
  test_arguments();
  test_special_rows();
  std::mt19937 rng(1);
  for (int bits = 2; bits <= 8; ++bits) {
    for (int64_t k : {1, 2, 5, 4095, 2500}) test_case({3, 17, k, bits, 1, 1, NF_NONE, true, true, false, false}, rng);
    test_case({29, 33, 1500, bits, 3, 2, NF_NONE, true, true, true, false}, rng);
    if (bits > 4) continue;
    for (int64_t m : {1, 2, 3, 4, 5, 13})
      for (int64_t k : {1, 30, 33, 64, 4100})
        test_case({m, 17, k, bits, 1, 1, NF_NONE, m % 2 == 0, true, false, false, 32 << m % 3}, rng);
  }
  for (int i = 0; i < cases; ++i) {
    Case c{};
    c.m = 1 + rng() % (rng() % 3 ? 9 : 70);
    c.n = 1 + rng() % (rng() % 2 ? 20 : 150);
    c.k = 1 + rng() % (rng() % 2 ? 70 : 700);
    c.bits = static_cast<int>(2 + rng() % 7);
    c.groups = static_cast<int>(1 + (rng() % 2) * (rng() % 5));
    c.threads = static_cast<int>(1 + rng() % 3);
    c.epilogue = static_cast<int>(rng() % 5);
    c.full_scale = rng() % 5 == 0;
    c.bias = rng() % 2;
    c.residual = rng() % 2;
    c.one_scale = rng() % 3 == 0;
    if (c.bits <= 4 && c.groups == 1 && rng() % 2) c.block = 32 << rng() % 4;
    test_case(c, rng);
  }
  test_case({700, 40, 64, 4, 2, 3, NF_RELU, false, true, true, false}, rng);
  test_case({1500, 20, 1900, 4, 1, 2, NF_NONE, false, true, false, false}, rng);  // more than a band
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
