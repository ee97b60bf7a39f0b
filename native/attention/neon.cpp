// Attention with NEON: 6 rows by 4 vectors of sums.
#include "isa/isa.h"

#define NF_NEON
#include "simd/simd.h"

#include "attention/kernel.h"
#if NF_BUILT
namespace nf::neon {
namespace {

struct Blocks {
  static constexpr int rows = 6, columns = 4, block_rows = 24, few_rows = 4;
  static void sums(const F32* x, float* to) {
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(x[0].v, x[1].v), vpaddq_f32(x[2].v, x[3].v)));
  }
  static I32 pairs(I32 sum, F32 a, F32 b) {
    const int16x8_t x = vreinterpretq_s16_f32(a.v), y = vreinterpretq_s16_f32(b.v);
    return {vaddq_s32(sum.v, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)))};
  }
  static void transpose(const float* from, int64_t stride, float* to, int64_t ld) {
    const float32x4_t a = vld1q_f32(from), b = vld1q_f32(from + stride), c = vld1q_f32(from + 2 * stride),
                      d = vld1q_f32(from + 3 * stride);
    const float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    vst1q_f32(to, vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)));
    vst1q_f32(to + ld, vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1)));
    vst1q_f32(to + 2 * ld, vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)));
    vst1q_f32(to + 3 * ld, vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1)));
  }
};

}  // namespace

const AttendKernels attention = Attention<Blocks>::kernels();

}  // namespace nf::neon
#endif
#include "simd/end.h"
