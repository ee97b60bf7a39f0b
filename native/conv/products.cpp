// Convolution as products: the images become int8 with channels running fastest (conv/image.h), a tile of output pixels
// becomes rows of (exponent, tap, channel) in the order of the packed weights, and the panels of 16 outputs
// (linear/panel.h) multiply it. A kernel of one tap needs no rows: its tile is the image itself.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "conv/conv.h"
#include "conv/image.h"
#include "conv/transpose.h"
#include "isa/isa.h"
#include "linear/panel.h"
#include "parallel.h"

namespace nf {
namespace {

constexpr int64_t kTileBytes = 384 << 10;  // codes of a tile: second-level cache
constexpr int64_t kTileRows = 192;
constexpr int64_t kImagesBytes = 1 << 20;  // codes of the images that are worked on together

struct TileMemory;
struct ImageMemory;
struct ImageScales;

// How one group's rows are made and multiplied.
struct GroupPlan {
  Layout layout;
  bool regular;  // the exponent of a channel is the same for all taps, and the order is the stable one
  ConvRecord record;
  std::vector<int32_t> channels;  // of the record
};

// Channels sorted by the exponent that the first tap gives them, and where each exponent starts.
std::vector<int32_t> sort_channels(const ConvShape& s, const nf_weight& w, int32_t* starts) {
  std::vector<int32_t> exponent(static_cast<size_t>(s.channels), 0);
  if (w.order) {
    int64_t position = 0;
    for (int32_t g = 0; g < w.groups; ++g)
      for (int32_t i = 0; i < w.sizes[g]; ++i, ++position)
        if (w.order[position] < s.channels) exponent[static_cast<size_t>(w.order[position])] = g;
  }
  std::vector<int32_t> sorted;
  for (int32_t g = 0; g < w.groups; ++g) {
    for (int32_t c = 0; c < s.channels; ++c)
      if (exponent[static_cast<size_t>(c)] == g) sorted.push_back(c);
    starts[g + 1] = static_cast<int32_t>(sorted.size());
  }
  return sorted;
}

// Whether the weight's order is the one that follows from these channels for every tap.
bool is_regular(const ConvShape& s, const nf_weight& w, const std::vector<int32_t>& sorted, const int32_t* starts) {
  int64_t position = 0;
  for (int32_t g = 0; g < w.groups; ++g) {
    if (w.sizes[g] != (starts[g + 1] - starts[g]) * s.taps) return false;
    for (int64_t t = 0; t < s.taps && w.order; ++t)
      for (int32_t i = starts[g]; i < starts[g + 1]; ++i, ++position)
        if (w.order[position] != t * s.channels + sorted[static_cast<size_t>(i)]) return false;
  }
  return true;
}

GroupPlan plan_of(const ConvShape& s, const nf_weight& w, bool direct) {
  int32_t starts[kMaxGroups + 1] = {0};
  std::vector<int32_t> sorted = sort_channels(s, w, starts);
  GroupPlan p{Layout(w), is_regular(s, w, sorted, starts), {}, {}};
  if (!p.regular) {
    for (int32_t c = 0; c < s.channels; ++c) sorted[static_cast<size_t>(c)] = c;
    starts[1] = static_cast<int32_t>(s.channels);
  }
  const int32_t parts = p.regular ? w.groups : 1;
  for (int32_t g = 0; g < parts; ++g) {
    const int64_t size = starts[g + 1] - starts[g];
    if (size == 0) continue;
    p.record.parts[p.record.part_count++] = {static_cast<int64_t>(p.channels.size()), size};
    p.channels.insert(p.channels.end(), sorted.begin() + starts[g], sorted.begin() + starts[g + 1]);
    while (direct && p.regular && p.channels.size() % 4 != 0) p.channels.push_back(-1);
  }
  p.record.size = static_cast<int64_t>(p.channels.size());
  return p;
}

// 16 bytes at a time; up to 15 more are read and written, which later copies and the slack of both buffers bear.
inline int8_t* copy(int8_t* to, const int8_t* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) std::memcpy(to + i, from + i, 16);
  return to + n;
}

struct Products {
  const ConvCall& call;
  const ConvShape& s;
  const LinearKernels& kernels;
  const bool direct;     // a tap, and rows are the image itself
  const int64_t pixels;  // of an output image
  std::vector<GroupPlan> plans;
  std::vector<ConvRecord> records;
  int64_t widest;                // bytes of a row of any group
  int64_t image_bytes;           // of all groups
  int64_t images;                // that are worked on together
  int8_t* codes;                 // [group][image][hp][wp][record]
  std::vector<int64_t> offsets;  // of the groups in `codes`
  ConvImageCodes* scales;

