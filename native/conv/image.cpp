// Images to records of codes: rows are quantized as they lie, then turned by blocks of channels and pixels.
#include "conv/image.h"

#include <algorithm>
#include <atomic>

#include "conv/transpose.h"
#include "isa/isa.h"
#include "linear/linear.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kBandBytes = 64 << 10;  // codes of the rows that are turned together

struct BandMemory;

}  // namespace

const char* conv_fill_images(const ConvCall& call, const ConvRecord* records, const int64_t* offsets, int64_t first,
                             int64_t count, const ConvImageCodes* scales, int8_t* codes) {
  const ConvShape& s = call.shape;
  const ConvKernels& kernels = active_kernels().conv;
  const int64_t band = std::min(s.hp, std::max<int64_t>(1, kBandBytes / (s.c * s.w))), bands = ceil_div(s.hp, band);
  const int64_t columns = std::max<int64_t>(0, std::min(s.w, s.wp - s.pad_left));
  const bool joined = columns == s.w && s.wp == s.w;  // no border at the sides: rows of pixels run on
  std::atomic<bool> full{false};
  parallel(call.threads, count * bands, [&](int64_t task) {
    const int64_t image = task / bands, top = task % bands * band, bottom = std::min(s.hp, top + band);
    // Rows of the image in this band.
    const int64_t y0 = std::max<int64_t>(0, top - s.pad_top), y1 = std::max(y0, std::min(s.h, bottom - s.pad_top));
    const int64_t plane = (y1 - y0) * s.w, pitch = plane + 16;
    int8_t* rows = thread_scratch<BandMemory>().of<int8_t>(s.c * pitch + pitch);
    if (!rows) {
      full = true;
      return;
    }
    int8_t* zeros = rows + s.c * pitch;
    std::memset(zeros, 0, static_cast<size_t>(pitch));
    const float* x = call.x + (first + image) * s.c * s.h * s.w + y0 * s.w;
    const bool whole = plane == s.h * s.w;
    if (whole) kernels.codes(x, s.c * plane, scales[image].codes, rows);
    for (int64_t c = 0; c < s.c && !whole; ++c)
      kernels.codes(x + c * s.h * s.w, plane, scales[image].codes, rows + c * pitch);
    const int64_t step = whole ? plane : pitch;
    for (int64_t g = 0; g < s.groups; ++g) {
      const ConvRecord& record = records[g];
      int8_t* to = codes + offsets[g] + (image * s.hp + top) * s.wp * record.size;
      if (!joined || y1 - y0 != bottom - top)
        std::memset(to, 0, static_cast<size_t>((bottom - top) * s.wp * record.size));
      if (columns == 0) continue;
      to += (y0 + s.pad_top - top) * s.wp * record.size + s.pad_left * record.size;
      const int8_t* from = rows + g * s.channels * step;
      for (int64_t y = 0; y < (joined ? y1 > y0 : y1 - y0); ++y, from += s.w, to += s.wp * record.size)
        transpose_bytes(from, zeros, step, record.channels, record.size, joined ? plane : columns, to);
    }
  });
  return full ? kNoMemory : nullptr;
}

}  // namespace nf
