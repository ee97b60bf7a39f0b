#define NF_AVX512
#include "isa/families.inc"
