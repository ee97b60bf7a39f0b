// Norms and softmax with 8 floats a vector.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_AVX2
#include "norm.h"
#include "simd.h"
#if NF_BUILT
#include "norm_kernel.h"
#include "softmax_kernel.h"
#endif
#include "simd_end.h"
#if NF_BUILT
namespace nf {
const NormKernels norm_avx2 = avx2::kKernels;
}
#endif
