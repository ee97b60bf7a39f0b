// Convolutions of codes on AVX2.
#include "codes/codes.h"
#include "isa/isa.h"

#define NF_AVX2
#include "simd/simd.h"

#if NF_BUILT
#include "codes/kernel.h"

namespace nf::avx2 {

const CodesKernels codes = {tile_codes,       depthwise_codes, max_pool_codes, quantize_codes,
                            dequantize_codes, add_codes,       sum_codes,      gate_codes};

}  // namespace nf::avx2
#endif
#include "simd/end.h"
