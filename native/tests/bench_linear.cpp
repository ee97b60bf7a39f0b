// How fast the integer products are, beside what this machine can do at most: the least of many runs. GOP/s counts a
// multiplication and an addition as two. Needs x86 with AVX2 for the peaks; elsewhere only the products are timed.
//
//   bench_linear [instruction set] [bits] [threads]     products; more than one thread: wall-clock time
//   bench_linear [instruction set] [bits] [threads] decode    one row, weights that are in no cache
//   bench_linear [instruction set] [bits] [threads] epilogues | groups
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <string>
#include <utility>

#include "weights.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

const nf_threads* threads = nullptr;

// One thread: its own time, so that what others run meanwhile does not count.
double now() {
  timespec t;
  clock_gettime(threads ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double once(const std::function<void()>& f) {
  const double before = now();
  f();
  return now() - before;
}

double seconds(const std::function<void()>& f, double budget = 0.4) {
  double best = 1e9, spent = 0;
  for (int i = 0; i < 3 || (spent < budget && i < 20000); ++i) {
    const double t = once(f);
    best = std::min(best, t);
    spent += t;
  }
  return best;
}

#if defined(__x86_64__)
#define WITH_AVX2 __attribute__((target("avx2,fma")))

// Registers only. 12 chains hide every latency.
WITH_AVX2 void fma_rounds(int rounds) {
  __m256 c[12];
  const __m256 x = _mm256_set1_ps(0.999f);
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) c[j] = _mm256_set1_ps(1.f);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(c[j]) : "x"(x));
  }
}
double peak_fma() {
  return 2. * 8 * 12 * 5000 / seconds([] { fma_rounds(5000); }) * 1e-9;
}

// `Adds` results of vpmaddubsw are added in 16 bits, then vpmaddwd and vpaddd widen them: the least work for weights of
// so many bits.
template <int Adds>
WITH_AVX2 void maddubs_rounds(int rounds) {
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
    for (int j = 0; j < 4; ++j)
      asm volatile("vpmaddwd %2, %0, %0\n\tvpaddd %0, %1, %1" : "+x"(p[j]), "+x"(c[j]) : "x"(ones));
  }
}
template <int Adds>
double peak_maddubs() {
  const int rounds = 40000 / Adds;
  return 2. * 32 * 4 * Adds * rounds / seconds([=] { maddubs_rounds<Adds>(rounds); }) * 1e-9;
}

WITH_AVX2 int read_all(const uint8_t* p, size_t bytes) {
  __m256i s[4] = {};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j)
      s[j & 3] = _mm256_add_epi8(s[j & 3], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + j * 32)));
  }
  return _mm256_extract_epi32(_mm256_add_epi8(_mm256_add_epi8(s[0], s[1]), _mm256_add_epi8(s[2], s[3])), 0);
}
void read_memory(const std::vector<uint8_t>& memory) {
  struct Work {
    const uint8_t* p;
    size_t bytes;
    std::atomic<int> sink;
  } work{memory.data(), memory.size() / 64, {0}};
  const nf_task task = [](void* arg, size_t i) {
    auto* w = static_cast<Work*>(arg);
    w->sink += read_all(w->p + i * w->bytes, w->bytes);
  };
  if (threads) return threads->run(threads->context, 64, task, &work);
  for (size_t i = 0; i < 64; ++i) task(&work, i);
}
double read_bandwidth(size_t bytes) {
  const std::vector<uint8_t> memory(bytes, 1);
  return static_cast<double>(bytes) / seconds([&] { read_memory(memory); }) * 1e-9;
}
#else
void read_memory(const std::vector<uint8_t>&) {}
#endif

struct Inputs {
  std::vector<int8_t> q;
  std::vector<float> x, scale, y;
  Inputs(int64_t m, int64_t k, int64_t n, std::mt19937& rng)
      : q(static_cast<size_t>(m * k)), scale(static_cast<size_t>(m), 1e-3f), y(static_cast<size_t>(m * n)) {
    for (auto& v : q) v = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
    x.assign(q.begin(), q.end());
  }
};

