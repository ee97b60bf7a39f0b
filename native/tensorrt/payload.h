// What the node of a plugin carries: a kernel as PTX for several architectures, and how it is launched. The fields are
// those of export/tensorrt/plugins/payload.py. Nothing here knows TensorRT or CUDA.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace nf::trt {

struct Problem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A field as TensorRT gives it and takes it: text has no zero byte at its end, though TensorRT may have added one.
struct Field {
  const char* name;
  bool text;
  std::string bytes;               // of a text
  std::vector<int32_t> numbers{};  // of the others
};

struct Code {
  int32_t capability;  // 80 for sm_80
  bool exact;          // runs on that capability alone (sm_90a); else on newer ones too
  int32_t threads;
  int32_t shared;      // bytes
  int32_t parameters;  // of the function; those behind inputs, outputs and rows are pointers to scratch memory that is
                       // not used
  std::string ptx;
  std::string name() const { return "sm_" + std::to_string(capability) + (exact ? "a" : ""); }
};

enum class Type { fp32, fp16, bf16, i8, i32 };

// A launch: images, one an architecture, rows of one program, and programs that share rows.
struct Way {
  std::vector<Code> codes;
  int64_t rows_each, columns;
  int64_t grid(int64_t rows) const { return (rows + rows_each - 1) / rows_each * columns; }
};

struct Payload {
  std::string entry;
  Way many, few;         // with blocks of different sizes, and the same results
  int64_t few_rows = 0;  // up to how many rows `few` is taken; 0: never
  std::vector<Type> inputs, outputs;
  std::vector<int32_t> features;  // of each output
  std::vector<Field> fields;      // what all of this was read from

  // Every field by name, in the order in which they are written. Throws Problem.
  static Payload read(std::vector<Field> fields);
  // The names and kinds of the fields, without contents.
  static std::vector<Field> empty();

  // The image for a device: that of its own architecture, else the newest one that it can run. Throws Problem.
  const Code& code(const Way& way, int32_t capability) const;
};

}  // namespace nf::trt
