// Names of operators in exported files. A file has a name for each function body: the operator and a number, counted
// through the file (normfuse/export/onnx/variants.py). A kernel reads from attributes and inputs what a body has built
// in, so it serves every number; a number that is not here runs its body. ONNX Runtime takes 20 µs and more a name each
// time that it opens a session.
#include <string>

#include "ort/op.h"

namespace nf::ort {
namespace {

int variants(const std::string& op) {
  if (op.compare(0, 10, "ShiftQuant") == 0) return 32;
  if (op == "CodesConv2d") return 28;  // bits by what is optional
  if (op == "CachedAttention")
    return 8;  // rotated, in pairs side by side, within a window, capped, packed: a file has few
  if (op == "Attention" || op == "NormQuantize" || op == "RmsNorm" || op == "CrmsNorm" || op == "L1Norm") return 12;
  return 1;
}

}  // namespace

const std::vector<Op>& named_ops() {
  static const std::vector<Op>& all = *[] {
    auto* found = new std::vector<Op>;
    for (const std::vector<const Op*>* ops :
         {&linear_ops(), &norm_ops(), &conv_ops(), &codes_ops(), &attention_ops(), &cached_attention_ops()})
      for (const Op* op : *ops) {
        found->push_back(*op);
        for (int i = 1; i <= variants(op->name); ++i) {
          found->push_back(*op);
          found->back().variant = (new std::string(op->name + ("_" + std::to_string(i))))->c_str();
        }
      }
    return found;
  }();
  return all;
}

}  // namespace nf::ort

NF_EXPORT const char* nf_operators() {
  static const std::string& all = *[] {
    auto* text = new std::string;
    for (const nf::ort::Op& op : nf::ort::named_ops()) *text += std::string(text->empty() ? "" : "\n") + op.variant;
    return text;
  }();
  return all.c_str();
}
