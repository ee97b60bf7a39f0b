// nf_conv2d of every instruction set of this machine: exact against sums of plain integers, and against float64 with
// bias and epilogue. Usage: test_conv [seed [cases]]. Exits with 1 and says what was wrong.
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

int failures = 0;
std::string where;
std::mt19937 rng;

void expect(bool ok, const char* what, double found = 0, double wanted = 0) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAIL %s: %s: %.9g, expected %.9g\n", where.c_str(), what, found, wanted);
}

int64_t from_to(int64_t a, int64_t b) { return std::uniform_int_distribution<int64_t>(a, b)(rng); }

// Weights of one group of channels: codes [n][k] with an exponent a k, packed as normfuse.h says.
struct Weight {
  int64_t n, k;
  int bits, groups;
  std::vector<int> codes, exponents;
  std::vector<int32_t> sizes, order;
  std::vector<uint8_t> packed;
  std::vector<float> scale, bias;
  bool with_order;

  int64_t operand(int64_t row, int64_t column) const {
    return (int64_t)codes[(size_t)(row * k + column)] * (1 << (groups - 1 - exponents[(size_t)column]));
  }
  nf_weight view() const {
    return {n,
            k,
            bits,
            groups,
            sizes.data(),
            with_order ? order.data() : nullptr,
            packed.data(),
            scale.data(),
            bias.empty() ? nullptr : bias.data()};
  }
  void pack() {
    sizes.assign((size_t)groups, 0);
    order.clear();
    std::vector<int32_t> places;  // -1: padding
    for (int g = 0; g < groups; g++) {
      for (int64_t c = 0; c < k; c++)
        if (exponents[(size_t)c] == g) {
          order.push_back((int32_t)c);
          places.push_back((int32_t)c);
          sizes[(size_t)g]++;
        }
      while (places.size() % 4) places.push_back(-1);
    }
    const int unit = bits == 8 ? 1 : bits == 4 ? 2 : bits == 6 || bits == 2 ? 4 : 8;
    while (places.size() / 4 % (size_t)unit) places.push_back(-1);
    const int64_t quads = (int64_t)places.size() / 4, panels = (n + 15) / 16;
    packed.assign((size_t)nf_packed_bytes(n, bits, groups, sizes.data()), 0);
    expect((int64_t)packed.size() == panels * quads * 8 * bits, "packed bytes", (double)packed.size(),
           (double)(panels * quads * 8 * bits));
    uint8_t* at = packed.data();
    for (int64_t p = 0; p < panels; p++)
      for (int w = bits == 8 ? 8 : 4, low = 0; w >= 1; w /= 2) {
        if (!(bits & w)) continue;
        const int per = 8 / w;
        for (int64_t q = 0; q < quads; q++)
          for (int column = 0; column < 16; column++)
            for (int c = 0; c < 4; c++) {
              const int64_t row = p * 16 + column;
              const int32_t channel = places[(size_t)(q * 4 + c)];
              const int code = row < n && channel >= 0 ? codes[(size_t)(row * k + channel)] : 0;
              const int u = (code + (1 << (bits - 1))) >> low & ((1 << w) - 1);
              at[q / per * 64 + column * 4 + c] = (uint8_t)(at[q / per * 64 + column * 4 + c] | u << (q % per * w));
            }
        at += quads / per * 64;
        low += w;
      }
  }
};

enum Exponents { kNatural, kByChannel, kAnyhow };

Weight make_weight(int64_t n, int64_t taps, int64_t channels, int bits, int groups, Exponents how, bool plain) {
  Weight w{n, taps * channels, bits, groups, {}, {}, {}, {}, {}, {}, {}, how != kNatural};
  const int most = (1 << (bits - 1)) - 1;
  for (int64_t i = 0; i < n * w.k; i++) w.codes.push_back((int)from_to(-most, most));
  std::vector<int> of_channel;
  for (int64_t c = 0; c < channels; c++) of_channel.push_back((int)from_to(0, groups - 1));
  for (int64_t i = 0; i < w.k; i++)
    w.exponents.push_back(how == kAnyhow ? (int)from_to(0, groups - 1) : of_channel[(size_t)(i % channels)]);
  for (int64_t i = 0; i < n; i++) w.scale.push_back(plain ? 1.f : (float)from_to(1, 1000) * 1e-5f);
  for (int64_t i = 0; i < n && !plain; i++) w.bias.push_back((float)from_to(-100, 100) * 0.01f);
  w.pack();
  return w;
}

