// Products of few rows with weights, which are multiplied as they are read: up to ROWS rows at a time.
#pragma once
#include <algorithm>
#include "inputs.h"
#include "tiles.h"

template <int B, int R> INLINE void finish(vf (&a)[R][B], float* t, int64_t ld) {  // t[b * ld + r] = sum(a[r][b])
  if (R % 4 == 0) {
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int r = 0; r + 3 < R; r += 4) sum4(a[r][b], a[r + 1][b], a[r + 2][b], a[r + 3][b], t + b * ld + r);
  } else if (B % 4 == 0) {
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b + 3 < B; b += 4) {
      float s[4]; sum4(a[r][b], a[r][b + 1], a[r][b + 2], a[r][b + 3], s);
      UNROLL for (int j = 0; j < 4; j++) t[(b + j) * ld + r] = s[j];
    }
  } else UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < B; b++) t[b * ld + r] = sum(a[r][b]);
}

// The distance of prefetched weights: whole blocks of outputs that are computed together, so that no row is left out.
INLINE int64_t ahead(int64_t bytes) { return bytes ? (AHEAD + bytes - 1) / bytes * bytes : 0; }

// Dense weights times float32 inputs.
template <class T, int B, int R> static void dense(const T* w, const float* x, int K, int64_t pad, float* t, int64_t ld) {
  vf a[R][B] = {};
  const int64_t later = ahead(R * K * (int64_t)sizeof(T));
  int k = 0;
  for (; k + LANES <= K; k += LANES) {
    vf v[R]; UNROLL for (int r = 0; r < R; r++) { const T* p = w + (int64_t)r * K + k; v[r] = load(p); prefetch((const char*)p + later); }
    UNROLL for (int b = 0; b < B; b++) { vf xv = load(x + b * pad + k); UNROLL for (int r = 0; r < R; r++) a[r][b] += v[r] * xv; }
  }
  if (k < K) {  // the last inputs, as one vector with zeros behind
    for (int r = 0; r < R; r++) {
      T last[LANES] = {}; memcpy(last, w + (int64_t)r * K + k, (K - k) * sizeof(T));
      for (int b = 0; b < B; b++) a[r][b] += load(last) * load(x + b * pad + k);
    }
  }
  finish<B, R>(a, t, ld);
}
// Grouped weights, dequantized to float32, times float32 inputs.
template <bool FOUR, int B, int R> static void grouped(const uint8_t* w, const uint16_t* scales, const float* x, int K, int64_t pad, float* t, int64_t ld) {
  vf a[R][B] = {};
  constexpr int BLOCK = LANES < 16 ? 1 : 16, BYTES = FOUR ? GROUP / 2 : GROUP;  // groups whose scales are converted together, and bytes of one
  const int G = K / GROUP; const int64_t stride = (int64_t)G * BYTES, later = ahead(R * stride);
  for (int start = 0; start < G; start += BLOCK) {
    const int count = std::min(BLOCK, G - start);
    float s[R][BLOCK]; UNROLL for (int r = 0; r < R; r++) from_halves(scales + (int64_t)r * G + start, count, s[r]);
    for (int g = 0; g < count; g++) {
      const float* from = x + (int64_t)(start + g) * GROUP; const int8_t* values[R]; int8_t n[R][GROUP]; vf scale[R];
      UNROLL for (int r = 0; r < R; r++) {
        const uint8_t* p = w + r * stride + (int64_t)(start + g) * BYTES;
        if (FOUR) nibbles(p, n[r], n[r] + 16);
        values[r] = FOUR ? n[r] : (const int8_t*)p, scale[r] = splat(s[r][g]); prefetch(p + later);
      }
      UNROLL for (int j = 0; j < GROUP; j += LANES) {
        vf v[R]; UNROLL for (int r = 0; r < R; r++) v[r] = load(values[r] + j) * scale[r];
        UNROLL for (int b = 0; b < B; b++) { vf xv = load(from + b * pad + j); UNROLL for (int r = 0; r < R; r++) a[r][b] += v[r] * xv; }
      }
    }
  }
  finish<B, R>(a, t, ld);
}
#ifdef HAS_AMX
// 8-bit weights times one row of float32 inputs. Processors with AMX convert such weights to floats faster than to bfloat16.
// They are read in the order of memory, and a scale multiplies the sum of its group.
template <int R> static void one_row_of_bytes(const int8_t* w, const uint16_t* scales, const float* x, int K, float* t) {
  constexpr int BLOCK = 512;  // groups whose scales are converted together: short loops are slower
  vf a[R][2] = {}, out[R][1];
  const int G = K / GROUP;
  for (int start = 0; start < G; start += BLOCK) UNROLL for (int r = 0; r < R; r++) {
    const int count = std::min(BLOCK, G - start);
    const int8_t* p = w + ((int64_t)r * G + start) * GROUP; const float* from = x + start * GROUP;
    float s[BLOCK]; for (int g = 0; g < count; g += 16) from_halves(scales + (int64_t)r * G + start + g, std::min(16, count - g), s + g);
    auto group = [&](int g) __attribute__((always_inline)) { return (load(p + g * GROUP) * load(from + g * GROUP) + load(p + g * GROUP + 16) * load(from + g * GROUP + 16)) * s[g]; };
    int g = 0;
    for (; g + 2 <= count; g += 2) prefetch(p + g * GROUP + AHEAD), a[r][0] += group(g), a[r][1] += group(g + 1);
    if (g < count) a[r][0] += group(g);
  }
  UNROLL for (int r = 0; r < R; r++) out[r][0] = a[r][0] + a[r][1];
  finish<1, R>(out, t, R);
}
#endif

