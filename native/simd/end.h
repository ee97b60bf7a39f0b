// Ends what simd.h began: what follows compiles for the base instruction set again.
#if defined(NF_TARGET)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef NF_TARGET
#endif
