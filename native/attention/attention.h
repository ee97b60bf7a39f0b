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

// A few queries of each row of a batch over its cache: a token or some. A task is a part of the keys of one kv head,
// for all queries that read it, so that keys and values come from memory once and threads share what a long cache
// costs. What a part finds is put together by the driver.
struct CachedPlan {
  nf_cache shape;
  const float*
      q;  // [batch, kv heads, rows, padded_dim]: rotated and scaled; row = (head in the group) * tokens + token
  const float* key;
  const float* value;
  const float* const* bias;  // of each row of the batch: added to the scores of its slots, or nullptr
  const int64_t* first;  // of each row of the batch: the first slot that is seen, and the slot of its first new token
  const int64_t* start;
  int64_t rows;        // group * tokens
  int64_t part;        // keys of a task
  int64_t parts;       // of each kv head, at most
  int64_t padded_dim;  // head_dim in whole vectors
  int64_t pitch;       // floats of a row of scores
  float* found;        // [batch, kv heads, parts, rows, padded_dim]: sums of weighted values
  float* weight;       // [batch, kv heads, parts, rows, 2]: the largest score, and the sum of exp(score - largest)
};

struct AttendKernels {
  int64_t width;       // floats of a vector
  int64_t panel;       // keys (or features) of a packed panel
  int64_t block_rows;  // rows whose scores are alive at once
  int64_t few_rows;    // at most so many rows are streamed
  int64_t (*scratch)(const AttendPlan&);
  void (*attend)(const AttendPlan&, int64_t batch, int64_t kv_head, int64_t row0, int64_t row1, float* scratch);
  // Of one part of one kv head's keys; `scratch` holds min(rows, few_rows) * pitch floats.
  void (*attend_part)(const CachedPlan&, int64_t batch, int64_t kv_head, int64_t part, float* scratch);
};

}  // namespace nf
