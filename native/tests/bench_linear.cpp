// How fast the integer products are, beside what this machine can do at most: the least of many single-threaded runs. GOP/s counts
// a multiplication and an addition as two. Needs x86 with AVX2 for the peaks; elsewhere only the products are timed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>

#include "weights.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Time of this thread: what others run meanwhile does not count.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double seconds(const std::function<void()>& f, double budget = 0.4) {
  double best = 1e9, spent = 0;
  for (int i = 0; i < 3 || (spent < budget && i < 20000); ++i) {
    const double before = now();
    f();
    const double t = now() - before;
    best = std::min(best, t);
    spent += t;
  }
  return best;
}

#if defined(__x86_64__)
#define NF_AVX2 __attribute__((target("avx2,fma")))

// Registers only. 12 chains hide every latency.
NF_AVX2 void fma_rounds(int rounds) {
  __m256 c[12];
  const __m256 x = _mm256_set1_ps(0.999f);
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) c[j] = _mm256_set1_ps(1.f);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(c[j]) : "x"(x));
  }
}
double peak_fma() { return 2. * 8 * 12 * 5000 / seconds([] { fma_rounds(5000); }) * 1e-9; }

// `Adds` results of vpmaddubsw are added in 16 bits, then vpmaddwd and vpaddd widen them: the least work for weights of so many bits.
template <int Adds>
NF_AVX2 void maddubs_rounds(int rounds) {
  __m256i p[4], c[4];
  const __m256i w = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1), a = _mm256_set1_epi8(2);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) c[j] = _mm256_setzero_si256();
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) asm volatile("vpmaddubsw %1, %2, %0" : "=x"(p[j]) : "x"(a), "x"(w));
#pragma GCC unroll 32
    for (int k = 1; k < Adds; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m256i x;
        asm volatile("vpmaddubsw %2, %3, %0\n\tvpaddw %0, %1, %1" : "=&x"(x), "+x"(p[j]) : "x"(a), "x"(w));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) asm volatile("vpmaddwd %2, %0, %0\n\tvpaddd %0, %1, %1" : "+x"(p[j]), "+x"(c[j]) : "x"(ones));
  }
}
template <int Adds>
double peak_maddubs() {
  const int rounds = 40000 / Adds;
  return 2. * 32 * 4 * Adds * rounds / seconds([=] { maddubs_rounds<Adds>(rounds); }) * 1e-9;
}

NF_AVX2 int read_all(const uint8_t* p, size_t bytes) {
  __m256i s[4] = {};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j) s[j & 3] = _mm256_add_epi8(s[j & 3], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + j * 32)));
  }
  return _mm256_extract_epi32(_mm256_add_epi8(_mm256_add_epi8(s[0], s[1]), _mm256_add_epi8(s[2], s[3])), 0);
}
double read_bandwidth(size_t bytes) {
  const std::vector<uint8_t> memory(bytes, 1);
  volatile int sink = 0;
  return static_cast<double>(bytes) / seconds([&] { sink = read_all(memory.data(), bytes); }) * 1e-9;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1)
    if (const char* wrong = nf_force_isa(argv[1])) return std::puts(wrong), 1;
  const int only_bits = argc > 2 ? std::atoi(argv[2]) : 0;
  std::printf("instruction set: %s\n", nf_isa());
  double peak[9] = {};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    const double peaks[9] = {0, 0, peak_maddubs<32>(), peak_maddubs<16>(), peak_maddubs<8>(), peak_maddubs<4>(), peak_maddubs<2>(), peak_maddubs<1>(),
                             peak_maddubs<1>()};
    std::copy(peaks, peaks + 9, peak);
    std::printf("peak: FMA float32 %.0f GFLOP/s; vpmaddubsw, widened after 8: %.0f GOP/s, after each: %.0f GOP/s\n", peak_fma(), peak[4], peak[7]);
    for (size_t mb : {1, 4, 16, 256}) std::printf("read bandwidth, %zu MiB: %.1f GB/s\n", mb, read_bandwidth(mb << 20));
  }
#endif
  std::mt19937 rng(1);
  struct Shape {
    int64_t m, k, n;
    int groups;
  };
  for (const Shape& s : {Shape{1576, 768, 3072, 1}, Shape{1576, 3072, 768, 1}, Shape{128, 768, 3072, 1}, Shape{128, 768, 3072, 3}, Shape{1, 768, 2304, 1},
                         Shape{4, 768, 2304, 1}, Shape{8, 768, 2304, 1}, Shape{1, 4096, 16384, 1}, Shape{1, 4096, 16384, 3}}) {
    for (int bits : {4, 8, 2, 3, 5, 6, 7}) {
      if (only_bits ? bits != only_bits : bits != 4 && bits != 8) continue;
      const Weights w(s.n, s.k, bits, s.groups, rng);
      const nf_weight view = w.view();
      std::vector<int8_t> q(static_cast<size_t>(s.m * s.k));
      for (auto& v : q) v = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
      std::vector<float> scale(static_cast<size_t>(s.m), 1e-3f), y(static_cast<size_t>(s.m * s.n)), x(q.begin(), q.end());
      std::vector<int8_t> out(y.size());
      std::vector<float> out_scale(scale.size());
      const double t = seconds([&] { nf_matmul(nullptr, &view, q.data(), scale.data(), 1, s.m, NF_NONE, nullptr, y.data()); });
      const double t_linear = seconds([&] { nf_linear(nullptr, &view, x.data(), s.m, 8, 0.f, NF_GELU, nullptr, y.data()); }, 0.2);
      const double t_again =
          seconds([&] { nf_matmul_quantize(nullptr, &view, q.data(), scale.data(), 1, s.m, NF_GELU, 8, out.data(), out_scale.data()); }, 0.2);
      const double ops = 2. * static_cast<double>(s.m * s.k * s.n);
      std::printf("%5d x %4d x %5d, %d bits, groups %d: %7.1f GOP/s", int(s.m), int(s.k), int(s.n), bits, s.groups, ops / t * 1e-9);
      if (peak[bits] > 0) std::printf(" (%3.0f %% of peak)", 100 * ops / t * 1e-9 / peak[bits]);
      std::printf(", weights %5.1f GB/s, %9.3f ms; linear+gelu %9.3f ms; gelu+quantize %9.3f ms\n", static_cast<double>(w.packed.size()) / t * 1e-9,
                  t * 1e3, t_linear * 1e3, t_again * 1e3);
    }
  }
  return 0;
}
