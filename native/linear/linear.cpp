// Products of int8 rows with packed weights: arguments, blocking and threads. The arithmetic is in the kernels of
// linear.h.
//
// A band of rows is prepared (quantized, gathered in the order of the exponents, summed), then multiplied by tasks of
// some rows and some panels, then, if asked, quantized again. A chunk of a panel is unpacked to bytes once for all rows
// of a task and stays in the first-level cache. Integer sums are exact and every output is made by one task: the result
// does not depend on the threads.
#include "linear/linear.h"

#include <algorithm>
#include <atomic>

#include "isa/isa.h"
#include "linear/panel.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kTaskBytes = 384 << 10;  // codes of the rows of a task: second-level cache
constexpr int64_t kTaskRows = 256;         // and their sums: 64 bytes a row
constexpr int64_t kTileRows = 12;          // a multiple of every kernel's tile
constexpr int64_t kBandBytes = 2 << 20;    // codes of a band of rows
constexpr int64_t kFloatBytes = 1 << 20;   // float results of a band that are quantized again
constexpr int64_t kAtOnce = 16384;         // numbers of the rows that are quantized by one task

struct TaskMemory;
struct CallMemory;

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
  int8_t* out_q = nullptr;  // instead of y
  int32_t out_bits = 8;
  float* out_scale = nullptr;
  int32_t* sums = nullptr;  // instead of y
};

struct Product {
  const Call& call;
  const nf_weight& w;
  const LinearKernels& kernels;
  const Layout layout;
  const Way way;
  const bool gather;     // rows cannot be read where they lie
  const bool corrected;  // sums are too large by a correction
  const bool pairs;      // rows are read as int16
  const int64_t stride;  // bytes of a row as it is read
  const int64_t spans;   // of a row, if its sums have starts
  const int64_t panels;
  const int64_t band_rows;

  // Of the rows of a band; what is not needed is empty.
  int8_t* quantized;
  int8_t* gathered;
  int16_t* widened;
  float* scales;
  int32_t* corrections;
  int32_t* starts;
  float* floats;

  struct Band {
    int64_t first, rows;
    const int8_t* codes;
    const float* row_scale;
    int64_t row_stride;
    float* y;  // [rows][n]
  };

  explicit Product(const Call& c)
      : call(c),
        w(*c.weight),
        kernels(active_kernels().linear),
        layout(w),
        way(way_of(kernels, w, c.m)),
        gather(w.order != nullptr || w.k % 4 != 0),
        corrected(way == Way::stretches ? kernels.is_unsigned(w.bits) : way == Way::folded && kernels.is_unsigned(8)),
        pairs(w.bits == 8 && kernels.multiply_pairs && c.m > kernels.direct_rows),
        stride(pairs ? 2 * layout.width() : layout.width()),
        spans(way == Way::blocks || way == Way::direct_blocks ? ceil_div(layout.quads, kSpan) : 0),
        panels(ceil_div(w.n, kPanel)),
        band_rows(rows_of_bands()) {}

  int64_t rows_of_bands() const {
    int64_t most = std::max<int64_t>(1, kBandBytes / stride);
    if (call.out_q) most = std::max<int64_t>(1, std::min(most, kFloatBytes / (w.n * 4)));
    return ceil_div(call.m, ceil_div(call.m, most));
  }

  const char* run() {
    if (!reserve()) return kNoMemory;
    bool starved = false;
    for (int64_t first = 0; first < call.m; first += band_rows) {
      const Band band = band_at(first);
      prepare(band);
      starved = !multiply(band) || starved;
      if (call.out_q) quantize_again(band);
    }
    return starved ? kNoMemory : nullptr;
  }

