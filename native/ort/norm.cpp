// NormQuantize, RmsNorm, CrmsNorm, L1Norm, TwoPassSoftmax.
#include "ort/op.h"

namespace nf::ort {
namespace {

struct Features {
  const float *residual, *gain, *shift;
};

Features features(const Context& c, const Tensor& x, const Tensor& residual, const Tensor& gain, const Tensor& shift) {
  require(x.shape.rank >= 1 && x.shape.last() >= 1,
          c.at("x") + ": found " + x.shape.text() + ", expected features in the last dimension");
  require(!residual || residual.shape == x.shape,
          c.at("residual") + ": found " + residual.shape.text() + ", expected " + x.shape.text());
  const auto one_each = [&](const Tensor& t, const char* name) {
    require(!t || (t.shape.rank == 1 && t.shape.dim[0] == x.shape.last()),
            c.at(name) + ": found " + t.shape.text() + ", expected [" + std::to_string(x.shape.last()) + "]");
  };
  one_each(gain, "gain");
  one_each(shift, "shift");
  return {residual.as<float>(), gain.as<float>(), shift.as<float>()};
}

template <int32_t Kind>
struct Norm {
  float eps, scale_const;
  explicit Norm(const Info& info) : eps(info.number("eps", 1e-5f)), scale_const(info.number("scale_const", 1)) {}

  void compute(const Context& c) const {
    constexpr bool shifts = Kind == NF_L1;
    const Tensor x = c.input(0), gain = c.input(1), shift = shifts ? c.input(2) : Tensor{},
                 residual = c.input(shifts ? 3 : 2);
    const Features f = features(c, x, residual, gain, shift);
    const Tensor y = c.output(0, x.shape), sum = c.output(1, x.shape);
    if (!x.shape.rows()) return;
    done(nf_norm(c.threads(), Kind, x.as<float>(), f.residual, x.shape.rows(), x.shape.last(), f.gain, f.shift, eps,
                 scale_const, sum.as<float>(), y.as<float>()));
  }
};

struct NormQuantize {
  int32_t kind, bits;
  float eps, scale_const;
  explicit NormQuantize(const Info& info)
      : kind(info.one_of("kind", kNormKinds, "")),
        bits(int32_t(info.integer("bits", 8, 2, 8))),
        eps(info.number("eps", 1e-5f)),
        scale_const(info.number("scale_const", 1)) {}

  void compute(const Context& c) const {
    const Tensor x = c.input(0), residual = c.input(3);
    const Features f = features(c, x, residual, c.input(1), c.input(2));
    const Tensor q = c.output(0, x.shape), scale = c.output(1, x.shape.with_last(1)), sum = c.output(2, x.shape);
    if (!x.shape.rows()) return;
    done(nf_norm_quantize(c.threads(), kind, x.as<float>(), f.residual, x.shape.rows(), x.shape.last(), f.gain, f.shift,
                          eps, scale_const, bits, sum.as<float>(), q.as<int8_t>(), scale.as<float>()));
  }
};

struct Softmax {
  explicit Softmax(const Info&) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    require(x.shape.rank >= 1, c.at("x") + ": expected at least one dimension");
    const Tensor y = c.output(0, x.shape);
    if (!x.shape.count()) return;
    done(nf_two_pass_softmax(c.threads(), x.as<float>(), x.shape.rows(), x.shape.last(), y.as<float>()));
  }
};

const Port kScaled[] = {{"x", kFloat, false}, {"gain", kFloat, true}, {"residual", kFloat, true}};
const Port kShifted[] = {
    {"x", kFloat, false}, {"gain", kFloat, true}, {"shift", kFloat, true}, {"residual", kFloat, true}};
const Port kNormed[] = {{"y", kFloat, false}, {"sum", kFloat, true}};
const Port kCodes[] = {{"q", kInt8, false}, {"scale", kFloat, false}, {"sum", kFloat, true}};
const Port kX[] = {{"x", kFloat, false}};
const Port kY[] = {{"y", kFloat, false}};

}  // namespace

const std::vector<const Op*>& norm_ops() {
  static const Op rms = make<Norm<NF_RMS>>("RmsNorm", kScaled, kNormed);
  static const Op crms = make<Norm<NF_CRMS>>("CrmsNorm", kScaled, kNormed);
  static const Op l1 = make<Norm<NF_L1>>("L1Norm", kShifted, kNormed);
  static const Op quantize = make<NormQuantize>("NormQuantize", kShifted, kCodes);
  static const Op softmax = make<Softmax>("TwoPassSoftmax", kX, kY);
  static const std::vector<const Op*> all = {&rms, &crms, &l1, &quantize, &softmax};
  return all;
}

}  // namespace nf::ort