#ifdef HAS_BF16
// bfloat16 weights times bfloat16 inputs, in pairs with float32 sums.
template <int B, int R> static void pairs(const uint16_t* w, const uint16_t* x, int K, int64_t pad, float* t, int64_t ld) {
  const int64_t later = ahead(R * K * 2ll);
  __m512 a[R][B]; UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < B; b++) a[r][b] = _mm512_setzero_ps();
  auto step = [&](int k, __mmask32 mask) __attribute__((always_inline)) {
    __m512bh v[R]; UNROLL for (int r = 0; r < R; r++) { const uint16_t* p = w + (int64_t)r * K + k; v[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, p); prefetch((const char*)p + later); }
    UNROLL for (int b = 0; b < B; b++) { __m512bh xv = (__m512bh)_mm512_loadu_si512(x + b * pad + k); UNROLL for (int r = 0; r < R; r++) a[r][b] = _mm512_dpbf16_ps(a[r][b], v[r], xv); }
  };
  int k = 0;
  for (; k + 32 <= K; k += 32) step(k, ~0u);
  if (k < K) step(k, (1u << (K - k)) - 1);
  vf out[R][B]; UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < B; b++) out[r][b] = (vf)a[r][b];
  finish<B, R>(out, t, ld);
}
// Four groups of weights as bfloat16, which holds integers up to 256 exactly. Every lane of the four vectors belongs to
// one group, so that one multiplication by scales serves 128 weights. Inputs are in the same order (in_order).
template <int B> INLINE void four_groups(const uint8_t* p, int live, __m512bh (&v)[4]) {  // beyond `live` groups, weights are read as zeros
  // bfloat16 of -8 to 7, twice, so that the fifth bit of an index, which belongs to another weight, is ignored
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
  const __m512i bytes = _mm512_maskz_loadu_epi32(0xffff >> (16 - 4 * live), p);
  UNROLL for (int i = 0; i < 4; i++) v[i] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4 * i), table);
}
#ifdef __AVX512VBMI__
// The two bytes of bfloat16 for 0 to 127.
struct Bytes { alignas(64) uint8_t low[128], high[128]; };
static const Bytes BYTES = [] {
  Bytes t;
  for (int i = 0; i < 128; i++) { const uint16_t h = to_bf16((float)i); t.low[i] = (uint8_t)h, t.high[i] = (uint8_t)(h >> 8); }
  return t;
}();
#endif
template <int B> INLINE void four_groups(const int8_t* p, int live, __m512bh (&v)[4]) {
  const __m512i a = _mm512_maskz_loadu_epi32(live > 1 ? 0xffff : 0xff, p), sign = _mm512_set1_epi8(-128);
  const __m512i b = _mm512_maskz_loadu_epi32(live > 3 ? 0xffff : live > 2 ? 0xff : 0, p + 64);
#ifdef __AVX512VBMI__
  constexpr bool through_float = B == 8;  // whose instructions do not compete with the products for the same ports
#else
  constexpr bool through_float = true;
#endif
  if (through_float) {
    UNROLL for (int i = 0; i < 4; i++) {
      const __m512i x = i & 2 ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b);
      auto number = [&](int left) __attribute__((always_inline)) { return (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(left ? _mm512_slli_epi32(x, left) : x, 24)); };
      const __m512i first = number(i & 1 ? 8 : 24), second = number(i & 1 ? 0 : 16);
      v[i] = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, _mm512_set1_epi32(0xffff0000), 0xf8);  // first >> 16 | (second & mask)
    }
    return;
  }
