// QuantizeRows, ShiftQuantLinear, ShiftQuantMatMul, ShiftQuantMatMulQuantize.
#include "ort/op.h"

namespace nf::ort {
namespace {

struct Rows {
  int32_t bits;
  explicit Rows(const Info& info) : bits(int32_t(info.integer("bits", 8, 2, 8))) {}

  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    require(x.shape.rank >= 1, c.at("x") + ": expected at least one dimension");
    const Tensor q = c.output(0, x.shape), scale = c.output(1, x.shape.with_last(1));
    if (!x.shape.rows()) return;
    done(nf_quantize_rows(c.threads(), x.as<float>(), x.shape.rows(), x.shape.last(), bits, q.as<int8_t>(),
                          scale.as<float>()));
  }
};

// The shape of the product of rows with a weight.
Shape product(const Context& c, const char* name, const Shape& in, const nf_weight& w) {
  require(in.rank >= 1 && in.last() == w.k, c.at(name) + ": found " + in.text() + ", expected " + std::to_string(w.k) +
                                                " channels in the last dimension");
  return in.with_last(w.n);
}

// What is added to the outputs; a file writes one 0 for none where another input follows.
const float* added(const Context& c, const Tensor& t, const Shape& shape) {
  if (t && t.shape.count() == 1 && shape.count() != 1 && *t.as<float>() == 0.f) return nullptr;
  require(!t || t.shape == shape, c.at("residual") + ": found " + t.shape.text() + ", expected " + shape.text());
  return t.as<float>();
}

struct Linear {
  Weights weights;
  int32_t activation_bits, epilogue;
  float input_scale;
  explicit Linear(const Info& info)
      : weights(info, 1, 1, 1, 6),
        activation_bits(int32_t(info.integer("activation_bits", 8, 2, 8))),
        epilogue(info.epilogue()),
        input_scale(info.number("input_scale", 0)) {
    require(input_scale >= 0, info.at("input_scale") + ": expected a positive number, or 0 for a scale of each row");
  }

  void compute(const Context& c) const {
    weights.with(c, [&](const nf_weight* weight) {
      const nf_weight& w = *weight;
      const Tensor x = c.input(0), residual = c.input(5);
      const Shape shape = product(c, "x", x.shape, w);
      const float* add = added(c, residual, shape);
      const Tensor y = c.output(0, shape);
      if (!x.shape.rows()) return;
      done(nf_linear(c.threads(), &w, x.as<float>(), x.shape.rows(), activation_bits, input_scale, epilogue, add,
                     y.as<float>()));
    });
  }
};

// row_scale: one for each row of q, or one for all.
int64_t row_stride(const Context& c, const Tensor& q, const Tensor& scale) {
  const int64_t rows = q.shape.rows();
  require(scale.shape.count() == rows || scale.shape.count() == 1, c.at("row_scale") + ": found " + scale.shape.text() +
                                                                       ", expected one for each of " +
                                                                       std::to_string(rows) + " rows, or one");
  return scale.shape.count() == rows ? 1 : 0;
}

struct MatMul {
  Weights weights;
  int32_t epilogue;
  explicit MatMul(const Info& info) : weights(info, 2, 1, 1, 7), epilogue(info.epilogue()) {}

  void compute(const Context& c) const {
    weights.with(c, [&](const nf_weight* weight) {
      const nf_weight& w = *weight;
      const Tensor q = c.input(0), scale = c.input(1), residual = c.input(6);
      const Shape shape = product(c, "q", q.shape, w);
      const int64_t stride = row_stride(c, q, scale);
      const float* add = added(c, residual, shape);
      const Tensor y = c.output(0, shape);
      if (!q.shape.rows()) return;
      done(nf_matmul(c.threads(), &w, q.as<int8_t>(), scale.as<float>(), stride, q.shape.rows(), epilogue, add,
                     y.as<float>()));
    });
  }
};

struct MatMulQuantize {
  Weights weights;
  int32_t epilogue, out_bits;
  explicit MatMulQuantize(const Info& info)
      : weights(info, 2, 1, 1, 6), epilogue(info.epilogue()), out_bits(int32_t(info.integer("out_bits", 8, 2, 8))) {}

  void compute(const Context& c) const {
    weights.with(c, [&](const nf_weight* weight) {
      const nf_weight& w = *weight;
      const Tensor q = c.input(0), scale = c.input(1);
      const Shape shape = product(c, "q", q.shape, w);
      const int64_t stride = row_stride(c, q, scale);
      const Tensor out = c.output(0, shape), out_scale = c.output(1, shape.with_last(1));
      if (!q.shape.rows()) return;
      done(nf_matmul_quantize(c.threads(), &w, q.as<int8_t>(), scale.as<float>(), stride, q.shape.rows(), epilogue,
                              out_bits, out.as<int8_t>(), out_scale.as<float>()));
    });
  }
};

const Port kX[] = {{"x", kFloat, false}};
const Port kY[] = {{"y", kFloat, false}};
const Port kCodes[] = {{"q", kInt8, false}, {"scale", kFloat, false}};
const Port kLinear[] = {{"x", kFloat, false},        {"weight", kUint8, false}, {"exponents", kUint8, false},
                        {"scale", kFloat, false},    {"bias", kFloat, true},    {"residual", kFloat, true},
                        {"multipliers", kInt8, true}};
const Port kMatMul[] = {{"q", kInt8, false},          {"row_scale", kFloat, false}, {"weight", kUint8, false},
                        {"exponents", kUint8, false}, {"scale", kFloat, false},     {"bias", kFloat, true},
                        {"residual", kFloat, true},   {"multipliers", kInt8, true}};
const Port kMatMulQuantize[] = {{"q", kInt8, false},          {"row_scale", kFloat, false}, {"weight", kUint8, false},
                                {"exponents", kUint8, false}, {"scale", kFloat, false},     {"bias", kFloat, true},
                                {"multipliers", kInt8, true}};

}  // namespace

const std::vector<const Op*>& linear_ops() {
  static const Op rows = make<Rows>("QuantizeRows", kX, kCodes);
  static const Op linear = make<Linear>("ShiftQuantLinear", kLinear, kY);
  static const Op matmul = make<MatMul>("ShiftQuantMatMul", kMatMul, kY);
  static const Op quantize = make<MatMulQuantize>("ShiftQuantMatMulQuantize", kMatMulQuantize, kCodes);
  static const std::vector<const Op*> all = {&rows, &linear, &matmul, &quantize};
  return all;
}

}  // namespace nf::ort
