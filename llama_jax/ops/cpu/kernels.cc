// Products with weights, and attention over the live keys, as XLA custom calls for CPUs.
//
// llama_linear: y_i = f(x) w_i^T for one or several weights (out, in) of the same inputs. f is nothing, RMSNorm, or
// SwiGLU's silu(x) * up. x, up and y are float32 or bfloat16.
// llama_attention: softmax(q k^T / sqrt(H)) v over the first `length` keys of each row, for one query a row.
// llama_attention_many: the same for many queries, each with a range of keys (attention.h).
// llama_rows: rows of a table of bfloat16.
//
// Up to FEW rows are multiplied with weights as they are read. For more rows the weights are packed first (tiles.h).
// A result does not depend on how many threads run, and within each of the two kinds not on the number of rows.
// Letters: B rows, K inputs, N outputs.
#include <algorithm>
#include "attention.h"
#include "pool.h"
#include "simd.h"
#include "tiles.h"

using Buffer = ffi::AnyBuffer;

enum Math { FLOAT, BF16 };  // how inputs are multiplied: in float32, or as bfloat16 pairs
constexpr int ROWS = 8;            // rows of x at a time, if they are few
constexpr int FEW = 16;            // most rows that are few
constexpr int MANY = 512;          // rows of x at a time, if they are many
constexpr int TILE = 252;          // most outputs of a tile, whose results wait in float32
constexpr int AHEAD = 8192;        // least bytes between the prefetched and the multiplied weights
constexpr int GROUP = 32;          // values that share a scale

// ------------------------------------------------------------------------------------------------ inputs
struct Inputs {
  const void* x; bool bf16; int first, B, K, pad;  // rows first..first + B; pad: K rounded up to 64 or 128
  int before; const void* with; bool with_bf16; float eps;  // before: 0 nothing, 1 RMSNorm (with: its weight), 2 silu(x) * with
  float* f;      // (B, pad), zero beyond K; not for bfloat16 inputs of many rows
  uint16_t* h;   // (B, pad) bfloat16; for few rows of grouped weights, in the order of in_order
};

INLINE float at(const void* p, bool bf16, int64_t i) { return bf16 ? from_bf16(((const uint16_t*)p)[i]) : ((const float*)p)[i]; }

template <class T> static void widen(const T* x, int K, float* f) {
  int k = 0;
  for (; k + LANES <= K; k += LANES) store(f + k, load(x + k));
  for (; k < K; k++) f[k] = at(x, sizeof(T) == 2, k);
}
static void round_to_bf16(float* f, int K) {
  int k = 0;
  for (; k + LANES <= K; k += LANES) { uint16_t h[LANES]; narrow(f + k, LANES, h); store(f + k, load(h)); }
  for (; k < K; k++) f[k] = from_bf16(to_bf16(f[k]));
}
// Row b of x as floats, after the norm or the activation, with the roundings of the same operations in x's type.
static void read_row(const Inputs& in, int b, float* f) {
  const int K = in.K; const int64_t start = (int64_t)(in.first + b) * K;
  auto row = [&](const void* from, float* out) {
    if (in.bf16) widen((const uint16_t*)from + start, K, out); else widen((const float*)from + start, K, out);
    memset(out + K, 0, (in.pad - K) * 4);
  };
  row(in.x, f);
  if (in.before == 1) {
    vf squares[4] = {};
    for (int k = 0; k < in.pad; k += 4 * LANES) UNROLL for (int j = 0; j < 4; j++) { vf v = load(f + k + j * LANES); squares[j] += v * v; }
    const float r = 1.f / sqrtf(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / K + in.eps);
    static thread_local Scratch scratch;
    float* scale = scratch.get<float>(in.pad);
    if (in.with_bf16) widen((const uint16_t*)in.with, K, scale); else widen((const float*)in.with, K, scale);
    for (int k = 0; k < K; k++) f[k] *= r;
    if (in.bf16) round_to_bf16(f, K), round_to_bf16(scale, K);
    for (int k = 0; k < K; k++) f[k] *= scale[k];
    if (in.bf16) round_to_bf16(f, K);
  } else if (in.before == 2) {
    static thread_local Scratch scratch;
    float* up = scratch.get<float>(in.pad);
    row(in.with, up);
    for (int k = 0; k < in.pad; k += LANES) { vf g = load(f + k); store(f + k, g / (1.f + exp(-g)) * load(up + k)); }
    if (in.bf16) round_to_bf16(f, K);
  }
}

