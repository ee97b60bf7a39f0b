// Products of int8 rows with packed weights: arguments, blocking and threads. The arithmetic is in the kernels of linear.h.
//
// A band of rows is prepared (quantized, gathered in the order of the exponents, summed), then multiplied by tasks of some rows and
// some panels, then, if asked, quantized again. A chunk of a panel is unpacked to bytes once for all rows of a task and stays in
// the first-level cache. Integer sums are exact and every output is made by one task: the result does not depend on the threads.
#include "linear/linear.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace nf {

const LinearKernels& linear_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::Avx512:
      return linear_avx512;
#if NF_HAS_AVXVNNI
    case Isa::AvxVnni:
      return linear_avxvnni;
#endif
    case Isa::Avx2:
      return linear_avx2;
#elif defined(__aarch64__)
    case Isa::Neon:
      return linear_neon;
#endif
    default:
      return linear_scalar;
  }
}

namespace {

constexpr int kMaxGroups = 16;
constexpr int64_t kChunk = 256;              // quads of a panel that are unpacked at once: 16 KB
constexpr int64_t kTaskBytes = 384 << 10;    // codes of the rows of a task: second-level cache
constexpr int64_t kTaskRows = 256;           // and their sums: 64 bytes a row
constexpr int64_t kTileRows = 12;            // a multiple of every kernel's tile
constexpr int64_t kBandBytes = 2 << 20;      // codes of a band of rows
constexpr int64_t kFloatBytes = 1 << 20;     // float results of a band that are quantized again

struct Layout {
  int64_t quads = 0;        // real ones
  int64_t packed_quads = 0;
  Segment segments[kMaxGroups + 1];
  int segment_count = 0;
  bool gather = false;      // rows cannot be read where they lie
};

const char* check(const nf_weight* w) {
  if (!w) return "nf_weight: null";
  if (w->n < 1 || w->k < 1 || w->n > INT32_MAX || w->k > INT32_MAX) return "nf_weight: n and k must be 1..2^31 - 1";
  if (w->bits < 2 || w->bits > 8) return "nf_weight: bits must be 2..8";
  if (w->groups < 1 || w->groups > kMaxGroups) return "nf_weight: groups must be 1..16";
  if (!w->sizes || !w->packed || !w->scale) return "nf_weight: sizes, packed or scale is null";
  if (w->groups > 1 && !w->order) return "nf_weight: order is null although there is more than one group";
  int64_t sum = 0;
  for (int32_t g = 0; g < w->groups; ++g) {
    if (w->sizes[g] < 0) return "nf_weight: a size is negative";
    sum += w->sizes[g];
  }
  if (sum != w->k) return "nf_weight: sizes do not add up to k";
  if (w->order) {
    bool outside = false;
    for (int64_t i = 0; i < w->k; ++i) outside |= static_cast<uint32_t>(w->order[i]) >= static_cast<uint32_t>(w->k);
    if (outside) return "nf_weight: order holds a channel outside 0..k - 1";
  }
  return nullptr;
}

Layout layout_of(const nf_weight& w) {
  Layout l;
  int shift = 0;
  for (int32_t g = 0; g < w.groups; ++g, ++shift) {
    const int64_t quads = ceil_div(w.sizes[g], 4);
    if (quads == 0) continue;
    l.segments[l.segment_count++] = {l.quads, l.quads + quads, l.quads == 0 ? 0 : shift};
    l.quads += quads;
    shift = 0;
  }
  if (shift > 1) l.segments[l.segment_count++] = {l.quads, l.quads, shift - 1};
  l.packed_quads = round_up(l.quads, unit_of(w.bits));
  l.gather = w.order != nullptr || w.k % 4 != 0;
  return l;
}

// What a call multiplies and where it leaves the results.
struct Call {
  const nf_threads* threads;
  const nf_weight* weight;
  const int8_t* q = nullptr;  // codes, or
  const float* x = nullptr;   // floats to be quantized
  int32_t activation_bits = 8;
  float static_scale = 0.f;
  const float* row_scale = nullptr;
  int64_t row_stride = 0;
  int64_t m = 0;
  int32_t epilogue = NF_NONE;
  const float* residual = nullptr;
  float* y = nullptr;
  int8_t* out_q = nullptr;    // instead of y
  int32_t out_bits = 8;
  float* out_scale = nullptr;
  int32_t* sums = nullptr;    // instead of y
};

// The rows of a band as the kernels read them.
struct Band {
  int64_t first, rows;
  const int8_t* codes;        // int16 if `pairs`
  int64_t stride;             // bytes
  bool pairs;
  const float* row_scale;
  int64_t row_stride;
  const int32_t* correction;  // nullptr: none
  float* y;                   // [rows][n]
};

void gather_row(const nf_weight& w, const int8_t* from, int8_t* to) {
  const int32_t* order = w.order;
  for (int32_t g = 0; g < w.groups; ++g) {
    const int32_t size = w.sizes[g];
    if (order) {
#pragma GCC unroll 8
      for (int32_t i = 0; i < size; ++i) to[i] = from[order[i]];
      order += size;
    } else {
      std::memcpy(to, from, static_cast<size_t>(size));
    }
    to += size;
    for (int32_t i = size; i % 4 != 0; ++i) *to++ = 0;
  }
}

// 2^(bits-1) Σ_k A (1 << (E - e)): by how much unsigned operands make the sums of a row too large.
int32_t correction_of(const LinearKernels& kernels, const Layout& l, int bits, const int8_t* a) {
  uint32_t sum = 0;
  for (int i = 0; i < l.segment_count; ++i) {
    const Segment& s = l.segments[i];
    sum = (sum << s.shift) + static_cast<uint32_t>(kernels.row_sum(a + s.begin * 4, (s.end - s.begin) * 4));
  }
  return static_cast<int32_t>(sum << (bits - 1));
}

struct TaskMemory;
struct CallMemory;

void multiply_panel(const LinearKernels& kernels, const Call& call, const Layout& l, const Band& band, int64_t row, int64_t rows,
                    int64_t panel, uint8_t* operands, int32_t* sums) {
  const nf_weight& w = *call.weight;
  const uint8_t* packed = w.packed + panel * l.packed_quads * 8 * w.bits;
  const int64_t column = panel * kPanel;
  const int columns = static_cast<int>(std::min<int64_t>(kPanel, w.n - column));
  const int8_t* a = band.codes + row * band.stride;
  float* y = band.y ? band.y + row * w.n + column : nullptr;
  if (rows <= kernels.direct_rows && !band.pairs) {
    kernels.direct({a, band.stride, rows, packed, l.packed_quads, l.segments, l.segment_count, w.bits, sums});
  } else {
    const int64_t wide = band.pairs ? 2 : 1, chunk = kChunk / wide;
    for (int64_t begin = 0; begin < l.quads; begin += chunk) {
      const int64_t end = std::min(begin + chunk, l.quads), unpacked = std::min(begin + chunk, l.packed_quads) - begin;
      if (band.pairs) kernels.unpack_pairs(packed, begin, unpacked, operands);
      else kernels.unpack(w.bits, kernels.is_unsigned(w.bits), packed, l.packed_quads, begin, unpacked, operands);
      for (int i = 0; i < l.segment_count; ++i) {
        const Segment& s = l.segments[i];
        const int64_t from = std::max(begin, s.begin), to = std::min(end, s.end);
        const bool trailing = s.begin == s.end && end == l.quads;  // nothing but a shift
        if (from >= to && !trailing) continue;
        const bool last = to == l.quads;
        const Stretch stretch{a + from * 4 * wide, band.stride, rows, operands + (from - begin) * kQuadBytes * wide, trailing ? 0 : to - from, w.bits,
                              trailing || from == s.begin ? s.shift : 0, from == 0 && !trailing, sums, last ? y : nullptr, w.n};
        if (band.pairs) kernels.multiply_pairs(stretch);
        else kernels.multiply(stretch);
      }
    }
  }
  const int32_t* correction = band.correction ? band.correction + row : nullptr;
  if (call.sums) {
    for (int64_t m = 0; m < rows; ++m)
      for (int n = 0; n < columns; ++n)
        call.sums[(band.first + row + m) * w.n + column + n] =
            static_cast<int32_t>(static_cast<uint32_t>(sums[m * kPanel + n]) - static_cast<uint32_t>(correction ? correction[m] : 0));
    return;
  }
  const float* residual = call.residual ? call.residual + (band.first + row) * w.n + column : nullptr;
  kernels.finish({sums, correction, rows, columns, band.row_scale + row * band.row_stride, band.row_stride, w.scale + column,
                  w.bias ? w.bias + column : nullptr, residual, y, w.n, call.epilogue});
}

// Codes, scales and corrections of the band's rows, a few rows a task.
void prepare(const LinearKernels& kernels, const Call& call, const Layout& l, bool corrected, int8_t* quantized, int8_t* gathered,
             int16_t* widened, float* scales, int32_t* corrections, const Band& band) {
  const nf_weight& w = *call.weight;
  const int64_t step = std::max<int64_t>(1, 16384 / w.k);
  const int64_t width = l.quads * 4;
  parallel(call.threads, ceil_div(band.rows, step), [&](int64_t t) {
    for (int64_t r = t * step; r < std::min(band.rows, (t + 1) * step); ++r) {
      const int8_t* codes;
      if (call.x) {
        const float* x = call.x + (band.first + r) * w.k;
        int8_t* q = quantized + r * w.k;
        if (call.static_scale > 0.f) kernels.quantize_static(x, w.k, call.static_scale, call.activation_bits, q);
        else kernels.quantize_row(x, w.k, call.activation_bits, q, scales + r);
        codes = q;
      } else {
        codes = call.q + (band.first + r) * w.k;
      }
      if (l.gather) {
        gather_row(w, codes, gathered + r * width);
        codes = gathered + r * width;
      }
      if (band.pairs)
        for (int64_t i = 0; i < width; ++i) widened[r * width + i] = codes[i];
      if (corrected) corrections[r] = correction_of(kernels, l, w.bits, codes);
    }
  });
}

const char* run(const Call& call) {
  const nf_weight& w = *call.weight;
  const LinearKernels& kernels = linear_kernels();
  const Layout l = layout_of(w);
  const bool corrected = kernels.is_unsigned(w.bits);
  const bool pairs = w.bits == 8 && kernels.multiply_pairs && call.m > kernels.direct_rows;
  const int64_t width = l.quads * 4, wide_width = pairs ? 2 * width : width, panels = ceil_div(w.n, kPanel);
  const int threads = thread_count(call.threads);

  int64_t most = std::max<int64_t>(1, kBandBytes / wide_width);
  if (call.out_q) most = std::max<int64_t>(1, std::min(most, kFloatBytes / (w.n * 4)));
  const int64_t bands = ceil_div(call.m, most), band_rows = ceil_div(call.m, bands);

  // One piece of memory: [codes][gathered codes][codes as int16][scales][corrections][floats]
  const int64_t code_bytes = call.x ? round_up(band_rows * w.k, 64) : 0, gathered_bytes = l.gather ? round_up(band_rows * width, 64) : 0;
  const int64_t wide_bytes = pairs ? round_up(band_rows * wide_width, 64) : 0, row_bytes = round_up(band_rows * 4, 64);
  const int64_t float_bytes = call.out_q ? band_rows * w.n * 4 : 0;
  int8_t* memory = thread_scratch<CallMemory>().of<int8_t>(code_bytes + gathered_bytes + wide_bytes + 2 * row_bytes + float_bytes);
  if (!memory) return kNoMemory;
  int8_t* gathered = memory + code_bytes;
  int16_t* widened = reinterpret_cast<int16_t*>(gathered + gathered_bytes);
  int8_t* after = gathered + gathered_bytes + wide_bytes;
  float* scales = reinterpret_cast<float*>(after);
  int32_t* corrections = reinterpret_cast<int32_t*>(after + row_bytes);
  float* floats = reinterpret_cast<float*>(after + 2 * row_bytes);

  bool starved = false;
  for (int64_t first = 0; first < call.m; first += band_rows) {
    Band band{};
    band.first = first;
    band.rows = std::min(band_rows, call.m - first);
    band.pairs = pairs;
    prepare(kernels, call, l, corrected, memory, gathered, widened, scales, corrections, band);
    band.codes = pairs ? reinterpret_cast<const int8_t*>(widened) : l.gather ? gathered : call.x ? memory : call.q + first * w.k;
    band.stride = wide_width;
    if (call.x) {
      band.row_scale = call.static_scale > 0.f ? &call.static_scale : scales;
      band.row_stride = call.static_scale > 0.f ? 0 : 1;
    } else if (call.row_scale) {
      band.row_scale = call.row_scale + first * call.row_stride;
      band.row_stride = call.row_stride;
    }
    band.correction = corrected ? corrections : nullptr;
    band.y = call.out_q ? floats : call.y ? call.y + first * w.n : nullptr;

    // Panels are shared out first: each is then unpacked once.
    const int64_t rows_at_once = std::min(kTaskRows, std::max<int64_t>(24, kTaskBytes / wide_width));
    int64_t row_tasks = ceil_div(band.rows, rows_at_once);
    int64_t panel_tasks = threads == 1 ? 1 : std::min<int64_t>(panels, 4 * threads);
    if (threads > 1 && row_tasks * panel_tasks < 2 * threads) row_tasks = std::min(ceil_div(band.rows, kTileRows), ceil_div(2 * threads, panel_tasks));
    const int64_t task_rows = round_up(ceil_div(band.rows, row_tasks), kTileRows);
    row_tasks = ceil_div(band.rows, task_rows);
    std::atomic<bool> failed{false};
    parallel(call.threads, row_tasks * panel_tasks, [&](int64_t t) {
      const int64_t row = t % row_tasks * task_rows, rows = std::min(task_rows, band.rows - row), part = t / row_tasks;
      int32_t* sums = thread_scratch<TaskMemory>().of<int32_t>(kChunk * kQuadBytes / 4 + rows * kPanel);
      if (!sums) {
        failed.store(true, std::memory_order_relaxed);
        return;
      }
      uint8_t* operands = reinterpret_cast<uint8_t*>(sums + rows * kPanel);
      for (int64_t p = panels * part / panel_tasks; p < panels * (part + 1) / panel_tasks; ++p)
        multiply_panel(kernels, call, l, band, row, rows, p, operands, sums);
    });
    starved = starved || failed.load();

    if (call.out_q) {
      const int64_t step = std::max<int64_t>(1, 16384 / w.n);
      parallel(call.threads, ceil_div(band.rows, step), [&](int64_t t) {
        for (int64_t r = t * step; r < std::min(band.rows, (t + 1) * step); ++r)
          kernels.quantize_row(floats + r * w.n, w.n, call.out_bits, call.out_q + (first + r) * w.n, call.out_scale + first + r);
      });
    }
  }
  return starved ? kNoMemory : nullptr;
}

const char* check_product(const nf_weight* w, int64_t m, int32_t epilogue) {
  if (const char* wrong = check(w)) return wrong;
  if (m < 0) return "m must be >= 0";
  if (m > (INT64_MAX >> 4) / std::max(w->n, w->k)) return "m is too large: the bytes of the rows leave 63 bits";
  if (epilogue < NF_NONE || epilogue > NF_SILU) return "epilogue must be one of nf_epilogue";
  return nullptr;
}

}  // namespace
}  // namespace nf