double activate(double v, int epilogue) {
  switch (epilogue) {
    case NF_RELU: return v > 0 ? v : 0;
    case NF_GELU: return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case NF_GELU_TANH: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case NF_SILU: return v / (1 + std::exp(-v));
    default: return v;
  }
}

int code_of(float x, float factor, bool divide, float limit) {
  const float v = divide ? x / factor : x * factor;
  return std::isnan(v) ? 0 : (int)std::nearbyint(std::min(std::max(v, -limit), limit));
}

void conv_case(const nf_threads* threads, const nf_conv& c, int64_t outputs, int bits, int groups, Exponents how,
               int activation_bits, float static_scale, int epilogue, bool plain) {
  std::ostringstream name;
  name << nf_isa() << " batch " << c.batch << " c " << c.c << " " << c.h << "x" << c.w << " k " << c.kh << "x" << c.kw
       << " stride " << c.stride[0] << "," << c.stride[1] << " pad " << c.pad_begin[0] << "," << c.pad_begin[1] << ","
       << c.pad_end[0] << "," << c.pad_end[1] << " dilation " << c.dilation[0] << "," << c.dilation[1] << " groups "
       << c.conv_groups << " outputs " << outputs << " bits " << bits << " exponents " << groups << " how " << how
       << " static " << static_scale << " epilogue " << epilogue;
  where = name.str();
  const int64_t channels = c.c / c.conv_groups, taps = c.kh * c.kw;
  std::vector<Weight> weights;
  std::vector<nf_weight> views;
  for (int64_t g = 0; g < c.conv_groups; g++)
    weights.push_back(make_weight(outputs, taps, channels, bits, groups, how, plain));
  for (const Weight& w : weights) views.push_back(w.view());
  const int64_t oh = (c.h + c.pad_begin[0] + c.pad_end[0] - (c.kh - 1) * c.dilation[0] - 1) / c.stride[0] + 1;
  const int64_t ow = (c.w + c.pad_begin[1] + c.pad_end[1] - (c.kw - 1) * c.dilation[1] - 1) / c.stride[1] + 1;
  const float limit = (float)((1 << (activation_bits - 1)) - 1);
  std::vector<float> x((size_t)(c.batch * c.c * c.h * c.w)),
      y((size_t)(c.batch * c.conv_groups * outputs * oh * ow), -7.f);
  std::normal_distribution<double> dist(0, plain ? (double)limit / 2 : 1.0);
  for (float& v : x) v = (float)(plain ? std::nearbyint(dist(rng)) : dist(rng));
  const char* error = nf_conv2d(threads, &c, views.data(), x.data(), activation_bits, static_scale, epilogue, y.data());
  expect(!error, error ? error : "");
  for (int64_t b = 0; b < c.batch; b++) {
    const float* image = x.data() + b * c.c * c.h * c.w;
    float top = 0;
    for (int64_t i = 0; i < c.c * c.h * c.w; i++) top = std::max(top, std::fabs(image[i]));
    const bool divide = static_scale > 0;
    const float factor = divide    ? static_scale
                         : top > 0 ? limit / top
                                   : 0,
                image_scale = divide    ? static_scale
                              : top > 0 ? top / limit
                                        : 1;
    for (int64_t g = 0; g < c.conv_groups; g++)
      for (int64_t n = 0; n < outputs; n++)
        for (int64_t i = 0; i < oh * ow; i++) {
          int64_t sum = 0;
          for (int64_t t = 0; t < taps; t++) {
            const int64_t yy = i / ow * c.stride[0] + t / c.kw * c.dilation[0] - c.pad_begin[0];
            const int64_t xx = i % ow * c.stride[1] + t % c.kw * c.dilation[1] - c.pad_begin[1];
            if (yy < 0 || yy >= c.h || xx < 0 || xx >= c.w) continue;
            for (int64_t k = 0; k < channels; k++)
              sum += code_of(image[((g * channels + k) * c.h + yy) * c.w + xx], factor, divide, limit) *
                     weights[(size_t)g].operand(n, t * channels + k);
          }
          const float found = y[(size_t)(((b * c.conv_groups + g) * outputs + n) * oh * ow + i)];
          if (plain && divide && static_scale == 1 && epilogue == NF_NONE) {
            expect(found == (float)sum, "sum", (double)found, (double)sum);
          } else {
            const Weight& w = weights[(size_t)g];
            const float scale = image_scale * w.scale[(size_t)n];
            const double linear = (double)((float)sum * scale), bias = w.bias.empty() ? 0.0 : (double)w.bias[(size_t)n];
            const double wanted = activate(linear + bias, epilogue);
            expect(std::fabs((double)found - wanted) <= 1e-6 * (std::fabs(linear) + std::fabs(bias) + 1e-3), "output",
                   (double)found, wanted);
          }
        }
  }
}

