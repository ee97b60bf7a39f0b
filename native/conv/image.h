// An image as int8 codes with channels running fastest, a record a pixel, with its border of zeros.
#pragma once
#include "conv/conv.h"

namespace nf {

// The channels of a pixel in the order in which rows take them: a part for each exponent.
struct ConvRecord {
  struct Part {
    int64_t offset, size;
  };
  Part parts[16];
  int part_count = 0;
  int64_t size = 0;
  const int32_t* channels = nullptr;  // [size] channel of the group, or -1: a zero
};

// codes[offsets[group] + ((image · hp + y) · wp + x) · size + position] for `count` images of the call from `first` on.
const char* conv_fill_images(const ConvCall&, const ConvRecord* records, const int64_t* offsets, int64_t first,
                             int64_t count, const ConvImageCodes* scales, int8_t* codes);

}  // namespace nf
