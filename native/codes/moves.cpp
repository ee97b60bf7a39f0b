// Codes that only change their places.
#include <algorithm>
#include <cstring>

#include "linear/linear.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kTask = 1 << 15;  // bytes that are written
constexpr int64_t kMost = INT64_C(1) << 40;

bool fits(int64_t a, int64_t b, int64_t c) {
  return a <= kMost && b <= kMost / std::max<int64_t>(a, 1) && c <= kMost / std::max<int64_t>(a * b, 1);
}

// Bytes of which compilers make one move each; a call of memcpy costs more than the few of a pixel.
inline void copy(const uint8_t* from, int64_t count, uint8_t* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) std::memcpy(to + i, from + i, 16);
  if (i == count) return;
  if (count >= 16) std::memcpy(to + count - 16, from + count - 16, 16);
  else
    for (; i < count; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace nf

NF_EXPORT const char* nf_codes_take(const nf_threads* threads, const uint8_t* x, int64_t pixels, int64_t c,
                                    int64_t first, int64_t count, int64_t groups, uint8_t* y) {
  using namespace nf;
  if (pixels < 0 || c < 1 || !fits(pixels, c, 1)) return "codes: the tensor does not fit in memory, or has no channels";
  if (first < 0 || count < 1 || first > c - count) return "codes: there are no such channels";
  if (groups < 1 || count % groups) return "codes: count must be a multiple of groups";
  if (pixels && (!x || !y)) return "codes: x or y is missing";
  const int64_t step = std::max<int64_t>(1, kTask / count), each = count / groups;
  parallel(threads, ceil_div(pixels, step), [&](int64_t task) {
    for (int64_t p = task * step; p < std::min(pixels, (task + 1) * step); ++p) {
      const uint8_t* from = x + p * c + first;
      uint8_t* to = y + p * count;
      if (groups == 1) copy(from, count, to);
      else
        for (int64_t i = 0; i < groups; ++i)
          for (int64_t j = 0; j < each; ++j) to[j * groups + i] = from[i * each + j];
    }
  });
  return nullptr;
}

NF_EXPORT const char* nf_codes_upsample(const nf_threads* threads, const uint8_t* x, int64_t rows, int64_t w, int64_t c,
                                        int64_t tall, int64_t wide, uint8_t* y) {
  using namespace nf;
  if (rows < 0 || w < 1 || c < 1 || tall < 1 || wide < 1 || !fits(rows, w, c) || !fits(rows * w * c, tall, wide))
    return "codes: the tensor does not fit in memory, or a size is less than 1";
  if (rows && (!x || !y)) return "codes: x or y is missing";
  parallel(threads, rows, [&](int64_t row) {
    const uint8_t* from = x + row * w * c;
    uint8_t *first = y + row * tall * wide * w * c, *to = first;
    for (int64_t p = 0; p < w; ++p, from += c)
      for (int64_t i = 0; i < wide; ++i, to += c) copy(from, c, to);
    for (int64_t i = 1; i < tall; ++i, to += wide * w * c) std::memcpy(to, first, static_cast<size_t>(wide * w * c));
  });
  return nullptr;
}
