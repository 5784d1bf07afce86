// Products of many rows: tiles of a few rows of A, whose sums stay in registers, times panels of B.
//
// A is row-major. A panel holds PANEL columns of B, one unit of every column after the other. A unit is what one lane
// multiplies at a time: one float, or two bfloat16 values (M is float or uint16_t).
#pragma once
#include <algorithm>
#include "amx.h"
#include "simd.h"

#if LANES == 16 && defined(__AVX512BF16__)
#define HAS_BF16 1
#endif
constexpr int PANEL = 2 * LANES;
constexpr int IN_REGISTERS = LANES == 16 ? 12 : 6;  // rows of a tile: as many as leave registers for a panel
template <class M> constexpr int MOST_ROWS = IN_REGISTERS;
#ifdef HAS_AMX
static_assert(PANEL == 32, "AMX takes two tiles of 16 columns, as AVX-512's panels have");
template <> constexpr int MOST_ROWS<uint16_t> = 32;  // two tiles of AMX
#endif
constexpr int ALIGN = 32;                        // values of a row of A, and of a column of a panel, are a multiple of it
template <class M> constexpr int UNIT = 4 / sizeof(M);

INLINE constexpr int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats as bfloat16, rounded to nearest.
INLINE void narrow(const float* from, int n, uint16_t* to) {
  int i = 0;
#ifdef HAS_BF16
  for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
  for (; i < n; i++) to[i] = to_bf16(from[i]);
}
INLINE void narrow(const float* from, int n, float* to) { memcpy(to, from, n * sizeof(float)); }

