// nf_codes_conv2d: output rows by panels of outputs are tasks; each copies the rows that it reads into a frame with the
// border around them, unless they lie as they are read.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "codes/codes.h"
#include "codes/plan.h"
#include "isa/isa.h"
#include "linear/linear.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kFrameBytes = 128 << 10;  // of what a task reads: within a second-level cache beside the weights
constexpr int64_t kFewPixels = 48;          // of a task, if there are more: tiles have up to 12

struct FrameMemory;
struct PixelMemory;
struct TapMemory;
struct BorderMemory;

struct Convolution {
  const nf_threads* threads;
  const nf_codes_conv& v;
  const CodesPlan& p;
  const uint8_t *packed, *x, *residual, *table;
  uint8_t* y;
  const CodesKernels& kernels = active_kernels().codes;

  // Rows and columns of a frame for `rows` output rows.
  int64_t frame_rows(int64_t rows) const { return (rows - 1) * v.stride[0] + (v.kh - 1) * v.dilation[0] + 1; }
  int64_t frame_columns() const { return (p.ow - 1) * v.stride[1] + (v.kw - 1) * v.dilation[1] + 1; }

  // Rows first.. of the padded image, zero points around it.
  void fill(int64_t image, int64_t first, int64_t rows, uint8_t* frame) const {
    const int64_t line = frame_columns() * p.pitch;
    const int64_t columns = std::max<int64_t>(0, std::min(v.w, frame_columns() - v.pad_begin[1]));
    for (int64_t r = 0; r < rows; ++r, frame += line) {
      const int64_t iy = first + r - v.pad_begin[0];
      if (iy < 0 || iy >= v.h || !columns) {
        std::memset(frame, v.zero, static_cast<size_t>(line));
        continue;
      }
      uint8_t* to = frame + v.pad_begin[1] * p.pitch;
      const uint8_t* from = x + (image * v.h + iy) * v.w * v.c;
      std::memset(frame, v.zero, static_cast<size_t>(to - frame));
      if (p.pitch == v.c) std::memcpy(to, from, static_cast<size_t>(columns * v.c));
      else
        for (int64_t i = 0; i < columns; ++i) std::memcpy(to + i * p.pitch, from + i * v.c, static_cast<size_t>(v.c));
      to += columns * p.pitch;
      std::memset(to, v.zero, static_cast<size_t>(frame + line - to));
    }
  }

  void multiply(const uint8_t* const* pixels, int64_t count, const int64_t* taps, int64_t output_pixel, int64_t group,
                int64_t panel, int64_t last, const uint8_t** shifted) const {
    const int64_t at = group * p.panels + panel, output = group * p.outputs + panel * kCodesPanel;
    if (group) {
      for (int64_t i = 0; i < count; ++i) shifted[i] = pixels[i] + group * p.channels;
      pixels = shifted;
    }
    const int64_t to = output_pixel * v.outputs + output;
    kernels.tile({pixels,
                  count,
                  taps,
                  p.taps,
                  p.quads,
                  reinterpret_cast<const int8_t*>(packed + p.at_weights) + at * p.taps * p.quads * 64,
                  packed + p.at_narrow + at,
                  packed + p.at_spans + at * p.taps * p.quads,
                  last - panel,
                  std::min(p.outputs, last * kCodesPanel) - panel * kCodesPanel,
                  reinterpret_cast<const int32_t*>(packed + p.at_start) + at * kCodesPanel,
                  reinterpret_cast<const float*>(packed + p.at_scale) + at * kCodesPanel,
                  reinterpret_cast<const float*>(packed + p.at_bias) + at * kCodesPanel,
                  residual ? residual + to : nullptr,
                  v.residual_scale,
                  y + to,
                  v.outputs,
                  static_cast<uint8_t>(v.low),
                  static_cast<uint8_t>(v.high),
                  table,
                  v.function,
                  v.gain,
                  v.offset});
  }

  // Output rows first..last of an image (of a single row of pixels where they lie as they are read).
  bool task(int64_t image, int64_t first, int64_t last, int64_t width, int64_t panel, int64_t end) const {
    const int64_t count = (last - first) * width;
    const uint8_t** pixels = thread_scratch<PixelMemory>().of<const uint8_t*>(2 * count);
    int64_t* taps = thread_scratch<TapMemory>().of<int64_t>(p.taps);
    if (!pixels || !taps) return false;
    const uint8_t* base = x;
    taps[0] = 0;
    int64_t line = v.stride[0] * v.w * v.c, step = v.stride[1] * p.pitch;
    if (p.way != CodesPlan::kDirect) {
      const int64_t rows = frame_rows(last - first), bytes = rows * frame_columns() * p.pitch + kCodesSlack;
      uint8_t* frame = thread_scratch<FrameMemory>().of<uint8_t>(bytes);
      if (!frame) return false;
      fill(image, first * v.stride[0], rows, frame);
      base = frame;
      const int64_t row = frame_columns() * p.pitch;
      line = v.stride[0] * row;
      for (int64_t t = 0; t < p.taps; ++t)
        taps[t] = p.way == CodesPlan::kRows ? t * v.dilation[0] * row
                                            : t / v.kw * v.dilation[0] * row + t % v.kw * v.dilation[1] * p.pitch;
    } else {
      if (v.stride[0] == 1 && v.stride[1] == 1) line = v.c;  // pixel by pixel
      base += image * v.h * v.w * v.c + first * line;
    }
    const uint8_t** to = pixels;
    for (int64_t oy = 0; oy < last - first; ++oy)
      for (int64_t ox = 0; ox < width; ++ox) *to++ = base + oy * line + ox * step;
    const int64_t output_pixel = image * p.oh * p.ow + first * width;
    for (int64_t group = 0; group < v.groups; ++group)
      multiply(pixels, count, taps, output_pixel, group, panel, end, pixels + count);
    return true;
  }

