// Attention, in the layouts that exporters leave: [B, H, T, D]; [B, T, H D] for each of q, k, v; or one [B, T, (H + 2
// KV) D].
#include <cmath>

#include "ort/op.h"

namespace nf::ort {
namespace {

struct Attention {
  float scale;
  bool causal;
  int64_t heads, kv_heads;
  int32_t bits;
  enum { kHeadsFirst, kTokensFirst, kPacked } layout;

  explicit Attention(const Info& info)
      : scale(info.number("scale", 0)),
        causal(info.integer("causal", 0, 0, 1) != 0),
        heads(info.integer("heads", 0, 0, INT32_MAX)),
        kv_heads(info.integer("kv_heads", 0, 0, INT32_MAX)),
        bits(int32_t(info.integer("bits", 0, 0, 8))) {
    const std::string given = info.word("layout", "bhtd");
    if (given == "bhtd") layout = kHeadsFirst;
    else if (given == "bthd") layout = kTokensFirst;
    else if (given == "packed") layout = kPacked;
    else throw Problem(info.at("layout") + ": found \"" + given + "\", expected bhtd, bthd or packed");
    require(layout == kHeadsFirst || heads > 0,
            info.at("heads") + ": the attribute is missing (layout " + given + " needs it)");
    if (layout != kHeadsFirst && !kv_heads) kv_heads = heads;
    require(!heads || !kv_heads || heads % kv_heads == 0,
            info.at("kv_heads") + ": " + std::to_string(heads) + " heads cannot share " + std::to_string(kv_heads));
  }

  void compute(const Context& c) const {
    const Tensor q = c.input(0), k = c.input(1), v = c.input(2), mask = c.input(3);
    nf_attention a{};
    a.scale = scale;
    a.causal = causal;
    a.bits = bits;
    const bool same = (!k || k.data == q.data) && (!v || v.data == q.data);
    require(layout == kPacked ? same : k && v,
            c.at("k, v") + (layout == kPacked ? ": layout packed has none besides q" : ": the inputs are missing"));
    if (layout == kHeadsFirst) heads_first(c, q.shape, k.shape, v.shape, &a);
    else tokens_first(c, q.shape, layout == kPacked ? q.shape : k.shape, layout == kPacked ? q.shape : v.shape, &a);
    if (scale == 0) a.scale = 1 / std::sqrt(float(a.head_dim));
    Shape shape = q.shape;
    if (layout == kPacked) shape.dim[2] = a.heads * a.head_dim;
    const float* additive = add_mask(c, mask, &a);
    const Tensor y = c.output(0, shape);
    if (!shape.count()) return;
    const float *qs = q.as<float>(), *ks = k.as<float>(), *vs = v.as<float>();
    if (layout == kPacked) {
      ks = qs + a.heads * a.head_dim;
      vs = ks + a.kv_heads * a.head_dim;
    }
    done(nf_attend(c.threads(), &a, qs, ks, vs, additive, y.as<float>()));
  }

 private:
  void heads_first(const Context& c, const Shape& q, const Shape& k, const Shape& v, nf_attention* a) const {
    require(q.rank == 4 && q.dim[3] >= 1,
            c.at("q") + ": found " + q.text() + ", expected [batch, heads, queries, features]");
    require(!heads || q.dim[1] == heads,
            c.at("q") + ": found " + q.text() + ", expected " + std::to_string(heads) + " heads");
    require(k.rank == 4 && k.dim[0] == q.dim[0] && k.dim[3] == q.dim[3] && k.dim[1] >= 1 && q.dim[1] % k.dim[1] == 0 &&
                (!kv_heads || k.dim[1] == kv_heads),
            c.at("k") + ": found " + k.text() + ", which does not go with q of " + q.text());
    require(v == k, c.at("v") + ": found " + v.text() + ", expected " + k.text());
    a->batch = q.dim[0];
    a->heads = q.dim[1];
    a->kv_heads = k.dim[1];
    a->queries = q.dim[2];
    a->keys = k.dim[2];
    a->head_dim = q.dim[3];
    contiguous(a->q_stride, a->heads, a->queries, a->head_dim);
    contiguous(a->y_stride, a->heads, a->queries, a->head_dim);
    contiguous(a->k_stride, a->kv_heads, a->keys, a->head_dim);
    contiguous(a->v_stride, a->kv_heads, a->keys, a->head_dim);
  }