// ------------------------------------------------------------------------------------------------ weights
struct Weight { const char* w; const uint16_t* scales; Type type; int N; char* out; };
static int64_t row_bytes(Type t, int K) { return t == Type::F32 ? 4ll * K : t == Type::BF16 ? 2ll * K : t == Type::S8 ? K : K / 2; }

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
INLINE int64_t ahead(int64_t bytes) { return (AHEAD + bytes - 1) / bytes * bytes; }

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
  const int G = K / GROUP; const int64_t bytes = FOUR ? K / 2 : K, later = ahead(R * bytes);
  for (int g = 0; g < G; g++) {
    alignas(64) int8_t n[R][GROUP]; float s[R];
    UNROLL for (int r = 0; r < R; r++) {
      const uint8_t* p = w + r * bytes + (int64_t)g * (FOUR ? 16 : 32);
      if (FOUR) nibbles(p, n[r], n[r] + 16); else memcpy(n[r], p, GROUP);
      s[r] = from_half(scales[(int64_t)r * G + g]); prefetch(p + later);
    }
    UNROLL for (int j = 0; j < GROUP; j += LANES) {
      vf v[R]; UNROLL for (int r = 0; r < R; r++) v[r] = load(n[r] + j) * s[r];
      UNROLL for (int b = 0; b < B; b++) { vf xv = load(x + b * pad + g * GROUP + j); UNROLL for (int r = 0; r < R; r++) a[r][b] += v[r] * xv; }
    }
  }
  finish<B, R>(a, t, ld);
}

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
    UNROLL for (int r = 0; r < R; r++) block[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1 << count) - 1, scales + (int64_t)r * G + start));
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

