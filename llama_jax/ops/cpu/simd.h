// Vectors of floats, conversions to them, and sums over their lanes, for AVX-512, AVX2 and any other target.
//
// GCC's and clang's vector extensions give the arithmetic. Intrinsics are used where the compilers' own conversions are
// slow, so that a target without them (ARM's NEON among them) still has correct code that the compiler vectorizes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

INLINE float from_bf16(uint16_t x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE uint16_t to_bf16(float f) {  // rounds to nearest, ties to even, as XLA does; NaN stays NaN
  uint32_t u; memcpy(&u, &f, 4);
  return f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE float from_half(uint16_t h) {
#if LANES >= 8
  return _cvtsh_ss(h);
#else
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, u;
  if (rest >= 0x7c00) u = 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) u = (rest << 13) + 0x38000000;
  else { float tiny = (float)rest * 5.9604644775390625e-8f; memcpy(&u, &tiny, 4); }  // subnormal: rest * 2^-24
  u |= sign; float f; memcpy(&f, &u, 4); return f;
#endif
}
INLINE uint16_t to_half(float f) {  // rounds to nearest, ties to even. f is 2^-14 at least, or NaN.
#if LANES >= 8
  return _cvtss_sh(f, 0);
#else
  uint32_t u; memcpy(&u, &f, 4);
  return f != f ? 0x7e00 : u >= 0x477ff000 ? 0x7c00 : (uint16_t)((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
#endif
}

#if LANES == 16
INLINE __m512 from_halves(const uint16_t* p, int count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1 << count) - 1, p)); }  // 0 to 16, with zeros behind
#endif
// 0 to 16 halves as floats, and any behind them up to 16.
INLINE void from_halves(const uint16_t* p, int count, float* out) {
#if LANES == 16
  _mm512_storeu_ps(out, from_halves(p, count));
#else
  for (int i = 0; i < count; i++) out[i] = from_half(p[i]);
#endif
}

// LANES values of a type as floats.
INLINE vf load(const uint16_t* bf16) {
#if LANES == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)bf16)), 16);
#elif LANES == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)bf16)), 16);
#else
  typedef uint16_t small __attribute__((vector_size(LANES * 2)));
  typedef uint32_t wide __attribute__((vector_size(LANES * 4)));
  small s; memcpy(&s, bf16, sizeof s);
  return (vf)(__builtin_convertvector(s, wide) << 16);
#endif
}
INLINE vf load(const int8_t* p) {
#if LANES == 16
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif LANES == 8
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t small __attribute__((vector_size(LANES)));
  small s; memcpy(&s, p, sizeof s);
  return __builtin_convertvector(s, vf);
#endif
}
// The low halves of 16 bytes, minus 8, as int8; and the high halves.
INLINE void nibbles(const uint8_t* p, int8_t* low, int8_t* high) {
  typedef uint8_t bytes __attribute__((vector_size(16)));
  bytes b, l, h; memcpy(&b, p, 16);
  l = (b & 15) - 8, h = (b >> 4) - 8;
  memcpy(low, &l, 16), memcpy(high, &h, 16);
}

// The sums over the lanes of four vectors. Together they take half the instructions of four single sums.
INLINE void sum4(vf a, vf b, vf c, vf d, float* out) {
#if LANES == 16
  auto half = [](vf v) { return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)); };
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#elif LANES == 8
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  int i = 0; for (vf v : {a, b, c, d}) out[i++] = (v[0] + v[1]) + (v[2] + v[3]);
#endif
}
INLINE float sum(vf v) { float s[4]; sum4(v, v, v, v, s); return s[0]; }  // in the order of sum4, to the bit

INLINE vf max(vf a, vf b) { return a > b ? a : b; }
// e^x to a relative error of 1e-7: 2^n times a polynomial of degree 6. Below -87 it is e^-87.
INLINE vf exp(vf x) {
  x = x < splat(-87.f) ? splat(-87.f) : x;  // written so that NaN stays NaN
  x = x > splat(88.f) ? splat(88.f) : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  vf n = (x * 1.44269504f + magic) - magic;
  vf r = x - n * 0.693145752f - n * 1.42860677e-6f;
  vf p = splat(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = p * r + c;
  return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}
// Into the second-level cache: the first holds the inputs, and has fewer places for lines that are on their way.
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
