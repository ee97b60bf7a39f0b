// The instruction sets: what each has of every family of kernels, and which one runs now.
#pragma once

// Compilers as old as these come with assemblers that do not know vpdpbusd without AVX-512 (binutils before 2.36).
#if !defined(__x86_64__)
#define NF_HAS_AVXVNNI 0
#elif defined(__clang__)
#define NF_HAS_AVXVNNI (__clang_major__ >= 13)
#else
#define NF_HAS_AVXVNNI (__GNUC__ >= 11)
#endif

namespace nf {

struct AttendKernels;
struct CodesKernels;
struct ConvKernels;
struct LinearKernels;
struct NormKernels;
struct SoftmaxKernels;

// Of one instruction set. The header of a family says what its kernels do.
struct Kernels {
  const LinearKernels& linear;
  const AttendKernels& attention;
  const CodesKernels& codes;
  const ConvKernels& conv;
  const NormKernels& norm;
  const SoftmaxKernels& softmax;
};

// Each is defined where the target has the instruction set. `linear`, `attention` and `codes` have a source file each
// in their rooms; the other families are made of the vectors alone, and put together by families.inc.
namespace scalar {
extern const LinearKernels linear;
extern const AttendKernels attention;
extern const CodesKernels codes;
extern const Kernels kernels;
}  // namespace scalar
namespace neon {
extern const LinearKernels linear;
extern const AttendKernels attention;
extern const CodesKernels codes;
extern const Kernels kernels;
}  // namespace neon
namespace avx2 {
extern const LinearKernels linear, linear_vnni;
extern const AttendKernels attention;
extern const CodesKernels codes;
extern const Kernels kernels, kernels_vnni;  // AVX-VNNI is AVX2 for everything but the products
}  // namespace avx2
namespace avx512 {
extern const LinearKernels linear;
extern const AttendKernels attention;
extern const CodesKernels codes;
extern const Kernels kernels;
}  // namespace avx512

// Those of the set that runs now.
const Kernels& active_kernels();

}  // namespace nf
