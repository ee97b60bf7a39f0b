// Convolutions of codes on NEON: plain loops, of which the compiler makes vectors.
#include "codes/codes.h"
#include "isa/isa.h"

#define NF_NEON
#include "simd/simd.h"

#if NF_BUILT
#include "codes/kernel.h"

namespace nf::neon {

const CodesKernels codes = {tile_codes,       depthwise_codes, max_pool_codes, quantize_codes,
                            dequantize_codes, add_codes,       sum_codes,      gate_codes};

}  // namespace nf::neon
#endif
#include "simd/end.h"
