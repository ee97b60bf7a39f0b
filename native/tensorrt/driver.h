// A carried kernel on a GPU, loaded and launched by the driver alone, which is looked for when the first kernel is
// loaded.
#pragma once

#include "payload.h"

namespace nf::trt {

class Kernel {
 public:
  // Loads the image for the device of the current context, or of device 0 where there is none, as CUDA's runtime does.
  // Equal images are loaded once for each context. Throws Problem.
  explicit Kernel(const Payload& given);

  // One launch on `stream`; nothing for no rows. Nothing else is asked of the driver: a graph may be being captured.
  // Throws Problem.
  void launch(const void* const* inputs, void* const* outputs, int64_t rows, void* stream) const;

 private:
  struct Loaded {
    const Way* way;
    const Code* code;
    void* function;
  };

  const Payload& payload;
  Loaded many, few;
};

}  // namespace nf::trt
