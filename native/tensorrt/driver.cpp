#include "driver.h"

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace nf::trt {
namespace {

// The functions of the driver's interface that are used here, with its types spelled out: no toolkit is needed to
// compile this.
using Result = int;
using Handle = void*;

constexpr uint64_t ALIGNED =
    16;  // bytes that kernels read at a time; an address between two would end the whole CUDA context
constexpr int32_t FREE_SHARED = 48 * 1024;  // bytes; for more than that a function must be told
constexpr int MAX_SHARED = 8, MAJOR = 75,
              MINOR = 76;  // CU_FUNC_ATTRIBUTE_..., CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...

struct Driver {
  Result (*init)(unsigned);
  Result (*error_name)(Result, const char**);
  Result (*current)(Handle*);
  Result (*set_current)(Handle);
  Result (*retain)(Handle*, int);
  Result (*device)(int*);
  Result (*attribute)(int*, int, int);
  Result (*load)(Handle*, const void*);
  Result (*function)(Handle*, Handle, const char*);
  Result (*set)(Handle, int, int);
  Result (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                   void**);

  Driver() {
#ifdef _WIN32
    const auto library = LoadLibraryA("nvcuda.dll");
    const auto symbol = [&](const char* name) {
      return library ? reinterpret_cast<void*>(GetProcAddress(library, name)) : nullptr;
    };
    const std::string why = "nvcuda.dll does not load";
#else
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    const auto symbol = [&](const char* name) { return library ? dlsym(library, name) : nullptr; };
    const char* const said = library ? nullptr : dlerror();
    const std::string why = said ? said : "";
#endif
    if (!library) throw Problem("the GPU's driver is not there: " + why);
    const auto find = [&](auto& to, const char* name) {
      void* const found = symbol(name);
      if (!found) throw Problem(std::string("the GPU's driver has no ") + name);
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(found);
    };
    find(init, "cuInit");
    find(error_name, "cuGetErrorName");
    find(current, "cuCtxGetCurrent");
    find(set_current, "cuCtxSetCurrent");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(device, "cuCtxGetDevice");
    find(attribute, "cuDeviceGetAttribute");
    find(load, "cuModuleLoadData");
    find(function, "cuModuleGetFunction");
    find(set, "cuFuncSetAttribute");
    find(launch, "cuLaunchKernel");
    done(init(0), "cuInit");
  }

  void done(Result result, const std::string& call) const {
    if (result == 0) return;
    const char* name = nullptr;
    error_name(result, &name);
    throw Problem(call + " of the GPU's driver failed: " + (name ? name : std::to_string(result)));
  }
};

const Driver& driver() {
  static const Driver it;  // tried again after an exception
  return it;
}

Handle context() {
  const Driver& cu = driver();
  Handle found = nullptr;
  cu.done(cu.current(&found), "cuCtxGetCurrent");
  if (found) return found;
  cu.done(cu.retain(&found, 0), "cuDevicePrimaryCtxRetain");
  cu.done(cu.set_current(found), "cuCtxSetCurrent");
  return found;
}

int32_t capability() {
  const Driver& cu = driver();
  int device = 0, major = 0, minor = 0;
  cu.done(cu.device(&device), "cuCtxGetDevice");
  cu.done(cu.attribute(&major, MAJOR, device), "cuDeviceGetAttribute");
  cu.done(cu.attribute(&minor, MINOR, device), "cuDeviceGetAttribute");
  return major * 10 + minor;
}

// Layers of one size share an image, and each loaded module would be compiled again.
Handle function(Handle context, const std::string& entry, const Code& code) {
  static std::mutex lock;
  static std::map<std::tuple<Handle, std::string, std::string>, Handle> loaded;
  const Driver& cu = driver();
  const std::lock_guard<std::mutex> guard(lock);
  const auto key = std::make_tuple(context, entry, code.ptx);
  if (const auto at = loaded.find(key); at != loaded.end()) return at->second;
  Handle module = nullptr, found = nullptr;
  cu.done(cu.load(&module, code.ptx.c_str()), "cuModuleLoadData(PTX of " + entry + ", " + code.name() + ")");
  cu.done(cu.function(&found, module, entry.c_str()), "cuModuleGetFunction(" + entry + ")");
  if (code.shared > FREE_SHARED)
    cu.done(cu.set(found, MAX_SHARED, code.shared),
            "cuFuncSetAttribute(" + entry + ", " + std::to_string(code.shared) + " bytes of shared memory)");
  return loaded[key] = found;
}

}  // namespace

Kernel::Kernel(const Payload& given) : payload(given) {
  const Handle current = context();
  const int32_t device = capability();
  const auto load = [&](const Way& way) {
    const Code& code = payload.code(way, device);
    return Loaded{&way, &code, function(current, payload.entry, code)};
  };
  many = load(payload.many);
  few = payload.few_rows ? load(payload.few) : many;
}

void Kernel::launch(const void* const* inputs, void* const* outputs, int64_t rows, void* stream) const {
  if (rows == 0) return;
  const Loaded& it = rows <= payload.few_rows ? few : many;
  const int64_t grid = it.way->grid(rows), most = int64_t(1) << 31;
  if (rows >= most || grid >= most)
    throw Problem("the plugin " + payload.entry + ": " + std::to_string(rows) + " rows in " + std::to_string(grid) +
                  " programs; a launch has less than 2^31");
  // 8 bytes a parameter: an int32 is the lower half of one, and scratch pointers stay zero
  std::vector<uint64_t> values(size_t(it.code->parameters), 0);
  std::vector<void*> places;
  for (uint64_t& value : values) places.push_back(&value);
  size_t i = 0;
  for (size_t k = 0; k < payload.inputs.size(); ++k) values[i++] = reinterpret_cast<uintptr_t>(inputs[k]);
  for (size_t k = 0; k < payload.outputs.size(); ++k) values[i++] = reinterpret_cast<uintptr_t>(outputs[k]);
  for (size_t k = 0; k < i; ++k)
    if (values[k] % ALIGNED)
      throw Problem("the plugin " + payload.entry + ": its tensor " + std::to_string(k) + " is at no multiple of " +
                    std::to_string(ALIGNED) + " bytes");
  values[i] = uint64_t(rows);
  const Driver& cu = driver();
  const Code& code = *it.code;
  cu.done(cu.launch(it.function, unsigned(grid), 1, 1, unsigned(code.threads), 1, 1, unsigned(code.shared), stream,
                    places.data(), nullptr),
          "cuLaunchKernel(" + payload.entry + ")");
}

}  // namespace nf::trt
