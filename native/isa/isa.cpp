// The machine is asked once; NORMFUSE_ISA and nf_force_isa choose among what it has.
#include "isa/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "normfuse.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nf {
namespace {

#if defined(NORMFUSE_SIMDE)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

struct InstructionSet {
  const char* name;
  const Kernels* kernels;  // nullptr: not of this target
  bool (*there)();         // on this machine
  bool asked = false;      // for tests that ask for it: never chosen as the best
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// No name for it in __builtin_cpu_supports of GCC 12 and Clang 14. That the system saves the registers is what "avx2"
// has asked.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && (kEmulated || (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)));
}

bool has_avx512() {
  return kEmulated || (has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vnni"));
}

constexpr const Kernels *kAvx512 = &avx512::kernels, *kAvx2 = &avx2::kernels, *kNeon = nullptr;
#if NF_HAS_AVXVNNI
constexpr const Kernels* kAvxVnni = &avx2::kernels_vnni;
#else
constexpr const Kernels* kAvxVnni = nullptr;
#endif
#else
constexpr bool (*has_avx2)() = nullptr, (*has_avxvnni)() = nullptr, (*has_avx512)() = nullptr;
constexpr const Kernels *kAvx512 = nullptr, *kAvxVnni = nullptr, *kAvx2 = nullptr;
#if defined(__aarch64__)
constexpr const Kernels* kNeon = &neon::kernels;
#else
constexpr const Kernels* kNeon = nullptr;
#endif
#endif

bool has_neon() {
#if defined(__aarch64__) && defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__aarch64__) && defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#else
  return false;
#endif
}

// Best first.
constexpr InstructionSet kSets[] = {{"avx512vnni", kAvx512, has_avx512, kEmulated},
                                    {"avxvnni", kAvxVnni, has_avxvnni, kEmulated},
                                    {"avx2", kAvx2, has_avx2},
                                    {"neondot", kNeon, has_neon},
                                    {"scalar", &scalar::kernels, [] { return true; }}};

bool has(const InstructionSet& s) { return s.kernels && s.there(); }

const InstructionSet* named(const char* name) {
  for (const InstructionSet& s : kSets)
    if (std::strcmp(s.name, name) == 0) return &s;
  return nullptr;
}

const InstructionSet& best() {
  if (const char* wanted = std::getenv("NORMFUSE_ISA")) {
    const InstructionSet* s = named(wanted);
    if (s && has(*s)) return *s;
  }
  const InstructionSet* s = kSets;
  while (s->asked || !has(*s)) ++s;  // the last one is always there
  return *s;
}

std::atomic<const InstructionSet*> forced{nullptr};

const InstructionSet& active() {
  static const InstructionSet& found = best();
  const InstructionSet* f = forced.load(std::memory_order_relaxed);
  return f ? *f : found;
}

struct Available {
  char text[96] = "";
  Available() {
    for (const InstructionSet& s : kSets) {
      if (!has(s)) continue;
      if (text[0]) std::strcat(text, " ");
      std::strcat(text, s.name);
    }
  }
};

}  // namespace

const Kernels& active_kernels() { return *active().kernels; }

}  // namespace nf

NF_EXPORT const char* nf_isa_available() {
  static const nf::Available available;
  return available.text;
}

NF_EXPORT const char* nf_isa() { return nf::active().name; }

NF_EXPORT const char* nf_force_isa(const char* name) {
  if (!name) {
    nf::forced.store(nullptr);
    return nullptr;
  }
  const nf::InstructionSet* s = nf::named(name);
  if (!s) return "nf_force_isa: no instruction set of this name; nf_isa_available() lists them";
  if (!nf::has(*s))
    return "nf_force_isa: this machine does not have that instruction set; nf_isa_available() lists what it has";
  nf::forced.store(s);
  return nullptr;
}
