// Convolution's codes and depthwise sums with the vectors of simd/scalar.h.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_SCALAR
#include "conv/conv.h"
#include "linear/linear.h"
#include "simd/simd.h"
#if NF_BUILT
#include "conv/kernel.h"
#endif
#include "simd/end.h"
#if NF_BUILT
namespace nf {
const ConvKernels conv_scalar = scalar::kConvKernels;
}
#endif
