// Norms and softmax in plain C++: for a machine with none of the vector sets.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_SCALAR
#include "norm.h"
#include "simd.h"
#if NF_BUILT
#include "norm_kernel.h"
#include "softmax_kernel.h"
#endif
#include "simd_end.h"
#if NF_BUILT
namespace nf {
const NormKernels norm_scalar = scalar::kKernels;
}
#endif
