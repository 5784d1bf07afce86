// Attention of one query a row over its live keys.
#pragma once
#include <algorithm>
#include "attention.h"
#include "simd.h"

// The dot product of one key with a query of H floats.
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
// Attention of one query, which is scaled already, to `length` keys from position `base` on, all of T. out are H floats.
template <class T> static void attend(const float* query, const Keys& keys, int64_t base, int length, int H, float* out) {
  static thread_local Scratch scratch;
  const int pad = (length + 15) & ~15;
  float* p = scratch.get<float>(pad);
  const T *k = (const T*)keys.k + base * H, *v = (const T*)keys.v + base * H;
  int s = 0;
  for (; s + 4 <= length; s += 4) dot4(query, k + (int64_t)s * H, H, p + s);
  for (; s < length; s++) p[s] = dot(query, k + (int64_t)s * H, H);
  if (keys.k_scales) for (s = 0; s < length; s++) p[s] *= from_half(keys.k_scales[base + s]);
  for (s = length; s < pad; s++) p[s] = -INFINITY;
  vf largest = splat(-INFINITY), total{};
  for (s = 0; s < pad; s += LANES) largest = max(load(p + s), largest);
  float top = largest[0]; for (int i = 1; i < LANES; i++) top = std::max(top, largest[i]);
  for (s = 0; s < pad; s += LANES) { vf e = exp(load(p + s) - top); if (s + LANES > length) for (int i = 0; i < LANES; i++) if (s + i >= length) e[i] = 0; total += e; store(p + s, e); }
  const float inverse = 1.f / sum(total);
  if (keys.v_scales) for (s = 0; s < length; s++) p[s] *= from_half(keys.v_scales[base + s]);
  for (int h = 0; h < H; h += 4 * LANES) {
    const int n = std::min(4, (H - h) / LANES);
    vf a[4] = {};
    if (n == 4) for (s = 0; s < length; s++) { UNROLL for (int j = 0; j < 4; j++) a[j] += p[s] * load(v + (int64_t)s * H + h + j * LANES); }
    else for (s = 0; s < length; s++) for (int j = 0; j < n; j++) a[j] += p[s] * load(v + (int64_t)s * H + h + j * LANES);
    for (int j = 0; j < n; j++) store(out + h + j * LANES, a[j] * inverse);
  }
}
// softmax(q k^T / sqrt(H)) v of one query for `length` keys from position `base` on, as H values of `to` from place `at` on.
// Without keys they are zeros. The query is scaled in place.
static void attend(float* query, const Keys& keys, Type type, int64_t base, int length, int H, bool bf16, void* to, int64_t at) {
  static thread_local Scratch scratch;
  float* out = scratch.get<float>(H); const float scale = 1.f / sqrtf((float)H);
  for (int h = 0; h < H; h++) query[h] *= scale, out[h] = 0;
  if (length) {
    if (type == Type::F32) attend<float>(query, keys, base, length, H, out);
    else if (type == Type::BF16 || type == Type::U16) attend<uint16_t>(query, keys, base, length, H, out);
    else attend<int8_t>(query, keys, base, length, H, out);
  }
  if (bf16) narrow(out, H, (uint16_t*)to + at); else narrow(out, H, (float*)to + at);
}
