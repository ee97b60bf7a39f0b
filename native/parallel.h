// Threads that the caller brings, and memory that a thread keeps.
#pragma once
#include <cstdlib>
#include <cstring>

#include "normfuse.h"

namespace nf {

inline int thread_count(const nf_threads* threads) {
  return threads && threads->run && threads->count > 1 ? threads->count : 1;
}

// body(i) for every i < total, each exactly once. `body` must not throw.
template <class Body>
void parallel(const nf_threads* threads, int64_t total, const Body& body) {
  if (thread_count(threads) == 1 || total <= 1) {
    for (int64_t i = 0; i < total; ++i) body(i);
    return;
  }
  threads->run(
      threads->context, static_cast<size_t>(total),
      [](void* arg, size_t i) { (*static_cast<const Body*>(arg))(static_cast<int64_t>(i)); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

constexpr size_t kAlign = 64;

// Memory aligned to a cache line that grows and is kept; never throws: null when there is no more.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(raw_); }

  // At least `bytes` bytes, contents undefined; valid until the next call of this object.
  void* bytes(size_t bytes) {
    if (bytes > size_) {
      std::free(raw_);
      raw_ = std::malloc(bytes + kAlign);
      size_ = raw_ ? bytes : 0;
    }
    if (!raw_) return nullptr;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(raw_) + kAlign - 1) &
                                   ~static_cast<uintptr_t>(kAlign - 1));
  }
  template <class T>
  T* of(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* raw_ = nullptr;
  size_t size_ = 0;
};

// One per use and thread: `thread_scratch<struct MyBuffer>()`. The tag keeps nested users apart.
template <class Tag>
Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

constexpr const char* kNoMemory = "out of memory";

}  // namespace nf