NF_EXPORT int64_t nf_packed_bytes(int64_t n, int32_t bits, int32_t groups, const int32_t* sizes) {
  if (n < 1 || n > INT32_MAX || bits < 2 || bits > 8 || groups < 1 || groups > nf::kMaxGroups || !sizes) return -1;
  int64_t quads = 0;
  for (int32_t g = 0; g < groups; ++g) {
    if (sizes[g] < 0) return -1;
    quads += nf::ceil_div(sizes[g], 4);
  }
  if (quads > INT32_MAX / 4 + 1) return -1;  // n and k fit into 31 bits, and so does all of it into 63
  return nf::ceil_div(n, nf::kPanel) * nf::round_up(quads, nf::unit_of(bits)) * 8 * bits;
}

NF_EXPORT const char* nf_matmul(const nf_threads* threads, const nf_weight* w, const int8_t* q, const float* row_scale, int64_t row_stride,
                                int64_t m, int32_t epilogue, const float* residual, float* y) {
  if (const char* wrong = nf::check_product(w, m, epilogue)) return wrong;
  if (m == 0) return nullptr;
  if (!q || !row_scale || !y) return "nf_matmul: q, row_scale or y is null";
  if (row_stride != 0 && row_stride != 1) return "nf_matmul: row_stride must be 0 or 1";
  nf::Call call{};
  call.threads = threads;
  call.weight = w;
  call.q = q;
  call.row_scale = row_scale;
  call.row_stride = row_stride;
  call.m = m;
  call.epilogue = epilogue;
  call.residual = residual;
  call.y = y;
  return nf::run(call);
}

