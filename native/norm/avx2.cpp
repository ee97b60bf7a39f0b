// Norms and softmax with 8 floats a vector.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_AVX2
#include "norm/norm.h"
#include "simd/simd.h"
#if NF_BUILT
#include "norm/kernel.h"
#include "softmax/kernel.h"
#endif
#include "simd/end.h"
#if NF_BUILT
namespace nf {
const NormKernels norm_avx2 = avx2::kKernels;
}
#endif
