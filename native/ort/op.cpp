#include "ort/op.h"

#include <cmath>
#include <limits>

namespace nf::ort {

namespace {

const char* type_name(int type) {
  switch (type) {
    case kFloat: return "float32";
    case kUint8: return "uint8";
    case kInt8: return "int8";
    case kInt64: return "int64";
    default: return "another type";
  }
}

// Never read: an empty tensor may have no address, and a null pointer means "absent" everywhere else.
alignas(64) char nowhere[64];

}  // namespace

std::string Shape::text() const {
  std::string s = "[";
  for (size_t i = 0; i < rank; ++i) s += (i ? ", " : "") + std::to_string(dim[i]);
  return s + "]";
}

OrtStatus* report(const OrtApi& api, const char* op, const std::string& text) {
  const std::string whole = text.compare(0, std::string(op).size(), op) == 0
                                ? "normfuse." + text
                                : std::string("normfuse.") + op + ": " + text;
  return api.call<OrtStatus*>(kCreateStatus, int(kInvalidArgument), whole.c_str());
}

Tensor view(const OrtApi& api, const OrtValue* value, const Port& port, const char* op) {
  const std::string where = std::string(op) + ", " + port.name;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api.call<OrtStatus*>(kGetTensorTypeAndShape, value, &info));
  struct Release {
    const OrtApi& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Release() { api.call<void>(kReleaseTensorTypeAndShapeInfo, info); }
  } release{api, info};
  int type = 0;
  check(api.call<OrtStatus*>(kGetTensorElementType, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &type));
  require(type == port.type, where + ": found " + type_name(type) + ", expected " + type_name(port.type));
  Tensor t;
  check(api.call<OrtStatus*>(kGetDimensionsCount, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &t.shape.rank));
  require(t.shape.rank <= kMaxRank,
          where + ": found " + std::to_string(t.shape.rank) + " dimensions, expected at most 8");
  check(api.call<OrtStatus*>(kGetDimensions, static_cast<const OrtTensorTypeAndShapeInfo*>(info), t.shape.dim,
                             t.shape.rank));
  check(api.call<OrtStatus*>(kGetTensorMutableData, const_cast<OrtValue*>(value), &t.data));
  if (!t.data) t.data = nowhere;
  return t;
}

// -- attributes -----------------------------------------------------------------------------------

bool Info::found(OrtStatus* status) const {
  if (!status) return true;
  api_.call<void>(kReleaseStatus, status);
  return false;
}

int64_t Info::integer(const char* name, int64_t otherwise, int64_t low, int64_t high) const {
  int64_t value = otherwise;
  if (!found(api_.call<OrtStatus*>(kKernelInfoGetAttribute_int64, info_, name, &value))) value = otherwise;
  require(value >= low && value <= high, at(name) + ": found " + std::to_string(value) + ", expected " +
                                             std::to_string(low) + " to " + std::to_string(high));
  return value;
}

int64_t Info::integer(const char* name, int64_t low, int64_t high) const {
  int64_t value = 0;
  require(found(api_.call<OrtStatus*>(kKernelInfoGetAttribute_int64, info_, name, &value)),
          at(name) + ": the attribute is missing (an integer)");
  return integer(name, value, low, high);
}

float Info::number(const char* name, float otherwise) const {
  float value = otherwise;
  if (!found(api_.call<OrtStatus*>(kKernelInfoGetAttribute_float, info_, name, &value))) value = otherwise;
  require(std::isfinite(value), at(name) + ": expected a finite number");
  return value;
}

std::string Info::word(const char* name, const char* otherwise) const {
  char text[64] = {};
  size_t size = 0;
  if (!found(api_.call<OrtStatus*>(kKernelInfoGetAttribute_string, info_, name, static_cast<char*>(nullptr), &size)))
    return otherwise;
  require(size <= sizeof text, at(name) + ": the text is too long");
  size = sizeof text;
  check(api_.call<OrtStatus*>(kKernelInfoGetAttribute_string, info_, name, static_cast<char*>(text), &size));
  text[sizeof text - 1] = 0;
  return text;
}

std::vector<int64_t> Info::integers(const char* name, size_t size, int64_t otherwise, int64_t low, int64_t high) const {
  std::vector<int64_t> values(size, otherwise);
  size_t given = 0;
  if (!found(api_.call<OrtStatus*>(kKernelInfoGetAttributeArray_int64, info_, name, static_cast<int64_t*>(nullptr),
                                   &given)))
    return values;
  require(given == size, at(name) + ": found " + std::to_string(given) + " integers, expected " + std::to_string(size));
  check(api_.call<OrtStatus*>(kKernelInfoGetAttributeArray_int64, info_, name, values.data(), &given));
  for (const int64_t v : values)
    require(v >= low && v <= high, at(name) + ": found " + std::to_string(v) + ", expected " + std::to_string(low) +
                                       " to " + std::to_string(high));
  return values;
}

