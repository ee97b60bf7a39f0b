// ShiftQuantConv2d.
#include "ort/op.h"

namespace nf::ort {
namespace {

constexpr int64_t kMost = int64_t(1) << 24;  // of an attribute: keeps every size below within 64 bits

struct Conv {
  std::vector<int64_t> kernel, strides, pads, dilations;
  int64_t group;
  Weights weights;
  int32_t activation_bits, epilogue;
  float input_scale;

  explicit Conv(const Info& info)
      : kernel(info.integers("kernel", 2, 0, 1, 4096)),
        strides(info.integers("strides", 2, 1, 1, kMost)),
        pads(info.integers("pads", 4, 0, 0, kMost)),
        dilations(info.integers("dilations", 2, 1, 1, kMost)),
        group(info.integer("group", 1, 1, INT32_MAX)),
        weights(info, 1, group, taps(info)),
        activation_bits(int32_t(info.integer("activation_bits", 8, 2, 8))),
        epilogue(info.epilogue()),
        input_scale(info.number("input_scale", 0)) {
    require(input_scale >= 0, info.at("input_scale") + ": expected a positive number, or 0 for a scale of each image");
  }

  int64_t taps(const Info& info) const {
    require(kernel[0] && kernel[1], info.at("kernel") + ": the attribute is missing (two integers)");
    return kernel[0] * kernel[1];
  }

  // Positions of the kernel along one axis.
  int64_t positions(const Context& c, const Shape& x, size_t axis) const {
    const int64_t size = x.dim[2 + axis] + pads[axis] + pads[2 + axis],
                  reach = dilations[axis] * (kernel[axis] - 1) + 1;
    require(x.dim[2 + axis] >= 1 && x.dim[2 + axis] <= INT32_MAX && reach <= size,
            c.at("x") + ": found " + x.text() + ", smaller than the kernel, which reaches over " +
                std::to_string(reach) + " along dimension " + std::to_string(2 + axis));
    return (size - reach) / strides[axis] + 1;
  }

  void compute(const Context& c) const {
    weights.with(c, [&](const nf_weight* w) {
      const Tensor x = c.input(0);
      const int64_t channels = group * (w->k / (kernel[0] * kernel[1]));
      require(x.shape.rank == 4 && x.shape.dim[1] == channels, c.at("x") + ": found " + x.shape.text() +
                                                                   ", expected [batch, " + std::to_string(channels) +
                                                                   ", height, width]");
      Shape shape = x.shape;
      shape.dim[1] = group * w->n;
      shape.dim[2] = positions(c, x.shape, 0);
      shape.dim[3] = positions(c, x.shape, 1);
      const Tensor y = c.output(0, shape);
      if (!x.shape.dim[0]) return;
      nf_conv conv{};
      conv.batch = x.shape.dim[0];
      conv.c = channels;
      conv.h = x.shape.dim[2];
      conv.w = x.shape.dim[3];
      conv.kh = kernel[0];
      conv.kw = kernel[1];
      for (size_t axis = 0; axis < 2; ++axis) {
        conv.stride[axis] = strides[axis];
        conv.pad_begin[axis] = pads[axis];
        conv.pad_end[axis] = pads[2 + axis];
        conv.dilation[axis] = dilations[axis];
      }
      conv.conv_groups = group;
      done(nf_conv2d(c.threads(), &conv, w, x.as<float>(), activation_bits, input_scale, epilogue, y.as<float>()));
    });
  }
};

const Port kIn[] = {{"x", kFloat, false},
                    {"weight", kUint8, false},
                    {"exponents", kUint8, false},
                    {"scale", kFloat, false},
                    {"bias", kFloat, true}};
const Port kOut[] = {{"y", kFloat, false}};

}  // namespace

const std::vector<const Op*>& conv_ops() {
  static const Op conv = make<Conv>("ShiftQuantConv2d", kIn, kOut);
  static const std::vector<const Op*> all = {&conv};
  return all;
}

}  // namespace nf::ort
