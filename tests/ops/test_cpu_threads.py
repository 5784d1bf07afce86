"""The parallel loops of the CPU kernels, with pools that start tasks late, never, or on the thread of the caller."""

import subprocess
from pathlib import Path

import pytest

from llama_jax.ops.cpu import build

# In the place of XLA's header. XLA runs a task inside Schedule if the queue of its pool is full.
POOL = """
#pragma once
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>
namespace xla::ffi {
struct ThreadPool {
  enum Kind { AT_ONCE, LATE, NEVER, INSIDE } kind;
  int threads;
  std::vector<std::thread> started;
  ThreadPool(Kind kind, int threads) : kind(kind), threads(threads) {}
  int64_t num_threads() const { return threads; }
  template <class F> void Schedule(F task) {
    if (kind == INSIDE) return task();
    if (kind == NEVER) return;
    auto delay = std::chrono::microseconds(kind == LATE ? 137 * started.size() % 5000 : 0);
    started.emplace_back([task, delay]() mutable { std::this_thread::sleep_for(delay); task(); });
  }
  void join() { for (auto& thread : started) thread.join(); started.clear(); }
};
}
"""


@pytest.mark.skipif(build._compiler() is None, reason="no compiler")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_every_item_of_every_loop_runs_once(tmp_path, sanitizer):
    header = tmp_path / "xla" / "ffi" / "api" / "ffi.h"
    header.parent.mkdir(parents=True)
    header.write_text(POOL)
    source, program = Path(__file__).parent / "team.cc", tmp_path / "team"
    command = [build._compiler(), "-std=c++17", "-O1", "-g", "-pthread", "-I", str(tmp_path), "-I", str(build.HERE)]
    compiled = subprocess.run(
        [*command, f"-fsanitize={sanitizer}", "-o", str(program), str(source)], capture_output=True, text=True
    )
    if "cannot find" in compiled.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_a_container_may_allow_fewer_threads_than_there_are_processors(files, allowed, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert build.allowed_processors(tmp_path) == allowed
