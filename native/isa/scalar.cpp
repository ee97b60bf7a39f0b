#define NF_SCALAR
#include "isa/families.inc"
