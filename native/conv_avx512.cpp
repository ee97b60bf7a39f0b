// Convolution's codes and depthwise sums with the vectors of simd_avx512.h.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_AVX512
#include "conv.h"
#include "linear.h"
#include "simd.h"
#if NF_BUILT
#include "conv_kernel.h"
#endif
#include "simd_end.h"
#if NF_BUILT
namespace nf {
const ConvKernels conv_avx512 = avx512::kConvKernels;
}
#endif
