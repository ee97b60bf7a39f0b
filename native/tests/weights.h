// Random quantized weights in the layout of nf_weight, packed bit by bit as normfuse.h describes it: slow and plain, so
// that the kernels are tested against the description and not against themselves.
#pragma once
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "normfuse.h"

struct Weights {
  int64_t n, k;
  int bits, groups;
  std::vector<int8_t> codes;   // [n][k]
  std::vector<int> exponents;  // [k]
  std::vector<int32_t> sizes, order;
  std::vector<uint8_t> packed;
  std::vector<float> scale, bias;
  int block = 0;                    // channels that share a multiplier; 0: there are none
  std::vector<int8_t> multipliers;  // [panel][block][16]

  Weights(int64_t n_, int64_t k_, int bits_, int groups_, std::mt19937& rng, bool full_scale = false)
      : n(n_), k(k_), bits(bits_), groups(groups_) {
    const int limit = (1 << (bits - 1)) - 1;
    codes.resize(static_cast<size_t>(n * k));
    for (auto& c : codes) {
      const int r = static_cast<int>(rng() % static_cast<unsigned>(2 * limit + 1)) - limit;
      c = static_cast<int8_t>(full_scale ? (r < 0 ? -limit : limit) : r);
    }
    exponents.resize(static_cast<size_t>(k));
    for (auto& e : exponents) e = static_cast<int>(rng() % static_cast<unsigned>(groups));
    sizes.assign(static_cast<size_t>(groups), 0);
    for (int e : exponents) ++sizes[static_cast<size_t>(e)];
    order.resize(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) order[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return exponents[static_cast<size_t>(a)] < exponents[static_cast<size_t>(b)];
    });
    for (int64_t i = 0; i < n; ++i) {
      scale.push_back(0.001f * static_cast<float>(1 + rng() % 100));
      bias.push_back(0.01f * static_cast<float>(rng() % 200) - 1.f);
    }
    pack();
  }

  void pack() {
    std::vector<int64_t> channels;  // -1: padding
    size_t at = 0;
    for (int32_t size : sizes) {
      for (int32_t i = 0; i < size; ++i) channels.push_back(order[at++]);
      while (channels.size() % 4) channels.push_back(-1);
    }
    const int unit = bits == 8 ? 1 : bits == 4 ? 2 : bits == 6 || bits == 2 ? 4 : 8;
    while (channels.size() / 4 % static_cast<size_t>(unit)) channels.push_back(-1);
    const int64_t quads = static_cast<int64_t>(channels.size()) / 4;
    for (int64_t panel = 0; panel < (n + 15) / 16; ++panel) {
      int low = 0;
      for (int w : {8, 4, 2, 1}) {
        if (!(w == 8 ? bits == 8 : bits < 8 && bits & w)) continue;
        const int per = 8 / w;
        for (int64_t block = 0; block < quads / per; ++block)
          for (int column = 0; column < 16; ++column)
            for (int c = 0; c < 4; ++c) {
              int byte = 0;
              for (int j = 0; j < per; ++j) {
                const int64_t channel = channels[static_cast<size_t>((block * per + j) * 4 + c)],
                              row = panel * 16 + column;
                const int code = channel < 0 || row >= n ? 0 : codes[static_cast<size_t>(row * k + channel)];
                const int u = code + (1 << (bits - 1));
                byte |= (u >> low & ((1 << w) - 1)) << (w * j);
              }
              packed.push_back(static_cast<uint8_t>(byte));
            }
        low += w;
      }
    }
  }

  nf_weight view(bool with_bias = true) const {
    return {n,
            k,
            bits,
            groups,
            sizes.data(),
            groups > 1 ? order.data() : nullptr,
            packed.data(),
            scale.data(),
            with_bias ? bias.data() : nullptr,
            block ? multipliers.data() : nullptr,
            block};
  }

  // Every block of `channels` channels gets multipliers up to the largest that there may be, and codes their lowest
  // value.
  void multiply(int channels, std::mt19937& rng, bool full_scale = false) {
    block = channels;
    const unsigned most = 127u >> (bits - 1);
    for (auto& c : codes)
      if (full_scale ? c < 0 : rng() % 8 == 0) c = static_cast<int8_t>(-(1 << (bits - 1)));
    packed.clear();
    pack();
    multipliers.resize(static_cast<size_t>((n + 15) / 16 * ((k + block - 1) / block) * 16));
    for (auto& m : multipliers) {
      const int size = static_cast<int>(full_scale ? most : 1 + rng() % most);
      m = static_cast<int8_t>(rng() % 2 ? size : -size);
    }
  }

  int64_t multiplier(int64_t row, int64_t channel) const {
    if (!block) return 1;
    return multipliers[static_cast<size_t>((row / 16 * ((k + block - 1) / block) + channel / block) * 16 + row % 16)];
  }

  int64_t sum(const int8_t* a, int64_t row) const {  // of one output, exactly
    int64_t s = 0;
    for (int64_t i = 0; i < k; ++i)
      s += static_cast<int64_t>(a[i]) * codes[static_cast<size_t>(row * k + i)] * multiplier(row, i) *
           (int64_t{1} << (groups - 1 - exponents[static_cast<size_t>(i)]));
    return s;
  }
};
