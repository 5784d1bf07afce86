// A parallel loop on XLA's own thread pool, and scratch memory.
#pragma once
#include <algorithm>
#include <atomic>
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

// Runs body(0) ... body(n - 1). Each thread takes the items of a range of its own in order, which lets it prefetch what
// follows, and then those that are left in the ranges of others. The caller takes items too, so that the loop ends even
// if no other thread is free: helpers that start late find no item left. They keep only the shared counters alive, never
// the caller's stack.
template <class Body> static void parallel(ffi::ThreadPool& pool, int n, const Body& body) {
  constexpr int MOST = 64;
  struct Shared { struct alignas(64) { std::atomic<int> next{0}; } of[MOST]; std::atomic<int> done{0}; };
  const int threads = std::min((int)pool.num_threads(), n), ranges = std::min(threads, MOST);
  if (threads < 2) { for (int i = 0; i < n; i++) body(i); return; }
  auto shared = std::make_shared<Shared>();
  auto start = [n, ranges](int t) { return (int)((int64_t)n * t / ranges); };
  for (int t = 0; t < ranges; t++) shared->of[t].next = start(t);
  const Body* task = &body;
  auto drain = [=](Shared& s, int first) {
    for (int j = 0; j < ranges; j++) {
      const int t = (first + j) % ranges, end = start(t + 1);
      for (int i; (i = s.of[t].next.fetch_add(1)) < end; s.done.fetch_add(1, std::memory_order_release)) (*task)(i);
    }
  };
  for (int t = 1; t < threads; t++) pool.Schedule([shared, drain, t] { drain(*shared, t); });
  drain(*shared, 0);
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < n; spins++)
    if (spins > 1000) std::this_thread::yield();  // another process has the processor of a helper
}

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
