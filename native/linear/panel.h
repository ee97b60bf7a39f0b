// What every product of rows with packed weights is made of, whoever makes the rows: linear.cpp reads them,
// conv/products.cpp fills them from images.
#pragma once
#include "linear/linear.h"

namespace nf {

constexpr int kMaxGroups = 16;
constexpr int64_t kChunk = 256;                       // quads of a panel that are unpacked at once
constexpr int64_t kChunkBytes = kChunk * kQuadBytes;  // 16 KB: half a first-level cache

// Where the exponents of a weight lie in a row and in a panel.
struct Layout {
  int64_t quads = 0;  // real ones
  int64_t packed_quads = 0;
  Segment segments[kMaxGroups + 1];
  int segment_count = 0;

  explicit Layout(const nf_weight&);
  int64_t width() const { return quads * 4; }  // codes of a row
};

// How a weight is multiplied. `blocks`, `direct_blocks`: its multipliers multiply sums; `folded`: they multiply its
// codes, which are then those of 8 bits.
enum class Way { stretches, blocks, direct_blocks, folded };
Way way_of(const LinearKernels&, const nf_weight&, int64_t rows);

// Rows as the kernels read them.
struct Rows {
  const int8_t* codes;  // int16 if `pairs`
  int64_t stride;       // bytes
  int64_t count;
  bool pairs;
  float* y;  // where their outputs of the panel will be, to be in the cache by then; or nullptr
  int64_t y_stride;
  Way way = Way::stretches;
  const int32_t* starts = nullptr;  // `blocks`, `direct_blocks`: [rows][starts_stride], see `span_starts`
  int64_t starts_stride = 0;
};

const char* check_weight(const nf_weight*);

// A row in the order of the exponents, each padded to whole quads.
void gather_row(const nf_weight&, const int8_t* from, int8_t* to);

// 2^(bits-1) Σ_k A (1 << (E - e)): by how much unsigned operands make the sums of a row too large.
int32_t correction_of(const LinearKernels&, const Layout&, int bits, const int8_t* row);

// What the sums of a row's spans start from.
void span_starts(const LinearKernels&, int bits, int64_t quads, const int8_t* row, int32_t* starts);

// sums [rows][16] of a panel; `operands` holds kChunkBytes, aligned to 64.
void multiply_panel(const LinearKernels&, const nf_weight&, const Layout&, int64_t panel, const Rows&,
                    uint8_t* operands, int32_t* sums);

}  // namespace nf
