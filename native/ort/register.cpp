// The entry point that ONNX Runtime looks up in a custom-op library.
#include <mutex>

#include "ort/op.h"

#if defined(__linux__)
#include <sched.h>
#endif
#include <thread>

namespace nf::ort {

// ONNX Runtime does not say how many threads its pool has; its default is a thread a core, and with fewer the tasks of
// a kernel wait in line.
int processors() {
  static const int count = [] {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const int n = int(std::thread::hardware_concurrency());
    return n > 0 ? n : 1;
  }();
  return count;
}

namespace {

struct Domain {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
};

// One domain for each ONNX Runtime in the process. Sessions refer to it as long as they live, so it stays.
OrtStatus* domain_of(const OrtApi& api, OrtCustomOpDomain** out) {
  static std::mutex mutex;
  static std::vector<Domain>& known = *new std::vector<Domain>;
  std::lock_guard<std::mutex> lock(mutex);
  for (const Domain& d : known)
    if (d.api == &api) {
      *out = d.domain;
      return nullptr;
    }
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* failed = api.call<OrtStatus*>(kCreateCustomOpDomain, "normfuse", &domain)) return failed;
  for (const Op& op : named_ops())
    if (OrtStatus* failed = api.call<OrtStatus*>(kCustomOpDomain_Add, domain, static_cast<const OrtCustomOp*>(&op)))
      return failed;
  known.push_back({&api, domain});
  *out = domain;
  return nullptr;
}

}  // namespace
}  // namespace nf::ort

NF_EXPORT nf::ort::OrtStatus* RegisterCustomOps(nf::ort::OrtSessionOptions* options, const nf::ort::OrtApiBase* base) {
  using namespace nf::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) {
    // Every version has slot 0, which is what a status is made with.
    const OrtApi* oldest = base->GetApi(1);
    if (!oldest) return nullptr;
    return oldest->call<OrtStatus*>(kCreateStatus, int(kNotImplemented),
                                    "normfuse needs ONNX Runtime 1.17 or newer for its native kernels");
  }
  try {
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* failed = domain_of(*api, &domain)) return failed;
    return api->call<OrtStatus*>(kAddCustomOpDomain, options, domain);
  } catch (...) {
    return api->call<OrtStatus*>(kCreateStatus, int(kFail), "normfuse: out of memory");
  }
}