  explicit Products(const ConvCall& c)
      : call(c),
        s(c.shape),
        kernels(active_kernels().linear),
        direct(s.taps == 1 && s.sy == 1 && s.sx == 1 && s.pad_top == 0 && s.pad_left == 0 && s.hp == s.h &&
               s.wp == s.w),
        pixels(s.oh * s.ow) {}

  // The rows of output pixels first.. of a group: pixels run on from image to image.
  void fill_rows(const GroupPlan& p, const int8_t* image, const nf_weight& w, int64_t first, int64_t rows, int8_t* to,
                 int8_t* spare) const {
    const int64_t width = p.layout.width(), record = p.record.size, line = s.wp * record, image_size = s.hp * line;
    const bool run = p.record.part_count == 1 && s.dx == 1;  // the taps of a row lie side by side
    int64_t pixel = first % pixels, oy = pixel / s.ow, ox = pixel % s.ow;
    const int8_t* base = image + first / pixels * image_size;
    for (int64_t r = 0; r < rows; ++r, to += width) {
      const int8_t* from = base + oy * s.sy * line + ox * s.sx * record;
      int8_t* at = p.regular ? to : spare;
      if (run) {
        for (int64_t ky = 0; ky < s.kh; ++ky) at = copy(at, from + ky * s.dy * line, s.kw * record);
      } else {
        for (int i = 0; i < p.record.part_count; ++i) {
          const ConvRecord::Part& part = p.record.parts[i];
          int8_t* begin = at;
          for (int64_t ky = 0; ky < s.kh; ++ky)
            for (int64_t kx = 0; kx < s.kw; ++kx)
              at = copy(at, from + ky * s.dy * line + kx * s.dx * record + part.offset, part.size);
          while ((at - begin) % 4 != 0) *at++ = 0;
        }
      }
      if (p.regular)
        while (at - to < width) *at++ = 0;
      else gather_row(w, spare, to);
      if (++ox == s.ow) {
        ox = 0;
        if (++oy == s.oh) {
          oy = 0;
          base += image_size;
        }
      }
    }
  }

  // Columns of a panel, a pixel a row, to planes of pixels.
  void scatter(const float* tile, int64_t group, int64_t column, int columns, int64_t image0, int64_t first,
               int64_t rows) const {
    while (rows > 0) {
      const int64_t image = first / pixels, pixel = first % pixels, n = std::min(rows, pixels - pixel);
      float* y = call.y + (((image0 + image) * s.groups + group) * s.outputs + column) * pixels + pixel;
      transpose_columns(tile, kPanel, n, columns, y, pixels);
      tile += n * kPanel;
      first += n;
      rows -= n;
    }
  }

  struct Tile {
    int8_t *codes, *spare;
    uint8_t* operands;
    int32_t *sums, *corrections;
    float *scales, *y;
  };

  static int64_t tile_bytes(int64_t rows, int64_t widest) {
    return round_up(rows * widest + 64, 64) + round_up(widest + 64, 64) + kChunkBytes + rows * (kPanel * 8 + 8) + 64;
  }

  Tile tile_of(int8_t* memory, int64_t rows) const {
    Tile t;
    t.operands = reinterpret_cast<uint8_t*>(memory);
    t.sums = reinterpret_cast<int32_t*>(memory + kChunkBytes);
    t.y = reinterpret_cast<float*>(t.sums + rows * kPanel);
    t.scales = t.y + rows * kPanel;
    t.corrections = reinterpret_cast<int32_t*>(t.scales + rows);
    t.codes = memory + round_up(reinterpret_cast<int8_t*>(t.corrections + rows) - memory, 64);
    t.spare = t.codes + round_up(rows * widest + 64, 64);
    return t;
  }

