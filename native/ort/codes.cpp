// QuantizeCodes, DequantizeCodes, CodesConv2d, CodesAdd, CodesGate, CodesMaxPool2d, CodesMean, CodesTake,
// CodesUpsample.
#include <memory>

#include "ort/op.h"

namespace nf::ort {
namespace {

constexpr int64_t kMost = int64_t(1) << 24;  // of an attribute: keeps every size below within 64 bits

int32_t code(const Info& info, const char* name) { return int32_t(info.integer(name, 0, 255)); }

void require_image(const Context& c, const char* name, const Shape& shape) {
  require(shape.rank == 4, c.at(name) + ": found " + shape.text() + ", expected four dimensions");
}

Shape shape_of(int64_t a, int64_t b, int64_t c, int64_t d) {
  Shape s;
  s.rank = 4;
  s.dim[0] = a, s.dim[1] = b, s.dim[2] = c, s.dim[3] = d;
  return s;
}

struct Quantize {
  float scale;
  int32_t zero, top;
  explicit Quantize(const Info& info)
      : scale(info.number("scale", 0)), zero(code(info, "zero")), top(code(info, "top")) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    require_image(c, "x", x.shape);
    const int64_t* d = x.shape.dim;
    const Tensor y = c.output(0, shape_of(d[0], d[2], d[3], d[1]));
    if (!x.shape.count()) return;
    done(nf_codes_quantize(c.threads(), x.as<float>(), d[0], d[1], d[2] * d[3], scale, zero, top, y.as<uint8_t>()));
  }
};

struct Dequantize {
  float scale;
  int32_t zero;
  explicit Dequantize(const Info& info) : scale(info.number("scale", 0)), zero(code(info, "zero")) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    require_image(c, "x", x.shape);
    const int64_t* d = x.shape.dim;
    const Tensor y = c.output(0, shape_of(d[0], d[3], d[1], d[2]));
    if (!x.shape.count()) return;
    done(nf_codes_dequantize(c.threads(), x.as<uint8_t>(), d[0], d[3], d[1] * d[2], scale, zero, y.as<float>()));
  }
};

struct Mean {
  float scale;
  int32_t zero;
  explicit Mean(const Info& info) : scale(info.number("scale", 0)), zero(code(info, "zero")) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    require_image(c, "x", x.shape);
    const int64_t* d = x.shape.dim;
    const Tensor y = c.output(0, shape_of(d[0], d[3], 1, 1));
    if (!y.shape.count()) return;
    done(nf_codes_mean(c.threads(), x.as<uint8_t>(), d[0], d[3], d[1] * d[2], scale, zero, y.as<float>()));
  }
};

struct Add {
  float a_scale, b_scale, bias;
  int32_t low, high;
  explicit Add(const Info& info)
      : a_scale(info.number("a_scale", 0)),
        b_scale(info.number("b_scale", 0)),
        bias(info.number("bias", 0)),
        low(code(info, "low")),
        high(code(info, "high")) {}
  void compute(const Context& c) const {
    const Tensor a = c.input(0), b = c.input(1);
    require(a.shape == b.shape, c.at("b") + ": found " + b.shape.text() + ", expected " + a.shape.text());
    const Tensor y = c.output(0, a.shape);
    done(nf_codes_add(c.threads(), a.as<uint8_t>(), b.as<uint8_t>(), a.shape.count(), a_scale, b_scale, bias, low, high,
                      y.as<uint8_t>()));
  }
};

struct Gate {
  float scale, bias;
  int32_t zero, low, high;
  explicit Gate(const Info& info)
      : scale(info.number("scale", 0)),
        bias(info.number("bias", 0)),
        zero(code(info, "zero")),
        low(code(info, "low")),
        high(code(info, "high")) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0), gate = c.input(1);
    require_image(c, "x", x.shape);
    const int64_t* d = x.shape.dim;
    const Shape wanted = shape_of(d[0], d[3], 1, 1);
    require(gate.shape == wanted, c.at("gate") + ": found " + gate.shape.text() + ", expected " + wanted.text());
    const Tensor y = c.output(0, x.shape);
    if (!x.shape.count()) return;
    done(nf_codes_gate(c.threads(), x.as<uint8_t>(), gate.as<float>(), d[0], d[3], d[1] * d[2], scale, zero, bias, low,
                       high, y.as<uint8_t>()));
  }
};

// Where a convolution or a pool reads.
nf_codes_conv window(const Info& info) {
  nf_codes_conv v{};
  const std::vector<int64_t> kernel = info.integers("kernel", 2, 0, 1, 4096),
                             strides = info.integers("strides", 2, 1, 1, kMost),
                             pads = info.integers("pads", 4, 0, 0, kMost),
                             dilations = info.integers("dilations", 2, 1, 1, kMost);
  require(kernel[0] && kernel[1], info.at("kernel") + ": the attribute is missing (two integers)");
  v.kh = kernel[0];
  v.kw = kernel[1];
  for (size_t axis = 0; axis < 2; ++axis) {
    v.stride[axis] = strides[axis];
    v.pad_begin[axis] = pads[axis];
    v.pad_end[axis] = pads[2 + axis];
    v.dilation[axis] = dilations[axis];
  }
  v.groups = 1;
  v.high = 255;
  return v;
}

