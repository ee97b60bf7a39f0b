#include "payload.h"

#include <algorithm>

namespace nf::trt {
namespace {

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> found;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find(at, start), text.size());
    if (end > start) found.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return found;
}

std::vector<Type> types(const std::string& entry, const std::string& names) {
  static const char* const known[] = {"fp32", "fp16", "bf16", "i8", "i32"};
  std::vector<Type> found;
  for (const std::string& name : split(names, ',')) {
    const auto at = std::find(std::begin(known), std::end(known), name);
    if (at == std::end(known)) throw Problem("the plugin " + entry + ": unknown element type " + name);
    found.push_back(Type(at - std::begin(known)));
  }
  return found;
}

const Field& field(const std::vector<Field>& fields, const std::string& name) {
  for (const Field& f : fields)
    if (name == f.name) {
      if (f.text ? f.bytes.empty() : f.numbers.empty()) break;
      return f;
    }
  throw Problem("a plugin node carries no " + name +
                "; write the ONNX file with the version of normfuse that this library is from");
}

std::string word(const std::vector<Field>& fields, const std::string& name) {
  const std::string& bytes = field(fields, name).bytes;
  return bytes.substr(0, bytes.find('\0'));
}

}  // namespace

std::vector<Field> Payload::empty() {
  return {{"entry", true, ""},   {"ptx", true, ""},   {"inputs", true, ""},   {"outputs", true, ""},
          {"images", false, ""}, {"grid", false, ""}, {"features", false, ""}};
}

Payload Payload::read(std::vector<Field> fields) {
  Payload p{};
  p.entry = word(fields, "entry");
  p.inputs = types(p.entry, word(fields, "inputs"));
  p.outputs = types(p.entry, word(fields, "outputs"));
  p.features = field(fields, "features").numbers;
  const std::vector<std::string> parts = split(field(fields, "ptx").bytes, '\0');
  const std::vector<int32_t>&images = field(fields, "images").numbers, &grid = field(fields, "grid").numbers;
  const bool two = grid.size() == 6;
  const bool counted = (two || grid.size() == 2) && *std::min_element(grid.begin(), grid.end()) > 0;
  if (!counted || images.size() != 5 * parts.size() || parts.size() <= (two ? size_t(grid[5]) : 0))
    throw Problem("the plugin " + p.entry + ": " + std::to_string(parts.size()) + " images and " +
                  std::to_string(images.size()) + " numbers for them; expected 5 each");
  if (p.inputs.empty() || p.outputs.empty() || p.features.size() != p.outputs.size())
    throw Problem("the plugin " + p.entry + ": " + std::to_string(p.inputs.size()) + " inputs, " +
                  std::to_string(p.outputs.size()) + " outputs and the features of " +
                  std::to_string(p.features.size()));
  p.many.rows_each = grid[0];
  p.many.columns = grid[1];
  if (two) p.few_rows = grid[2], p.few.rows_each = grid[3], p.few.columns = grid[4];
  const size_t own = parts.size() - (two ? size_t(grid[5]) : 0);
  for (size_t i = 0; i < parts.size(); ++i) {
    const int32_t* n = images.data() + 5 * i;
    (i < own ? p.many : p.few).codes.push_back({n[0], n[1] != 0, n[2], n[3], n[4], parts[i]});
    if (n[4] <= int32_t(p.inputs.size() + p.outputs.size()))  // a launch would read behind its arguments
      throw Problem("the plugin " + p.entry + " has " + std::to_string(n[4]) + " parameters for " +
                    std::to_string(p.inputs.size() + p.outputs.size()) + " tensors and the rows");
  }
  p.fields = std::move(fields);
  return p;
}

const Code& Payload::code(const Way& way, int32_t capability) const {
  const Code* best = nullptr;
  std::string found;
  for (const Code& c : way.codes) {
    if (c.capability == capability) return c;
    if (c.capability < capability && !c.exact && (!best || best->capability < c.capability)) best = &c;
    found += (found.empty() ? "" : ", ") + c.name();
  }
  if (best) return *best;
  throw Problem("the plugin " + entry + " carries PTX for " + found + "; the device is sm_" +
                std::to_string(capability) +
                ". Export for that capability too, or without plugins (they need 8.0 or newer)");
}

}  // namespace nf::trt
