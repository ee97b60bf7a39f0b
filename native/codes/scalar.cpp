// Convolutions of codes in plain loops.
#include "codes/codes.h"
#include "isa/isa.h"

#define NF_SCALAR
#include "simd/simd.h"

#include "codes/kernel.h"

namespace nf::scalar {

const CodesKernels codes = {tile_codes,       depthwise_codes, max_pool_codes, quantize_codes,
                            dequantize_codes, add_codes,       sum_codes,      gate_codes};

}  // namespace nf::scalar
#include "simd/end.h"