#ifdef __AVX512VBMI__
  UNROLL for (int i = 0; i < 2; i++) {  // by tables of both bytes: the fewest instructions
    const __m512i from = _mm512_add_epi16(_mm512_broadcast_i32x4(_mm_setr_epi16(0, 32, 2, 34, 1, 33, 3, 35)), _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_setr_m128i(_mm_set1_epi16(4 * i), _mm_set1_epi16(4 * i + 8))), _mm256_setr_m128i(_mm_set1_epi16(4 * i + 16), _mm_set1_epi16(4 * i + 24)), 1));
    const __m512i x = _mm512_permutex2var_epi16(a, from, b), size = _mm512_abs_epi8(x);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(BYTES.low), size, _mm512_load_si512(BYTES.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(BYTES.high), size, _mm512_load_si512(BYTES.high + 64));
    high = _mm512_ternarylogic_epi32(high, x, sign, 0xf8);                                      // high | (x & sign)
    high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(x, sign), _mm512_set1_epi8(-61));  // -128
    v[2 * i] = (__m512bh)_mm512_unpacklo_epi8(low, high), v[2 * i + 1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
  }
#endif
}
template <class T> constexpr bool FOUR_BITS = T(-1) > 0;
// Grouped weights (T: int8_t, or uint8_t for 4 bits) times bfloat16 inputs, with float32 sums: exact products.
template <class T, int B, int R> static void scaled_pairs(const T* w, const uint16_t* scales, const uint16_t* x, int K, int64_t pad, float* t, int64_t ld) {
  constexpr int BLOCK = 16, STEP = FOUR_BITS<T> ? 64 : 128;  // scales at a time, and bytes of four groups
  const int G = K / GROUP; const int64_t stride = (int64_t)G * STEP / 4, later = ahead(R * stride);
  __m512 a[R][B]; UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < B; b++) a[r][b] = _mm512_setzero_ps();
  for (int start = 0; start < G; start += BLOCK) {
    const int count = std::min(BLOCK, G - start); __m512 block[R];
    UNROLL for (int r = 0; r < R; r++) block[r] = from_halves(scales + (int64_t)r * G + start, count);
    __m512i index = FOUR_BITS<T> ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3) : _mm512_setr_epi32(0, 2, 0, 2, 0, 2, 0, 2, 1, 3, 1, 3, 1, 3, 1, 3);
    auto step = [&](int g, const T* p, int live) __attribute__((always_inline)) {
      __m512bh v[R][4]; __m512 scale[R];
      UNROLL for (int r = 0; r < R; r++) {
        four_groups<B>(p + r * stride, live, v[r]);
        UNROLL for (int i = 0; i < STEP; i += 64) prefetch(p + r * stride + later + i);
        scale[r] = _mm512_permutexvar_ps(index, block[r]);
      }
      index = _mm512_add_epi32(index, _mm512_set1_epi32(4));
      UNROLL for (int b = 0; b < B; b++) {
        const uint16_t* from = x + b * pad + (int64_t)(start + g) * GROUP;
        __m512 sums[R]; UNROLL for (int r = 0; r < R; r++) sums[r] = _mm512_setzero_ps();
        UNROLL for (int i = 0; i < 4; i++) {
          const __m512bh xv = (__m512bh)_mm512_loadu_si512(from + 32 * i);
          UNROLL for (int r = 0; r < R; r++) sums[r] = _mm512_dpbf16_ps(sums[r], v[r][i], xv);
        }
        UNROLL for (int r = 0; r < R; r++) a[r][b] = _mm512_fmadd_ps(sums[r], scale[r], a[r][b]);
      }
    };
    const T* p = w + (int64_t)start * STEP / 4; int g = 0;
    for (; g + 4 <= count; g += 4, p += STEP) step(g, p, 4);
    if (g < count) step(g, p, count - g);
  }
  vf out[R][B]; UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < B; b++) out[r][b] = (vf)a[r][b];
  finish<B, R>(out, t, ld);
}
#endif

