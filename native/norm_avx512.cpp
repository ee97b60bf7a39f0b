// Norms and softmax with 16 floats a vector.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_AVX512
#include "norm.h"
#include "simd.h"
#if NF_BUILT
#include "norm_kernel.h"
#include "softmax_kernel.h"
#endif
#include "simd_end.h"
#if NF_BUILT
namespace nf {
const NormKernels norm_avx512 = avx512::kKernels;
}
#endif
