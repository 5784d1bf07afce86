// Products of bfloat16 by AMX: a tile is 16 rows of 64 bytes, and one instruction multiplies 16 x 32 by 32 x 16 values.
//
// While an Amx lives, its thread may use tiles: 0 to 3 are sums (rows, columns), 4 and 5 first operands (rows, 32), 6 and
// 7 second operands (32, columns), which have the layout of a panel (tiles.h). AMX is used where the compiler and the
// operating system allow it. With -DEMULATE_AMX the same code runs on any processor, by loops, for tests.
#pragma once
#include "simd.h"

#if defined(EMULATE_AMX)
#define HAS_AMX 1
struct Emulated { float data[8][16][16]; int rows, columns; };
static thread_local Emulated emulated;
struct Amx { explicit Amx(int rows = 16, int columns = 16) { emulated.rows = rows, emulated.columns = columns; } };
INLINE bool amx_allowed() { return true; }
#define AMX_ZERO(t) memset(emulated.data[t], 0, 1024)
#define AMX_ROWS(t) ((t) < 6 ? emulated.rows : 16)
#define AMX_BYTES(t) ((t) == 4 || (t) == 5 ? 64 : 4 * emulated.columns)
#define AMX_LOAD(t, from, bytes) for (int r = 0; r < AMX_ROWS(t); r++) memcpy(emulated.data[t][r], (const char*)(from) + r * (int64_t)(bytes), AMX_BYTES(t))
#define AMX_STORE(t, to, bytes) for (int r = 0; r < AMX_ROWS(t); r++) memcpy((char*)(to) + r * (int64_t)(bytes), emulated.data[t][r], AMX_BYTES(t))
#define AMX_MULTIPLY(sum, a, b) emulate(emulated.data[sum], emulated.data[a], emulated.data[b])
static void emulate(float (*sum)[16], const float (*a)[16], const float (*b)[16]) {
  auto half = [](const float* unit, int i) { uint16_t h; memcpy(&h, (const char*)unit + 2 * i, 2); return from_bf16(h); };
  for (int m = 0; m < emulated.rows; m++) for (int k = 0; k < 16; k++) for (int n = 0; n < emulated.columns; n++)
    sum[m][n] += half(&a[m][k], 0) * half(&b[k][n], 0) + half(&a[m][k], 1) * half(&b[k][n], 1);
}
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__) && LANES == 16
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
// Linux gives a process the 8 KiB of tile data when it asks for them: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
static bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}
struct Amx {
  explicit Amx(int rows = 16, int columns = 16) {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {1};
    for (int t = 0; t < 8; t++) config.bytes[t] = t == 4 || t == 5 ? 64 : 4 * columns, config.rows[t] = t < 6 ? rows : 16;
    if (amx_allowed()) _tile_loadconfig(&config);
  }
  ~Amx() { if (amx_allowed()) _tile_release(); }
};
#define AMX_ZERO(t) _tile_zero(t)
// GCC does not know that a tile is read from memory, and would drop what was stored there.
#define AMX_LOAD(t, from, bytes) do { __asm__ volatile("" ::: "memory"); _tile_loadd(t, from, bytes); } while (0)
#define AMX_STORE(t, to, bytes) _tile_stored(t, to, bytes)
#define AMX_MULTIPLY(sum, a, b) _tile_dpbf16ps(sum, a, b)
#else
struct Amx { ~Amx() {} };
#endif

#ifdef HAS_AMX
// c (16, 32), or (32, 32) if BOTH, = A panel, or c += A panel. `units`, a multiple of 16, of each row are multiplied.
template <bool BOTH> static void amx_tile(const uint16_t* a, int64_t stride, const uint32_t* panel, int units, float* c, int64_t ld, bool add) {
  const int64_t below = 16 * ld;
  if (add) {
    AMX_LOAD(0, c, ld * 4); AMX_LOAD(1, c + 16, ld * 4);
    if (BOTH) { AMX_LOAD(2, c + below, ld * 4); AMX_LOAD(3, c + below + 16, ld * 4); }
  } else {
    AMX_ZERO(0); AMX_ZERO(1);
    if (BOTH) { AMX_ZERO(2); AMX_ZERO(3); }
  }
  for (int u = 0; u < units; u += 16) {
    AMX_LOAD(4, a + 2 * u, stride * 2);
    AMX_LOAD(6, panel + (int64_t)u * 32, 128); AMX_LOAD(7, panel + (int64_t)u * 32 + 16, 128);
    AMX_MULTIPLY(0, 4, 6); AMX_MULTIPLY(1, 4, 7);
    if (BOTH) { AMX_LOAD(5, a + 16 * stride + 2 * u, stride * 2); AMX_MULTIPLY(2, 5, 6); AMX_MULTIPLY(3, 5, 7); }
  }
  AMX_STORE(0, c, ld * 4); AMX_STORE(1, c + 16, ld * 4);
  if (BOTH) { AMX_STORE(2, c + below, ld * 4); AMX_STORE(3, c + below + 16, ld * 4); }
}
#endif