#ifdef HAS_AMX
// Products by AMX. w are 16 outputs, and t (B, 16) their products with B rows of x, which are in the order of in_pairs.
template <int B> static void amx_dense(const uint16_t* w, const uint16_t* x, int K, float* t) {
  alignas(64) float sums[16][B];
  AMX_ZERO(0);
  for (int k = 0; k < K; k += 32, x += 32 * B) {
    if (k + 32 <= K) AMX_LOAD(4, w + k, K * 2);
    else {  // the last inputs, with zeros behind
      alignas(64) uint16_t last[16][32] = {};
      for (int r = 0; r < 16; r++) memcpy(last[r], w + (int64_t)r * K + k, (K - k) * 2);
      AMX_LOAD(4, last, 64);
    }
    AMX_LOAD(6, x, 4 * B); AMX_MULTIPLY(0, 4, 6);
  }
  AMX_STORE(0, sums, 4 * B);
  for (int b = 0; b < B; b++) for (int r = 0; r < 16; r++) t[16 * b + r] = sums[r][b];
}
// 16 bytes of each of 16 outputs as 16 rows of a second operand: to(4 d + i, v) takes nibble i of both words of dword d
// of every output, as bfloat16 of the table of even or of odd nibbles.
template <class To> INLINE void sixteen_outputs(const char* const (&rows)[4], int64_t stride, int64_t at, __m512i even, __m512i odd, const To& to) {
  __m512i a[4], b[4];
  UNROLL for (int j = 0; j < 4; j++) {
    auto output = [&](int l) { return _mm_loadu_si128((const __m128i*)(rows[l] + j * stride + at)); };  // 4 l + j
    a[j] = _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(output(0)), output(1), 1), output(2), 2), output(3), 3);
  }
  UNROLL for (int j = 0; j < 4; j += 2) b[j] = _mm512_unpacklo_epi32(a[j], a[j + 1]), b[j + 1] = _mm512_unpackhi_epi32(a[j], a[j + 1]);
  UNROLL for (int j = 0; j < 2; j++) a[2 * j] = _mm512_unpacklo_epi64(b[j], b[j + 2]), a[2 * j + 1] = _mm512_unpackhi_epi64(b[j], b[j + 2]);
  UNROLL for (int d = 0; d < 4; d++) UNROLL for (int i = 0; i < 4; i++) to(4 * d + i, _mm512_permutexvar_epi16(_mm512_srli_epi16(a[d], 4 * i), i & 1 ? odd : even));
}
template <class F> static __m512i nibble_table(F number) {  // twice, so that the fifth bit of an index, of another nibble, is ignored
  alignas(64) uint16_t table[32]; for (int i = 0; i < 32; i++) table[i] = to_bf16((float)number(i & 15));
  return _mm512_load_si512(table);
}
// Scales of 16 groups of 16 outputs as floats: to[g] is group g of every output. There are `count` groups.
static void transposed_scales(const uint16_t* scales, int G, int count, float (*to)[16]) {
  __m512i a[16];
  UNROLL for (int r = 0; r < 16; r++) a[r] = (__m512i)from_halves(scales + (int64_t)r * G, count);
  transpose16(a, (uint32_t*)to[0], 16);
}
// Grouped weights. A group of 16 outputs is a second operand of exact integers; 8 bits are two, of the low halves and of
// 16 times the high halves. The products of each group are multiplied by its scales in float32. Four groups are a step,
// and the parts of a step run in turns with those of others, because the results of AMX and of stores come late.
constexpr int AMX_STEP = 4;  // groups
struct Tiles { alignas(64) uint16_t of[2 * AMX_STEP * 2 * 16 * 32]; };  // weights of two steps
template <class T, int B> static void amx_grouped(const char* w, const uint16_t* scales, const uint16_t* x, int K, Tiles& memory, float* t) {
  constexpr int BLOCK = 16, STEP = AMX_STEP, BYTES = FOUR_BITS<T> ? 16 : 32, PARTS = BYTES / 16, S = groups_of_a_tile(B);
  const int G = K / GROUP, steps = (G + STEP - 1) / STEP;
  const int64_t stride = (int64_t)G * BYTES, later = ahead(16 * stride), scales_later = ahead(32 * G);
  const __m512i even = nibble_table([](int i) { return FOUR_BITS<T> ? i - 8 : i; });
  const __m512i odd = FOUR_BITS<T> ? even : nibble_table([](int i) { return 16 * (i < 8 ? i : i - 16); });
  const char* rows[4]; for (int l = 0; l < 4; l++) rows[l] = w + 4 * l * stride;
  alignas(64) float scale[2][BLOCK][16], products[STEP][B][16];
  auto& tiles = *(uint16_t (*)[2][STEP][PARTS][16][32])memory.of;
  auto each = [&](int step, auto body) __attribute__((always_inline)) {
    const int count = std::min(STEP, G - step * STEP);
    if (count == STEP) UNROLL for (int j = 0; j < STEP; j++) body(j); else for (int j = 0; j < count; j++) body(j);
  };
  vf sums[B] = {};
  for (int i = 0; i < steps + 3; i++) {
    if (i >= 3) {
      const int g = (i - 3) * STEP; const float (*s)[16] = scale[g / BLOCK & 1] + g % BLOCK;
      each(i - 3, [&](int j) __attribute__((always_inline)) { const vf v = load(s[j]); UNROLL for (int b = 0; b < B; b++) sums[b] += load(products[j][b]) * v; });
    }
    if (i >= 2) {
      AMX_STORE(0, products[0], 64);
      if (S == 1) { AMX_STORE(1, products[1], 64); AMX_STORE(2, products[2], 64); AMX_STORE(3, products[3], 64); }
    }
    if (i < steps) {
      const int g = i * STEP;
      if (g % BLOCK == 0) {
        UNROLL for (int j = 0; j < 8; j++) prefetch((const char*)(scales + 16 * g + 32 * j) + scales_later);
        transposed_scales(scales + g, G, std::min(BLOCK, G - g), scale[g / BLOCK & 1]);
      }
      UNROLL for (int r = 0; r < 16; r++) UNROLL for (int j = 0; j < STEP * BYTES; j += 64) {
        const char* p = rows[r / 4] + r % 4 * stride + (int64_t)g * BYTES + j;
        prefetch(FOUR_BITS<T> ? w + 16 * stride + (int64_t)g * 16 * BYTES + 64 * r : p + later);  // short rows in the order of memory
        __builtin_prefetch(p + STEP * BYTES, 0, 3);
      }
      each(i, [&](int j) __attribute__((always_inline)) {
        UNROLL for (int h = 0; h < PARTS; h++)
          sixteen_outputs(rows, stride, (int64_t)(g + j) * BYTES + 16 * h, even, odd, [&](int k, __m512i v) __attribute__((always_inline)) {
            _mm512_store_si512(PARTS == 1 ? tiles[i & 1][j][0][k] : tiles[i & 1][j][k & 1][8 * h + k / 2], v);
          });
      });
    }
    if (i >= 1 && i <= steps) {
      const uint16_t* from = x + (int64_t)(i - 1) * STEP * S * B * GROUP; auto& step = tiles[(i - 1) & 1];
#define PRODUCT(sum, j) \
      AMX_LOAD(4, from + j * S * B * GROUP, 64); \
      AMX_LOAD(6, step[j][0], 64); AMX_MULTIPLY(sum, 4, 6); \
      if (PARTS == 2) { AMX_LOAD(7, step[j][PARTS - 1], 64); AMX_MULTIPLY(sum, 4, 7); }
      AMX_ZERO(0); PRODUCT(0, 0)
      if (S == 4) { PRODUCT(0, 1) PRODUCT(0, 2) PRODUCT(0, 3) }
      else { AMX_ZERO(1); PRODUCT(1, 1) AMX_ZERO(2); PRODUCT(2, 2) AMX_ZERO(3); PRODUCT(3, 3) }
#undef PRODUCT
    }
  }
  for (int b = 0; b < B; b++) store(t + 16 * b, sums[b]);
}
// Outputs lo..hi of one weight for in.B <= B rows.
template <int B> static void amx_outputs(const Inputs& in, const Weight& w, int lo, int hi) {
  const Amx amx(w.scales ? groups_of_a_tile(B) * B : 16, w.scales ? 16 : B);
  static thread_local Scratch last_weights, last_scales;
  const int64_t bytes = row_bytes(w.type, in.K), G = in.K / GROUP;
  Tiles tiles; if (w.scales) memset(&tiles, 0, sizeof tiles);  // groups beyond the last are multiplied too, by zeros
  for (int n = lo; n < hi; n += 16) {
    const int live = std::min(16, hi - n);
    const char* p = w.w + n * bytes; const uint16_t* scales = w.scales + n * G;
    if (live < 16) {  // the last outputs, with any behind
      p = (const char*)memcpy(last_weights.get<char>(16 * bytes), p, live * bytes);
      if (w.scales) scales = (const uint16_t*)memcpy(last_scales.get<uint16_t>(16 * G), scales, live * G * 2);
    }
    alignas(64) float t[B * 16];
    if (w.type == Type::BF16) amx_dense<B>((const uint16_t*)p, in.h, in.K, t);
    else if (w.type == Type::S8) amx_grouped<int8_t, B>(p, scales, in.h, in.K, tiles, t);
    else amx_grouped<uint8_t, B>(p, scales, in.h, in.K, tiles, t);
    for (int b = 0; b < in.B; b++) write_row(t + 16 * b, live, w.out_bf16, w.out, (int64_t)b * w.N + n, w.plus);
  }
}
#endif

