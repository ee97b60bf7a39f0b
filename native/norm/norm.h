// What norm.cpp asks of an instruction set.
#pragma once
#include <cstdint>

namespace nf {

struct NormRows {
  int32_t kind;
  const float *x, *residual;
  int64_t d;
  const float *gain, *shift;
  float eps, scale_const;
  float* sum;
  float* y;  // nullptr: q and scale
  int32_t bits;
  int8_t* q;
  float* scale;
};

struct NormKernels {
  // Rows first..last-1; `row` holds d floats, used where neither y nor sum can hold the row.
  void (*norm)(const NormRows&, int64_t first, int64_t last, float* row);
};

}  // namespace nf