  // One piece of memory: [codes][gathered codes][codes as int16][scales][corrections][starts][floats]
  bool reserve() {
    const int64_t code_bytes = call.x ? round_up(band_rows * w.k, 64) : 0;
    const int64_t gathered_bytes = gather ? round_up(band_rows * layout.width(), 64) : 0;
    const int64_t wide_bytes = pairs ? round_up(band_rows * stride, 64) : 0, row_bytes = round_up(band_rows * 4, 64);
    const int64_t start_bytes = round_up(band_rows * spans * 4, 64);
    const int64_t float_bytes = call.out_q ? band_rows * w.n * 4 : 0;
    quantized = thread_scratch<CallMemory>().of<int8_t>(code_bytes + gathered_bytes + wide_bytes + 2 * row_bytes +
                                                        start_bytes + float_bytes);
    if (!quantized) return false;
    gathered = quantized + code_bytes;
    widened = reinterpret_cast<int16_t*>(gathered + gathered_bytes);
    int8_t* after = gathered + gathered_bytes + wide_bytes;
    scales = reinterpret_cast<float*>(after);
    corrections = reinterpret_cast<int32_t*>(after + row_bytes);
    starts = reinterpret_cast<int32_t*>(after + 2 * row_bytes);
    floats = reinterpret_cast<float*>(after + 2 * row_bytes + start_bytes);
    return true;
  }

  Band band_at(int64_t first) const {
    Band band{};
    band.first = first;
    band.rows = std::min(band_rows, call.m - first);
    if (pairs) band.codes = reinterpret_cast<const int8_t*>(widened);
    else if (gather) band.codes = gathered;
    else band.codes = call.x ? quantized : call.q + first * w.k;
    if (call.x) {
      band.row_scale = call.static_scale > 0.f ? &call.static_scale : scales;
      band.row_stride = call.static_scale > 0.f ? 0 : 1;
    } else if (call.row_scale) {
      band.row_scale = call.row_scale + first * call.row_stride;
      band.row_stride = call.row_stride;
    }
    band.y = call.out_q ? floats : call.y ? call.y + first * w.n : nullptr;
    return band;
  }

  // Codes, scales and corrections of the band's rows, a few rows a task.
  void prepare(const Band& band) const {
    const int64_t step = std::max<int64_t>(1, kAtOnce / w.k), width = layout.width();
    parallel(call.threads, ceil_div(band.rows, step), [&](int64_t t) {
      for (int64_t r = t * step; r < std::min(band.rows, (t + 1) * step); ++r) {
        const int8_t* codes = call.x ? quantize(band.first + r, r) : call.q + (band.first + r) * w.k;
        if (gather) {
          gather_row(w, codes, gathered + r * width);
          codes = gathered + r * width;
        }
        if (pairs)
          for (int64_t i = 0; i < width; ++i) widened[r * width + i] = codes[i];
        if (spans) span_starts(kernels, w.bits, layout.quads, codes, starts + r * spans);
        if (corrected) corrections[r] = correction_of(kernels, layout, way == Way::folded ? 8 : w.bits, codes);
      }
    });
  }

  const int8_t* quantize(int64_t row, int64_t r) const {
    const float* x = call.x + row * w.k;
    int8_t* q = quantized + r * w.k;
    if (call.static_scale > 0.f) kernels.quantize_static(x, w.k, call.static_scale, call.activation_bits, q);
    else kernels.quantize_row(x, w.k, call.activation_bits, q, scales + r);
    return q;
  }

