// What every operator of the custom-op library is made from: attributes, inputs and outputs behind checks, errors as
// exceptions that become an OrtStatus at the border, and ONNX Runtime's own threads.
#pragma once
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "normfuse.h"
#include "ort/abi.h"
#include "words.h"

namespace nf::ort {

constexpr size_t kMaxRank = 8;

// A mistake in the model or its inputs: which operator, what was found, what was expected.
struct Problem : std::exception {
  std::string text;
  explicit Problem(std::string t) : text(std::move(t)) {}
  const char* what() const noexcept override { return text.c_str(); }
};
// An error that ONNX Runtime itself reported; handed on as it is.
struct Reported {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status) throw Reported{status};
}
inline void require(bool holds, const std::string& text) {
  if (!holds) throw Problem(text);
}
// A message of normfuse.h.
inline void done(const char* message) {
  if (message) throw Problem(message);
}

struct Shape {
  size_t rank = 0;
  int64_t dim[kMaxRank] = {};

  int64_t count() const {  // ONNX Runtime has allocated so many: it cannot overflow
    int64_t n = 1;
    for (size_t i = 0; i < rank; ++i) n *= dim[i];
    return n;
  }
  int64_t last() const { return rank ? dim[rank - 1] : 1; }
  int64_t rows() const {
    int64_t n = 1;
    for (size_t i = 0; i + 1 < rank; ++i) n *= dim[i];
    return n;
  }
  Shape with_last(int64_t n) const {
    Shape s = *this;
    s.dim[s.rank - 1] = n;
    return s;
  }
  bool operator==(const Shape& o) const {
    for (size_t i = 0; i < rank && rank == o.rank; ++i)
      if (dim[i] != o.dim[i]) return false;
    return rank == o.rank;
  }
  std::string text() const;
};

struct Tensor {
  void* data = nullptr;  // null: absent. An empty tensor has some address.
  Shape shape;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

struct Port {
  const char* name;
  int type;
  bool optional;
};

struct Op : OrtCustomOp {
  const char* name;     // in messages
  const char* variant;  // in files: see ort/names.cpp
  const Port* in;
  size_t ins;
  const Port* out;
  size_t outs;
};

// What a kernel is created from.
class Info {
 public:
  Info(const Op& op, const OrtApi& api, const OrtKernelInfo* info) : op_(op), api_(api), info_(info) {}
  int64_t integer(const char* name, int64_t otherwise, int64_t low, int64_t high) const;
  int64_t integer(const char* name, int64_t low, int64_t high) const;
  float number(const char* name, float otherwise) const;
  std::string word(const char* name, const char* otherwise) const;
  // `size` values, or `otherwise` everywhere.
  std::vector<int64_t> integers(const char* name, size_t size, int64_t otherwise, int64_t low, int64_t high) const;
  // The place of the attribute's word among `words`, see words.h.
  template <size_t N>
  int32_t one_of(const char* name, const char* const (&words)[N], const char* otherwise) const {
    return one_of(name, words, N, otherwise);
  }
  int32_t epilogue() const { return one_of("epilogue", kEpilogues, "none"); }
  // True: the input is a constant of the model (or absent), which lives as long as the session.
  bool constant(size_t index, Tensor* tensor) const;
  std::string at(const char* what) const { return std::string(op_.name) + ", " + what; }

 private:
  bool found(OrtStatus* status) const;
  int32_t one_of(const char* name, const char* const* words, size_t count, const char* otherwise) const;
  const Op& op_;
  const OrtApi& api_;
  const OrtKernelInfo* info_;
};

// What a kernel computes from.
class Context {
 public:
  Context(const Op& op, const OrtApi& api, OrtKernelContext* context);
  Tensor input(size_t index) const;
  Tensor output(size_t index, const Shape& shape) const;
  const nf_threads* threads() const { return &threads_; }
  std::string at(const char* what) const { return std::string(op_.name) + ", " + what; }

