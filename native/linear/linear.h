// What the instruction sets' integer products share: the layout of the weights and the operations that linear.cpp
// blocks.
#pragma once
#include <type_traits>

#include "normfuse.h"

namespace nf {

constexpr int kPanel = 16;      // outputs of a panel
constexpr int kQuadBytes = 64;  // a quad of a panel, a byte a code

constexpr int unit_of(int bits) { return bits == 8 ? 1 : bits == 4 ? 2 : bits == 6 || bits == 2 ? 4 : 8; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A stretch of quads of one exponent inside a chunk; the sums of what came before are shifted first (Horner's rule).
struct Segment {
  int64_t begin, end;  // quads
  int shift;
};

// rows x 16 sums += rows of codes times quads of a panel, unpacked.
struct Stretch {
  const int8_t* a;   // the first row at the first quad of the stretch
  int64_t a_stride;  // bytes
  int64_t rows;
  const uint8_t* w;  // [quads][64]
  int64_t quads;
  int bits, shift;
  bool first;        // nothing is in the sums yet
  int32_t* sums;     // [rows][16], aligned to 64
  float* y;          // the outputs that follow if these are the last sums, to be in the cache by then; or nullptr
  int64_t y_stride;  // floats
};

// Few rows: the packed panel is read where it lies. Segments are those of all quads.
struct Direct {
  const int8_t* a;
  int64_t a_stride;
  int64_t rows;  // 1..kernels.direct_rows
  const uint8_t* panel;
  int64_t packed_quads;  // with the padding at the end
  const Segment* segments;
  int segment_count;
  int bits;
  int32_t* sums;
};

// The sums of rows and a panel whose blocks have multipliers, from the first quad on. A span of kSpan quads is added up
// by itself, times the multiplier of its block. What it starts from makes up for unsigned codes: see `start`.
constexpr int kSpan = 8;
struct Blocks {
  const int8_t* a;
  int64_t a_stride;
  int64_t rows;
  const int32_t* starts;  // [rows][spans]
  int64_t starts_stride;
  const uint8_t* w;           // multiply: [quads][64], a byte a code; direct: the packed panel
  int64_t packed_quads;       // of that
  const int8_t* multipliers;  // [blocks][16]
  int64_t quads, spans_a_block;
  int bits;
  bool first;     // nothing is in the sums yet
  int32_t* sums;  // [rows][16], aligned to 64

  int64_t spans() const { return (quads + kSpan - 1) / kSpan; }
  int64_t quads_of(int64_t span) const { return quads - span * kSpan < kSpan ? quads - span * kSpan : kSpan; }
  const int8_t* multipliers_of(int64_t span) const { return multipliers + span / spans_a_block * kPanel; }
};

struct BlockKernels {
  int direct_rows;  // up to so many rows go through `direct`
  void (*direct)(const Blocks&);
  void (*multiply)(const Blocks&);  // or nullptr: codes times multipliers are operands of 8 bits
  // Of the row's codes of a span, for codes that are too large by `half`.
  int32_t (*start)(const int8_t* a, int64_t count, int half);
};

// y[rows][columns] = act(float(sums - correction) * (row_scale * scale) + bias) + residual
struct Finish {
  const int32_t* sums;
  const int32_t* correction;  // [rows] or nullptr
  int64_t rows;
  int columns;  // 1..16
  const float* row_scale;
  int64_t row_stride;
  const float* scale;     // of the panel
  const float* bias;      // of the panel, or nullptr
  const float* residual;  // or nullptr; rows are y_stride apart
  float* y;
  int64_t y_stride;
  int32_t epilogue;
};

struct LinearKernels {
  // Operands are u = C + 2^(bits-1): the sums are too large by 2^(bits-1) Σ A << (E - e).
  bool (*is_unsigned)(int bits);
  int direct_rows;  // up to so many rows go through `direct`; 0: none
  void (*unpack)(int bits, bool is_unsigned, const uint8_t* panel, int64_t quads_in_all, int64_t first, int64_t count,
                 uint8_t* out);
  void (*multiply)(const Stretch&);
  void (*direct)(const Direct&);
  void (*finish)(const Finish&);
  int32_t (*row_sum)(const int8_t* a, int64_t count);
  void (*quantize_row)(const float* x, int64_t k, int bits, int8_t* q, float* scale);
  void (*quantize_static)(const float* x, int64_t count, float scale, int bits, int8_t* q);
  // 8 bits with rows and weights as int16, or nullptr: a quad is 128 bytes here, and rows are int16 behind the pointer
  // of Stretch.
  void (*unpack_pairs)(const uint8_t* panel, int64_t first, int64_t count, uint8_t* out);
  void (*multiply_pairs)(const Stretch&);
  // (operand - half) * multiplier of its output + offset: a byte each, in place.
  void (*fold)(const int8_t* multipliers, int half, int offset, int64_t quads, uint8_t* operands);
  BlockKernels blocks;
};

}  // namespace nf
