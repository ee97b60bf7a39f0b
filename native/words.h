// The words that attributes of ONNX nodes use for the numbers of normfuse.h; normfuse/words.py has the same ones in the
// same order.
#pragma once
#include "normfuse.h"

namespace nf {

constexpr const char* kEpilogues[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
constexpr const char* kFunctions[] = {"none", "hardswish", "silu"};
constexpr const char* kNormKinds[] = {"layer", "rms", "crms", "l1"};
static_assert(sizeof kEpilogues / sizeof *kEpilogues == NF_SILU + 1, "a word for each epilogue");
static_assert(sizeof kFunctions / sizeof *kFunctions == NF_CODES_SILU + 1, "a word for each function");
static_assert(sizeof kNormKinds / sizeof *kNormKinds == NF_L1 + 1, "a word for each norm");

}  // namespace nf
