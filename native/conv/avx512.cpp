// Convolution's codes and depthwise sums with the vectors of simd/avx512.h.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NF_AVX512
#include "conv/conv.h"
#include "linear/linear.h"
#include "simd/simd.h"
#if NF_BUILT
#include "conv/kernel.h"
#endif
#include "simd/end.h"
#if NF_BUILT
namespace nf {
const ConvKernels conv_avx512 = avx512::kConvKernels;
}
#endif
