// Attention: what a call is cut into, and which instruction set runs it. The kernels are in attention/kernel.h.
#include "attention/attention.h"

#include <atomic>

#include "isa/isa.h"
#include "parallel.h"

namespace nf {
namespace {

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace
}  // namespace nf

const char* nf_attend(const nf_threads* threads, const nf_attention* shape, const float* q, const float* k,
                      const float* v, const float* mask, float* y) {
  using namespace nf;
  if (!shape) return "nf_attend: the shape is missing";
  const nf_attention& a = *shape;
  if (a.batch < 0 || a.queries < 0) return "nf_attend: batch and queries must not be negative";
  if (a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads)
    return "nf_attend: heads must be a positive multiple of kv_heads";
  if (a.keys < 1) return "nf_attend: at least one key is needed";
  if (a.head_dim < 1 || a.head_dim > 1 << 16) return "nf_attend: head_dim must be in 1..65536";
  if (a.batch > 1 << 30 || a.heads > 1 << 20 || a.queries > 1 << 30 || a.keys > 1 << 30)
    return "nf_attend: a size is out of range";
  if (a.bits != 0 && (a.bits < 2 || a.bits > 8)) return "nf_attend: bits must be 0 or 2..8";
  if (a.batch == 0 || a.queries == 0) return nullptr;
  if (!q || !k || !v || !y) return "nf_attend: q, k, v or y is missing";

  const AttendKernels& kernel = active_kernels().attention;
  AttendPlan p{};
  p.shape = a;
  p.q = q, p.k = k, p.v = v, p.mask = mask, p.y = y;
  p.group = a.heads / a.kv_heads;
  p.rows = p.group * a.queries;
  p.streamed = p.rows <= kernel.few_rows && !a.bits;
  p.padded_dim = up(a.head_dim, kernel.width);
  // Tiles of equal size, of keys and values that stay in L2 together: 320 keys for 64 features.
  const int64_t fit = p.streamed ? 1024 : 320 * 64 / (p.padded_dim < 64 ? 64 : p.padded_dim);
  const int64_t limit = up(fit < 32 ? 32 : fit, kernel.panel), tiles = (a.keys + limit - 1) / limit;
  p.tile_keys = tiles == 1 ? a.keys : up((a.keys + tiles - 1) / tiles, kernel.panel);
  p.pitch = up(p.tile_keys, kernel.panel) + 16;
  // Every task packs its keys again, so that rows are divided only where there are too few heads for the threads.
  const int64_t heads = a.batch * a.kv_heads, count = thread_count(threads);
  int64_t parts = p.streamed || count == 1 ? 1 : (2 * count + heads - 1) / heads;
  if (heads % count == 0 || heads >= 4 * count) parts = 1;
  if (parts * 512 < p.rows) parts = (p.rows + 511) / 512;
  p.rows_per_task = up((p.rows + parts - 1) / parts, p.streamed ? 1 : kernel.block_rows);
  p.tasks_per_head = (p.rows + p.rows_per_task - 1) / p.rows_per_task;
  p.scratch = kernel.scratch(p);

  std::atomic<bool> out_of_memory{false};
  parallel(threads, heads * p.tasks_per_head, [&](int64_t i) {
    float* const scratch = thread_scratch<struct AttentionScratch>().of<float>(p.scratch);
    if (!scratch) {
      out_of_memory.store(true, std::memory_order_relaxed);
      return;
    }
    const int64_t head = i / p.tasks_per_head, row0 = i % p.tasks_per_head * p.rows_per_task,
                  row1 = row0 + p.rows_per_task;
    kernel.attend(p, head / p.shape.kv_heads, head % p.shape.kv_heads, row0, row1 < p.rows ? row1 : p.rows, scratch);
  });
  return out_of_memory ? kNoMemory : nullptr;
}
