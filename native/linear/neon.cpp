// Integer products of NEON with dot products (sdot, Armv8.2): signed weights, four quads of a row at a time.
#include "linear/linear.h"

#include "isa/isa.h"

#define NF_NEON
#include "simd/simd.h"

#if NF_BUILT
#include "linear/blocks.h"
#include "linear/finish.h"
#include "linear/tile.h"
#include "simd/quantize.h"

namespace nf::neon {
namespace {

// vdotq_laneq_s32, which the headers hide unless the whole file may use the extension.
template <int Lane>
NF_INLINE inline void dot(int32x4_t& c, int8x16_t w, int8x16_t a) {
  asm(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(c) : "w"(w), "w"(a), "i"(Lane));
}

struct Dot {
  static constexpr int kRows = 4;

  template <int R, int Lane>
  static NF_INLINE void quad(int32x4_t* c, const int8_t* w, const int8x16_t* a) {
    NF_UNROLL for (int v = 0; v < 4; ++v) {
      const int8x16_t x = vld1q_s8(w + Lane * kQuadBytes + v * 16);
      NF_UNROLL for (int r = 0; r < R; ++r) dot<Lane>(c[r * 4 + v], x, a[r]);
    }
  }

  template <int R>
  static void tile(const Stretch& s, const int8_t* first, int32_t* sums) {
    int32x4_t c[R * 4];
    const int32x4_t by = vdupq_n_s32(s.shift);
    NF_UNROLL for (int i = 0; i < R * 4; ++i) c[i] = s.first ? vdupq_n_s32(0) : vshlq_s32(vld1q_s32(sums + i * 4), by);
    const int8_t* w = reinterpret_cast<const int8_t*>(s.w);
    const int8_t* p = first;
    int64_t q = 0;
    int8x16_t a[R];
    for (; q + 4 <= s.quads; q += 4, w += 4 * kQuadBytes, p += 16) {
      NF_UNROLL for (int r = 0; r < R; ++r) a[r] = vld1q_s8(p + r * s.a_stride);
      quad<R, 0>(c, w, a);
      quad<R, 1>(c, w, a);
      quad<R, 2>(c, w, a);
      quad<R, 3>(c, w, a);
    }
    for (; q < s.quads; ++q, w += kQuadBytes, p += 4) {
      NF_UNROLL for (int r = 0; r < R; ++r) {
        int32_t x;
        std::memcpy(&x, p + r * s.a_stride, 4);
        a[r] = vreinterpretq_s8_s32(vdupq_n_s32(x));
      }
      quad<R, 0>(c, w, a);
    }
    NF_UNROLL for (int i = 0; i < R * 4; ++i) vst1q_s32(sums + i * 4, c[i]);
  }
};

void multiply(const Stretch& s) { multiply_rows<Dot>(s); }
bool no(int) { return false; }

}  // namespace

const LinearKernels linear = {
    no, 0, unpack, multiply, nullptr, finish, row_sum, quantize_row, quantize_static, nullptr, nullptr, fold, {}};

}  // namespace nf::neon
#endif
#include "simd/end.h"