// The image, and the shape of what is computed from it.
Shape placed(const Context& c, const Shape& x, int64_t outputs, nf_codes_conv* v) {
  require_image(c, "x", x);
  v->batch = x.dim[0];
  v->h = x.dim[1];
  v->w = x.dim[2];
  v->c = x.dim[3];
  const int64_t rows = v->h + v->pad_begin[0] + v->pad_end[0] - (v->kh - 1) * v->dilation[0] - 1;
  const int64_t columns = v->w + v->pad_begin[1] + v->pad_end[1] - (v->kw - 1) * v->dilation[1] - 1;
  require(v->h >= 1 && v->w >= 1 && rows >= 0 && columns >= 0,
          c.at("x") + ": found " + x.text() + ", smaller than the kernel, which reaches over " +
              std::to_string((v->kh - 1) * v->dilation[0] + 1) + " x " +
              std::to_string((v->kw - 1) * v->dilation[1] + 1));
  return shape_of(v->batch, rows / v->stride[0] + 1, columns / v->stride[1] + 1, outputs);
}

struct MaxPool {
  nf_codes_conv conv;
  explicit MaxPool(const Info& info) : conv(window(info)) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    nf_codes_conv v = conv;
    const Shape shape = placed(c, x.shape, x.shape.rank == 4 ? x.shape.dim[3] : 1, &v);
    v.outputs = v.c;
    const Tensor y = c.output(0, shape);
    if (!shape.count()) return;
    done(nf_codes_max_pool(c.threads(), &v, x.as<uint8_t>(), y.as<uint8_t>()));
  }
};

struct Take {
  int64_t first, count, groups;
  explicit Take(const Info& info)
      : first(info.integer("first", 0, 0, kMost)),
        count(info.integer("count", 1, kMost)),
        groups(info.integer("groups", 1, 1, kMost)) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    require_image(c, "x", x.shape);
    const int64_t* d = x.shape.dim;
    require(first + count <= d[3], c.at("x") + ": found " + x.shape.text() + ", expected at least " +
                                       std::to_string(first + count) + " channels");
    const Tensor y = c.output(0, shape_of(d[0], d[1], d[2], count));
    done(nf_codes_take(c.threads(), x.as<uint8_t>(), d[0] * d[1] * d[2], d[3], first, count, groups, y.as<uint8_t>()));
  }
};

struct Upsample {
  std::vector<int64_t> times;
  explicit Upsample(const Info& info) : times(info.integers("times", 2, 1, 1, 4096)) {}
  void compute(const Context& c) const {
    const Tensor x = c.input(0);
    require_image(c, "x", x.shape);
    const int64_t* d = x.shape.dim;
    const Tensor y = c.output(0, shape_of(d[0], d[1] * times[0], d[2] * times[1], d[3]));
    if (!y.shape.count()) return;
    done(nf_codes_upsample(c.threads(), x.as<uint8_t>(), d[0] * d[1], d[2], d[3], times[0], times[1], y.as<uint8_t>()));
  }
};

// Weights of bit strings, unpacked and laid out for the kernels.
struct Packed {
  nf_codes_conv conv;
  std::unique_ptr<uint8_t[]> bytes;
};

struct Conv {
  nf_codes_conv conv;
  int32_t bits;
  bool constant = true;
  Packed packed;

  explicit Conv(const Info& info) : conv(window(info)), bits(int32_t(info.integer("bits", 2, 8))) {
    conv.groups = info.integer("group", 1, 1, INT32_MAX);
    conv.zero = code(info, "zero");
    conv.low = code(info, "low");
    conv.high = code(info, "high");
    conv.residual_scale = info.number("residual_scale", 0);
    conv.function = info.one_of("function", kFunctions, "none");
    conv.gain = info.number("gain", 1);
    conv.offset = info.number("offset", 0);
    Tensor t[4];
    for (size_t i = 0; i < 4; ++i) constant = info.constant(1 + i, &t[i]) && constant;
    if (constant) packed = pack(nullptr, t, info.at(""));
  }

