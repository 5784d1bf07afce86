// Loops of a Team with pools that start tasks at once, late, never, or inside Schedule. Exits with 1 if an item did not run once.
#include <chrono>
#include <cstdio>
#include "pool.h"

int main() {
  using Pool = ffi::ThreadPool;
  for (auto kind : {Pool::AT_ONCE, Pool::LATE, Pool::NEVER, Pool::INSIDE}) for (int threads : {1, 2, 3, 70}) for (int repeat = 0; repeat < (kind == Pool::LATE ? 3 : 30); repeat++) {
    Pool pool(kind, threads);
    {
      constexpr int LOOPS = 9;
      Team team(pool, LOOPS - 2);  // two more run on the caller
      for (int loop = 0; loop < LOOPS; loop++) {
        const int n = loop * loop;
        std::vector<std::atomic<int>> runs(n);
        team.run(n, [&](int i) { runs[i]++; });
        for (int i = 0; i < n; i++) if (runs[i] != 1) { printf("pool %d, %d threads: item %d of %d ran %d times\n", kind, threads, i, n, runs[i].load()); return 1; }
      }
    }
    std::atomic<int> sum{0};
    parallel(pool, 100, [&](int i) { sum += i; });
    if (sum != 4950) { printf("pool %d, %d threads: a single loop gave %d\n", kind, threads, sum.load()); return 1; }
    pool.join();
  }
}