NF_EXPORT const char* nf_matmul_quantize(const nf_threads* threads, const nf_weight* w, const int8_t* q, const float* row_scale,
                                         int64_t row_stride, int64_t m, int32_t epilogue, int32_t out_bits, int8_t* out_q,
                                         float* out_scale) {
  if (const char* wrong = nf::check_product(w, m, epilogue)) return wrong;
  if (out_bits < 2 || out_bits > 8) return "nf_matmul_quantize: out_bits must be 2..8";
  if (m == 0) return nullptr;
  if (!q || !row_scale || !out_q || !out_scale) return "nf_matmul_quantize: q, row_scale, out_q or out_scale is null";
  if (row_stride != 0 && row_stride != 1) return "nf_matmul_quantize: row_stride must be 0 or 1";
  nf::Call call{};
  call.threads = threads;
  call.weight = w;
  call.q = q;
  call.row_scale = row_scale;
  call.row_stride = row_stride;
  call.m = m;
  call.epilogue = epilogue;
  call.out_q = out_q;
  call.out_bits = out_bits;
  call.out_scale = out_scale;
  return nf::run(call);
}

NF_EXPORT const char* nf_linear(const nf_threads* threads, const nf_weight* w, const float* x, int64_t m, int32_t activation_bits,
                                float static_scale, int32_t epilogue, const float* residual, float* y) {
  if (const char* wrong = nf::check_product(w, m, epilogue)) return wrong;
  if (activation_bits < 2 || activation_bits > 8) return "nf_linear: activation_bits must be 2..8";
  if (m == 0) return nullptr;
  if (!x || !y) return "nf_linear: x or y is null";
  nf::Call call{};
  call.threads = threads;
  call.weight = w;
  call.x = x;
  call.activation_bits = activation_bits;
  call.static_scale = static_scale;
  call.m = m;
  call.epilogue = epilogue;
  call.residual = residual;
  call.y = y;
  return nf::run(call);
}

NF_EXPORT const char* nf_matmul_i32(const nf_threads* threads, const nf_weight* w, const int8_t* q, int64_t m, int32_t* acc) {
  if (const char* wrong = nf::check_product(w, m, NF_NONE)) return wrong;
  if (m == 0) return nullptr;
  if (!q || !acc) return "nf_matmul_i32: q or acc is null";
  nf::Call call{};
  call.threads = threads;
  call.weight = w;
  call.q = q;
  call.m = m;
  call.sums = acc;
  return nf::run(call);
}
