// How fast nf_attend is on one thread: the least of many short runs, as a share of what the core's multipliers could
// do. Arguments: an instruction set (default: the best), seconds for each shape.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "normfuse.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// GFLOP/s of twelve independent chains of fused multiply-adds in registers.
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) double peak() {
  double best = 0;
  for (int turn = 0; turn < 40; ++turn) {
    __m256 s[12], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1e-3f);
    for (auto& x : s) x = b;
    const double start = now();
    for (int i = 0; i < 400000; ++i) {
      for (auto& x : s) x = _mm256_fmadd_ps(x, a, b);
      asm volatile(""
                   : "+x"(s[0]), "+x"(s[1]), "+x"(s[2]), "+x"(s[3]), "+x"(s[4]), "+x"(s[5]), "+x"(s[6]), "+x"(s[7]),
                     "+x"(s[8]), "+x"(s[9]), "+x"(s[10]), "+x"(s[11]));
    }
    const double rate = 400000.0 * 12 * 16 / (now() - start) * 1e-9;
    float out[8];
    for (int i = 1; i < 12; ++i) s[0] = _mm256_add_ps(s[0], s[i]);
    _mm256_storeu_ps(out, s[0]);
    volatile float keep = out[0];
    (void)keep;
    best = rate > best ? rate : best;
  }
  return best;
}
#else
double peak() { return NAN; }
#endif

struct Shape {
  const char* name;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  bool causal, packed;
  int32_t bits = 0;
};

void measure(const Shape& c, double seconds, double top) {
  std::mt19937 random_bits(1);
  std::normal_distribution<float> draw;
  const int64_t width = c.heads * c.dim, tokens = c.queries;
  nf_attention s{};
  s.batch = c.batch, s.heads = c.heads, s.kv_heads = c.kv_heads, s.queries = c.queries, s.keys = c.keys,
  s.head_dim = c.dim;
  s.scale = 1.0f / std::sqrt(static_cast<float>(c.dim)), s.causal = c.causal, s.bits = c.bits;
  std::vector<float> x, cache, y(static_cast<size_t>(c.batch * tokens * width));
  const float *k, *v;
  const int64_t row = c.packed ? 3 * width : width;
  x.resize(static_cast<size_t>(c.batch * tokens * row));
  for (float& e : x) e = draw(random_bits);
  const int64_t strides[3] = {tokens * row, c.dim, row};
  for (int i = 0; i < 3; ++i) s.q_stride[i] = s.k_stride[i] = s.v_stride[i] = strides[i];
  s.y_stride[0] = tokens * width, s.y_stride[1] = c.dim, s.y_stride[2] = width;
  k = x.data() + width, v = k + width;
  if (!c.packed) {  // a cache [batch, kv heads, keys, dim]
    cache.resize(static_cast<size_t>(2 * c.batch * c.kv_heads * c.keys * c.dim));
    for (float& e : cache) e = draw(random_bits);
    k = cache.data(), v = k + cache.size() / 2;
    const int64_t cached[3] = {c.kv_heads * c.keys * c.dim, c.keys * c.dim, c.dim};
    for (int i = 0; i < 3; ++i) s.k_stride[i] = s.v_stride[i] = cached[i];
  }
  double best = 1e30;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    if (const char* error = nf_attend(nullptr, &s, x.data(), k, v, nullptr, y.data())) std::printf("%s\n", error);
    const double t = now() - start;
    best = t < best ? t : best;
  }
  double pairs = static_cast<double>(c.queries * c.keys);
  if (c.causal) pairs -= static_cast<double>(c.queries * (c.queries - 1)) / 2;
  const double flops = 4.0 * static_cast<double>(c.batch * c.heads * c.dim) * pairs;
  const double bytes = 8.0 * static_cast<double>(c.batch * c.kv_heads * c.keys * c.dim);
  std::printf("%-36s %9.1f us  %6.1f GFLOP/s  %4.1f %% of peak  K, V at %5.1f GB/s\n", c.name, best * 1e6,
              flops / best * 1e-9, 100 * flops / best * 1e-9 / top, bytes / best * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1)
    if (const char* error = nf_force_isa(argv[1])) return std::printf("%s\n", error), 1;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 1.0, top = peak();
  std::printf("%s, peak %.1f GFLOP/s\n", nf_isa(), top);
  const Shape shapes[] = {
      {"ViT-B/16, batch 8", 8, 12, 12, 197, 197, 64, false, true},
      {"ViT-B/16, batch 8, scores of 8 bits", 8, 12, 12, 197, 197, 64, false, true, 8},
      {"ViT-B/16, batch 1", 1, 12, 12, 197, 197, 64, false, true},
      {"ViT-B/16, batch 1, scores of 8 bits", 1, 12, 12, 197, 197, 64, false, true, 8},
      {"GPT-2, 128 tokens, causal", 1, 12, 12, 128, 128, 64, true, true},
      {"1024 tokens", 1, 2, 2, 1024, 1024, 64, false, true},
      {"head_dim 32, 197 tokens", 1, 12, 12, 197, 197, 32, false, true},
      {"head_dim 80, 256 tokens", 1, 12, 12, 256, 256, 80, false, true},
      {"head_dim 128, 512 tokens, causal", 1, 4, 4, 512, 512, 128, true, true},
      {"one query, 256 keys", 1, 12, 12, 1, 256, 64, false, false},
      {"one query, 1024 keys", 1, 12, 12, 1, 1024, 64, false, false},
      {"one query, 12 layers' caches of 256", 12, 12, 12, 1, 256, 64, false, false},
      {"one query, 9 heads on 3, 1024 keys", 1, 9, 3, 1, 1024, 64, false, false},
  };
  for (const Shape& c : shapes) measure(c, seconds, top);
}