  bool multiply(const Band& band) const {
    // Panels are shared out first: each is then unpacked once.
    const int threads = thread_count(call.threads);
    const int64_t rows_at_once = std::min(kTaskRows, std::max<int64_t>(24, kTaskBytes / stride));
    int64_t row_tasks = ceil_div(band.rows, rows_at_once);
    const int64_t panel_tasks = threads == 1 ? 1 : std::min<int64_t>(panels, 4 * threads);
    if (threads > 1 && row_tasks * panel_tasks < 2 * threads)
      row_tasks = std::min(ceil_div(band.rows, kTileRows), ceil_div(2 * threads, panel_tasks));
    const int64_t task_rows = round_up(ceil_div(band.rows, row_tasks), kTileRows);
    row_tasks = ceil_div(band.rows, task_rows);
    std::atomic<bool> failed{false};
    parallel(call.threads, row_tasks * panel_tasks, [&](int64_t t) {
      const int64_t row = t % row_tasks * task_rows, rows = std::min(task_rows, band.rows - row), part = t / row_tasks;
      int32_t* sums = thread_scratch<TaskMemory>().of<int32_t>(kChunkBytes / 4 + rows * kPanel);
      if (!sums) {
        failed.store(true, std::memory_order_relaxed);
        return;
      }
      uint8_t* operands = reinterpret_cast<uint8_t*>(sums + rows * kPanel);
      for (int64_t p = panels * part / panel_tasks; p < panels * (part + 1) / panel_tasks; ++p) {
        float* y = band.y ? band.y + row * w.n + p * kPanel : nullptr;
        multiply_panel(kernels, w, layout, p,
                       {band.codes + row * stride, stride, rows, pairs, y, w.n, way, starts + row * spans, spans},
                       operands, sums);
        if (call.sums) leave_sums(band.first + row, row, rows, p * kPanel, sums);
        else finish(band, row, rows, p * kPanel, sums);
      }
    });
    return !failed.load();
  }

  int columns_at(int64_t column) const { return static_cast<int>(std::min<int64_t>(kPanel, w.n - column)); }

  void leave_sums(int64_t to, int64_t row, int64_t rows, int64_t column, const int32_t* sums) const {
    const int columns = columns_at(column);
    for (int64_t m = 0; m < rows; ++m)
      for (int n = 0; n < columns; ++n)
        call.sums[(to + m) * w.n + column + n] = static_cast<int32_t>(
            static_cast<uint32_t>(sums[m * kPanel + n]) - static_cast<uint32_t>(corrected ? corrections[row + m] : 0));
  }

  void finish(const Band& band, int64_t row, int64_t rows, int64_t column, const int32_t* sums) const {
    const float* residual = call.residual ? call.residual + (band.first + row) * w.n + column : nullptr;
    kernels.finish({sums, corrected ? corrections + row : nullptr, rows, columns_at(column),
                    band.row_scale + row * band.row_stride, band.row_stride, w.scale + column,
                    w.bias ? w.bias + column : nullptr, residual, band.y + row * w.n + column, w.n, call.epilogue});
  }

  void quantize_again(const Band& band) const {
    const int64_t step = std::max<int64_t>(1, kAtOnce / w.n);
    parallel(call.threads, ceil_div(band.rows, step), [&](int64_t t) {
      for (int64_t r = t * step; r < std::min(band.rows, (t + 1) * step); ++r)
        kernels.quantize_row(floats + r * w.n, w.n, call.out_bits, call.out_q + (band.first + r) * w.n,
                             call.out_scale + band.first + r);
    });
  }
};

const char* run(const Call& call) { return Product(call).run(); }

const char* check_product(const nf_weight* w, int64_t m, int32_t epilogue) {
  if (const char* wrong = check_weight(w)) return wrong;
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

NF_EXPORT const char* nf_matmul(const nf_threads* threads, const nf_weight* w, const int8_t* q, const float* row_scale,
                                int64_t row_stride, int64_t m, int32_t epilogue, const float* residual, float* y) {
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

NF_EXPORT const char* nf_matmul_quantize(const nf_threads* threads, const nf_weight* w, const int8_t* q,
                                         const float* row_scale, int64_t row_stride, int64_t m, int32_t epilogue,
                                         int32_t out_bits, int8_t* out_q, float* out_scale) {
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

NF_EXPORT const char* nf_linear(const nf_threads* threads, const nf_weight* w, const float* x, int64_t m,
                                int32_t activation_bits, float static_scale, int32_t epilogue, const float* residual,
                                float* y) {
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

NF_EXPORT const char* nf_matmul_i32(const nf_threads* threads, const nf_weight* w, const int8_t* q, int64_t m,
                                    int32_t* acc) {
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
