#define NF_NEON
#include "isa/families.inc"