// ------------------------------------------------------------------------------------------------ loops
// Outputs at a time: as many as leave a register for each sum.
template <int B, bool GROUPED> constexpr int STEP = B == 8 ? (LANES < 16 ? 1 : GROUPED ? 2 : 3) : B == 4 && LANES < 16 ? 2 : 4;
template <int B, int R> static void outputs(const Inputs& in, Math math, const Weight& w, int n, int b0, float* t, int64_t ld) {
  const char* p = w.w + n * row_bytes(w.type, in.K); const float* f = in.f + (int64_t)b0 * in.pad;
  const uint16_t* scales = w.scales + (int64_t)n * (in.K / GROUP);
  if (w.type == Type::F32) dense<float, B, R>((const float*)p, f, in.K, in.pad, t, ld);
#ifdef HAS_BF16
  else if (math == BF16) {
    const uint16_t* h = in.h + (int64_t)b0 * in.pad;
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
  for (constexpr int R = STEP<B, GROUPED>; n + R <= hi; n += R) outputs<B, R>(in, math, w, n, b0, t + n - lo, ld);
  for (; n < hi; n++) outputs<B, 1>(in, math, w, n, b0, t + n - lo, ld);
}
// Outputs lo..hi of one weight for all rows. Rows are padded to 1, 2, 4 or 8 by the inputs' scratch memory.
static void tile(const Inputs& in, Math math, const Weight& w, bool out_bf16, int lo, int hi) {
  float t[ROWS * TILE];
  const int n = hi - lo;
  for (int b0 = 0; b0 < in.B; b0 += ROWS) {
    const int rows = std::min(ROWS, in.B - b0);
    if (rows == 1) block<1, false>(in, math, w, lo, hi, b0, t, n);
    else if (rows == 2) block<2, false>(in, math, w, lo, hi, b0, t, n);
    else if (rows <= 4) block<4, false>(in, math, w, lo, hi, b0, t, n);
    else if (w.scales) block<8, true>(in, math, w, lo, hi, b0, t, n);
    else block<8, false>(in, math, w, lo, hi, b0, t, n);
    for (int b = 0; b < rows; b++) {
      const int64_t to = (int64_t)(b0 + b) * w.N + lo; const float* from = t + b * n;
      if (out_bf16) narrow(from, n, (uint16_t*)w.out + to); else narrow(from, n, (float*)w.out + to);
    }
  }
}
// Row n of a weight as M, rounded as XLA rounds a dequantized weight.
template <class M> static void widen_row(const Weight& w, int n, int K, M* to) {
  if (!w.scales) return convert(w.w, w.type, nullptr, n, K, to);
  const int64_t bytes = row_bytes(w.type, K); const uint16_t* scales = w.scales + (int64_t)n * (K / GROUP);
  for (int g = 0; g < K / GROUP; g++, to += GROUP) {
    int8_t values[GROUP]; float wide[GROUP]; const char* p = w.w + n * bytes + (int64_t)g * (w.type == Type::U8 ? GROUP / 2 : GROUP);
    if (w.type == Type::U8) nibbles((const uint8_t*)p, values, values + GROUP / 2); else memcpy(values, p, GROUP);
    for (int i = 0; i < GROUP; i += LANES) store(wide + i, load(values + i) * from_half(scales[g]));
    narrow(wide, GROUP, to);
  }
}
// Up to PANEL outputs lo..hi of one weight for many rows. M is the type of the inputs x.
template <class M> static void panel(const Inputs& in, const M* x, const Weight& w, bool out_bf16, int lo, int hi) {
  static thread_local Scratch rows, packed;
  M* few = rows.get<M>((int64_t)PANEL * in.pad); uint32_t* columns = packed.get<uint32_t>((int64_t)PANEL * in.pad / UNIT<M>);
  for (int n = 0; n < PANEL; n++) {
    const int live = lo + n < hi ? in.K : 0;
    if (live) widen_row(w, lo + n, in.K, few + (int64_t)n * in.pad);
    std::fill(few + (int64_t)n * in.pad + live, few + (int64_t)(n + 1) * in.pad, M(0));
  }
  pack_columns(few, in.pad, columns);
  float t[MOST_ROWS<M> * PANEL];
  const Amx amx;
  for (int b0 = 0; b0 < in.B; b0 += MOST_ROWS<M>) {
    const int count = std::min(MOST_ROWS<M>, in.B - b0);
    multiply(count, x + (int64_t)b0 * in.pad, in.pad, columns, in.pad / UNIT<M>, t, PANEL, false);
    for (int b = 0; b < count; b++) {
      const int64_t to = (int64_t)(in.first + b0 + b) * w.N + lo;
      if (out_bf16) narrow(t + b * PANEL, hi - lo, (uint16_t*)w.out + to); else narrow(t + b * PANEL, hi - lo, (float*)w.out + to);
    }
  }
}

#ifdef HAS_BF16
// Inputs in the order of the weights of four_groups, 128 at a time.
static void in_order(const float* f, int count, bool four_bits, uint16_t* h) {
  alignas(64) uint16_t evens_and_odds[GROUP];  // even values of the first 16 and of the last, then odd ones
  for (int i = 0; i < GROUP; i++) evens_and_odds[i] = 16 * (i >> 3 & 1) + 2 * (i & 7) + (i >> 4);
  for (int k = 0; k < count; k += GROUP) {
    uint16_t from[GROUP], *to = h + (k & ~127); const int g = k / GROUP & 3;
    narrow(f + k, GROUP, from);
    if (four_bits) {
      uint16_t lanes[GROUP];
      _mm512_storeu_si512(lanes, _mm512_permutexvar_epi16(_mm512_load_si512(evens_and_odds), _mm512_loadu_si512(from)));
      UNROLL for (int i = 0; i < 4; i++) memcpy(to + 32 * i + 8 * g, lanes + 8 * i, 16);
    }
    else UNROLL for (int i = 0; i < 16; i++) memcpy(to + 64 * (i >> 2 & 1) + 32 * (i & 1) + 16 * (g & 1) + 8 * (i >> 3) + 4 * (i >> 1 & 1) + 2 * (g >> 1), from + 2 * i, 4);
  }
}
#endif
// Inputs of in.B rows, of a call with more than FEW rows if many. The last rows of such a call may be few.
static void prepare(Inputs& in, Math math, Type type, bool many, ffi::ThreadPool& pool) {
  static thread_local Scratch floats, halves;
  const int64_t rows = rounded_up(in.B, ROWS) + (many ? MOST_ROWS<uint16_t> : 0);  // rows beyond B may be multiplied too, and their results are dropped
  const bool grouped = !many && (type == Type::S8 || type == Type::U8);
  in.pad = rounded_up(in.K, grouped ? 128 : 64);
  in.f = many && math == BF16 ? nullptr : floats.get<float>(rows * in.pad);
  if (math == BF16) in.h = halves.get<uint16_t>(rows * in.pad);
  auto one = [&](int b) {
    static thread_local Scratch scratch;
    float* f = in.f ? in.f + (int64_t)b * in.pad : scratch.get<float>(in.pad);
    read_row(in, b, f);
    if (math != BF16) return;
    uint16_t* h = in.h + (int64_t)b * in.pad;
#ifdef HAS_BF16
    if (grouped) return in_order(f, in.pad, type == Type::U8, h);
#endif
    narrow(f, in.pad, h);
  };
  if (in.B <= ROWS) for (int b = 0; b < in.B; b++) one(b); else parallel(pool, in.B, one);
}

static ffi::Error bad(const char* text) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, text); }

