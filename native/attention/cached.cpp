// Attention over a cache: where a row's tokens go follows from its mask; a few queries go over the cache by parts, a
// prompt as any attention does.
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "attention/attention.h"
#include "isa/isa.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kFewRows = 16;     // of a kv head: above, packed panels pay
constexpr int64_t kPart = 64;        // keys of a part, at least; parts are at most 16 where nothing is hidden
constexpr int64_t kAlone = 1 << 15;  // floats of keys that one thread has read before others have begun
constexpr size_t kFloat = sizeof(float);

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

const char* wrong(const nf_cache& a) {
  if (a.batch < 0 || a.tokens < 0) return "nf_attend_cached: batch and tokens must not be negative";
  if (a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads)
    return "nf_attend_cached: heads must be a positive multiple of kv_heads";
  if (a.head_dim < 1 || a.head_dim > 1 << 16) return "nf_attend_cached: head_dim must be in 1..65536";
  if (a.batch > 1 << 30 || a.heads > 1 << 20 || a.past < 0 || a.past > 1 << 30 || a.total > 1 << 30)
    return "nf_attend_cached: a size is out of range";
  if (a.tokens > a.total) return "nf_attend_cached: the mask has fewer slots than there are new tokens";
  if (a.present != (a.past > a.total ? a.past : a.total))
    return "nf_attend_cached: present must have as many slots as past or the mask, whichever has more";
  if (a.pairs < 0 || 2 * a.pairs > a.head_dim) return "nf_attend_cached: pairs must be at most half of head_dim";
  if (a.pairs && a.positions < a.total) return "nf_attend_cached: the tables of the rotation have too few positions";
  if (a.window < 0 || !(a.softcap >= 0)) return "nf_attend_cached: window and softcap must not be negative";
  return nullptr;
}

// What the mask says of one row.
struct Row {
  int64_t first = 0, start = 0;  // the first slot that is seen, and the slot of the first new token
  bool holes = false;            // behind `first` something is hidden

  Row(const nf_cache& a, const int64_t* mask) {
    const int64_t before = a.total - a.tokens;
    if (!a.total || mask[0]) {
      for (int64_t i = 0; i < before; ++i) start += mask[i] != 0;
      return;
    }
    start = before;
    while (first < a.total && !mask[first]) ++first;
    for (int64_t i = first; i < a.total && !holes; ++i) holes = !mask[i];
  }
  bool operator==(const Row& o) const { return first == o.first && start == o.start && !holes && !o.holes; }
};

struct Cached {
  const nf_threads* threads;
  const nf_cache& a;
  const float *q, *k, *v, *past_key, *past_value;
  const int64_t* mask;
  const float *cosines, *sines;
  float *present_key, *present_value, *y;
  const AttendKernels& kernel;
  std::vector<Row> rows{};

  const char* run() {
    for (int64_t b = 0; b < a.batch; ++b) rows.emplace_back(a, mask + b * a.total);
    append();
    if (!a.tokens) return nullptr;
    return a.heads / a.kv_heads * a.tokens <= kFewRows ? few() : many();
  }

  int64_t end(int64_t b) const { return rows[static_cast<size_t>(b)].start + a.tokens; }
  const Row& row(int64_t b) const { return rows[static_cast<size_t>(b)]; }

  // scale * x, rotated as at `slot`.
  void turned(const float* x, int64_t slot, float scale, float* to) const {
    const int64_t turn = a.pairs, step = a.interleaved ? 2 : 1, apart = a.interleaved ? 1 : turn;
    const float *cos = cosines + slot * turn, *sin = sines + slot * turn;
    for (int64_t i = 0; i < turn; ++i) {
      const float one = x[i * step], other = x[i * step + apart];
      to[i * step] = scale * (one * cos[i] - other * sin[i]);
      to[i * step + apart] = scale * (one * sin[i] + other * cos[i]);
    }
    for (int64_t i = 2 * turn; i < a.head_dim; ++i) to[i] = scale * x[i];
  }

