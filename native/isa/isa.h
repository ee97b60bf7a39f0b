// Which instruction sets the kernels are written for, and which one runs now.
#pragma once
#include "normfuse.h"

// Compilers as old as these come with assemblers that do not know vpdpbusd without AVX-512 (binutils before 2.36).
#if !defined(__x86_64__)
#define NF_HAS_AVXVNNI 0
#elif defined(__clang__)
#define NF_HAS_AVXVNNI (__clang_major__ >= 13)
#else
#define NF_HAS_AVXVNNI (__GNUC__ >= 11)
#endif

namespace nf {

// Best last. AvxVnni is Avx2 for everything but the int8 products.
enum class Isa : int { Scalar = 0, Neon = 1, Avx2 = 2, AvxVnni = 3, Avx512 = 4 };

Isa active_isa();

// What a table of kernels is chosen by: of AVX-512, AVX2 and NEON only one or none fits a machine.
inline bool runs_avx512() { return active_isa() == Isa::Avx512; }
inline bool runs_avx2() { return active_isa() == Isa::Avx2 || active_isa() == Isa::AvxVnni; }
inline bool runs_neon() { return active_isa() == Isa::Neon; }

}  // namespace nf