  static void contiguous(int64_t* stride, int64_t h, int64_t tokens, int64_t features) {
    stride[0] = h * tokens * features;
    stride[1] = tokens * features;
    stride[2] = features;
  }

  void tokens_first(const Context& c, const Shape& q, const Shape& k, const Shape& v, nf_attention* a) const {
    const int64_t shares = layout == kPacked ? heads + 2 * kv_heads : heads;  // heads in a row of q
    require(q.rank == 3 && q.dim[2] >= 1 && q.dim[2] % shares == 0, c.at("q") + ": found " + q.text() +
                                                                        ", expected [batch, queries, features of " +
                                                                        std::to_string(shares) + " heads]");
    const int64_t d = q.dim[2] / shares, k_row = layout == kPacked ? q.dim[2] : kv_heads * d;
    require(k.rank == 3 && k.dim[0] == q.dim[0] && k.dim[2] == k_row, c.at("k") + ": found " + k.text() +
                                                                          ", expected [" + std::to_string(q.dim[0]) +
                                                                          ", keys, " + std::to_string(k_row) + "]");
    require(v == k, c.at("v") + ": found " + v.text() + ", expected " + k.text());
    a->batch = q.dim[0];
    a->heads = heads;
    a->kv_heads = kv_heads;
    a->queries = q.dim[1];
    a->keys = k.dim[1];
    a->head_dim = d;
    interleaved(a->q_stride, a->queries, q.dim[2], d);
    interleaved(a->y_stride, a->queries, heads * d, d);
    interleaved(a->k_stride, a->keys, k_row, d);
    interleaved(a->v_stride, a->keys, k_row, d);
  }

  static void interleaved(int64_t* stride, int64_t tokens, int64_t row, int64_t d) {
    stride[0] = tokens * row;
    stride[1] = d;
    stride[2] = row;
  }

  // The mask broadcasts to [batch, heads, queries, keys]; only its last axis must be there in full.
  static const float* add_mask(const Context& c, const Tensor& mask, nf_attention* a) {
    if (!mask) return nullptr;
    const int64_t full[4] = {a->batch, a->heads, a->queries, a->keys};
    const auto expected = [&] {
      return c.at("mask") + ": found " + mask.shape.text() + ", expected what broadcasts to [" +
             std::to_string(full[0]) + ", " + std::to_string(full[1]) + ", " + std::to_string(full[2]) + ", " +
             std::to_string(full[3]) + "] and has all keys";
    };
    require(mask.shape.rank >= 1 && mask.shape.rank <= 4 && mask.shape.last() == a->keys, expected());
    int64_t stride = a->keys;
    for (size_t back = 2; back <= 4; ++back) {  // queries, heads, batch
      const size_t axis = 4 - back;
      const int64_t size = back <= mask.shape.rank ? mask.shape.dim[mask.shape.rank - back] : 1;
      require(size == full[axis] || size == 1, expected());
      a->mask_stride[axis] = size == 1 ? 0 : stride;
      stride *= size;
    }
    return mask.as<float>();
  }
};

const Port kIn[] = {{"q", kFloat, false}, {"k", kFloat, true}, {"v", kFloat, true}, {"mask", kFloat, true}};
const Port kOut[] = {{"y", kFloat, false}};

}  // namespace

const std::vector<const Op*>& attention_ops() {
  static const Op attention = make<Attention>("Attention", kIn, kOut);
  static const std::vector<const Op*> all = {&attention};
  return all;
}

}  // namespace nf::ort
