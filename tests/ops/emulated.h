// CUDA on a CPU, for tests: the threads of a block are fibers, and the functions of device.cuh are written in C++.
// Copies take place when they must be done at the latest, or at once with EAGER, so that a wait too few shows either way.
// All blocks are alive at once, as those of a launch that wait for one another are. They have turns.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static inline
#define DEVICE_METHOD
#define __device__
#define __global__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
#define unroll

using std::max;
using std::min;

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct Index { int x, y, z; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }

constexpr int SHARED = 1 << 18;
alignas(128) u8 shared[SHARED];  // of the block whose turn it is
static Index threadIdx, blockIdx, gridDim;

struct Copy { void* to; const void* from; int bytes; bool wanted; };
struct Barrier { int waiting = 0, generation = 0; };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool ended;
  std::deque<std::vector<Copy>> groups;  // of copies that have not taken place
  std::vector<Copy> group;
  bool waits;  // for other blocks
};
struct Warp { Barrier barrier; u32 a[32][4], b[32][2]; float value[32]; };
struct Block {
  Index index;
  std::vector<Fiber> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<u8> shared;
};
static Block* block;
#define fibers (block->threads)
static ucontext_t scheduler;
static int current;

static void wait(Barrier& barrier, int threads) {
  const int generation = barrier.generation;
  if (++barrier.waiting == threads) {
    barrier.waiting = 0;
    barrier.generation++;
  }
  while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

static Warp& warp() { return block->warps[current / 32]; }
static void __syncthreads() { wait(block->barrier, (int)fibers.size()); }
static void __syncwarp() { wait(warp().barrier, 32); }

static float __shfl_xor_sync(u32, float value, int step) {
  warp().value[current % 32] = value;
  __syncwarp();
  const float other = warp().value[current % 32 ^ step];
  __syncwarp();
  return other;
}

static void take_place(const Copy& copy) {
  if (copy.wanted) memcpy(copy.to, copy.from, copy.bytes);
  else memset(copy.to, 0, copy.bytes);
}

template <int BYTES>
static void copy(void* to, const void* from, bool wanted) {
  if (((u64)to | (u64)from) % BYTES) abort();  // a GPU refuses it, too
  const Copy copy = {to, from, BYTES, wanted};
#ifdef EAGER
  take_place(copy);
#else
  fibers[current].group.push_back(copy);
#endif
}
static void end_of_copies() {
  fibers[current].groups.push_back(std::move(fibers[current].group));
  fibers[current].group.clear();
}
template <int N>
static void wait_for_copies() {
  auto& groups = fibers[current].groups;
  for (; (int)groups.size() > N; groups.pop_front())
    for (const Copy& copy : groups.front()) take_place(copy);
}

static float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static u32 __float_as_uint(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
static float rsqrtf(float f) { return 1 / std::sqrt(f); }
static float exponential(float f) { return std::exp(f); }
static float float_of_half(u16 bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
static u16 half_of_float(float f) { const _Float16 h = (_Float16)f; u16 bits; memcpy(&bits, &h, 2); return bits; }
static u32 halves(float low, float high) { return half_of_float(low) | (u32)half_of_float(high) << 16; }
static float float_of_bfloat16(u16 bits) { return __uint_as_float((u32)bits << 16); }
static u16 bfloat16_of_float(float f) {
  const u32 bits = __float_as_uint(f);
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static u32 bfloat16s(float low, float high) { return bfloat16_of_float(low) | (u32)bfloat16_of_float(high) << 16; }
static float quotient(float a, float b) { return a / b; }

#if HALF
static float float_of(u16 bits) { return float_of_half(bits); }
static u16 bits_of(float f) { return half_of_float(f); }
#else
static float float_of(u16 bits) { return float_of_bfloat16(bits); }
static u16 bits_of(float f) { return bfloat16_of_float(f); }
#endif

static u32 minus(u32 a, u32 b) {
  const u16 low = bits_of(float_of((u16)a) - float_of((u16)b));
  return low | (u32)bits_of(float_of((u16)(a >> 16)) - float_of((u16)(b >> 16))) << 16;
}

static void multiply_tile(float d[4], const u32 a[4], u32 b0, u32 b1, const float c[4]) {
  Warp& all = warp();
  const int lane = current % 32, g = lane / 4, t = lane % 4;
  memcpy(all.a[lane], a, 16);
  all.b[lane][0] = b0, all.b[lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    d[i] = c[i];
    for (int k = 0; k < 16; k++) {
      const int of_row = row % 8 * 4 + k % 8 / 2, of_column = column * 4 + k % 8 / 2;
      const u32 left = all.a[of_row][row / 8 + k / 8 * 2], right = all.b[of_column][k / 8];
      d[i] += float_of((u16)(left >> k % 2 * 16)) * float_of((u16)(right >> k % 2 * 16));
    }
  }
  __syncwarp();
}

static float load_fresh(const float* from) { return *from; }
static uint4 load_fresh_16(const void* from) { return *(const uint4*)from; }
static uint2 load_fresh_8(const void* from) { return *(const uint2*)from; }
static u32 load_fresh_4(const void* from) { return *(const u32*)from; }
static u16 load_fresh_2(const u16* from) { return *from; }
static u32 arrive(u32* counter) { return (*counter)++; }
static void wait_until(const u32* counter, u32 count) {
  Fiber& fiber = fibers[current];
  for (fiber.waits = true; *counter < count;) swapcontext(&fiber.context, &scheduler);
  fiber.waits = false;
}
static float power_of_2(float f) { return std::exp2(f); }

static void (*body)();
static void start() {
  body();
  fibers[current].ended = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// Runs a block until all threads have ended, or one waits for other blocks. Returns whether threads are left.
static bool have_turn(Block& turn) {
  block = &turn;
  blockIdx = turn.index;
  memcpy(shared, turn.shared.data(), SHARED);
  bool left = true;
  for (bool waits = false; left && !waits;) {
    left = false;
    for (current = 0; current < (int)fibers.size(); current++) {
      if (fibers[current].ended) continue;
      left = true;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
      waits |= fibers[current].waits;
    }
  }
  memcpy(turn.shared.data(), shared, SHARED);
  return left;
}

// Runs a kernel with so many bytes of shared memory. It must not write beyond them.
static void launch(int blocks_x, int blocks_y, int blocks_z, int threads, int bytes, void (*kernel)()) {
  gridDim = {blocks_x, blocks_y, blocks_z};
  body = kernel;
  std::deque<std::unique_ptr<Block>> blocks;
  int number = 0;
  auto begin = [&] {
    const Index index = {number % blocks_x, number / blocks_x % blocks_y, number / blocks_x / blocks_y};
    number++;
    blocks.emplace_back(new Block{index, std::vector<Fiber>(threads), std::vector<Warp>(threads / 32), {}, {}});
    blocks.back()->shared.assign(SHARED, 0xff);  // not a number
    for (Fiber& fiber : blocks.back()->threads) {
      getcontext(&fiber.context);
      fiber.stack.reset(new char[1 << 16]);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = 1 << 16;
      makecontext(&fiber.context, start, 0);
    }
  };
  // A block begins when those before it have ended or wait.
  for (const int all = blocks_x * blocks_y * blocks_z; number < all || !blocks.empty();) {
    if (number < all) begin();
    for (size_t i = number < all ? blocks.size() - 1 : 0; i < blocks.size();) {
      if (have_turn(*blocks[i])) {
        i++;
        continue;
      }
      for (int j = bytes; j < SHARED; j++)
        if (blocks[i]->shared[j] != 0xff) abort();
      blocks.erase(blocks.begin() + i);
    }
  }
}
