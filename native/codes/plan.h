// How a convolution of codes is cut, and where its packed weights lie.
#pragma once
#include "codes/codes.h"

namespace nf {

struct CodesPlan {
  enum Way { kDirect, kPixels, kRows, kDepthwise } way;
  // kDirect     one tap, no border: a pixel is read where it lies
  // kPixels     the rows that are read are copied into a frame of zero points; a tap is a pixel
  // kRows       the same; few channels: a tap is a row of the kernel
  // kDepthwise  one channel a group
  int64_t channels, outputs;    // of a group
  int64_t taps, quads, panels;  // of a group; what kDepthwise has beside: row groups as `taps`, blocks as `panels`
  int64_t pitch;                // bytes of a pixel that is read
  int64_t oh, ow;
  int64_t lanes;  // floats of each of start, scale, bias: outputs padded to whole panels
  // Bytes in packed memory.
  int64_t at_start, at_scale, at_bias, at_narrow, at_spans, at_weights, at_natural, size;

  // nullptr, or what is wrong.
  const char* of(const nf_codes_conv&);
};

// What no convolution of codes may have. Sizes of images are checked too where `image`.
const char* codes_check(const nf_codes_conv*, bool image);

}  // namespace nf