// A decoder's layers, one row at a time: so many copies of the weights that each has left the caches when its turn
// comes. Reads of the same memory are timed in between.
void decode(int bits) {
  constexpr size_t kBytes = size_t{128} << 20;
  std::mt19937 rng(1);
  for (const auto& [k, n] : {std::pair<int64_t, int64_t>{768, 2304}, {768, 3072}, {3072, 768}, {768, 50257}}) {
    for (const auto& [groups, block] : {std::pair<int, int>{1, 0}, {3, 0}, {1, 32}, {1, 64}}) {
      if (block && bits > 4) continue;
      Weights w(n, k, bits, groups, rng);
      if (block) w.multiply(block, rng);
      const size_t copies = std::max<size_t>(1, kBytes / w.packed.size()),
                   each = w.packed.size() + w.multipliers.size();
      std::vector<uint8_t> all;
      for (size_t i = 0; i < copies; ++i) {
        all.insert(all.end(), w.packed.begin(), w.packed.end());
        all.insert(all.end(), w.multipliers.begin(), w.multipliers.end());
      }
      Inputs in(1, k, n, rng);
      nf_weight view = w.view();
      double product = 1e9, read = 1e9;
      for (int i = 0; i < 40; ++i) {
        product =
            std::min(product, once([&] {
                       for (size_t c = 0; c < copies; ++c) {
                         view.packed = all.data() + c * each;
                         if (block) view.multipliers = reinterpret_cast<const int8_t*>(view.packed + w.packed.size());
                         nf_matmul(threads, &view, in.q.data(), in.scale.data(), 1, 1, NF_NONE, nullptr, in.y.data());
                       }
                     }));
        read = std::min(read, once([&] { read_memory(all); }));
      }
      const double bytes = static_cast<double>(all.size());
      std::printf("1 x %4d x %5d, %d bits, groups %d, block %2d: %7.3f ms, %5.1f GB/s; a read: %5.1f GB/s (%3.0f %%)\n",
                  int(k), int(n), bits, groups, block, product / static_cast<double>(copies) * 1e3,
                  bytes / product * 1e-9, bytes / read * 1e-9, 100 * read / product);
    }
  }
}

