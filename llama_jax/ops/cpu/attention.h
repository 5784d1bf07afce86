// Attention of many queries: softmax(q k^T / sqrt(H)) v, where each query has a range of keys of its own.
//
// Keys are taken in blocks, and the softmax is corrected when a later block has a larger score (Milakov and Gimelshein,
// arXiv:1805.02867). Scores of one tile of queries and one block of keys are in memory at a time.
// Letters: B rows, T queries, N query heads, K key/value heads, G = N / K, S cache slots, H head dim.
#pragma once
#include <algorithm>
#include "pool.h"
#include "inputs.h"
#include "tiles.h"

struct Keys { const void *k, *v; const uint16_t *k_scales, *v_scales; };  // scales: one a position, for int8
struct Queries {
  const void* q; bool bf16; Type type; int T, N, K, S, H;  // q is (B, T, N, H), and type is that of the keys
  const int32_t *low, *high;  // (B, T): first key, and one after the last, of each query
  void* out; float* lse;  // lse: null, or (B, T, N) for the log-sum-exp of each query's scores, -infinity without keys
};
constexpr int KEYS = 256;           // of a block
constexpr int QUERIES = 192;        // of a task: query heads times positions

INLINE vf exp2_rough(vf x, bool rough) {  // 2^x for x <= 0, to 1e-7, or 4e-5 if rough; 2^-126 below that
  x = x < splat(-126.f) ? splat(-126.f) : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  vf n = (x + magic) - magic, r = x - n, p;
  if (rough) p = splat(.00961812911f);
  else p = (splat(.000154035304f) * r + .00133335581f) * r + .00961812911f;
  for (float c : {.0555041087f, .240226507f, .693147181f, 1.f}) p = p * r + c;
  return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}
// `count` values of position `at` as M. Values of 16 bits stay as they are where M is bfloat16.
template <class T, class M> static void convert(const T* from, const uint16_t* scales, int64_t at, int count, M* to) {
  from += at * count;
  if (sizeof(T) == 2 && sizeof(M) == 2) { memcpy(to, from, count * 2); return; }
  const float scale = scales ? from_half(scales[at]) : 1.f;
  float wide[LANES]; int i = 0;
  for (; i + LANES <= count; i += LANES) { store(wide, load(from + i) * scale); narrow(wide, LANES, to + i); }
  for (; i < count; i++) { const float x = (sizeof(T) == 2 ? from_bf16((uint16_t)from[i]) : (float)from[i]) * scale; narrow(&x, 1, to + i); }
}
template <class M> static void convert(const void* from, Type type, const uint16_t* scales, int64_t at, int count, M* to) {
  if (type == Type::F32) convert((const float*)from, scales, at, count, to);
  else if (type == Type::S8) convert((const int8_t*)from, scales, at, count, to);
  else convert((const uint16_t*)from, scales, at, count, to);
}

// The scores of one query as weights, relative to the largest so far. Scores outside of from..to are hidden.
template <class M> static void weigh(float* scores, int count, int from, int to, float scale, float& top, float& total, float* out, int H, M* weights) {
  for (int s = 0; s < from; s++) scores[s] = -INFINITY;
  for (int s = to; s < count; s++) scores[s] = -INFINITY;
  vf largest = load(scores);
  for (int s = LANES; s < count; s += LANES) largest = max(largest, load(scores + s));
  float next = top;
  for (int i = 0; i < LANES; i++) next = std::max(next, largest[i] * scale);
  if (next > top) {
    const float less = exp2f(top - next); top = next, total *= less;
    for (int h = 0; h < H; h += LANES) store(out + h, load(out + h) * less);
  }
  vf sums{};
  for (int s = 0; s < count; s += LANES) {
    const vf e = exp2_rough(load(scores + s) * scale - top, sizeof(M) == 2);
    sums += e;
    float wide[LANES]; store(wide, e); narrow(wide, LANES, weights + s);
  }
  total += sum(sums);
}

