// Parallel loops on XLA's own thread pool, and scratch memory.
#pragma once
#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;

static inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}
// Threads that a loop may have. A container may allow less time than that of all processors, and threads that wait use it too.
static std::atomic<int> most_threads{INT_MAX};
extern "C" void llama_set_threads(int most) { most_threads = most; }

// Threads of XLA's pool that run up to `loops` loops, one after the other (any more run on the caller alone): run(n, body)
// runs body(0) ... body(n - 1). Each thread takes the items of a range of its own in order, which lets it prefetch what
// follows, and then those that are left in the ranges of others. Threads that have no item wait for the next loop.
//
// The caller takes items too, so that every loop ends even if no other thread is free. Each loop has counters of its own.
// Helpers keep these alive, find no item there once the loop has ended, and then never touch the caller's stack.
class Team {
  static constexpr int WAIT = 1000, RANGES = 64;  // looks of a waiting thread before it yields the processor; most ranges
  struct alignas(64) Counter { std::atomic<int> value{0}; };
  struct Loop { int n; const void* body; void (*item)(const void*, int); };
  struct Shared {
    const int ranges; const std::thread::id caller = std::this_thread::get_id();
    std::vector<Loop> loops; std::vector<Counter> next, done;  // next: of each range of each loop
    std::atomic<int> started{0}; std::atomic<bool> over{false};
    Shared(int ranges, int loops) : ranges(ranges), loops(loops), next(loops * ranges), done(loops) {}
    void drain(int i, int first) {
      const Loop loop = loops[i];
      auto start = [&](int t) { return (int)((int64_t)loop.n * t / ranges); };
      for (int j = 0; j < ranges; j++) {
        const int t = (first + j) % ranges, from = start(t), count = start(t + 1) - from; auto& taken = next[i * ranges + t].value;
        for (int k; (k = taken.fetch_add(1)) < count; done[i].value.fetch_add(1, std::memory_order_release)) loop.item(loop.body, from + k);
      }
    }
    template <class F> void wait_until(const F& ready) {
      for (int looks = 0; !ready(); looks++) if (looks < WAIT) relax(); else std::this_thread::yield();  // another process may have the processor
    }
    void help(int t) {
      if (std::this_thread::get_id() == caller) return;  // a pool whose queue is full runs a task inside Schedule
      for (int i = std::max(0, started.load(std::memory_order_acquire) - 1); i < (int)loops.size() && !over.load(std::memory_order_acquire); i++) {
        wait_until([&] { return started.load(std::memory_order_acquire) > i || over.load(std::memory_order_acquire); });
        if (started.load(std::memory_order_acquire) <= i) return;
        drain(i, t);
      }
    }
  };
  std::shared_ptr<Shared> shared; int used = 0;

 public:
  const int threads;
  Team(ffi::ThreadPool& pool, int loops, int most = INT_MAX) : threads(std::min({(int)pool.num_threads(), most, most_threads.load()})) {
    if (threads < 2) return;
    shared = std::make_shared<Shared>(std::min(threads, RANGES), loops);
    for (int t = 1; t < threads; t++) pool.Schedule([shared = shared, t] { shared->help(t); });
  }
  ~Team() { if (shared) shared->over.store(true, std::memory_order_release); }
  template <class Body> void run(int n, const Body& body) {
    if (n < 2 || threads < 2 || used == (int)shared->loops.size()) { for (int i = 0; i < n; i++) body(i); return; }
    const int i = used++;
    shared->loops[i] = {n, &body, [](const void* body, int item) { (*(const Body*)body)(item); }};
    shared->started.store(used, std::memory_order_release);
    shared->drain(i, 0);
    shared->wait_until([&] { return shared->done[i].value.load(std::memory_order_acquire) == n; });
  }
};
template <class Body> static void parallel(ffi::ThreadPool& pool, int n, const Body& body) { Team(pool, 1, n).run(n, body); }

// Memory that grows and is kept for the next call of the same thread, aligned to 64 bytes.
struct Scratch {
  char* data = nullptr; size_t size = 0;
  template <class T> T* get(size_t count) {
    const size_t page = count * sizeof(T) < 4 << 20 ? 4096 : 2 << 20, bytes = (count * sizeof(T) + page - 1) / page * page;
    if (bytes > size) {
      free(data); data = (char*)aligned_alloc(page, bytes); size = bytes;
#ifdef MADV_HUGEPAGE
      if (page > 4096) madvise(data, size, MADV_HUGEPAGE);
#endif
    }
    return (T*)data;
  }
  ~Scratch() { free(data); }
};
// Scratch memory of a whole call, which any thread of the pool may make: as many are kept as calls ran at the same time.
struct Borrowed {
  std::unique_ptr<Scratch> scratch;
  Borrowed() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (kept().empty()) scratch.reset(new Scratch); else scratch = std::move(kept().back()), kept().pop_back();
  }
  ~Borrowed() { const std::lock_guard<std::mutex> lock(mutex()); kept().push_back(std::move(scratch)); }
  operator Scratch&() { return *scratch; }
  static std::mutex& mutex() { static std::mutex m; return m; }
  static std::vector<std::unique_ptr<Scratch>>& kept() { static auto& all = *new std::vector<std::unique_ptr<Scratch>>; return all; }  // never destroyed: threads may outlive it
};
