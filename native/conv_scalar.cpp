// Convolution's codes and depthwise sums with the vectors of simd_scalar.h.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_SCALAR
#include "conv.h"
#include "linear.h"
#include "simd.h"
#if NF_BUILT
#include "conv_kernel.h"
#endif
#include "simd_end.h"
#if NF_BUILT
namespace nf {
const ConvKernels conv_scalar = scalar::kConvKernels;
}
#endif
