// A pool of our own for Python. One set of workers serves every count that is asked for; it starts with the first job
// and is never taken down, because a worker may outlive everything that could wait for it.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "normfuse.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif

namespace {

constexpr int kMost = 256;
constexpr int kSpins = 2000;  // 20 to 60 µs: the gap between two layers, not between two calls of a model

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  nf_task fn;
  void* arg;
  size_t total;
};

class Pool {
 public:
  // False: another caller has the workers (or the machine gives none), and nothing was done.
  bool run(int count, const Job& job) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    grow(count - 1);
    if (workers_ == 0) {
      busy_.store(false, std::memory_order_release);
      return false;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      next_.store(0, std::memory_order_relaxed);
      places_ = count - 1;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load(std::memory_order_seq_cst) > 0) wake_.notify_all();
    work(job);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      places_ = 0;  // who comes now comes too late
    }
    for (int i = 0; i < kSpins && inside_.load(std::memory_order_acquire); ++i) pause();
    if (inside_.load(std::memory_order_acquire)) {
      std::unique_lock<std::mutex> lock(mutex_);
      left_.wait(lock, [this] { return inside_.load(std::memory_order_acquire) == 0; });
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  void work(const Job& job) {
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job.total;) job.fn(job.arg, i);
  }

  void grow(int wanted) {
    if (workers_ >= wanted) return;
#if !defined(_WIN32)
    // Signals are for the threads of the program.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // no more threads: those we have will do
    }
#if !defined(_WIN32)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  void serve();

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::atomic<bool> busy_{false};
  std::atomic<unsigned> epoch_{0};
  std::atomic<int> asleep_{0};
  std::atomic<int> inside_{0};  // workers that took a place and have not left
  std::atomic<size_t> next_{0};
  Job job_{};        // under mutex_
  int places_ = 0;   // under mutex_: how many workers may still join
  int workers_ = 0;  // of the caller that holds busy_
};

thread_local bool inside_a_job = false;

void Pool::serve() {
  inside_a_job = true;
  unsigned seen = 0;
  for (;;) {
    for (int i = 0; i < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++i) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    if (epoch_.load(std::memory_order_acquire) == seen) {
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (places_ == 0) continue;
    --places_;
    inside_.fetch_add(1, std::memory_order_acq_rel);
    const Job job = job_;
    lock.unlock();
    work(job);
    lock.lock();
    if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
  }
}

std::atomic<Pool*> current{nullptr};

Pool* pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found) return found;
#if !defined(_WIN32)
  // A fork takes only the calling thread along: the child starts with a pool of its own, and what it inherited is left
  // alone.
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    current.store(nullptr, std::memory_order_release);
    inside_a_job = false;
  });
  (void)registered;
#endif
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh && !current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) {
    delete fresh;
    return found;
  }
  return fresh;
}

void run(void* context, size_t total, nf_task fn, void* arg) {
  const int count = static_cast<nf_threads*>(context)->count;
  if (count > 1 && total > 1 && !inside_a_job) {
    inside_a_job = true;  // a task that asks for threads itself works alone
    Pool* shared = pool();
    const bool done = shared && shared->run(count, Job{fn, arg, total});
    inside_a_job = false;
    if (done) return;
  }
  for (size_t i = 0; i < total; ++i) fn(arg, i);
}

struct Table {
  nf_threads of[kMost + 1];
  Table() {
    for (int i = 0; i <= kMost; ++i) of[i] = {&of[i], i, run};
  }
};

}  // namespace

NF_EXPORT const nf_threads* nf_pool(int32_t count) {
  static const Table table;
  if (count < 1) return nullptr;
  return &table.of[count > kMost ? kMost : count];
}