// ------------------------------------------------------------------------------------------------ loops
// Outputs at a time: as many as leave a register for each sum.
template <int B, bool GROUPED> constexpr int TOGETHER = B == 8 ? (LANES < 16 ? 1 : GROUPED ? 2 : 3) : B == 4 && LANES < 16 ? 2 : 4;
template <int B, int R> static void outputs(const Inputs& in, Math math, const Weight& w, int n, int b0, float* t, int64_t ld) {
  const char* p = w.w + n * row_bytes(w.type, in.K); const float* f = in.f + (int64_t)b0 * in.pad;
  const uint16_t* scales = w.scales + (int64_t)n * (in.K / GROUP);
  if (w.type == Type::F32) dense<float, B, R>((const float*)p, f, in.K, in.pad, t, ld);
#ifdef HAS_BF16
  else if (math == BF16) {
    const uint16_t* h = in.h + (int64_t)b0 * in.pad;
#ifdef HAS_AMX
    if (B == 1 && w.type == Type::S8 && amx_allowed()) return one_row_of_bytes<R>((const int8_t*)p, scales, f, in.K, t);
#endif
    if (w.type == Type::BF16) pairs<B, R>((const uint16_t*)p, h, in.K, in.pad, t, ld);
    else if (w.type == Type::S8) scaled_pairs<int8_t, B, R>((const int8_t*)p, scales, h, in.K, in.pad, t, ld);
    else scaled_pairs<uint8_t, B, R>((const uint8_t*)p, scales, h, in.K, in.pad, t, ld);
  }
#endif
  else if (w.type == Type::BF16) dense<uint16_t, B, R>((const uint16_t*)p, f, in.K, in.pad, t, ld);
  else if (w.type == Type::S8) grouped<false, B, R>((const uint8_t*)p, scales, f, in.K, in.pad, t, ld);
  else grouped<true, B, R>((const uint8_t*)p, scales, f, in.K, in.pad, t, ld);
}
template <int B, bool GROUPED> static void block(const Inputs& in, Math math, const Weight& w, int lo, int hi, int b0, float* t, int64_t ld) {
  int n = lo;
  for (constexpr int R = TOGETHER<B, GROUPED>; n + R <= hi; n += R) outputs<B, R>(in, math, w, n, b0, t + n - lo, ld);
  for (; n < hi; n++) outputs<B, 1>(in, math, w, n, b0, t + n - lo, ld);
}
// Outputs lo..hi of one weight for all rows. Without AMX, they are padded to 1, 2, 4 or 8 by the inputs' scratch memory.
static void tile(const Inputs& in, Math math, const Weight& w, int lo, int hi) {
#ifdef HAS_AMX
  if (few_by_amx(math, in.B)) {
    const int rows = tile_rows(in.B);
    if (rows == 2) amx_outputs<2>(in, w, lo, hi);
    else if (rows == 4) amx_outputs<4>(in, w, lo, hi);
    else if (rows == 8) amx_outputs<8>(in, w, lo, hi);
    else amx_outputs<16>(in, w, lo, hi);
    return;
  }
#endif
  float t[ROWS * TILE];
  const int n = hi - lo;
  for (int b0 = 0; b0 < in.B; b0 += ROWS) {
    const int rows = std::min(ROWS, in.B - b0);
    if (rows == 1) block<1, false>(in, math, w, lo, hi, b0, t, n);
    else if (rows == 2) block<2, false>(in, math, w, lo, hi, b0, t, n);
    else if (rows <= 4) block<4, false>(in, math, w, lo, hi, b0, t, n);
    else if (w.scales) block<8, true>(in, math, w, lo, hi, b0, t, n);
    else block<8, false>(in, math, w, lo, hi, b0, t, n);
    for (int b = 0; b < rows; b++) write_row(t + b * n, n, w.out_bf16, w.out, (int64_t)(b0 + b) * w.N + lo, w.plus);
  }
}

// Products of up to FEW rows with `count` weights, of which all have the type of the first. Tiles are of one size, so that
// threads have equal parts: 16 KiB at least, and a multiple of 3 and 4 outputs, or 16 for AMX. run(n, body) is a parallel loop.
template <class Run> static void few_rows(Inputs in, const Weight* weights, int count, int threads, const Run& run) {
  const Type type = weights[0].type; const Math math = math_of(in, type);
  int64_t outputs = 0; for (int j = 0; j < count; j++) outputs += weights[j].N;
  const int64_t least = std::max<int64_t>(outputs / (16 * threads), 16384 / std::max<int64_t>(1, row_bytes(type, in.K)));
  const int unit = few_by_amx(math, in.B) ? 48 : 12, size = (int)std::min<int64_t>(TILE / unit * unit, least / unit * unit + unit);
  int of[MOST_WEIGHTS + 1] = {0};
  for (int j = 0; j < count; j++) of[j + 1] = of[j] + (weights[j].N + size - 1) / size;
  prepare(in, math, type, run);
  run(of[count], [&](int i) {
    int j = 0; while (i >= of[j + 1]) j++;
    const int lo = (i - of[j]) * size;
    tile(in, math, weights[j], lo, std::min(lo + size, weights[j].N));
  });
}