  // The past, where it is elsewhere, zeros behind it, and the new tokens in their slots.
  void append() const {
    const bool moved = past_key != present_key || past_value != present_value;
    const int64_t work = a.batch * a.kv_heads * a.head_dim * (moved ? a.present : a.tokens);
    parallel(work < kAlone ? nullptr : threads, a.batch * a.kv_heads, [&](int64_t head) {
      const int64_t b = head / a.kv_heads, kv = head % a.kv_heads, slot = row(b).start;
      float* const key = present_key + head * a.present * a.head_dim;
      float* const value = present_value + head * a.present * a.head_dim;
      carry(past_key + head * a.past * a.head_dim, past_key == present_key, key);
      carry(past_value + head * a.past * a.head_dim, past_value == present_value, value);
      for (int64_t t = 0; t < a.tokens; ++t) {
        const float* const token = k + (b * a.tokens + t) * a.k_row + kv * a.head_dim;
        turned(token, slot + t, 1.f, key + (slot + t) * a.head_dim);
        std::memcpy(value + (slot + t) * a.head_dim, v + (b * a.tokens + t) * a.v_row + kv * a.head_dim,
                    static_cast<size_t>(a.head_dim) * kFloat);
      }
    });
  }
  void carry(const float* past, bool there, float* to) const {
    if (there) return;
    const int64_t filled = a.past * a.head_dim, rest = (a.present - a.past) * a.head_dim;
    std::memcpy(to, past, static_cast<size_t>(filled) * kFloat);
    std::memset(to + filled, 0, static_cast<size_t>(rest) * kFloat);
  }

  // Added to the scores of a row whose mask has holes: `total` floats.
  void hide(int64_t b, float* to) const {
    for (int64_t i = 0; i < a.total; ++i) to[i] = mask[b * a.total + i] ? 0.f : -INFINITY;
  }

  // -- a prompt ---------------------------------------------------------------------------------
  const char* many() const {
    const int64_t width = a.heads * a.head_dim, count = a.pairs ? a.batch * a.tokens * width : 0;
    float* const scratch = thread_scratch<struct CachedQueries>().of<float>(count + a.total);
    if (!scratch) return kNoMemory;
    float* const bias = scratch + count;
    if (count)
      parallel(threads, a.batch * a.tokens, [&](int64_t i) {
        for (int64_t h = 0; h < a.heads; ++h)
          turned(q + i * a.q_row + h * a.head_dim, row(i / a.tokens).start + i % a.tokens, 1.f,
                 scratch + i * width + h * a.head_dim);
      });
    const float* const from = count ? scratch : q;
    const int64_t q_row = count ? width : a.q_row;
    bool alike = true;
    for (int64_t b = 0; b < a.batch; ++b) alike = alike && row(b) == row(0);
    if (alike) return attend(0, a.batch, from, q_row, nullptr);
    for (int64_t b = 0; b < a.batch; ++b) {
      if (row(b).holes) hide(b, bias);
      if (const char* message = attend(b, 1, from, q_row, row(b).holes ? bias : nullptr)) return message;
    }
    return nullptr;
  }

  const char* attend(int64_t b, int64_t batch, const float* from, int64_t q_row, const float* bias) const {
    const int64_t first = row(b).first, heads = b * a.kv_heads, dim = a.head_dim, width = a.heads * dim;
    float* const to = y + b * a.tokens * width;
    if (first >= end(b)) {  // padding alone
      std::memset(to, 0, static_cast<size_t>(batch * a.tokens * width) * kFloat);
      return nullptr;
    }
    nf_attention s{};
    s.batch = batch, s.heads = a.heads, s.kv_heads = a.kv_heads, s.queries = a.tokens, s.keys = end(b) - first;
    s.head_dim = dim, s.scale = a.scale, s.causal = 1, s.softcap = a.softcap, s.window = a.window;
    s.q_stride[0] = a.tokens * q_row, s.q_stride[1] = dim, s.q_stride[2] = q_row;
    s.y_stride[0] = a.tokens * width, s.y_stride[1] = dim, s.y_stride[2] = width;
    s.k_stride[0] = s.v_stride[0] = a.kv_heads * a.present * dim, s.k_stride[1] = s.v_stride[1] = a.present * dim,
    s.k_stride[2] = s.v_stride[2] = dim;
    const int64_t offset = (heads * a.present + first) * dim;
    return nf_attend(threads, &s, from + b * a.tokens * q_row, present_key + offset, present_value + offset,
                     bias ? bias + first : nullptr, to);
  }

  // -- a few queries ----------------------------------------------------------------------------
  const char* few() const {
    const int64_t group = a.heads / a.kv_heads, heads = a.batch * a.kv_heads;
    CachedPlan p{};
    p.shape = a, p.key = present_key, p.value = present_value;
    p.rows = group * a.tokens, p.padded_dim = up(a.head_dim, kernel.width);
    int64_t longest = 0, seen = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      longest = longest > end(b) ? longest : end(b);
      seen = seen > end(b) - row(b).first ? seen : end(b) - row(b).first;
    }
    if (a.window && a.window + a.tokens < seen) seen = a.window + a.tokens;
    p.part = seen <= 16 * kPart ? kPart : up((seen + 15) / 16, kPart);
    p.parts = (longest + p.part - 1) / p.part;
    p.pitch = up(p.part, kernel.panel) + 16;

