// What a node's weights are to the kernels: which channel stands where in the packed codes follows from the exponents.
#include "ort/op.h"

namespace nf::ort {

namespace {

// Counts the channels of each exponent and sorts them by it, stable. `taps` stretches of the same exponents follow each
// other.
void sort_channels(const uint8_t* exponents, int64_t channels, int64_t taps, std::vector<int32_t>* sizes,
                   std::vector<int32_t>* order, const std::string& where) {
  int groups = 0;
  for (int64_t i = 0; i < channels; ++i) groups = exponents[i] >= groups ? exponents[i] + 1 : groups;
  require(groups <= 16, where + "exponents: found " + std::to_string(groups - 1) + ", expected 0 to 15");
  sizes->assign(size_t(groups), 0);
  for (int64_t i = 0; i < channels; ++i) (*sizes)[exponents[i]] += int32_t(taps);
  order->clear();
  if (groups == 1) return;
  std::vector<int32_t> next(size_t(groups), 0);
  for (int g = 1; g < groups; ++g) next[g] = next[g - 1] + (*sizes)[g - 1];
  order->resize(size_t(channels * taps));
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t i = 0; i < channels; ++i) (*order)[size_t(next[exponents[i]]++)] = int32_t(tap * channels + i);
}

// Gives the weight its multipliers: [panels][blocks][16], within what codes of its bits allow.
void multiply(const Tensor& t, nf_weight* w, const std::string& where) {
  const int64_t panels = (w->n + 15) / 16;
  require(t.shape.rank == 3 && t.shape.dim[0] == panels && t.shape.dim[2] == 16,
          where + "multipliers: found " + t.shape.text() + ", expected [" + std::to_string(panels) + ", blocks, 16]");
  const int64_t blocks = t.shape.dim[1];
  for (int32_t block = 256; block >= 32; block /= 2)
    if ((w->k + block - 1) / block == blocks) w->block = block;
  require(w->block, where + "multipliers: " + std::to_string(blocks) + " blocks of " + std::to_string(w->k) +
                        " inputs; expected blocks of 32, 64, 128 or 256");
  require(w->bits <= 4 && w->groups == 1, where + "multipliers: expected codes of 2 to 4 bits, and exponents of 0");
  const int most = 127 >> (w->bits - 1);
  const int8_t* m = t.as<int8_t>();
  bool outside = false;
  for (int64_t i = 0; i < panels * blocks * 16; ++i) outside |= m[i] == 0 || m[i] > most || m[i] < -most;
  require(!outside, where + "multipliers: expected 1 to " + std::to_string(most) + " and their negatives");
  w->multipliers = m;
}

}  // namespace

Weights::Weights(const Info& info, size_t first, int64_t groups, int64_t taps, size_t multipliers)
    : first_(first),
      multipliers_(multipliers),
      bits_(int32_t(info.integer("bits", 2, 8))),
      groups_(groups),
      taps_(taps),
      constant_(true) {
  Tensor t[5];
  for (size_t i = 0; i < 4; ++i) constant_ = info.constant(first + i, &t[i]) && constant_;
  if (multipliers != kNoMultipliers) constant_ = info.constant(multipliers, &t[4]) && constant_;
  if (constant_) assemble(t, &layer_, info.at(""));
}

void Weights::assemble(const Tensor (&t)[5], Layer* out, const std::string& where) const {
  const Tensor &packed = t[0], &exponents = t[1], &scale = t[2], &bias = t[3];
  require(packed && exponents && scale, where + "weight, exponents and scale are needed");
  require(packed.shape.rank == 1, where + "weight: found " + packed.shape.text() + ", expected one dimension of bytes");
  require(exponents.shape.rank == 1 && exponents.shape.dim[0] >= 1 && exponents.shape.dim[0] <= INT32_MAX / taps_,
          where + "exponents: found " + exponents.shape.text() + ", expected one for each input channel");
  require(scale.shape.rank == 1 && scale.shape.dim[0] >= 1,
          where + "scale: found " + scale.shape.text() + ", expected one for each output");
  require(!bias || bias.shape == scale.shape,
          where + "bias: found " + bias.shape.text() + ", expected " + scale.shape.text());
  const int64_t channels = exponents.shape.dim[0], outputs = scale.shape.dim[0];
  require(channels % groups_ == 0 && outputs % groups_ == 0,
          where + "group: " + std::to_string(channels) + " input and " + std::to_string(outputs) +
              " output channels are not divisible by " + std::to_string(groups_));
  const int64_t c = channels / groups_, n = outputs / groups_;
  out->sizes.resize(size_t(groups_));
  out->order.resize(size_t(groups_));
  out->weights.resize(size_t(groups_));
  int64_t begin = 0;
  for (int64_t g = 0; g < groups_; ++g) {
    std::vector<int32_t>&sizes = out->sizes[size_t(g)], &order = out->order[size_t(g)];
    sort_channels(exponents.as<uint8_t>() + g * c, c, taps_, &sizes, &order, where);
    const int64_t bytes = nf_packed_bytes(n, bits_, int32_t(sizes.size()), sizes.data());
    require(bytes >= 0 && bytes <= packed.shape.dim[0] - begin,
            where + "weight: found " + packed.shape.text() + " bytes, too few for " + std::to_string(n) + " outputs, " +
                std::to_string(c * taps_) + " inputs and " + std::to_string(bits_) + " bits" +
                (groups_ > 1 ? " in each group" : ""));
    nf_weight& w = out->weights[size_t(g)];
    w.n = n;
    w.k = c * taps_;
    w.bits = bits_;
    w.groups = int32_t(sizes.size());
    w.sizes = sizes.data();
    w.order = order.empty() ? nullptr : order.data();
    w.packed = packed.as<uint8_t>() + begin;
    w.scale = scale.as<float>() + g * n;
    w.bias = bias ? bias.as<float>() + g * n : nullptr;
    w.multipliers = nullptr;
    w.block = 0;
    begin += bytes;
  }
  require(begin == packed.shape.dim[0],
          where + "weight: found " + packed.shape.text() + " bytes, expected " + std::to_string(begin));
  if (t[4]) multiply(t[4], &out->weights[0], where);
}

}  // namespace nf::ort