// ------------------------------------------------------------------------------------------------ panels
#if LANES == 16
INLINE void transpose16(__m512i (&a)[16], uint32_t* to, int64_t ld) {  // to[u * ld + n] = value u of a[n], which is overwritten
  __m512i b[16];
  UNROLL for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]), a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
  UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88), b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
  UNROLL for (int j = 0; j < 8; j++) _mm512_storeu_si512(to + j * ld, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
  UNROLL for (int j = 0; j < 8; j++) _mm512_storeu_si512(to + (j + 8) * ld, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
}
static void transpose16(const uint32_t* from, int64_t stride, uint32_t* to, int64_t ld) {  // to[u * ld + n] = from[n * stride + u]
  __m512i a[16];
  UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
  transpose16(a, to, ld);
}
#else
static void transpose16(const uint32_t* from, int64_t stride, uint32_t* to, int64_t ld) {
  for (int n = 0; n < 16; n++) for (int u = 0; u < 16; u++) to[u * ld + n] = from[n * stride + u];
}
#endif
// The panel of PANEL rows, which are its columns: a transpose of units. `values`, a multiple of ALIGN, of each row are
// packed. Meanwhile the same of the rows that are `ahead` rows further is prefetched.
template <class M> static void pack_columns(const M* rows, int64_t stride, int values, uint32_t* panel, int ahead = 0) {
  const int units = values / UNIT<M>;
#if LANES == 16
  for (int n = 0; n < PANEL; n += 16) for (int u = 0; u < units; u += 16) {
    const M* from = rows + n * stride + u * UNIT<M>;
    if (ahead) UNROLL for (int i = 0; i < 16; i++) prefetch(from + (i + ahead) * stride);
    transpose16((const uint32_t*)from, stride / UNIT<M>, panel + (int64_t)u * PANEL + n, PANEL);
  }
#else
  for (int n = 0; n < PANEL; n++) for (int u = 0; u < units; u++) memcpy(panel + (int64_t)u * PANEL + n, rows + n * stride + u * UNIT<M>, 4);
#endif
}
// One unit of PANEL columns, of the rows that it multiplies: one row of floats, or two of bfloat16.
INLINE void pack_rows(const float* rows, int64_t stride, uint32_t* unit) { memcpy(unit, rows, PANEL * 4); }
INLINE void pack_rows(const uint16_t* rows, int64_t stride, uint32_t* unit) {
  for (int i = 0; i < PANEL; i++) unit[i] = rows[i] | (uint32_t)rows[stride + i] << 16;
}

// ------------------------------------------------------------------------------------------------ tiles
INLINE void multiply(vf& sum, const float* a, vf b) { sum += *a * b; }
#ifdef HAS_BF16
INLINE void multiply(vf& sum, const uint16_t* a, vf b) {
  int32_t pair; memcpy(&pair, a, 4);
  sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
#endif
// Rows of A as a strip: one unit of IN_REGISTERS rows after the other, so that a tile reads one place of memory instead of
// one for each row. `units` is a multiple of 16. The strip has room for STRIP_END values more.
// Rows beyond `rows` hold any values, whose products are dropped.
constexpr int STRIP_END = 16 - IN_REGISTERS;
static void turn(int rows, const float* a, int64_t stride, int units, float* strip) {
#if LANES == 16
  for (int u = 0; u < units; u += 16) {
    __m512i few[16];
    UNROLL for (int r = 0; r < 16; r++) few[r] = _mm512_loadu_si512(a + std::min(r, rows - 1) * stride + u);
    transpose16(few, (uint32_t*)strip + u * IN_REGISTERS, IN_REGISTERS);  // a unit overwrites the end of the one before it
  }
#else
  for (int r = 0; r < rows; r++) for (int u = 0; u < units; u++) strip[u * IN_REGISTERS + r] = a[r * stride + u];
#endif
}
// What is in memory and needed soon. It is prefetched a few lines at a time while a strip is multiplied, which hides the
// time that this takes: some of the next rows of A, and the rows of a tile of C.
struct Soon {
  const float* a; int64_t stride; int rows; char* c; int64_t c_row;  // c_row: bytes from row to row
  __attribute__((always_inline)) void fetch(int u) const {  // not inlined, GCC would take it for a function without effect
    for (int r = 0; r < rows; r++) prefetch(a + r * stride + u);
    const int r = u / 16;
    if (c && r < IN_REGISTERS) __builtin_prefetch(c + r * c_row, 1), __builtin_prefetch(c + r * c_row + 64, 1);
  }
};
// c (R, PANEL) = A panel, or c += A panel. `units` of each of the R rows of A are multiplied. They are even, and if A is a
// STRIP, a multiple of 16.
template <class M, int R, bool STRIP> static void tile_of(const M* a, int64_t stride, const uint32_t* panel, int units, float* c, int64_t ld, bool add, const Soon& soon) {
  vf sums[R][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) sums[r][j] = add ? load(c + r * ld + j * LANES) : vf{};
  const int step = STRIP ? 16 : units;
  for (int from = 0; from < units; from += step) {
    if (STRIP) soon.fetch(from);
    for (int u = from; u < from + step; u += 2) UNROLL for (int v = u; v < u + 2; v++) {
      const vf b0 = load((const float*)panel + (int64_t)v * PANEL), b1 = load((const float*)panel + (int64_t)v * PANEL + LANES);
      UNROLL for (int r = 0; r < R; r++) {
        const M* at = a + (STRIP ? v * IN_REGISTERS + r : r * stride + v * UNIT<M>);
        multiply(sums[r][0], at, b0), multiply(sums[r][1], at, b1);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) store(c + r * ld + j * LANES, sums[r][j]);
}
template <bool STRIP, class M> static void in_registers(int rows, const M* a, int64_t stride, const uint32_t* panel, int units, float* c, int64_t ld, bool add, const Soon& soon = {}) {
  if (rows > 6) {
    if (IN_REGISTERS == 12 && rows > 8) tile_of<M, IN_REGISTERS, STRIP>(a, stride, panel, units, c, ld, add, soon);
    else tile_of<M, (IN_REGISTERS > 8 ? 8 : IN_REGISTERS), STRIP>(a, stride, panel, units, c, ld, add, soon);
  } else if (rows > 4) tile_of<M, 6, STRIP>(a, stride, panel, units, c, ld, add, soon);
  else if (rows > 2) tile_of<M, 4, STRIP>(a, stride, panel, units, c, ld, add, soon);
  else if (rows > 1) tile_of<M, 2, STRIP>(a, stride, panel, units, c, ld, add, soon);
  else tile_of<M, 1, STRIP>(a, stride, panel, units, c, ld, add, soon);
}
// The same for up to MOST_ROWS rows, by the fastest instructions. A and c have room for MOST_ROWS, and rows beyond `rows`
// may be computed too. The caller has an Amx.
template <class M> static void multiply(int rows, const M* a, int64_t stride, const uint32_t* panel, int units, float* c, int64_t ld, bool add) {
#ifdef HAS_AMX
  if constexpr (sizeof(M) == 2) if (amx_allowed()) {
    if (rows > 16) amx_tile<true>(a, stride, panel, units, c, ld, add); else amx_tile<false>(a, stride, panel, units, c, ld, add);
    return;
  }
#endif
  for (int r = 0; r < rows; r += IN_REGISTERS) in_registers<false>(std::min(IN_REGISTERS, rows - r), a + r * stride, stride, panel, units, c + r * ld, ld, add);
}
