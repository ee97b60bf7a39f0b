// Norms and softmax with 16 floats a vector.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_AVX512
#include "norm/norm.h"
#include "simd/simd.h"
#if NF_BUILT
#include "norm/kernel.h"
#include "softmax/kernel.h"
#endif
#include "simd/end.h"
#if NF_BUILT
namespace nf {
const NormKernels norm_avx512 = avx512::kKernels;
}
#endif
