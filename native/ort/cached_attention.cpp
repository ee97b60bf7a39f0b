// CachedAttention: puts new keys and values behind those of the past and attends to all that are there. Where past and
// present are bound to one buffer (IO binding), as with com.microsoft's GroupQueryAttention, nothing but the new tokens
// is written.
#include <utility>

#include "ort/op.h"

namespace nf::ort {
namespace {

struct CachedAttention {
  nf_cache facts{};
  bool packed;
  explicit CachedAttention(const Info& info) : packed(info.integer("packed", 0, 0, 1) != 0) {
    facts.scale = info.number("scale", 1), facts.softcap = info.number("softcap", 0);
    facts.window = info.integer("window", 0, 0, INT32_MAX);
    facts.interleaved = static_cast<int32_t>(info.integer("interleaved", 0, 0, 1));
    require(facts.softcap >= 0, info.at("softcap") + ": expected 0 or more");
  }

  void compute(const Context& c) const {
    const Tensor q = c.input(0), k = c.input(1), v = c.input(2), past_key = c.input(3), past_value = c.input(4),
                 mask = c.input(5), cosines = c.input(6), sines = c.input(7);
    nf_cache a = facts;
    sizes(c, q, past_key, past_value, mask, &a);
    const int64_t width = a.heads * a.head_dim, kv = a.kv_heads * a.head_dim;
    if (!packed)
      for (const auto& [name, x] : {std::pair{"key", &k}, std::pair{"value", &v}}) {
        Shape expected = q.shape;
        expected.dim[2] = kv;
        require(x->shape == expected, c.at(name) + ": found " + x->shape.text() + ", expected " + expected.text());
      }
    tables(c, cosines, sines, &a);
    Shape shape = q.shape, present = past_key.shape;
    shape.dim[2] = width, present.dim[2] = a.present;
    const Tensor y = c.output(0, shape), key = c.output(1, present), value = c.output(2, present);
    require(key && value, c.at("present_key, present_value") + ": the outputs are missing");
    const float* const x = q.as<float>();
    done(nf_attend_cached(c.threads(), &a, x, packed ? x + width : k.as<float>(),
                          packed ? x + width + kv : v.as<float>(), past_key.as<float>(), past_value.as<float>(),
                          mask.as<int64_t>(), cosines.as<float>(), sines.as<float>(), key.as<float>(),
                          value.as<float>(), y.as<float>()));
  }

 private:
  void sizes(const Context& c, const Tensor& q, const Tensor& past_key, const Tensor& past_value, const Tensor& mask,
             nf_cache* a) const {
    const Shape& cache = past_key.shape;
    require(cache.rank == 4 && cache.dim[1] >= 1 && cache.dim[3] >= 1,
            c.at("past_key") + ": found " + cache.text() + ", expected [batch, heads, slots, features]");
    require(past_value.shape == cache,
            c.at("past_value") + ": found " + past_value.shape.text() + ", expected " + cache.text());
    a->batch = cache.dim[0], a->kv_heads = cache.dim[1], a->past = cache.dim[2], a->head_dim = cache.dim[3];
    require(q.shape.rank == 3 && q.shape.dim[0] == a->batch && q.shape.dim[2] % a->head_dim == 0,
            c.at("query") + ": found " + q.shape.text() + ", expected [" + std::to_string(a->batch) +
                ", tokens, features of heads of " + std::to_string(a->head_dim) + "]");
    a->tokens = q.shape.dim[1];
    a->heads = q.shape.dim[2] / a->head_dim - (packed ? 2 * a->kv_heads : 0);
    require(a->heads >= 1 && a->heads % a->kv_heads == 0, c.at("query") + ": found " + std::to_string(a->heads) +
                                                              " heads, expected a multiple of the " +
                                                              std::to_string(a->kv_heads) + " of past_key");
    require(mask.shape.rank == 2 && mask.shape.dim[0] == a->batch && mask.shape.dim[1] >= a->tokens,
            c.at("attention_mask") + ": found " + mask.shape.text() + ", expected [" + std::to_string(a->batch) +
                ", slots of the past and of " + std::to_string(a->tokens) + " new tokens]");
    a->total = mask.shape.dim[1];
    a->present = a->past > a->total ? a->past : a->total;
    a->q_row = q.shape.dim[2];
    a->k_row = a->v_row = packed ? a->q_row : a->kv_heads * a->head_dim;
  }

  void tables(const Context& c, const Tensor& cosines, const Tensor& sines, nf_cache* a) const {
    require(bool(cosines) == bool(sines), c.at("cosines, sines") + ": expected both or none");
    if (!cosines) return;
    require(cosines.shape.rank == 2 && 2 * cosines.shape.dim[1] <= a->head_dim && cosines.shape.dim[0] >= a->total,
            c.at("cosines") + ": found " + cosines.shape.text() + ", expected " + std::to_string(a->total) +
                " positions or more, and at most half of " + std::to_string(a->head_dim) + " features");
    require(sines.shape == cosines.shape,
            c.at("sines") + ": found " + sines.shape.text() + ", expected " + cosines.shape.text());
    a->positions = cosines.shape.dim[0], a->pairs = cosines.shape.dim[1];
  }
};

const Port kIn[] = {{"query", kFloat, false},    {"key", kFloat, false},        {"value", kFloat, false},
                    {"past_key", kFloat, false}, {"past_value", kFloat, false}, {"attention_mask", kInt64, false},
                    {"cosines", kFloat, true},   {"sines", kFloat, true}};
const Port kOut[] = {{"y", kFloat, false}, {"present_key", kFloat, false}, {"present_value", kFloat, false}};

}  // namespace

const std::vector<const Op*>& cached_attention_ops() {
  static const Op cached = make<CachedAttention>("CachedAttention", kIn, kOut);
  static const std::vector<const Op*> all = {&cached};
  return all;
}

}  // namespace nf::ort
