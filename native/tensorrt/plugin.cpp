// One plugin class for all of normfuse's ops in TensorRT: it launches the PTX that its node carries. The same as
// export/tensorrt/plugins/plugin.py, for servers and programs without Python.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

#include "driver.h"

#ifdef _WIN32
#define NF_EXPORT extern "C" __declspec(dllexport)
#else
#define NF_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace nf::trt {
namespace {

using namespace nvinfer1;

constexpr const char *NAMESPACE = "normfuse", *VERSION = "1";
constexpr const char* OPS[] = {"CrmsNorm",      "L1Norm",           "QuantizeRows",  "RmsNorm",
                               "RmsNormLinear", "ShiftQuantMatMul", "TwoPassSoftmax"};

ILoggerFinder* finder = nullptr;

void complain(const char* text) noexcept {
  ILogger* const logger = finder ? finder->findLogger() : nullptr;
  if (logger) logger->log(ILogger::Severity::kERROR, text);
  else std::fprintf(stderr, "normfuse: %s\n", text);
}

// What may throw, as TensorRT wants it: a status.
template <class Work>
bool attempt(Work work) noexcept {
  try {
    work();
    return true;
  } catch (const std::exception& e) {
    complain(e.what());
    return false;
  }
}

DataType data_type(Type type) {
  switch (type) {
    case Type::fp16: return DataType::kHALF;
    case Type::bf16: return DataType::kBF16;
    case Type::i8: return DataType::kINT8;
    case Type::i32: return DataType::kINT32;
    default: return DataType::kFLOAT;
  }
}

// Fields as TensorRT sees them; valid as long as `fields` are.
std::vector<PluginField> seen(const std::vector<Field>& fields) {
  std::vector<PluginField> found;
  for (const Field& f : fields)
    found.emplace_back(f.name, f.text ? static_cast<const void*>(f.bytes.data()) : f.numbers.data(),
                       f.text ? PluginFieldType::kCHAR : PluginFieldType::kINT32,
                       int32_t(f.text ? f.bytes.size() : f.numbers.size()));
  return found;
}

std::vector<Field> read(const PluginFieldCollection& given) {
  std::vector<Field> fields = Payload::empty();
  for (Field& f : fields)
    for (int32_t i = 0; i < given.nbFields; ++i) {
      const PluginField& found = given.fields[i];
      if (!found.name || std::strcmp(found.name, f.name) != 0 || !found.data || found.length <= 0) continue;
      if (f.text) {
        f.bytes.assign(static_cast<const char*>(found.data), size_t(found.length));
      } else if (found.type == PluginFieldType::kINT32) {
        const auto* const numbers = static_cast<const int32_t*>(found.data);
        f.numbers.assign(numbers, numbers + found.length);
      }
    }
  return fields;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  Plugin(std::string op, std::shared_ptr<const Payload> given) : name(std::move(op)), payload(std::move(given)) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override {
    Plugin* made = nullptr;
    attempt([&] { made = new Plugin(name, payload); });
    return made;
  }

  const char* getPluginName() const noexcept override { return name.c_str(); }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

  int32_t getNbOutputs() const noexcept override { return int32_t(payload->outputs.size()); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t count, const DataType*, int32_t) const noexcept override {
    if (count != getNbOutputs()) return 1;
    for (int32_t i = 0; i < count; ++i) outputs[i] = data_type(payload->outputs[size_t(i)]);
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t count, IExprBuilder& builder) noexcept override {
    if (count != getNbOutputs() || inputs[0].nbDims < 1) return 1;
    for (int32_t i = 0; i < count; ++i) {
      outputs[i] = inputs[0];
      outputs[i].d[inputs[0].nbDims - 1] = builder.constant(payload->features[size_t(i)]);
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* all, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != int32_t(payload->inputs.size()) || outputs != getNbOutputs()) return false;
    const Type wanted = pos < inputs ? payload->inputs[size_t(pos)] : payload->outputs[size_t(pos - inputs)];
    return all[pos].desc.format == TensorFormat::kLINEAR && all[pos].desc.type == data_type(wanted);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return 0;
  }

  // The last call before enqueue, and no graph is being captured: a builder that times clones, which no context has
  // attached, loads the kernel here. One without a GPU comes here too, and never further: what is wrong is said by who
  // runs the plugin.
  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    try {
      loaded();
    } catch (const std::exception&) {
    }
    return 0;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
    std::unique_ptr<Plugin> made;
    const bool there = attempt([&] {
      made = std::make_unique<Plugin>(name, payload);
      made->loaded();
    });
    return there ? made.release() : nullptr;
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    attempt([&] { fields = seen(payload->fields); });
    collection.nbFields = int32_t(fields.size());
    collection.fields = fields.data();
    return &collection;
  }

  int32_t enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    const bool launched = attempt([&] {
      int64_t rows = 1;
      for (int32_t i = 0; i + 1 < descs[0].dims.nbDims; ++i) rows *= descs[0].dims.d[i];
      loaded().launch(inputs, outputs, rows, stream);
    });
    return launched ? 0 : 1;
  }

 private:
  // The kernel on the current device, from the first time that this clone is prepared there. Throws Problem.
  const Kernel& loaded() {
    if (!kernel) kernel = std::make_unique<Kernel>(*payload);
    return *kernel;
  }

  std::string name;
  std::shared_ptr<const Payload> payload;
  std::unique_ptr<Kernel> kernel;
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const char* op) : name(op), empty(Payload::empty()), fields(seen(empty)) {
    collection.nbFields = int32_t(fields.size());
    collection.fields = fields.data();
  }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
    Plugin* made = nullptr;
    attempt([&] {
      if (!given) throw Problem("a plugin node without attributes");
      made = new Plugin(name, std::make_shared<const Payload>(Payload::read(read(*given))));
    });
    return made;
  }

  const PluginFieldCollection* getFieldNames() noexcept override { return &collection; }
  const char* getPluginName() const noexcept override { return name; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

 private:
  const char* name;
  std::vector<Field> empty;
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};
};

}  // namespace
}  // namespace nf::trt

// What IPluginRegistry::loadLibrary calls.
NF_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* given) { nf::trt::finder = given; }

NF_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using nf::trt::Creator;
  static std::vector<std::unique_ptr<Creator>> creators;
  static std::vector<nvinfer1::IPluginCreatorInterface*> addresses;
  static std::once_flag once;
  std::call_once(once, [] {
    for (const char* name : nf::trt::OPS)
      addresses.push_back(creators.emplace_back(std::make_unique<Creator>(name)).get());
  });
  count = int32_t(addresses.size());
  return addresses.data();
}
