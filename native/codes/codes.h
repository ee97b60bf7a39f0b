// What this room asks of an instruction set: convolutions that read and write u8 codes, channels running fastest, and
// what stands between them. Shared by the files that plan a call and those that compute it.
#pragma once
#include "normfuse.h"

namespace nf {

constexpr int64_t kCodesPanel = 16;  // outputs of a panel
constexpr int64_t kCodesBlock = 64;  // channels of a depthwise block
constexpr int64_t kCodesSlack = 64;  // bytes that vectors may read behind a frame

// How many products of an output fit into 16 bits, whatever the codes are: not two, two, or those of spans of quads
// that are at least two long on average.
enum CodesNarrow : uint8_t { kCodesWide = 0, kCodesPairs = 1, kCodesSpans = 2 };

// Some pixels by some panels of outputs. Output pixel i reads 4 · quads bytes at pixels[i] + taps[t], for every t.
struct CodesTile {
  const uint8_t* const* pixels;
  int64_t count;
  const int64_t* taps;
  int64_t tap_count, quads;
  const int8_t* weights;  // [panels][tap][quad][16][4]
  const uint8_t* narrow;  // [panels]: CodesNarrow
  const uint8_t* spans;   // [panels][tap_count · quads]: lengths of spans of quads, those of a tap together
  int64_t panels, outputs;
  const int32_t* start;  // [panels · 16], as scale and bias
  const float *scale, *bias;
  const uint8_t* residual;  // of the first pixel and output, as y; or nullptr
  float residual_scale;
  uint8_t* y;
  int64_t stride;  // bytes between output pixels
  uint8_t low, high;
  const uint8_t* table;  // or nullptr
  int32_t function;      // of nf_codes_function
  float gain, offset;
};

// Output rows first..last of one image, channels block by block of kCodesBlock.
struct CodesDepthwise {
  const nf_codes_conv* conv;
  int64_t ow;
  const uint8_t* x;  // the image
  uint8_t* y;
  int64_t first, last;
  const int8_t* weights;         // [tap][c]
  const int8_t* columns;         // [block][row group][kw][4][lane][4 channels][4 rows]
  const uint8_t* narrow;         // [blocks]: rows 0 and 1, and 2 and 3, leave no 16 bits
  const int32_t* start;          // [c], as scale and bias
  const float *scale, *bias;     // the same by block in the order of `columns`: see codes_lane
  const int32_t* start_columns;  // [blocks · 64]
  const float *scale_columns, *bias_columns;
  const uint8_t* border;  // w · c zero points
  const uint8_t* table;
};

// Channel of a block at lane position i of `columns`: vectors of 16 lanes of 32 bits, four of them.
constexpr int64_t codes_lane(int64_t i) { return i % 16 / 4 * 16 + i / 16 * 4 + i % 4; }

// A pool's, or a depthwise convolution's, window that lies inside of the image, for one output pixel.
struct CodesPool {
  const nf_codes_conv* conv;
  int64_t ow;
  const uint8_t* x;
  uint8_t* y;
  int64_t first, last;  // output rows
};

struct CodesKernels {
  void (*tile)(const CodesTile&);
  void (*depthwise)(const CodesDepthwise&);
  void (*max_pool)(const CodesPool&);
  // y = clamp(rne(x / scale) + zero); whole vectors are written, up to kCodesSlack bytes beyond count
  void (*quantize)(const float* x, int64_t count, float scale, int32_t zero, int32_t top, uint8_t* y);
  // y = (x - zero) · scale
  void (*dequantize)(const uint8_t* x, int64_t count, float scale, int32_t zero, float* y);
  void (*add)(const uint8_t* a, const uint8_t* b, int64_t count, float a_scale, float b_scale, float bias, int32_t low,
              int32_t high, uint8_t* y);
  // sums[c] += over pixels
  void (*sums)(const uint8_t* x, int64_t c, int64_t pixels, int32_t* sums);
  void (*gate)(const uint8_t* x, const float* factor, int64_t c, int64_t pixels, int32_t zero, float bias, int32_t low,
               int32_t high, uint8_t* y);
};

}  // namespace nf
