// What the instruction sets' attention kernels share: the plan of one call, made once, and the kernels of an
// instruction set.
#pragma once
#include "normfuse.h"

namespace nf {

// The queries of all heads that read one kv head are its rows: row = (head in the group) * queries + query, so that
// grouped queries use a packed tile of keys together. A task is some rows of one kv head.
struct AttendPlan {
  nf_attention shape;
  const float* q;
  const float* k;
  const float* v;
  const float* mask;
  float* y;
  int64_t group;  // heads that share a kv head
  int64_t rows;   // group * queries
  int64_t rows_per_task;
  int64_t tasks_per_head;
  int64_t tile_keys;   // keys whose scores are alive at once; a multiple of a panel unless all
  bool streamed;       // few rows: keys and values are read once, where they lie
  int64_t pitch;       // floats of a row of scores
  int64_t padded_dim;  // head_dim in whole vectors
  int64_t scratch;     // floats that a task needs
};

struct AttendKernels {
  int64_t width;       // floats of a vector
  int64_t panel;       // keys (or features) of a packed panel
  int64_t block_rows;  // rows whose scores are alive at once
  int64_t few_rows;    // at most so many rows are streamed
  int64_t (*scratch)(const AttendPlan&);
  void (*attend)(const AttendPlan&, int64_t batch, int64_t kv_head, int64_t row0, int64_t row1, float* scratch);
};

}  // namespace nf