  void task(const Tile& t, int64_t group, int64_t image0, int64_t first, int64_t rows, int64_t panel,
            int64_t last) const {
    const GroupPlan& p = plans[static_cast<size_t>(group)];
    const nf_weight& w = call.weights[group];
    const int8_t* image = codes + offsets[static_cast<size_t>(group)];
    const int8_t* a = t.codes;
    if (direct && p.regular) a = image + first * p.record.size;
    else fill_rows(p, image, w, first, rows, t.codes, t.spare);
    const bool corrected = kernels.is_unsigned(w.bits);
    const int64_t width = p.layout.width();
    for (int64_t r = 0; r < rows; ++r) {
      if (corrected) t.corrections[r] = correction_of(kernels, p.layout, w.bits, a + r * width);
      t.scales[r] = scales[(first + r) / pixels].scale;
    }
    for (; panel < last; ++panel) {
      const int64_t column = panel * kPanel;
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, s.outputs - column));
      multiply_panel(kernels, w, p.layout, panel, {a, width, rows, false, nullptr, 0}, t.operands, t.sums);
      kernels.finish({t.sums, corrected ? t.corrections : nullptr, rows, columns, t.scales, 1, w.scale + column,
                      w.bias ? w.bias + column : nullptr, nullptr, t.y, kPanel, call.epilogue});
      scatter(t.y, group, column, columns, image0, first, rows);
    }
  }

  // How the groups are laid out, and memory for the images that are worked on together.
  bool plan() {
    widest = 0;
    image_bytes = 0;
    for (int64_t g = 0; g < s.groups; ++g) {
      plans.push_back(plan_of(s, call.weights[g], direct));
      widest = std::max(widest, plans.back().layout.width());
      image_bytes += s.hp * s.wp * plans.back().record.size;
    }
    images = std::min(s.batch, std::max<int64_t>(1, kImagesBytes / image_bytes));
    int64_t total = 0;
    for (GroupPlan& p : plans) {
      p.record.channels = p.channels.data();
      records.push_back(p.record);
      offsets.push_back(total);
      total += round_up(images * s.hp * s.wp * p.record.size, 64);
    }
    codes = thread_scratch<ImageMemory>().of<int8_t>(total + 64);
    scales = thread_scratch<ImageScales>().of<ConvImageCodes>(images);
    return codes && scales;
  }

  // Tiles of pixels of the images from image0 on by groups by parts of the panels.
  bool multiply(int64_t image0, int64_t count) const {
    const int threads = thread_count(call.threads);
    const int64_t panels = ceil_div(s.outputs, kPanel);
    const int64_t all = count * pixels, most = std::min(kTileRows, std::max<int64_t>(24, kTileBytes / widest));
    int64_t tiles = ceil_div(all, most);
    // Rows by 6 in the kernels, pixels by 4 where they are written.
    const int64_t rows = round_up(ceil_div(all, tiles), 12);
    tiles = ceil_div(all, rows);
    const int64_t parts = threads == 1 ? 1 : std::min(panels, ceil_div(4 * threads, tiles * s.groups));
    std::atomic<bool> full{false};
    parallel(call.threads, tiles * s.groups * parts, [&](int64_t i) {
      int8_t* memory = thread_scratch<TileMemory>().of<int8_t>(tile_bytes(rows, widest));
      if (!memory) {
        full = true;
        return;
      }
      const int64_t tile = i % tiles, group = i / tiles % s.groups, part = i / tiles / s.groups;
      task(tile_of(memory, rows), group, image0, tile * rows, std::min(rows, all - tile * rows), panels * part / parts,
           panels * (part + 1) / parts);
    });
    return !full;
  }

  const char* run() {
    if (!plan()) return kNoMemory;
    bool starved = false;
    for (int64_t image0 = 0; image0 < s.batch; image0 += images) {
      const int64_t count = std::min(images, s.batch - image0);
      conv_image_codes(call, image0, count, scales);
      if (const char* wrong = conv_fill_images(call, records.data(), offsets.data(), image0, count, scales, codes))
        return wrong;
      starved = !multiply(image0, count) || starved;
    }
    return starved ? kNoMemory : nullptr;
  }
};

}  // namespace

const char* conv_products(const ConvCall& call) {
  try {
    return Products(call).run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace nf
