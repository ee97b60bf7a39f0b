// Integer products in plain C++: what the other instruction sets are tested against, and what runs where there is none
// of them.
#include "linear/linear.h"

#include "isa/isa.h"

#define NF_SCALAR
#include "simd/simd.h"

#include "linear/blocks.h"
#include "linear/finish.h"
#include "simd/quantize.h"

namespace nf::scalar {
namespace {

void multiply(const Stretch& s) {
  for (int64_t m = 0; m < s.rows; ++m) {
    const int8_t* a = s.a + m * s.a_stride;
    int32_t* sums = s.sums + m * kPanel;
    for (int n = 0; n < kPanel; ++n) {
      uint32_t sum = s.first ? 0u : static_cast<uint32_t>(sums[n]) << s.shift;
      for (int64_t q = 0; q < s.quads; ++q) {
        const int8_t* w = reinterpret_cast<const int8_t*>(s.w) + q * kQuadBytes + n * 4;
        sum += static_cast<uint32_t>(a[q * 4] * w[0] + a[q * 4 + 1] * w[1] + a[q * 4 + 2] * w[2] + a[q * 4 + 3] * w[3]);
      }
      sums[n] = static_cast<int32_t>(sum);
    }
  }
}

bool no(int) { return false; }

}  // namespace

const LinearKernels linear = {
    no, 0, unpack, multiply, nullptr, finish, row_sum, quantize_row, quantize_static, nullptr, nullptr, fold, {}};

}  // namespace nf::scalar

#include "simd/end.h"