// Arguments: x, norm weight or up (before = 1, 2), then each weight, with scales if grouped.
static ffi::Error Linear(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t before, float eps) {
  size_t next = 0;
  auto take = [&] { return *args.get<Buffer>(next++); };
  Buffer x = take();
  const int B = (int)x.dimensions()[0];
  Inputs in{}; in.x = x.untyped_data(), in.bf16 = x.element_type() == Type::BF16;
  in.K = (int)x.dimensions()[1], in.before = before, in.eps = eps;
  if (before) { Buffer with = take(); in.with = with.untyped_data(), in.with_bf16 = with.element_type() == Type::BF16; }
  constexpr int MOST = 4;
  Weight weights[MOST]; int count = 0, of[MOST + 1] = {0}; int64_t outputs = 0; bool out_bf16[MOST];
  if (rets.size() > MOST) return bad("llama_linear takes at most 4 weights");
  const int threads = (int)std::max<int64_t>(1, pool.num_threads());
  while (next < args.size()) {
    Buffer w = take(); Weight& weight = weights[count];
    weight.w = (const char*)w.untyped_data(), weight.type = w.element_type(), weight.N = (int)w.dimensions()[0];
    weight.scales = weight.type == Type::S8 || weight.type == Type::U8 ? (const uint16_t*)take().untyped_data() : nullptr;
    Buffer out = *(*rets.get<Buffer>(count)); weight.out = (char*)out.untyped_data(), out_bf16[count] = out.element_type() == Type::BF16;
    outputs += weight.N;
    count++;
  }
  const Type type = weights[0].type;
  // Tiles of one size, so that threads have equal parts: 16 KiB at least, and a multiple of 3 and 4 outputs.
  const int64_t least = std::max<int64_t>(outputs / (16 * threads), 16384 / std::max<int64_t>(1, row_bytes(type, in.K)));
  const int size = B > FEW ? PANEL : (int)std::min<int64_t>(TILE, least / 12 * 12 + 12);
  for (int j = 0; j < count; j++) of[j + 1] = of[j] + (weights[j].N + size - 1) / size;
  const int tiles = of[count];
  Math math = FLOAT;
#ifdef HAS_BF16
  if (in.bf16 && type != Type::F32) math = BF16;
#endif
  for (in.first = 0; in.first < B; in.first += in.B) {
    in.B = B > FEW ? std::min(MANY, B - in.first) : B;
    prepare(in, math, type, B > FEW, pool);
    parallel(pool, tiles, [&](int i) {
      int j = 0; while (i >= of[j + 1]) j++;
      const int lo = (i - of[j]) * size, hi = std::min(lo + size, weights[j].N);
      if (B <= FEW) tile(in, math, weights[j], out_bf16[j], lo, hi);
#ifdef HAS_BF16
      else if (math == BF16) panel(in, in.h, weights[j], out_bf16[j], lo, hi);
#endif
      else panel(in, in.f, weights[j], out_bf16[j], lo, hi);
    });
  }
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------------------ attention
// The dot products of one key with G queries of H floats, and weights[g] times a value added to G sums.
template <class T> INLINE float dot(const float* q, const T* k, int H) {
  vf a{}; for (int h = 0; h < H; h += LANES) a += load(q + h) * load(k + h);
  return sum(a);
}
// Four keys at a time; their sums share instructions.
template <class T> INLINE void dot4(const float* q, const T* k, int H, float* out) {
  vf a{}, b{}, c{}, d{};
  for (int h = 0; h < H; h += LANES) { vf x = load(q + h); a += x * load(k + h), b += x * load(k + H + h), c += x * load(k + 2 * H + h), d += x * load(k + 3 * H + h); }
  sum4(a, b, c, d, out);
}
template <class T> static void attend(const float* q, const Keys& keys, int64_t base, int length, int G, int H, float* out) {
  static thread_local Scratch scratch;
  const int pad = (length + 15) & ~15;
  float* p = scratch.get<float>(pad);
  const T *k = (const T*)keys.k + base * H, *v = (const T*)keys.v + base * H;
  for (int g = 0; g < G; g++) {
    const float* query = q + g * H; int s = 0;
    for (; s + 4 <= length; s += 4) dot4(query, k + (int64_t)s * H, H, p + s);
    for (; s < length; s++) p[s] = dot(query, k + (int64_t)s * H, H);
    if (keys.k_scales) for (s = 0; s < length; s++) p[s] *= from_half(keys.k_scales[base + s]);
    float top = -INFINITY; for (s = 0; s < length; s++) top = p[s] > top ? p[s] : top;
    for (s = length; s < pad; s++) p[s] = -INFINITY;
    vf total{};
    for (s = 0; s < pad; s += LANES) { vf e = exp(load(p + s) - top); if (s + LANES > length) for (int i = 0; i < LANES; i++) if (s + i >= length) e[i] = 0; total += e; store(p + s, e); }
    const float inverse = 1.f / sum(total);
    if (keys.v_scales) for (s = 0; s < length; s++) p[s] *= from_half(keys.v_scales[base + s]);
    for (int h = 0; h < H; h += 4 * LANES) {
      const int n = std::min(4, (H - h) / LANES);
      vf a[4] = {};
      if (n == 4) for (s = 0; s < length; s++) { UNROLL for (int j = 0; j < 4; j++) a[j] += p[s] * load(v + (int64_t)s * H + h + j * LANES); }
      else for (s = 0; s < length; s++) for (int j = 0; j < n; j++) a[j] += p[s] * load(v + (int64_t)s * H + h + j * LANES);
      for (int j = 0; j < n; j++) store(out + g * H + h + j * LANES, a[j] * inverse);
    }
  }
}
// Arguments: q (B, N, H), k and v (B, K, S, H), lengths (B,) int32, then the scales (B, K, S) of k and v if they are int8.
static ffi::Error Attention(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<Buffer> result) {
  Buffer q = *args.get<Buffer>(0), k = *args.get<Buffer>(1), v = *args.get<Buffer>(2), lengths = *args.get<Buffer>(3);
  const int B = (int)q.dimensions()[0], N = (int)q.dimensions()[1], H = (int)q.dimensions()[2], K = (int)k.dimensions()[1], S = (int)k.dimensions()[2], G = N / K;
  if (H % 16) return bad("llama_attention takes heads of a multiple of 16");
  Keys keys{k.untyped_data(), v.untyped_data(), nullptr, nullptr};
  if (args.size() > 4) keys.k_scales = (const uint16_t*)(*args.get<Buffer>(4)).untyped_data(), keys.v_scales = (const uint16_t*)(*args.get<Buffer>(5)).untyped_data();
  const bool bf16 = q.element_type() == Type::BF16; const Type type = k.element_type(); const float scale = 1.f / sqrtf((float)H);
  parallel(pool, B * K, [&](int i) {
    static thread_local Scratch scratch;
    float *queries = scratch.get<float>(2 * G * H), *out = queries + G * H;
    const int64_t first = (int64_t)i * G * H; const int length = std::min(std::max(((const int32_t*)lengths.untyped_data())[i / K], 0), S);
    for (int j = 0; j < G * H; j++) queries[j] = at(q.untyped_data(), bf16, first + j) * scale, out[j] = 0;
    if (length) {
      if (type == Type::F32) attend<float>(queries, keys, (int64_t)i * S, length, G, H, out);
      else if (type == Type::BF16 || type == Type::U16) attend<uint16_t>(queries, keys, (int64_t)i * S, length, G, H, out);
      else attend<int8_t>(queries, keys, (int64_t)i * S, length, G, H, out);
    }
    void* y = result->untyped_data();
    for (int j = 0; j < G * H; j++) if (bf16) ((uint16_t*)y)[first + j] = to_bf16(out[j]); else ((float*)y)[first + j] = out[j];
  });
  return ffi::Error::Success();
}
// Arguments: q (B, T, N, H), k and v (B, K, S, H), low and high (B, T) int32, then the scales (B, K, S) of k and v if they are int8.
static ffi::Error AttentionMany(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<Buffer> result) {
  Buffer q = *args.get<Buffer>(0), k = *args.get<Buffer>(1), v = *args.get<Buffer>(2), low = *args.get<Buffer>(3), high = *args.get<Buffer>(4);
  auto size = [](const Buffer& a, int axis) { return (int)a.dimensions()[axis]; };
  const int B = size(q, 0), G = size(q, 2) / size(k, 1);
  const Queries in{q.untyped_data(), q.element_type() == Type::BF16, k.element_type(), size(q, 1), size(q, 2), size(k, 1), size(k, 2), size(q, 3), (const int32_t*)low.untyped_data(), (const int32_t*)high.untyped_data(), result->untyped_data()};
  Keys keys{k.untyped_data(), v.untyped_data(), nullptr, nullptr};
  if (args.size() > 5) keys.k_scales = (const uint16_t*)(*args.get<Buffer>(5)).untyped_data(), keys.v_scales = (const uint16_t*)(*args.get<Buffer>(6)).untyped_data();
  const int each = std::max(1, std::min(in.T, QUERIES / G)), blocks = (in.T + each - 1) / each;
  parallel(pool, B * in.K * blocks, [&](int i) {
    const int block = blocks - 1 - i % blocks, first = block * each, last = std::min(first + each, in.T);  // the longest first
#ifdef HAS_BF16
    if (in.bf16) return attend_many<uint16_t>(in, keys, i / blocks / in.K, i / blocks % in.K, first, last);
#endif
    attend_many<float>(in, keys, i / blocks / in.K, i / blocks % in.K, first, last);
  });
  return ffi::Error::Success();
}
// The rows of a table (V, D) of bfloat16 for int32 ids. Ids outside of the table give NaN.
static ffi::Error Rows(Buffer table, Buffer ids, ffi::Result<Buffer> result) {
  const int64_t V = table.dimensions()[0], D = table.dimensions()[1], count = (int64_t)ids.element_count();
  const int32_t* id = (const int32_t*)ids.untyped_data(); const uint16_t* from = (const uint16_t*)table.untyped_data();
  uint16_t* to = (uint16_t*)result->untyped_data();
  for (int64_t i = 0; i < count; i++, to += D)
    if (id[i] >= 0 && id[i] < V) memcpy(to, from + id[i] * D, D * 2); else std::fill(to, to + D, (uint16_t)0x7fc0);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_rows, Rows, ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_attention_many, AttentionMany, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_linear, Linear, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int32_t>("before").Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_attention, Attention, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<Buffer>());
