// The instructions of a GPU that CUDA C++ has no name for, in small functions (PTX ISA, compute capability 8.0 and above).
// tests/ops/emulated.h has the same functions for a CPU.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Starts a copy of 16, 8 or 4 bytes of global memory to shared memory. Without `wanted` it writes zeros and reads nothing.
template <int BYTES>
DEVICE void copy(void* to, const void* from, bool wanted) {
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(wanted ? 16 : 0));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                 "r"(wanted ? BYTES : 0));
  }
}

// Ends a group of copies of this thread.
DEVICE void end_of_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most N groups of copies of this thread are on their way.
template <int N>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// d = a b + c for a tile (16, 16) times (16, 8). Thread 4 g + t of a warp holds rows g and g + 8 of a, c and d, column g of
// b, and columns 2 t and 2 t + 1 of c and d. Of the inputs it holds those with the numbers 2 t, 2 t + 1 (a[0], a[1]; b0)
// and 2 t + 8, 2 t + 9 (a[2], a[3]; b1), two in each word. d may be c.
DEVICE void multiply_tile(float d[4], const u32 a[4], u32 b0, u32 b1, const float c[4]) {
#if HALF
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#endif
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// a - b for two 16-bit floats in each word.
DEVICE u32 minus(u32 a, u32 b) {
  u32 c;
#if HALF
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %2, %3, %1;" : "=r"(c) : "r"(a), "r"(b), "r"(0xbf80bf80));  // a + b * -1
#endif
  return c;
}

// Loads from the L2 cache: numbers that another block may have written in this launch.
DEVICE uint4 load_fresh_16(const void* from) {
  uint4 words;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}

DEVICE uint2 load_fresh_8(const void* from) {
  uint2 words;
  asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from) : "memory");
  return words;
}

DEVICE u32 load_fresh_4(const void* from) {
  u32 word;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

DEVICE float load_fresh(const float* from) { return __uint_as_float(load_fresh_4(from)); }

DEVICE u16 load_fresh_2(const u16* from) {
  u16 bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from) : "memory");
  return bits;
}

// Counts an arrival: all that the block wrote before its last barrier is visible to those that wait for it, or arrive later.
// Returns the number of arrivals before.
DEVICE u32 arrive(u32* counter) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Waits until so many have arrived. What they wrote before is visible then. Blocks that do not run at the same time would
// wait for ever: after 2^24 looks, which take some seconds, the launch fails.
DEVICE void wait_until(const u32* counter, u32 count) {
  u32 arrivals = 0;
  for (u32 polls = 0;; polls++) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrivals) : "l"(counter) : "memory");
    if (arrivals >= count) return;
    if (polls == 1u << 24) __trap();
  }
}

DEVICE float power_of_2(float f) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(f));
  return power;
}

DEVICE float float_of_half(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

DEVICE float float_of_bfloat16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Two floats, rounded to 16 bits.
DEVICE u32 halves(float low, float high) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

DEVICE u32 bfloat16s(float low, float high) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
DEVICE float exponential(float f) { return __expf(f); }
