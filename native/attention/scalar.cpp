// Attention in plain C++, for machines without a kernel of their own and as what the others are tested against.
#include "isa/isa.h"

#define NF_SCALAR
#include "simd/simd.h"

#include "attention/kernel.h"

namespace nf::scalar {
namespace {

struct Blocks {
  static constexpr int rows = 4, columns = 4, block_rows = 16, few_rows = 4;
  static void transpose(const float* from, int64_t, float* to, int64_t) { *to = *from; }
  static I32 pairs(I32 sum, F32 a, F32 b) {
    int16_t x[2], y[2];
    std::memcpy(x, &a.v, sizeof x);
    std::memcpy(y, &b.v, sizeof y);
    return {sum.v + x[0] * y[0] + x[1] * y[1]};
  }
  static void sums(const F32* x, float* to) {
    for (int i = 0; i < 4; ++i) to[i] = x[i].v;
  }
};

}  // namespace

const AttendKernels attention = Attention<Blocks>::kernels();

}  // namespace nf::scalar
#include "simd/end.h"