    const int64_t sizes[] = {heads * p.rows * p.padded_dim, heads * p.parts * p.rows * p.padded_dim,
                             heads * p.parts * p.rows * 2, a.batch * a.total};
    float* const scratch = thread_scratch<struct CachedQueries>().of<float>(sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    if (!scratch) return kNoMemory;
    float* const queries = scratch;
    p.q = queries, p.found = scratch + sizes[0], p.weight = p.found + sizes[1];
    float* const bias = p.weight + sizes[2];
    std::vector<const float*> biases;
    std::vector<int64_t> first, start;
    for (int64_t b = 0; b < a.batch; ++b) {
      first.push_back(row(b).first), start.push_back(row(b).start);
      biases.push_back(row(b).holes ? bias + b * a.total : nullptr);
      if (row(b).holes) hide(b, bias + b * a.total);
    }
    p.bias = biases.data(), p.first = first.data(), p.start = start.data();
    for (int64_t r = 0; r < heads * p.rows; ++r) turn_query(p, r, queries + r * p.padded_dim);

    std::atomic<bool> out_of_memory{false};
    const nf_threads* const help = heads * seen * a.head_dim < kAlone ? nullptr : threads;
    parallel(help, heads * p.parts, [&](int64_t i) {
      float* const scores = thread_scratch<struct CachedScores>().of<float>(kernel.few_rows * p.pitch);
      if (!scores) return out_of_memory.store(true, std::memory_order_relaxed);
      const int64_t head = i / p.parts;
      kernel.attend_part(p, head / a.kv_heads, head % a.kv_heads, i % p.parts, scores);
    });
    if (out_of_memory) return kNoMemory;
    parallel(sizes[1] < kAlone ? nullptr : threads, heads * p.rows, [&](int64_t r) { join(p, r); });
    return nullptr;
  }

  // Row r of all: token and head. y and the queries are laid out alike, but for what is between two tokens.
  struct Place {
    int64_t head, row, token, query_head;
    Place(const CachedPlan& p, int64_t r) : head(r / p.rows), row(r % p.rows) {
      const nf_cache& a = p.shape;
      token = head / a.kv_heads * a.tokens + row % a.tokens;
      query_head = head % a.kv_heads * (a.heads / a.kv_heads) + row / a.tokens;
    }
  };

  void turn_query(const CachedPlan& p, int64_t r, float* to) const {
    const Place at(p, r);
    const int64_t slot = row(at.head / a.kv_heads).start + at.row % a.tokens;
    turned(q + at.token * a.q_row + at.query_head * a.head_dim, slot, a.scale, to);
    for (int64_t i = a.head_dim; i < p.padded_dim; ++i) to[i] = 0;
  }

  // The sums of all parts, each with its own largest score, as one.
  void join(const CachedPlan& p, int64_t r) const {
    const Place at(p, r);
    float* const to = y + (at.token * a.heads + at.query_head) * a.head_dim;
    const int64_t from = at.head * p.parts * p.rows + at.row;
    float top = -INFINITY, total = 0;
    for (int64_t i = 0; i < p.parts; ++i) top = std::fmax(top, p.weight[2 * (from + i * p.rows)]);
    for (int64_t d = 0; d < a.head_dim; ++d) to[d] = 0;
    for (int64_t i = 0; i < p.parts; ++i) {
      const float *const weight = p.weight + 2 * (from + i * p.rows), *const found =
                                                                          p.found + (from + i * p.rows) * p.padded_dim;
      if (weight[1] == 0) continue;  // it saw nothing
      const float share = std::exp(weight[0] - top);
      total += share * weight[1];
      for (int64_t d = 0; d < a.head_dim; ++d) to[d] += share * found[d];
    }
    for (int64_t d = 0; d < a.head_dim && total != 0; ++d) to[d] /= total;
  }
};

}  // namespace
}  // namespace nf

const char* nf_attend_cached(const nf_threads* threads, const nf_cache* shape, const float* q, const float* k,
                             const float* v, const float* past_key, const float* past_value, const int64_t* mask,
                             const float* cosines, const float* sines, float* present_key, float* present_value,
                             float* y) {
  using namespace nf;
  if (!shape) return "nf_attend_cached: the shape is missing";
  if (const char* message = wrong(*shape)) return message;
  if (!shape->batch || !shape->present) return nullptr;
  if (!q || !k || !v || !mask || !present_key || !present_value || !y || (shape->past && !(past_key && past_value)))
    return "nf_attend_cached: q, k, v, a cache, the mask or y is missing";
  if (shape->pairs && !(cosines && sines)) return "nf_attend_cached: the tables of the rotation are missing";
  try {
    return Cached{threads,     *shape,
                  q,           k,
                  v,           past_key,
                  past_value,  mask,
                  cosines,     sines,
                  present_key, present_value,
                  y,           active_kernels().attention}
        .run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