int32_t Info::one_of(const char* name, const char* const* words, size_t count, const char* otherwise) const {
  const std::string given = word(name, otherwise);
  std::string expected;
  for (size_t i = 0; i < count; ++i) {
    if (given == words[i]) return int32_t(i);
    expected += (i == 0 ? "" : i + 1 < count ? ", " : " or ") + std::string(words[i]);
  }
  throw Problem(at(name) + ": found \"" + given + "\", expected " + expected);
}

bool Info::constant(size_t index, Tensor* tensor) const {
  *tensor = Tensor{};
  size_t count = 0;
  check(api_.call<OrtStatus*>(kKernelInfo_GetInputCount, info_, &count));
  if (index >= count) return true;
  size_t size = 0;  // with the zero at the end: an absent input has an empty name
  check(api_.call<OrtStatus*>(kKernelInfo_GetInputName, info_, index, static_cast<char*>(nullptr), &size));
  if (size <= 1) return true;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (!found(api_.call<OrtStatus*>(kKernelInfoGetConstantInput_tensor, info_, index, &is_constant, &value)))
    return false;
  if (!is_constant || !value) return false;
  *tensor = view(api_, value, op_.in[index], op_.name);
  return true;
}

// -- inputs, outputs, threads ---------------------------------------------------------------------

Context::Context(const Op& op, const OrtApi& api, OrtKernelContext* context) : op_(op), api_(api), context_(context) {
  const OrtKernelContext* c = context;
  check(api.call<OrtStatus*>(kKernelContext_GetInputCount, c, &inputs_));
  check(api.call<OrtStatus*>(kKernelContext_GetOutputCount, c, &outputs_));
  threads_ = {this, processors(), run};
}

Tensor Context::input(size_t index) const {
  const Port& port = op_.in[index];
  const OrtValue* value = nullptr;
  if (index < inputs_)
    check(
        api_.call<OrtStatus*>(kKernelContext_GetInput, static_cast<const OrtKernelContext*>(context_), index, &value));
  require(value || port.optional, at(port.name) + ": the input is missing");
  return value ? view(api_, value, port, op_.name) : Tensor{};
}

Tensor Context::output(size_t index, const Shape& shape) const {
  Tensor t;
  t.shape = shape;
  if (index >= outputs_) return t;
  OrtValue* value = nullptr;
  check(api_.call<OrtStatus*>(kKernelContext_GetOutput, context_, index, static_cast<const int64_t*>(shape.dim),
                              shape.rank, &value));
  if (!value) return t;  // an optional output that nobody reads
  check(api_.call<OrtStatus*>(kGetTensorMutableData, value, &t.data));
  if (!t.data) t.data = nowhere;
  return t;
}

void Context::run(void* self, size_t total, nf_task fn, void* arg) {
  const Context& c = *static_cast<const Context*>(self);
  if (total > 1) {
    OrtStatus* failed = c.api_.call<OrtStatus*>(
        kKernelContext_ParallelFor, static_cast<const OrtKernelContext*>(c.context_), fn, total, total, arg);
    if (!failed) return;
    c.api_.call<void>(kReleaseStatus, failed);  // it refuses before it starts
  }
  for (size_t i = 0; i < total; ++i) fn(arg, i);
}

// -- the callbacks that are the same for all ------------------------------------------------------

namespace {
const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
}  // namespace

void fill(Op& op) {
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* o) { return self(o).variant; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputType = [](const OrtCustomOp* o, size_t i) { return self(o).in[i].type; };
  op.GetInputTypeCount = [](const OrtCustomOp* o) { return self(o).ins; };
  op.GetOutputType = [](const OrtCustomOp* o, size_t i) { return self(o).out[i].type; };
  op.GetOutputTypeCount = [](const OrtCustomOp* o) { return self(o).outs; };
  op.GetInputCharacteristic = [](const OrtCustomOp* o, size_t i) { return int(self(o).in[i].optional); };
  op.GetOutputCharacteristic = [](const OrtCustomOp* o, size_t i) { return int(self(o).out[i].optional); };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); };
}

}  // namespace nf::ort
