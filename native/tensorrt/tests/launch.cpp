// Loads one payload and launches it: with 7 rows, none, at an odd address, and with too many rows. Prints what goes
// wrong; the driver prints what it is asked. With an argument, that field is damaged first; with "few", up to 4 rows
// have a launch of their own, and are launched too.
#include <cstdio>

#include "../driver.h"

int main(int count, char** arguments) {
  using namespace nf::trt;
  std::setvbuf(stdout, nullptr, _IONBF, 0);
  std::vector<Field> fields = Payload::empty();
  const auto put = [&](const std::string& name, std::string bytes, std::vector<int32_t> numbers) {
    for (Field& f : fields)
      if (name == f.name) f.bytes = std::move(bytes), f.numbers = std::move(numbers);
  };
  // as TensorRT hands them over: with a zero byte more
  put("entry", std::string("norm", 5), {});
  put("ptx", std::string("PTX80\0PTX89\0PTX90a\0", 20), {});
  put("inputs", std::string("fp16,fp32", 10), {});
  put("outputs", std::string("i8", 3), {});
  put("images", "", {80, 0, 128, 0, 6, 89, 0, 128, 512, 6, 90, 1, 256, 100000, 6});
  put("grid", "", {2, 3});
  put("features", "", {64});
  const bool few = count > 1 && std::string(arguments[1]) == "few";
  if (few) {
    put("ptx", std::string("PTX80\0PTX89\0PTX90a\0FEW80\0FEW90a\0", 33), {});
    put("images", "", {80, 0, 128, 0, 6, 89, 0, 128, 512, 6, 90, 1, 256, 100000, 6, 80, 0, 64, 0, 6, 90, 1, 32, 0, 6});
    put("grid", "", {2, 3, 4, 1, 5, 2});
  } else if (count > 1) put(arguments[1], count > 2 ? arguments[2] : "", {1});
  try {
    const Payload payload = Payload::read(fields);
    const Kernel kernel(payload), again(payload);
    const void* const inputs[] = {reinterpret_cast<void*>(0xffff00001000), reinterpret_cast<void*>(0x2000)};
    void* const outputs[] = {reinterpret_cast<void*>(0x3000)};
    if (few) kernel.launch(inputs, outputs, 4, reinterpret_cast<void*>(0x55));
    kernel.launch(inputs, outputs, 7, reinterpret_cast<void*>(0x55));
    again.launch(inputs, outputs, 0, nullptr);
    try {
      void* const odd[] = {reinterpret_cast<void*>(0x3008)};
      again.launch(inputs, odd, 7, nullptr);
    } catch (const Problem& e) {
      std::printf("problem: %s\n", e.what());
    }
    again.launch(inputs, outputs, int64_t(1) << 31, nullptr);
  } catch (const Problem& e) {
    std::printf("problem: %s\n", e.what());
  }
  return 0;
}
