// Norms and softmax in plain C++: for a machine with none of the vector sets.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_SCALAR
#include "norm/norm.h"
#include "simd/simd.h"
#if NF_BUILT
#include "norm/kernel.h"
#include "softmax/kernel.h"
#endif
#include "simd/end.h"
#if NF_BUILT
namespace nf {
const NormKernels norm_scalar = scalar::kKernels;
}
#endif
