#define NF_AVX2
#include "isa/families.inc"
