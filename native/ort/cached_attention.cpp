// CachedAttention: appends keys and values to their buffers and attends to all that is in them. Where past and present
// are bound to one buffer (IO binding), as with com.microsoft's GroupQueryAttention, nothing but the new tokens is
// written.
#include <cmath>
#include <cstring>

#include "ort/op.h"
#include "parallel.h"

namespace nf::ort {
namespace {

struct CachedAttention {
  float scale;
  int64_t heads, kv_heads;
  explicit CachedAttention(const Info& info)
      : scale(info.number("scale", 0)),
        heads(info.integer("heads", 1, 1 << 20)),
        kv_heads(info.integer("kv_heads", heads, 1, 1 << 20)) {
    require(heads % kv_heads == 0, info.at("kv_heads") + ": found " + std::to_string(kv_heads) +
                                       ", expected a divisor of " + std::to_string(heads));
  }

  void compute(const Context& c) const {
    const Tensor qkv = c.input(0), past_key = c.input(1), past_value = c.input(2), position = c.input(3);
    const int64_t parts = heads + 2 * kv_heads;
    require(qkv.shape.rank == 3 && qkv.shape.dim[2] >= parts && qkv.shape.dim[2] % parts == 0,
            c.at("qkv") + ": found " + qkv.shape.text() + ", expected [batch, tokens, features of " +
                std::to_string(parts) + " heads]");
    const int64_t batch = qkv.shape.dim[0], tokens = qkv.shape.dim[1], row = qkv.shape.dim[2], dim = row / parts;
    const Shape& cache = past_key.shape;
    require(cache.rank == 4 && cache.dim[0] == batch && cache.dim[1] == kv_heads && cache.dim[3] == dim,
            c.at("past_key") + ": found " + cache.text() + ", expected [" + std::to_string(batch) + ", " +
                std::to_string(kv_heads) + ", capacity, " + std::to_string(dim) + "]");
    require(past_value.shape == cache,
            c.at("past_value") + ": found " + past_value.shape.text() + ", expected " + cache.text());
    require(position.shape.count() == 1,
            c.at("position") + ": found " + position.shape.text() + ", expected one number");
    const int64_t first = *position.as<int64_t>(), room = cache.dim[2];
    require(first >= 0 && first <= room && tokens <= room - first,
            c.at("position") + ": found " + std::to_string(first) + "; " + std::to_string(tokens) +
                " tokens from there on do not fit into a buffer of " + std::to_string(room));

    Shape shape = qkv.shape;
    shape.dim[2] = heads * dim;
    const Tensor y = c.output(0, shape), key = c.output(1, cache), value = c.output(2, cache);
    require(key && value,
            c.at("present_key, present_value") + ": the outputs are missing; bind them to the buffers of the past");
    if (!batch || !tokens) return;

    const float* x = qkv.as<float>();
    parallel(tokens > 1 ? c.threads() : nullptr, batch * kv_heads, [&](int64_t i) {
      const float* from = x + i / kv_heads * tokens * row + (heads + i % kv_heads) * dim;
      append(past_key, key, i, room * dim, first * dim, from, tokens, row, dim);
      append(past_value, value, i, room * dim, first * dim, from + kv_heads * dim, tokens, row, dim);
    });
    nf_attention a{};
    a.batch = batch, a.heads = heads, a.kv_heads = kv_heads, a.queries = tokens, a.keys = first + tokens,
    a.head_dim = dim;
    a.q_stride[0] = tokens * row, a.q_stride[1] = dim, a.q_stride[2] = row;
    a.y_stride[0] = tokens * heads * dim, a.y_stride[1] = dim, a.y_stride[2] = heads * dim;
    a.k_stride[0] = a.v_stride[0] = kv_heads * room * dim, a.k_stride[1] = a.v_stride[1] = room * dim,
    a.k_stride[2] = a.v_stride[2] = dim;
    a.scale = scale == 0 ? 1 / std::sqrt(float(dim)) : scale;
    a.causal = 1;
    done(nf_attend(c.threads(), &a, x, key.as<float>(), value.as<float>(), nullptr, y.as<float>()));
  }

 private:
  // Of head i, whose buffer has `size` floats: the past (if it is elsewhere) and the new tokens behind it.
  static void append(const Tensor& past, const Tensor& present, int64_t i, int64_t size, int64_t filled,
                     const float* from, int64_t tokens, int64_t row, int64_t dim) {
    float* to = present.as<float>() + i * size;
    if (past.data != present.data)
      std::memcpy(to, past.as<float>() + i * size, static_cast<size_t>(filled) * sizeof(float));
    for (int64_t t = 0; t < tokens; ++t)
      std::memcpy(to + filled + t * dim, from + t * row, static_cast<size_t>(dim) * sizeof(float));
  }
};

const Port kIn[] = {
    {"qkv", kFloat, false}, {"past_key", kFloat, false}, {"past_value", kFloat, false}, {"position", kInt64, false}};
const Port kOut[] = {{"y", kFloat, false}, {"present_key", kFloat, false}, {"present_value", kFloat, false}};

}  // namespace

const std::vector<const Op*>& cached_attention_ops() {
  static const Op cached = make<CachedAttention>("CachedAttention", kIn, kOut);
  static const std::vector<const Op*> all = {&cached};
  return all;
}

}  // namespace nf::ort