  Packed pack(const nf_threads* threads, const Tensor (&t)[4], const std::string& where) const {
    const Tensor &weight = t[0], &shifts = t[1], &scale = t[2], &bias = t[3];
    require(weight && shifts && scale && bias, where + "weight, shifts, scale and bias are needed");
    require(scale.shape.rank == 1 && scale.shape.dim[0] >= 1 && bias.shape == scale.shape,
            where + "scale and bias: found " + scale.shape.text() + " and " + bias.shape.text() +
                ", expected one for each output");
    require(shifts.shape.rank == 1 && shifts.shape.dim[0] >= 1 && shifts.shape.dim[0] % conv.groups == 0 &&
                scale.shape.dim[0] % conv.groups == 0,
            where + "group: " + shifts.shape.text() + " channels and " + scale.shape.text() +
                " outputs are not divisible by " + std::to_string(conv.groups));
    Packed p{conv, nullptr};
    p.conv.c = shifts.shape.dim[0];
    p.conv.outputs = scale.shape.dim[0];
    const int64_t channels = p.conv.c / conv.groups, k = conv.kh * conv.kw * channels, line = (k * bits + 7) / 8;
    require(weight.shape.rank == 2 && weight.shape.dim[0] == p.conv.outputs && weight.shape.dim[1] == line,
            where + "weight: found " + weight.shape.text() + ", expected [" + std::to_string(p.conv.outputs) + ", " +
                std::to_string(line) + "]");
    const std::unique_ptr<int8_t[]> operand(new int8_t[size_t(p.conv.outputs * k)]);
    for (int64_t o = 0; o < p.conv.outputs; ++o) {
      const uint8_t* row = weight.as<uint8_t>() + o * line;
      const uint8_t* shift = shifts.as<uint8_t>() + o / (p.conv.outputs / conv.groups) * channels;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t bit = i * bits, byte = bit / 8;
        const int both = row[byte] | (byte + 1 < line ? row[byte + 1] << 8 : 0);
        const int c = ((both >> bit % 8) & ((1 << bits) - 1)) - (1 << (bits - 1));
        require(shift[i % channels] < 8,
                where + "shifts: found " + std::to_string(shift[i % channels]) + ", expected 0 to 7");
        const int w = c * (1 << shift[i % channels]);
        require(w >= -128 && w <= 127,
                where + "weight: a shifted code of " + std::to_string(w) + " does not fit into 8 bits");
        operand[size_t(o * k + i)] = int8_t(w);
      }
    }
    const int64_t size = nf_codes_bytes(&p.conv);
    require(size >= 0, where + "the sizes of the convolution are out of range");
    p.bytes.reset(new uint8_t[size_t(size)]);
    done(nf_codes_pack(threads, &p.conv, operand.get(), scale.as<float>(), bias.as<float>(), p.bytes.get()));
    return p;
  }

  void compute(const Context& c) const {
    if (constant) return run(c, packed);
    Tensor t[4];
    for (size_t i = 0; i < 4; ++i) t[i] = c.input(1 + i);
    run(c, pack(c.threads(), t, c.at("")));
  }

  void run(const Context& c, const Packed& p) const {
    const Tensor x = c.input(0), residual = c.input(5), table = c.input(6);
    require(x.shape.rank == 4 && x.shape.dim[3] == p.conv.c, c.at("x") + ": found " + x.shape.text() +
                                                                 ", expected [batch, height, width, " +
                                                                 std::to_string(p.conv.c) + "]");
    nf_codes_conv v = p.conv;
    const Shape shape = placed(c, x.shape, v.outputs, &v);
    require(!residual || residual.shape == shape,
            c.at("residual") + ": found " + residual.shape.text() + ", expected " + shape.text());
    require(!table || table.shape.count() == 256, c.at("table") + ": found " + table.shape.text() + ", expected 256");
    const Tensor y = c.output(0, shape);
    if (!shape.count()) return;
    done(nf_codes_conv2d(c.threads(), &v, p.bytes.get(), x.as<uint8_t>(), residual.as<uint8_t>(), table.as<uint8_t>(),
                         y.as<uint8_t>()));
  }
};

const Port kFloats[] = {{"x", kFloat, false}};
const Port kFloatsOut[] = {{"y", kFloat, false}};
const Port kCodes[] = {{"x", kUint8, false}};
const Port kCodesOut[] = {{"y", kUint8, false}};
const Port kTwo[] = {{"a", kUint8, false}, {"b", kUint8, false}};
const Port kGated[] = {{"x", kUint8, false}, {"gate", kFloat, false}};
const Port kConv[] = {{"x", kUint8, false},     {"weight", kUint8, false}, {"shifts", kUint8, false},
                      {"scale", kFloat, false}, {"bias", kFloat, false},   {"residual", kUint8, true},
                      {"table", kUint8, true}};

}  // namespace

const std::vector<const Op*>& codes_ops() {
  static const Op quantize = make<Quantize>("QuantizeCodes", kFloats, kCodesOut);
  static const Op dequantize = make<Dequantize>("DequantizeCodes", kCodes, kFloatsOut);
  static const Op conv = make<Conv>("CodesConv2d", kConv, kCodesOut);
  static const Op add = make<Add>("CodesAdd", kTwo, kCodesOut);
  static const Op gate = make<Gate>("CodesGate", kGated, kCodesOut);
  static const Op pool = make<MaxPool>("CodesMaxPool2d", kCodes, kCodesOut);
  static const Op mean = make<Mean>("CodesMean", kCodes, kFloatsOut);
  static const Op take = make<Take>("CodesTake", kCodes, kCodesOut);
  static const Op upsample = make<Upsample>("CodesUpsample", kCodes, kCodesOut);
  static const std::vector<const Op*> all = {&quantize, &dequantize, &conv, &add,     &gate,
                                             &pool,     &mean,       &take, &upsample};
  return all;
}

}  // namespace nf::ort