void random_case(const nf_threads* threads) {
  const int kind = (int)from_to(0, 3);  // depthwise, one tap, grouped or plain
  const int64_t groups = kind == 0   ? from_to(1, 20)
                         : kind == 1 ? 1
                                     : from_to(1, 3),
                channels = kind == 0 ? 1 : from_to(1, 40);
  nf_conv c{from_to(0, 3),
            groups * channels,
            from_to(1, 20),
            from_to(1, 20),
            from_to(1, 5),
            from_to(1, 5),
            {from_to(1, 3), from_to(1, 3)},
            {from_to(0, 3), from_to(0, 3)},
            {from_to(0, 3), from_to(0, 3)},
            {from_to(1, 2), from_to(1, 3)},
            groups};
  if (kind == 1) {
    c.kh = c.kw = 1;
    if (from_to(0, 1)) c = {c.batch, c.c, c.h, c.w, 1, 1, {1, 1}, {0, 0}, {0, 0}, {1, 1}, groups};
  }
  while ((c.kh - 1) * c.dilation[0] + 1 > c.h + c.pad_begin[0] + c.pad_end[0]) c.kh--;
  while ((c.kw - 1) * c.dilation[1] + 1 > c.w + c.pad_begin[1] + c.pad_end[1]) c.kw--;
  const int exponents = from_to(0, 1) ? 1 : (int)from_to(1, 5);
  const Exponents how = exponents == 1 ? (from_to(0, 1) ? kNatural : kByChannel) : from_to(0, 3) ? kByChannel : kAnyhow;
  const bool plain = from_to(0, 1);
  conv_case(threads, c, kind == 0 ? from_to(1, 3) : from_to(1, 40), (int)from_to(2, 8), exponents, how,
            plain ? 8 : (int)from_to(2, 8),
            plain           ? 1.f
            : from_to(0, 1) ? 0.02f
                            : 0.f,
            (int)from_to(0, plain ? 0 : 4), plain);
}

void fixed_cases(const nf_threads* threads) {
  const nf_conv cases[] = {
      {1, 3, 32, 32, 7, 7, {2, 2}, {3, 3}, {3, 3}, {1, 1}, 1},    // the first layer of a ResNet
      {2, 64, 7, 7, 1, 1, {1, 1}, {0, 0}, {0, 0}, {1, 1}, 1},     // a tile over two images
      {1, 64, 14, 14, 1, 1, {2, 2}, {0, 0}, {0, 0}, {1, 1}, 1},   // a shortcut
      {3, 24, 9, 9, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 24},    // depthwise
      {1, 8, 40, 41, 3, 3, {2, 2}, {0, 0}, {1, 1}, {1, 1}, 8},    // depthwise, asymmetric
      {1, 4, 200, 300, 5, 5, {1, 1}, {2, 2}, {2, 2}, {1, 1}, 4},  // depthwise, more than one band
      {1, 3, 13, 13, 13, 13, {1, 1}, {0, 0}, {0, 0}, {1, 1}, 3},  // more taps than the depthwise kernel takes
      {1, 64, 8, 8, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 8},     // ResNeXt
      {1, 130, 5, 5, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 1},    // more quads than a chunk
      {1, 2, 3, 3, 2, 2, {1, 1}, {9, 0}, {0, 9}, {1, 1}, 1},      // rows and columns of padding only
      {1, 2, 1, 1, 1, 1, {5, 5}, {0, 0}, {0, 0}, {3, 3}, 1},     {0, 2, 4, 4, 3, 3, {1, 1}, {0, 0}, {0, 0}, {1, 1}, 1}};
  for (const nf_conv& c : cases)
    for (int bits : {8, 4, 3})
      for (int exponents : {1, 3}) {
        conv_case(threads, c, c.conv_groups == c.c ? 1 : 20, bits, exponents, kByChannel, 8, 1.f, NF_NONE, true);
        conv_case(threads, c, c.conv_groups == c.c ? 2 : 33, bits, exponents, kByChannel, 8, 0.f, NF_SILU, false);
      }
  const nf_conv depthwise = {1, 3, 6, 6, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 3};
  conv_case(threads, depthwise, 1, 8, 12, kAnyhow, 8, 0.f, NF_NONE, false);  // sums beyond 2^24: not in float32
}

