// What this room asks of an instruction set, and the geometry of one call.
#pragma once
#include "normfuse.h"

namespace nf {

// Output pixel (oy, ox), tap (ky, kx) reads padded pixel (oy · sy + ky · dy, ox · sx + kx · dx); padded pixel (0, 0)
// lies (pad_top, pad_left) before the image. Rows and columns of the image that nothing reads are not kept.
struct ConvShape {
  int64_t batch, c, h, w, kh, kw, sy, sx, dy, dx, pad_top, pad_left, groups;
  int64_t channels, outputs;  // of a group
  int64_t taps, oh, ow;
  int64_t hp, wp;  // padded pixels that are read
};

// How a float becomes a code: clamp(rne(x · factor)), or x / factor if `divide`. `factor` 0: all codes are 0.
struct ConvCodes {
  float factor, limit;
  bool divide;
};

// Some output rows of one input plane, for all outputs that read it.
struct Depthwise {
  const ConvShape* shape;
  const float* x;  // [h][w]
  ConvCodes codes;
  int64_t first, last;   // output rows
  const float* weights;  // [outputs][taps], integers
  const float* scale;    // [outputs], of the weights
  const float* bias;     // [outputs] or nullptr
  float image_scale;
  int32_t epilogue;
  float* y;        // [outputs][oh][ow]
  float* scratch;  // depthwise_scratch(...) floats
};

constexpr int64_t kConvSlack = 16;  // floats (or bytes) that whole vectors may read past a row
constexpr int64_t kDepthwiseTaps = 128;

// Columns of a row of the scratch: those of one phase of the stride.
inline int64_t depthwise_pitch(const ConvShape& s) { return (s.wp + s.sx - 1) / s.sx + kConvSlack; }
inline int64_t depthwise_scratch(const ConvShape& s, int64_t rows) {
  return ((rows - 1) * s.sy + (s.kh - 1) * s.dy + 1) * s.sx * depthwise_pitch(s) + s.w + kConvSlack;
}

struct ConvKernels {
  int32_t (*highest)(const float* x, int64_t count);  // bits of the largest |x|
  void (*codes)(const float* x, int64_t count, ConvCodes codes, int8_t* q);
  void (*depthwise)(const Depthwise&);
};

// One call, checked.
struct ConvCall {
  const nf_threads* threads;
  ConvShape shape;
  const nf_weight* weights;
  const float* x;
  int32_t activation_bits;
  float static_scale;
  int32_t epilogue;
  float* y;
};

// Scale and codes of each image of a call: one scale an image if static_scale <= 0.
struct ConvImageCodes {
  ConvCodes codes;
  float scale;
};
void conv_image_codes(const ConvCall&, int64_t first, int64_t count, ConvImageCodes* out);

bool conv_is_depthwise(const ConvCall&);  // and exact in float32
const char* conv_depthwise(const ConvCall&);
const char* conv_products(const ConvCall&);  // everything else

}  // namespace nf