// Queries first..last of row b and key/value head k.
template <class M> static void attend_many(const Queries& in, const Keys& keys, int b, int k, int first, int last) {
  const int G = in.N / in.K, H = in.H, rows = (last - first) * G, padded = rounded_up(H, ALIGN), wide = rounded_up(H, PANEL);
  const int room = rows + MOST_ROWS<M>; const int64_t base = ((int64_t)b * in.K + k) * in.S;
  const float scale = 1.44269504f / sqrtf((float)H);
  static thread_local Scratch scratch;
  const Amx amx;
  char* memory = scratch.get<char>((int64_t)room * (padded * sizeof(M) + wide * 4 + 8) + MOST_ROWS<M> * KEYS * 8 + KEYS * (padded + wide) * sizeof(M) + PANEL * (padded + wide) * sizeof(M) + 1024);
  auto take = [&](auto* like, int64_t count) { auto* p = (decltype(like))memory; memory += (count * sizeof(*like) + 63) & ~63ll; return p; };
  M *q = take((M*)0, (int64_t)room * padded), *weights = take((M*)0, MOST_ROWS<M> * KEYS), *few = take((M*)0, PANEL * std::max(padded, wide));
  float *out = take((float*)0, (int64_t)room * wide), *top = take((float*)0, room), *total = take((float*)0, room), *scores = take((float*)0, MOST_ROWS<M> * KEYS);
  uint32_t *k_panels = take((uint32_t*)0, KEYS * padded / UNIT<M>), *v_panels = take((uint32_t*)0, KEYS * wide / UNIT<M>);
  const int32_t *low = in.low + (int64_t)b * in.T, *high = in.high + (int64_t)b * in.T;
  auto end_of = [&](int t) { return std::min(high[t], in.S); };
  auto start_of = [&](int t) { return std::max(low[t], 0); };
  int start = in.S, end = 0;
  for (int t = first; t < last; t++) if (start_of(t) < end_of(t)) start = std::min(start, start_of(t)), end = std::max(end, end_of(t));
  for (int r = 0; r < rows; r++) {
    M* row = q + (int64_t)r * padded;
    const int64_t at = ((int64_t)b * in.T + first + r / G) * in.N + k * G + r % G;
    convert(in.q, in.bf16 ? Type::BF16 : Type::F32, nullptr, at, H, row);
    std::fill(row + H, row + padded, M(0)), top[r] = -1e30f, total[r] = 0;
  }
  std::fill(out, out + (int64_t)room * wide, 0.f);
  std::fill(few, few + PANEL * std::max(padded, wide), M(0));
  for (int s0 = start; s0 < end; s0 += KEYS) {
    const int count = std::min(KEYS, end - s0), units = padded / UNIT<M>;
    for (int s = 0; s < count; s += PANEL) {
      const int live = std::min(PANEL, count - s);
      for (int i = 0; i < live; i++) convert(keys.k, in.type, keys.k_scales, base + s0 + s + i, H, few + i * padded);
      pack_columns(few, padded, padded, k_panels + (int64_t)s * units);
    }
    for (int s = 0; s < rounded_up(count, PANEL); s += UNIT<M>) {
      for (int i = 0; i < UNIT<M>; i++) {
        if (s + i < count) convert(keys.v, in.type, keys.v_scales, base + s0 + s + i, H, few + i * wide);
        else std::fill(few + i * wide, few + (i + 1) * wide, M(0));
      }
      for (int h = 0; h < wide; h += PANEL) pack_rows(few + h, wide, v_panels + (int64_t)h * (KEYS / UNIT<M>) + s / UNIT<M> * PANEL);
    }
    if (wide != padded || H % ALIGN) std::fill(few, few + PANEL * std::max(padded, wide), M(0));
    for (int r = 0; r < rows; r += MOST_ROWS<M>) {
      const int n = std::min(MOST_ROWS<M>, rows - r);
      int from = end, to = 0;
      for (int t = first + r / G; t <= first + (r + n - 1) / G; t++) if (start_of(t) < end_of(t)) from = std::min(from, start_of(t)), to = std::max(to, end_of(t));
      if (to <= s0 || from >= s0 + count) continue;
      const int seen = rounded_up(std::min(count, to - s0), PANEL);
      for (int s = 0; s < seen; s += PANEL) multiply(n, q + (int64_t)r * padded, padded, k_panels + (int64_t)s * units, units, scores + s, KEYS, false);
      for (int i = 0; i < n; i++) {
        const int t = first + (r + i) / G;
        const int begin = std::min(std::max(start_of(t) - s0, 0), seen), stop = std::min(std::max(end_of(t) - s0, begin), seen);
        weigh(scores + i * KEYS, seen, begin, stop, scale, top[r + i], total[r + i], out + (int64_t)(r + i) * wide, wide, weights + i * KEYS);
      }
      for (int h = 0; h < wide; h += PANEL) multiply(n, weights, KEYS, v_panels + (int64_t)h * (KEYS / UNIT<M>), seen / UNIT<M>, out + (int64_t)r * wide + h, wide, true);
    }
  }
  for (int r = 0; r < rows; r++) {
    const int t = first + r / G; float* row = out + (int64_t)r * wide;
    const int64_t at = ((int64_t)b * in.T + t) * in.N + k * G + r % G, to = at * H;
    const bool any = start_of(t) < end_of(t); const float inverse = any ? 1.f / total[r] : 0.f;
    if (in.lse) in.lse[at] = any ? (top[r] + log2f(total[r])) * .693147181f : -INFINITY;
    for (int h = 0; h < wide; h += LANES) store(row + h, load(row + h) * inverse);
    if (in.bf16) narrow(row, H, (uint16_t*)in.out + to); else narrow(row, H, (float*)in.out + to);
  }
}
