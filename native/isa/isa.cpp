// The machine is asked once; NORMFUSE_ISA and nf_force_isa choose among what it has.
#include "isa/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace nf {
namespace {

struct Entry {
  Isa isa;
  const char* name;
};
constexpr Entry kEntries[] = {
    {Isa::Avx512, "avx512vnni"}, {Isa::AvxVnni, "avxvnni"}, {Isa::Avx2, "avx2"}, {Isa::Neon, "neondot"}, {Isa::Scalar, "scalar"}};

#if defined(__x86_64__) || defined(__i386__)
// No name for it in __builtin_cpu_supports of GCC 12 and Clang 14. That the system saves the registers is what "avx2" has asked.
[[maybe_unused]] bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

bool has(Isa isa) {
  switch (isa) {
    case Isa::Scalar:
      return true;
#if defined(__x86_64__) || defined(__i386__)
    case Isa::Avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::AvxVnni:
#if !NF_HAS_AVXVNNI
      return false;
#elif defined(NORMFUSE_SIMDE)
      return has(Isa::Avx2);
#else
      return has(Isa::Avx2) && has_avx_vnni();
#endif
    case Isa::Avx512:
#if defined(NORMFUSE_SIMDE)
      return true;
#else
      return has(Isa::Avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
#elif defined(__aarch64__)
    case Isa::Neon:
#if defined(__linux__)
      return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    {
      int value = 0;
      size_t size = sizeof value;
      return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
    }
#else
      return false;
#endif
#endif
    default:
      return false;
  }
}

const Entry* named(const char* name) {
  for (const Entry& e : kEntries)
    if (std::strcmp(e.name, name) == 0) return &e;
  return nullptr;
}

Isa best() {
  if (const char* wanted = std::getenv("NORMFUSE_ISA")) {
    const Entry* e = named(wanted);
    if (e && has(e->isa)) return e->isa;
  }
  for (const Entry& e : kEntries) {
#if defined(NORMFUSE_SIMDE)
    if (e.isa == Isa::Avx512 || e.isa == Isa::AvxVnni) continue;  // emulated: for tests that ask for it
#endif
    if (has(e.isa)) return e.isa;
  }
  return Isa::Scalar;
}

std::atomic<int> forced{-1};

struct Available {
  char text[96] = "";
  Available() {
    for (const Entry& e : kEntries) {
      if (!has(e.isa)) continue;
      if (text[0]) std::strcat(text, " ");
      std::strcat(text, e.name);
    }
  }
};

}  // namespace

Isa active_isa() {
  static const Isa found = best();
  const int f = forced.load(std::memory_order_relaxed);
  return f < 0 ? found : static_cast<Isa>(f);
}

}  // namespace nf

NF_EXPORT const char* nf_isa_available() {
  static const nf::Available available;
  return available.text;
}

NF_EXPORT const char* nf_isa() {
  for (const nf::Entry& e : nf::kEntries)
    if (e.isa == nf::active_isa()) return e.name;
  return "scalar";
}

NF_EXPORT const char* nf_force_isa(const char* name) {
  if (!name) {
    nf::forced.store(-1);
    return nullptr;
  }
  const nf::Entry* e = nf::named(name);
  if (!e) return "nf_force_isa: no instruction set of this name; nf_isa_available() lists them";
  if (!nf::has(e->isa)) return "nf_force_isa: this machine does not have that instruction set; nf_isa_available() lists what it has";
  nf::forced.store(static_cast<int>(e->isa));
  return nullptr;
}