void epilogues(int bits) {
  std::mt19937 rng(1);
  const char* const names[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (const float scale : {1e-3f, 1e-6f}) {
    const Weights w(3072, 768, bits, 1, rng);
    const nf_weight view = w.view();
    Inputs in(128, 768, 3072, rng);
    std::fill(in.scale.begin(), in.scale.end(), scale);
    for (int e = NF_NONE; e <= NF_SILU; ++e) {
      const double t =
          seconds([&] { nf_matmul(threads, &view, in.q.data(), in.scale.data(), 1, 128, e, nullptr, in.y.data()); });
      std::printf("128 x 768 x 3072, %d bits, outputs about %g, %-9s: %7.3f ms\n", bits, double(scale) * 1e4, names[e],
                  t * 1e3);
    }
  }
}

void groups(int bits) {
  std::mt19937 rng(1);
  for (const auto& [m, k, n] :
       {std::array<int64_t, 3>{1, 768, 2304}, {16, 768, 3072}, {197, 768, 3072}, {197, 3072, 768}}) {
    double one = 0;
    for (const auto& [g, block] : {std::pair<int, int>{1, 0}, {2, 0}, {3, 0}, {8, 0}, {1, 32}, {1, 64}}) {
      if (block && bits > 4) continue;
      Weights w(n, k, bits, g, rng);
      if (block) w.multiply(block, rng);
      const nf_weight view = w.view();
      Inputs in(m, k, n, rng);
      const double t = seconds(
          [&] { nf_matmul(threads, &view, in.q.data(), in.scale.data(), 1, m, NF_NONE, nullptr, in.y.data()); });
      if (g == 1 && !block) one = t;
      std::printf("%3d x %4d x %4d, %d bits, groups %d, block %2d: %8.4f ms (%+.1f %%)\n", int(m), int(k), int(n), bits,
                  g, block, t * 1e3, 100 * (t / one - 1));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1)
    if (const char* wrong = nf_force_isa(argv[1])) return std::puts(wrong), 1;
  const int only_bits = argc > 2 ? std::atoi(argv[2]) : 0, count = argc > 3 ? std::atoi(argv[3]) : 1;
  if (count > 1) threads = nf_pool(count);
  std::printf("instruction set: %s, threads: %d\n", nf_isa(), count);
  if (argc > 4) {
    const std::string what = argv[4];
    const int bits = only_bits ? only_bits : 4;
    if (what == "decode") return decode(bits), 0;
    if (what == "epilogues") return epilogues(bits), 0;
    if (what == "groups") return groups(bits), 0;
    return std::printf("no measurement %s\n", argv[4]), 1;
  }
  double peak[9] = {};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    const double peaks[9] = {0,
                             0,
                             peak_maddubs<32>(),
                             peak_maddubs<16>(),
                             peak_maddubs<8>(),
                             peak_maddubs<4>(),
                             peak_maddubs<2>(),
                             peak_maddubs<1>(),
                             peak_maddubs<1>()};
    std::copy(peaks, peaks + 9, peak);
    std::printf("peak: FMA float32 %.0f GFLOP/s; vpmaddubsw, widened after 8: %.0f GOP/s, after each: %.0f GOP/s\n",
                peak_fma(), peak[4], peak[7]);
    for (size_t mb : {1, 4, 16, 256}) std::printf("read bandwidth, %zu MiB: %.1f GB/s\n", mb, read_bandwidth(mb << 20));
  }
#endif
  std::mt19937 rng(1);
  struct Shape {
    int64_t m, k, n;
    int groups;
  };
  for (const Shape& s :
       {Shape{1576, 768, 3072, 1}, Shape{1576, 3072, 768, 1}, Shape{128, 768, 3072, 1}, Shape{128, 768, 3072, 3},
        Shape{197, 768, 3072, 1}, Shape{16, 768, 3072, 1}, Shape{1, 768, 2304, 1}, Shape{2, 768, 2304, 1},
        Shape{4, 768, 2304, 1}, Shape{8, 768, 2304, 1}, Shape{1, 4096, 16384, 1}, Shape{1, 4096, 16384, 3}}) {
    for (int bits : {4, 8, 2, 3, 5, 6, 7}) {
      if (only_bits ? bits != only_bits : bits != 4 && bits != 8) continue;
      const Weights w(s.n, s.k, bits, s.groups, rng);
      const nf_weight view = w.view();
      std::vector<int8_t> q(static_cast<size_t>(s.m * s.k));
      for (auto& v : q) v = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
      std::vector<float> scale(static_cast<size_t>(s.m), 1e-3f), y(static_cast<size_t>(s.m * s.n)),
          x(q.begin(), q.end());
      std::vector<int8_t> out(y.size());
      std::vector<float> out_scale(scale.size());
      const double t =
          seconds([&] { nf_matmul(threads, &view, q.data(), scale.data(), 1, s.m, NF_NONE, nullptr, y.data()); });
      const double t_linear =
          seconds([&] { nf_linear(threads, &view, x.data(), s.m, 8, 0.f, NF_GELU, nullptr, y.data()); }, 0.2);
      const double t_again = seconds(
          [&] {
            nf_matmul_quantize(threads, &view, q.data(), scale.data(), 1, s.m, NF_GELU, 8, out.data(),
                               out_scale.data());
          },
          0.2);
      const double ops = 2. * static_cast<double>(s.m * s.k * s.n);
      std::printf("%5d x %4d x %5d, %d bits, groups %d: %7.1f GOP/s", int(s.m), int(s.k), int(s.n), bits, s.groups,
                  ops / t * 1e-9);
      if (peak[bits] > 0) std::printf(" (%3.0f %% of peak)", 100 * ops / t * 1e-9 / peak[bits]);
      std::printf(", weights %5.1f GB/s, %9.3f ms; linear+gelu %9.3f ms; gelu+quantize %9.3f ms\n",
                  static_cast<double>(w.packed.size()) / t * 1e-9, t * 1e3, t_linear * 1e3, t_again * 1e3);
    }
  }
  return 0;
}
