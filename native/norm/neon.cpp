// Norms and softmax with 4 floats a vector.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_NEON
#include "norm/norm.h"
#include "simd/simd.h"
#if NF_BUILT
#include "norm/kernel.h"
#include "softmax/kernel.h"
#endif
#include "simd/end.h"
#if NF_BUILT
namespace nf {
const NormKernels norm_neon = neon::kKernels;
}
#endif