 private:
  static void run(void* self, size_t total, nf_task fn, void* arg);
  const Op& op_;
  const OrtApi& api_;
  OrtKernelContext* context_;
  size_t inputs_ = 0, outputs_ = 0;
  nf_threads threads_;
};

Tensor view(const OrtApi& api, const OrtValue* value, const Port& port, const char* op);
OrtStatus* report(const OrtApi& api, const char* op, const std::string& text);

// Runs `body`, which must not let an exception out, and turns what it throws into a status.
template <class Body>
OrtStatus* guarded(const Op& op, const OrtApi& api, Body body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Reported& e) {
      return e.status;
    } catch (const std::bad_alloc&) {
      return report(api, op.name, "out of memory");
    } catch (const std::exception& e) {
      return report(api, op.name, e.what());
    }
  } catch (...) {  // no memory for the message either
    return api.call<OrtStatus*>(kCreateStatus, int(kFail), "normfuse: out of memory");
  }
}

// An operator from a class: `K(const Info&)` reads attributes and constants, `compute(const Context&) const` runs, from
// any thread.
template <class K>
struct Kernel {
  const Op& op;
  const OrtApi& api;
  K body;

  static OrtStatus* create(const OrtCustomOp* base, const OrtApi* api, const OrtKernelInfo* info, void** out) {
    const Op& op = *static_cast<const Op*>(base);
    return guarded(op, *api, [&] { *out = new Kernel{op, *api, K(Info(op, *api, info))}; });
  }
  static OrtStatus* compute(void* self, OrtKernelContext* context) {
    const Kernel& k = *static_cast<const Kernel*>(self);
    return guarded(k.op, k.api, [&] { k.body.compute(Context(k.op, k.api, context)); });
  }
  static void destroy(void* self) { delete static_cast<Kernel*>(self); }
};

void fill(Op& op);  // the callbacks that are the same for all

template <class K, size_t I, size_t O>
Op make(const char* name, const Port (&in)[I], const Port (&out)[O]) {
  Op op{};
  fill(op);
  op.name = op.variant = name;
  op.in = in;
  op.ins = I;
  op.out = out;
  op.outs = O;
  op.CreateKernelV2 = Kernel<K>::create;
  op.KernelComputeV2 = Kernel<K>::compute;
  op.KernelDestroy = Kernel<K>::destroy;
  return op;
}

// Weights of a quantized layer: `weight`, `exponents`, `scale`, `bias` in this order from input `first` on. What is
// constant in the model is looked at once; nothing is copied but the order of the channels. A convolution has one
// nf_weight for each of its `groups`, one after the other in `weight`, and reads each channel through `taps` taps;
// anything else has 1 and 1. Multipliers of blocks, if the operator has them, are its input `multipliers`.
struct Layer {
  std::vector<std::vector<int32_t>> sizes, order;
  std::vector<nf_weight> weights;
};
class Weights {
 public:
  static constexpr size_t kNoMultipliers = SIZE_MAX;
  Weights(const Info& info, size_t first, int64_t groups = 1, int64_t taps = 1, size_t multipliers = kNoMultipliers);
  // `use(const nf_weight*)`; weights that are not constant are put together anew.
  template <class Use>
  void with(const Context& context, Use use) const {
    if (constant_) return use(layer_.weights.data());
    Layer fresh;
    Tensor t[5];
    for (size_t i = 0; i < 4; ++i) t[i] = context.input(first_ + i);
    if (multipliers_ != kNoMultipliers) t[4] = context.input(multipliers_);
    assemble(t, &fresh, context.at(""));
    use(fresh.weights.data());
  }

  Weights(Weights&&) = default;  // vectors keep their addresses
  Weights(const Weights&) = delete;

 private:
  void assemble(const Tensor (&t)[5], Layer* out, const std::string& where) const;
  size_t first_, multipliers_;
  int32_t bits_;
  int64_t groups_, taps_;
  bool constant_;
  Layer layer_;
};

int processors();

// Registered by ort/register.cpp.
const std::vector<const Op*>& linear_ops();
const std::vector<const Op*>& norm_ops();
const std::vector<const Op*>& conv_ops();
const std::vector<const Op*>& codes_ops();
const std::vector<const Op*>& attention_ops();
const std::vector<const Op*>& cached_attention_ops();
// All of them under every name that a file may give them.
const std::vector<Op>& named_ops();

}  // namespace nf::ort
