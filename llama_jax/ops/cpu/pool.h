// A parallel loop on XLA's own thread pool, and scratch memory.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;

// Runs body(0) ... body(n - 1). The caller takes items too, so that the loop ends even if no other thread is free:
// helpers that start late find no item left. They keep only the shared counter alive, never the caller's stack.
template <class Body> static void parallel(ffi::ThreadPool& pool, int n, const Body& body) {
  struct Shared { std::atomic<int> next{0}, done{0}; };
  const int threads = (int)std::min<int64_t>(pool.num_threads(), n);
  if (threads < 2) { for (int i = 0; i < n; i++) body(i); return; }
  auto shared = std::make_shared<Shared>();
  const Body* task = &body;
  auto drain = [n, task](Shared& s) {
    for (int i; (i = s.next.fetch_add(1)) < n; s.done.fetch_add(1, std::memory_order_release)) (*task)(i);
  };
  for (int t = 1; t < threads; t++) pool.Schedule([shared, drain] { drain(*shared); });
  drain(*shared);
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < n; spins++)
    if (spins > 1000) std::this_thread::yield();  // another process has the processor of a helper
}

// Memory that grows and is kept for the next call of the same thread, aligned to 64 bytes.
struct Scratch {
  char* data = nullptr; size_t size = 0;
  template <class T> T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 4095) & ~(size_t)4095;
    if (bytes > size) { free(data); data = (char*)aligned_alloc(4096, bytes); size = bytes; }
    return (T*)data;
  }
  ~Scratch() { free(data); }
};
