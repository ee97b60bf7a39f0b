// Norms, softmax and convolutions on one thread: the least of many short runs, GB/s of what must move, and that as a
// fraction of the bandwidth of a copy of the same size, measured beside it. Usage: bench_norm [norm|softmax|conv].
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa/isa.h"
#include "normfuse.h"
#include "softmax/softmax.h"

namespace {

// Candidates take turns, so that what else runs on the machine meets all of them.
template <class... F>
std::vector<double> least(double seconds, const F&... candidates) {
  using clock = std::chrono::steady_clock;
  std::vector<double> best(sizeof...(F), 1e9);
  const auto end = clock::now() + std::chrono::duration<double>(seconds);
  for (int round = 0; round < 5 || clock::now() < end; round++) {
    size_t i = 0;
    const auto time = [&](const auto& f) {
      const auto t = clock::now();
      f();
      const double s = std::chrono::duration<double>(clock::now() - t).count();
      best[i] = s < best[i] ? s : best[i];
      i++;
    };
    (time(candidates), ...);
  }
  return best;
}

std::vector<float> normal(size_t n) {
  std::mt19937 rng(1);
  std::normal_distribution<float> dist;
  std::vector<float> v(n);
  for (float& x : v) x = dist(rng);
  return v;
}

// Not memcpy: its string instruction stumbles over buffers whose distance is a multiple of a page.
volatile float zero = 0;
void copy_floats(const float* x, float* y, size_t n) {
  const float z = zero;
  for (size_t i = 0; i < n; i++) y[i] = x[i] + z;
}

void norms() {
  std::printf("norms, gain and shift, us (GB/s of x and y; of a copy)   [%s]\n", nf_isa());
  const int64_t shapes[][2] = {{16, 768}, {64, 768}, {1576, 768}, {4096, 768}, {4096, 4096}};
  for (const auto& s : shapes) {
    const int64_t rows = s[0], d = s[1];
    const size_t n = (size_t)(rows * d);
    const int repeat = n < 100000 ? 20 : 1;
    std::vector<float> x = normal(n), y(n), r = normal(n), g(n, 1.1f), b(n, 0.1f), scale((size_t)rows);
    std::vector<int8_t> q(n);
    const auto norm = [&](int kind) {
      return [&, kind] {
        for (int i = 0; i < repeat; i++)
          nf_norm(nullptr, kind, x.data(), nullptr, rows, d, g.data(),
                  kind == NF_RMS || kind == NF_CRMS ? nullptr : b.data(), 1e-5f, 1.2533f, nullptr, y.data());
      };
    };
    const auto fused = [&](int kind) {
      return [&, kind] {
        for (int i = 0; i < repeat; i++)
          nf_norm_quantize(nullptr, kind, x.data(), nullptr, rows, d, g.data(), kind == NF_RMS ? nullptr : b.data(),
                           1e-5f, 1, 8, nullptr, q.data(), scale.data());
      };
    };
    const auto apart = [&](int kind) {
      return [&, kind] {
        for (int i = 0; i < repeat; i++) {
          nf_norm(nullptr, kind, x.data(), nullptr, rows, d, g.data(), kind == NF_RMS ? nullptr : b.data(), 1e-5f, 1,
                  nullptr, y.data());
          nf_quantize_rows(nullptr, y.data(), rows, d, 8, q.data(), scale.data());
        }
      };
    };
    const auto copy = [&] {
      for (int i = 0; i < repeat; i++) copy_floats(x.data(), y.data(), n);
    };
    const auto skip = [&] {
      for (int i = 0; i < repeat; i++)
        nf_norm_quantize(nullptr, NF_RMS, x.data(), r.data(), rows, d, g.data(), nullptr, 1e-5f, 1, 8, r.data(),
                         q.data(), scale.data());
    };
    const std::vector<double> t =
        least(1.0, copy, norm(NF_LAYER), norm(NF_L1), norm(NF_RMS), norm(NF_CRMS), fused(NF_LAYER), apart(NF_LAYER),
              fused(NF_RMS), apart(NF_RMS), fused(NF_L1), apart(NF_L1), skip);
    const char* names[] = {"copy",
                           "layer",
                           "L1",
                           "RMS",
                           "CRMS",
                           "layer -> int8",
                           "layer, quantize",
                           "RMS -> int8",
                           "RMS, quantize",
                           "L1 -> int8",
                           "L1, quantize",
                           "skip + RMS -> int8"};
    std::printf("(%lld, %lld)\n", (long long)rows, (long long)d);
    for (size_t i = 0; i < t.size(); i++) {
      const double us = t[i] / repeat * 1e6, bytes = (double)n * (i < 5 ? 8 : i == 11 ? 13 : 5);
      std::printf("  %-20s %9.2f us  %6.1f GB/s  %4.0f %%\n", names[i], us, bytes / us / 1e3,
                  100 * bytes / (t[i] / repeat) / ((double)n * 8 / (t[0] / repeat)));
    }
    std::printf("  layer / L1 %.2f   layer / RMS %.2f   apart / fused: layer %.2f  RMS %.2f  L1 %.2f\n", t[1] / t[2],
                t[1] / t[3], t[6] / t[5], t[8] / t[7], t[10] / t[9]);
  }
}

void softmax() {
  std::printf("softmax, ns an element   [%s]\n", nf_isa());
  const nf::SoftmaxKernels& kernels = nf::active_kernels().softmax;
  for (int power : {8, 10, 12, 14, 15, 16, 17, 18, 20, 22, 24}) {
    const int64_t d = int64_t(1) << power;
    const int repeat = d < 100000 ? (int)(100000 / d) : 1;
    std::vector<float> x = normal((size_t)d), y((size_t)d);
    const auto three = [&] {
      for (int i = 0; i < repeat; i++) kernels.row(x.data(), d, y.data());
    };
    const auto two = [&] {
      for (int i = 0; i < repeat; i++) kernels.write(x.data(), d, kernels.sum(x.data(), d), y.data());
    };
    const auto ours = [&] {
      for (int i = 0; i < repeat; i++) nf_two_pass_softmax(nullptr, x.data(), 1, d, y.data());
    };
    const auto copy = [&] {
      for (int i = 0; i < repeat; i++) copy_floats(x.data(), y.data(), (size_t)d);
    };
    const std::vector<double> t = least(1.0, copy, three, two, ours);
    std::printf("  2^%-2d  copy %.3f  three passes %.3f  two %.3f  nf_two_pass_softmax %.3f   three / two %.2f\n",
                power, t[0] * 1e9 / (double)(d * repeat), t[1] * 1e9 / (double)(d * repeat),
                t[2] * 1e9 / (double)(d * repeat), t[3] * 1e9 / (double)(d * repeat), t[1] / t[2]);
  }
}

void convolutions() {
  std::printf("nf_conv2d, one image, dynamic scale, us and GOP/s (2 per multiply-add)   [%s]\n", nf_isa());
  struct Case {
    const char* name;
    nf_conv c;
    int64_t outputs;
  };
  const Case cases[] = {{"7x7/2 3 -> 64, 224", {1, 3, 224, 224, 7, 7, {2, 2}, {3, 3}, {3, 3}, {1, 1}, 1}, 64},
                        {"1x1 64 -> 64, 56", {1, 64, 56, 56, 1, 1, {1, 1}, {0, 0}, {0, 0}, {1, 1}, 1}, 64},
                        {"3x3 64 -> 64, 56", {1, 64, 56, 56, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 1}, 64},
                        {"1x1 256 -> 64, 56", {1, 256, 56, 56, 1, 1, {1, 1}, {0, 0}, {0, 0}, {1, 1}, 1}, 64},
                        {"3x3 256 -> 256, 14", {1, 256, 14, 14, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 1}, 256},
                        {"1x1 2048 -> 512, 7", {1, 2048, 7, 7, 1, 1, {1, 1}, {0, 0}, {0, 0}, {1, 1}, 1}, 512},
                        {"3x3 512 -> 512, 7", {1, 512, 7, 7, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 1}, 512},
                        {"depthwise 3x3 32, 112", {1, 32, 112, 112, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 32}, 1},
                        {"depthwise 3x3/2 96, 112", {1, 96, 112, 112, 3, 3, {2, 2}, {1, 1}, {1, 1}, {1, 1}, 96}, 1},
                        {"depthwise 3x3 384, 14", {1, 384, 14, 14, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 384}, 1},
                        {"depthwise 3x3 960, 7", {1, 960, 7, 7, 3, 3, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 960}, 1}};
  for (const Case& k : cases) {
    const nf_conv& c = k.c;
    const int64_t K = c.kh * c.kw * c.c / c.conv_groups, oh = (c.h + 2 * c.pad_begin[0] - c.kh) / c.stride[0] + 1;
    const int32_t size = (int32_t)K;
    std::vector<float> x = normal((size_t)(c.c * c.h * c.w)), y((size_t)(c.conv_groups * k.outputs * oh * oh)),
                       scale((size_t)k.outputs, 0.01f);
    std::printf("  %-24s", k.name);
    for (int bits : {8, 4}) {
      const int64_t bytes = nf_packed_bytes(k.outputs, bits, 1, &size);
      std::vector<uint8_t> packed((size_t)(bytes * c.conv_groups));
      std::mt19937 rng(2);
      for (uint8_t& p : packed) p = (uint8_t)(rng() % 255 + 1) | 0x11;
      std::vector<nf_weight> w;
      for (int64_t g = 0; g < c.conv_groups; g++)
        w.push_back({k.outputs, K, bits, 1, &size, nullptr, packed.data() + g * bytes, scale.data(), nullptr});
      const auto once = [&] { nf_conv2d(nullptr, &c, w.data(), x.data(), 8, 0, NF_RELU, y.data()); };
      const double t = least(0.7, once)[0];
      std::printf("  W%d %8.1f us %6.1f GOP/s", bits, t * 1e6,
                  2.0 * (double)(c.conv_groups * k.outputs * oh * oh * K) / t / 1e9);
    }
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "norm") norms();
  if (only.empty() || only == "softmax") softmax();
  if (only.empty() || only == "conv") convolutions();
  return 0;
}