void hazards() {
  where = std::string(nf_isa()) + " hazards";
  nf_conv c = {2, 4, 5, 5, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 1};
  for (int64_t groups : {1, 4}) {
    c.conv_groups = groups;
    std::vector<Weight> weights;
    std::vector<nf_weight> views;
    for (int64_t g = 0; g < groups; g++) weights.push_back(make_weight(4, 9, 4 / groups, 4, 1, kNatural, false));
    for (const Weight& w : weights) views.push_back(w.view());
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      std::vector<float> x(200, 1.f), y((size_t)(2 * groups * 4 * 25), 0.f);
      x[7] = bad;
      expect(!nf_conv2d(nullptr, &c, views.data(), x.data(), 8, 0, NF_NONE, y.data()), "no error");
      for (size_t i = 0; i < y.size() / 2; i++)
        expect(std::isnan(y[i]), "an image with NaN or Inf is NaN", (double)y[i]);
      for (size_t i = y.size() / 2; i < y.size(); i++)
        expect(std::isfinite(y[i]), "its neighbour is not", (double)y[i]);
    }
    std::vector<float> x(200, 0.f), y((size_t)(2 * groups * 4 * 25), 9.f);
    nf_conv2d(nullptr, &c, views.data(), x.data(), 8, 0, NF_NONE, y.data());
    for (size_t i = 0; i < y.size(); i++) {
      const float bias = weights[i / 100 % (size_t)groups].bias[i / 25 % 4];
      expect(y[i] == bias, "an image of zeros is the bias", (double)y[i], (double)bias);
    }
    nf_conv wrong = c;
    const auto refused = [&](const char* what) {
      expect(nf_conv2d(nullptr, &wrong, views.data(), x.data(), 8, 0, NF_NONE, y.data()) != nullptr, what);
      wrong = c;
    };
    wrong.c = 3;
    refused("k of another c is refused");
    wrong.kh = 40;
    refused("a kernel larger than the image is refused");
    wrong.stride[0] = 0;
    refused("stride 0 is refused");
    wrong.pad_end[1] = -1;
    refused("padding -1 is refused");
    wrong.dilation[0] = INT64_MAX;
    refused("a huge dilation is refused");
    wrong.pad_begin[0] = wrong.pad_begin[1] = wrong.pad_end[0] = wrong.pad_end[1] = INT32_MAX;
    refused("a padded image of 2^64 is refused");
    wrong.h = INT64_MAX;
    refused("h of 2^63 is refused");
    wrong.conv_groups = 3;
    refused("groups that do not divide c are refused");
    wrong.batch = -1;
    refused("batch -1 is refused");
    expect(nf_conv2d(nullptr, &c, views.data(), nullptr, 8, 0, NF_NONE, y.data()) != nullptr, "x missing is refused");
    expect(nf_conv2d(nullptr, &c, views.data(), x.data(), 9, 0, NF_NONE, y.data()) != nullptr, "9 bits are refused");
    expect(nf_conv2d(nullptr, &c, views.data(), x.data(), 8, 0, 5, y.data()) != nullptr, "epilogue 5 is refused");
  }
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(argc > 1 ? (unsigned)std::atoi(argv[1]) : 1u);
  const int cases = argc > 2 ? std::atoi(argv[2]) : 200;
  std::istringstream names(nf_isa_available());
  for (std::string name; names >> name;) {
    if (const char* error = nf_force_isa(name.c_str())) {
      std::printf("FAIL %s: %s\n", name.c_str(), error);
      return 1;
    }
    hazards();
    fixed_cases(nullptr);
    for (int i = 0; i < cases; i++) random_case(i % 3 ? nullptr : nf_pool(3));
    std::printf("%s done\n", name.c_str());
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