  const char* products() const {
    // One tap of stride 1 makes no difference between rows, nor between images.
    const bool flat = p.way == CodesPlan::kDirect && v.stride[0] == 1 && v.stride[1] == 1;
    const int64_t images = flat ? 1 : v.batch, height = flat ? v.batch * p.oh * p.ow : p.oh, width = flat ? 1 : p.ow;
    const int64_t line = flat ? v.c : v.stride[0] * frame_columns() * p.pitch;  // bytes read for an output row
    const int64_t count = thread_count(threads);
    const int64_t most = std::max<int64_t>(1, kFrameBytes / line), least = ceil_div(kFewPixels, width);
    int64_t rows = std::max(std::min(most, ceil_div(height, ceil_div(2 * count, images))), std::min(least, height));
    if (count == 1) rows = std::min(height, std::max(most, least));
    const int64_t bands = ceil_div(height, rows);
    rows = ceil_div(height, bands);
    if (flat) rows = round_up(rows, 12);
    const int64_t tiles = ceil_div(height, rows), wanted = count == 1 ? 1 : ceil_div(2 * count, images * tiles);
    const int64_t units = ceil_div(p.panels, 4), parts = std::min(units, wanted);
    std::atomic<bool> full{false};
    parallel(threads, images * tiles * parts, [&](int64_t i) {
      const int64_t part = i % parts, tile = i / parts % tiles, image = i / parts / tiles;
      const int64_t panel = units * part / parts * 4, end = std::min(p.panels, units * (part + 1) / parts * 4);
      if (!task(image, tile * rows, std::min(height, (tile + 1) * rows), width, panel, end)) full = true;
    });
    return full ? kNoMemory : nullptr;
  }

  const char* depthwise() const {
    uint8_t* border = thread_scratch<BorderMemory>().of<uint8_t>(v.w * v.c + kCodesSlack);
    if (!border) return kNoMemory;
    std::memset(border, v.zero, static_cast<size_t>(v.w * v.c + kCodesSlack));
    const float* natural = reinterpret_cast<const float*>(packed + p.at_natural);
    const int64_t count = thread_count(threads);
    int64_t rows = count == 1 ? p.oh : ceil_div(p.oh, ceil_div(2 * count, v.batch));
    rows = std::min(p.oh, round_up(rows, 2));
    const int64_t bands = ceil_div(p.oh, rows);
    parallel(threads, v.batch * bands, [&](int64_t i) {
      const int64_t image = i / bands, first = i % bands * rows;
      kernels.depthwise(
          {&v, p.ow, x + image * v.h * v.w * v.c, y + image * p.oh * p.ow * v.c, first, std::min(p.oh, first + rows),
           reinterpret_cast<const int8_t*>(packed + p.at_natural + p.lanes * 12),
           reinterpret_cast<const int8_t*>(packed + p.at_weights), packed + p.at_narrow,
           reinterpret_cast<const int32_t*>(natural), natural + p.lanes, natural + 2 * p.lanes,
           reinterpret_cast<const int32_t*>(packed + p.at_start), reinterpret_cast<const float*>(packed + p.at_scale),
           reinterpret_cast<const float*>(packed + p.at_bias), border, table});
    });
    return nullptr;
  }
};

}  // namespace
}  // namespace nf

NF_EXPORT const char* nf_codes_conv2d(const nf_threads* threads, const nf_codes_conv* conv, const uint8_t* packed,
                                      const uint8_t* x, const uint8_t* residual, const uint8_t* table, uint8_t* y) {
  using namespace nf;
  if (const char* wrong = codes_check(conv, true)) return wrong;
  if (conv->batch == 0) return nullptr;
  if (!packed || !x || !y) return "codes: packed, x or y is missing";
  if (reinterpret_cast<uintptr_t>(packed) % 4) return "codes: packed must be aligned to 4 bytes";
  CodesPlan plan;
  plan.of(*conv);
  const bool depthwise = plan.way == CodesPlan::kDepthwise;
  if (depthwise && residual) return "codes: a depthwise convolution takes no residual";
  const Convolution convolution{threads, *conv, plan, packed, x, residual, table, y};
  return depthwise ? convolution.depthwise() : convolution.products();
}
