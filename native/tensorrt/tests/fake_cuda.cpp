// A libcuda.so.1 that writes down what it is asked: one line a call. FAKE_CAPABILITY: of its device, 89 for 8.9;
// FAKE_CONTEXT: 0 for a thread without one; FAKE_FAILS: the call that fails.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

int number(const char* name, int otherwise) {
  const char* const found = std::getenv(name);
  return found ? std::atoi(found) : otherwise;
}

int answer(const char* call) {
  const char* const fails = std::getenv("FAKE_FAILS");
  return fails && std::strcmp(fails, call) == 0 ? 700 : 0;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return answer("cuInit"); }
int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR_ILLEGAL_ADDRESS", 0; }
int cuCtxGetCurrent(void** context) {
  return *context = number("FAKE_CONTEXT", 1) ? reinterpret_cast<void*>(0x77) : nullptr, 0;
}
int cuCtxSetCurrent(void* context) { return std::printf("set current %p\n", context), 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(0x78);
  return std::printf("retain %d\n", device), 0;
}
int cuCtxGetDevice(int* device) { return *device = 3, answer("cuCtxGetDevice"); }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = number("FAKE_CAPABILITY", 80);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return device == 3 ? 0 : 101;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = reinterpret_cast<void*>(0x99);
  std::printf("load %s\n", static_cast<const char*>(image));
  return answer("cuModuleLoadData");
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = reinterpret_cast<void*>(0xaa);
  std::printf("function %s of %p\n", name, module);
  return answer("cuModuleGetFunction");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return std::printf("attribute %d of %p = %d\n", attribute, function, value), 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** places, void** extra) {
  std::printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %d:", function, x, y, z, bx, by, bz,
              shared, stream, extra != nullptr);
  for (int i = 0; i < 6; ++i) std::printf(" %llx", *static_cast<unsigned long long*>(places[i]));
  std::printf("\n");
  return answer("cuLaunchKernel");
}

// How `cuda.bindings` finds the others.
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}

}  // extern "C"
