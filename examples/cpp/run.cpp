// Runs a file that normfuse wrote, from C++: run_onnx MODEL.onnx [LIBRARY.so]
//
// LIBRARY.so is normfuse's library of operators (`python -c "from normfuse import native; print(native.path())"`). A
// native file is fast with it; without it, ONNX Runtime runs the functions inside the file, which compute the same
// integers.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace {

// Ones of the input's sizes; an open size is 1.
struct Input {
  std::vector<int64_t> sizes;
  std::vector<float> values;

  explicit Input(std::vector<int64_t> given) : sizes(std::move(given)) {
    int64_t count = 1;
    for (auto& size : sizes) {
      size = size < 1 ? 1 : size;
      count *= size;
    }
    values.assign(static_cast<size_t>(count), 1.0F);
  }
};

void run(const char* model, const char* library) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "normfuse");
  Ort::SessionOptions options;
  if (library != nullptr) {
    void* handle = nullptr;  // stays open as long as the process: sessions use it
    Ort::ThrowOnError(Ort::GetApi().RegisterCustomOpsLibrary(options, library, &handle));
  }
  Ort::Session session(env, model, options);

  Ort::AllocatorWithDefaultOptions allocator;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::string> names;
  std::vector<Input> held;
  std::vector<Ort::Value> inputs;
  held.reserve(session.GetInputCount());  // tensors point into it
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    Input& input = held.emplace_back(session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape());
    inputs.push_back(Ort::Value::CreateTensor<float>(memory, input.values.data(), input.values.size(),
                                                     input.sizes.data(), input.sizes.size()));
  }
  const auto output = session.GetOutputNameAllocated(0, allocator);
  std::vector<const char*> asked;
  for (const auto& name : names) asked.push_back(name.c_str());
  const char* wanted[] = {output.get()};
  const auto results = session.Run(Ort::RunOptions{nullptr}, asked.data(), inputs.data(), inputs.size(), wanted, 1);

  const float* values = results[0].GetTensorData<float>();
  const size_t count = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
  for (size_t i = 0; i < count; ++i) std::printf("%.9g\n", static_cast<double>(values[i]));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s MODEL.onnx [LIBRARY.so]\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argc == 3 ? argv[2] : nullptr);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
  return 0;
}
