// The gradient of attention of many queries (Dao, arXiv:2307.08691, algorithm 2).
//
// The weights are computed again, a strip of keys and a block of queries at a time, from the log-sum-exp of the scores
// that the forward pass has kept. Scores are transposed: the keys are rows and the queries are columns, so that what a
// query has one of (log-sum-exp, mean, first and last key) is a vector.
#pragma once
#include <algorithm>
#include "attention.h"

struct Gradient { const void *out, *g; const float* lse; void *dq, *dk, *dv; };  // the type of all is that of q
constexpr int SPAN = 96;      // keys of a block: a multiple of every MOST_ROWS, whose sums for the queries are added together
constexpr int COLUMNS = 128;  // queries of a block: query heads times positions

// What each query of a block has one of.
struct Columns {
  float lse[COLUMNS], mean[COLUMNS];  // in powers of 2; the sum of g times out
  int32_t low[COLUMNS], high[COLUMNS];
  struct { int low, high, every_low, every_high; } of[COLUMNS / PANEL];  // keys that any query of a panel sees, and those that all see
};
// The weights of one panel of queries for the keys s, s + 1, ..., from scores and products of g and v; and their gradient.
template <class M> static void weigh(const Columns& columns, int p, int s, float scale, const float* scores, const float* products, M* weights, M* gradients) {
  const bool all = columns.of[p].every_low <= s && s + MOST_ROWS<M> <= columns.of[p].every_high;
  UNROLL for (int c = p * PANEL; c < (p + 1) * PANEL; c += LANES) {
    const vf lse = load(columns.lse + c), mean = load(columns.mean + c);
    vi low, high; memcpy(&low, columns.low + c, sizeof low), memcpy(&high, columns.high + c, sizeof high);
    for (int i = 0; i < MOST_ROWS<M>; i++) {
      const int at = i * COLUMNS + c;
      vf weight = exp2_rough(load(scores + at) * scale - lse, sizeof(M) == 2);
      if (!all) weight = ((low <= s + i) & (high > s + i)) ? weight : vf{};
      float wide[LANES];
      store(wide, weight), narrow(wide, LANES, weights + at);
      store(wide, weight * (load(products + at) - mean)), narrow(wide, LANES, gradients + at);
    }
  }
}
static void write(float* from, int count, float scale, bool bf16, void* to, int64_t at) {
  for (int i = 0; i < count; i += LANES) store(from + i, load(from + i) * scale);
  if (bf16) narrow(from, count, (uint16_t*)to + at); else narrow(from, count, (float*)to + at);
}

// All queries of row b and key/value head k.
template <class M> static void attention_gradient(const Queries& in, const Keys& keys, const Gradient& gradient, int b, int k) {
  constexpr int STRIP = MOST_ROWS<M>;
  static_assert(SPAN % STRIP == 0 && SPAN % PANEL == 0 && STRIP % UNIT<M> == 0, "strips and panels fill a block of keys");
  const int G = in.N / in.K, H = in.H, W = rounded_up(H, ALIGN), S = rounded_up(in.S, SPAN), units = W / UNIT<M>, queries = in.T * G;
  const int64_t base = ((int64_t)b * in.K + k) * in.S, first = (int64_t)b * in.T;
  const float scale = 1.f / sqrtf((float)H);
  const Type type = in.bf16 ? Type::BF16 : Type::F32;
  static thread_local Scratch scratch;
  const Amx amx;
  char* memory = scratch.get<char>((int64_t)S * W * (3 * sizeof(M) + 8) + COLUMNS * W * (6 * sizeof(M) + 4) + STRIP * (SPAN * sizeof(M) + COLUMNS * (2 * sizeof(M) + 12)) + SPAN * COLUMNS * sizeof(M) + PANEL * (2 * W + COLUMNS) * 4 + 2048);
  auto take = [&](auto* like, int64_t count) { auto* p = (decltype(like))memory; memory += (count * sizeof(*like) + 63) & ~63ll; return p; };
  M *k_rows = take((M*)0, (int64_t)S * W), *v_rows = take((M*)0, (int64_t)S * W), *k_columns = take((M*)0, (int64_t)S * W + STRIP * SPAN);
  float *dk = take((float*)0, (int64_t)S * W), *dv = take((float*)0, (int64_t)S * W), *dq = take((float*)0, (W + STRIP) * COLUMNS);
  M *q = take((M*)0, COLUMNS * W), *g = take((M*)0, COLUMNS * W), *weights = take((M*)0, STRIP * COLUMNS), *gradients = take((M*)0, STRIP * COLUMNS);
  uint32_t *q_panels = take((uint32_t*)0, COLUMNS * units), *g_panels = take((uint32_t*)0, COLUMNS * units);          // of columns
  uint32_t *q_sums = take((uint32_t*)0, COLUMNS * units), *g_sums = take((uint32_t*)0, COLUMNS * units);              // of rows, over which one sums
  uint32_t* packed = take((uint32_t*)0, SPAN * COLUMNS / UNIT<M>);
  float *scores = take((float*)0, STRIP * COLUMNS), *products = take((float*)0, STRIP * COLUMNS), *floats = take((float*)0, PANEL * W), *turned = take((float*)0, PANEL * std::max(W, COLUMNS));
  // Each block of keys is stored as rows, and the keys as columns too.
  for (int s0 = 0; s0 < S; s0 += PANEL) {
    std::fill(floats, floats + PANEL * W, 0.f);
    for (int i = 0; i < PANEL; i++) {
      M *k_row = k_rows + (int64_t)(s0 + i) * W, *v_row = v_rows + (int64_t)(s0 + i) * W;
      const int live = s0 + i < in.S ? H : 0;
      if (live) convert(keys.k, in.type, nullptr, base + s0 + i, H, k_row), convert(keys.v, in.type, nullptr, base + s0 + i, H, v_row), convert(keys.k, in.type, nullptr, base + s0 + i, H, floats + i * W);
      std::fill(k_row + live, k_row + W, M(0)), std::fill(v_row + live, v_row + W, M(0));
    }
    pack_columns(floats, W, W, (uint32_t*)turned);
    for (int h = 0; h < W; h++) narrow(turned + h * PANEL, PANEL, k_columns + (int64_t)(s0 / SPAN) * SPAN * W + h * SPAN + s0 % SPAN);
  }
  std::fill(dk, dk + (int64_t)S * W, 0.f), std::fill(dv, dv + (int64_t)S * W, 0.f);
  for (int r0 = 0; r0 < queries; r0 += COLUMNS) {
    const int count = std::min(COLUMNS, queries - r0), panels = (count + PANEL - 1) / PANEL;
    Columns columns;
    int start = in.S, end = 0;
    for (int p = 0; p < panels; p++) {
      auto& of = columns.of[p];
      of = {in.S, 0, 0, in.S};
      for (int i = p * PANEL; i < (p + 1) * PANEL; i++) {
        M *q_row = q + i * W, *g_row = g + i * W;
        const int live = i < count ? H : 0;
        columns.lse[i] = columns.mean[i] = 0, columns.low[i] = columns.high[i] = 0;
        if (live) {
          const int64_t t = first + (r0 + i) / G, at = t * in.N + k * G + (r0 + i) % G;
          convert(in.q, type, nullptr, at, H, q_row), convert(gradient.g, type, nullptr, at, H, g_row);
          convert(gradient.g, type, nullptr, at, H, floats), convert(gradient.out, type, nullptr, at, H, floats + W);
          std::fill(floats + H, floats + W, 0.f), std::fill(floats + W + H, floats + 2 * W, 0.f);
          vf sums{};
          for (int h = 0; h < W; h += LANES) sums += load(floats + h) * load(floats + W + h);
          columns.lse[i] = gradient.lse[at] * 1.44269504f, columns.mean[i] = sum(sums);
          columns.low[i] = std::max(in.low[t], 0), columns.high[i] = std::min(in.high[t], in.S);
        }
        std::fill(q_row + live, q_row + W, M(0)), std::fill(g_row + live, g_row + W, M(0));
        if (columns.low[i] < columns.high[i]) of.low = std::min(of.low, columns.low[i]), of.high = std::max(of.high, columns.high[i]);
        of.every_low = std::max(of.every_low, columns.low[i]), of.every_high = std::min(of.every_high, columns.high[i]);
      }
      start = std::min(start, of.low), end = std::max(end, of.high);
      pack_columns(q + p * PANEL * W, W, W, q_panels + p * PANEL * units), pack_columns(g + p * PANEL * W, W, W, g_panels + p * PANEL * units);
      for (int i = p * PANEL; i < (p + 1) * PANEL; i += UNIT<M>) for (int h = 0; h < W; h += PANEL) {
        const int to = (h * COLUMNS + i * PANEL) / UNIT<M>;
        pack_rows(q + i * W + h, W, q_sums + to), pack_rows(g + i * W + h, W, g_sums + to);
      }
    }
    std::fill(dq, dq + W * COLUMNS, 0.f);
    for (int s0 = start / SPAN * SPAN; s0 < end; s0 += SPAN) {
      // The strips of this block that a panel sees.
      auto from = [&](int p) { return std::max(columns.of[p].low - s0, 0) / STRIP; };
      auto to = [&](int p) { return (std::min(columns.of[p].high - s0, SPAN) + STRIP - 1) / STRIP; };
      for (int strip = 0; strip < SPAN / STRIP; strip++) {
        const int s = s0 + strip * STRIP; const int64_t row = (int64_t)s * W;
        for (int p = 0, next; p < panels; p = next + 1) {
          for (next = p; next < panels && from(next) <= strip && strip < to(next); next++) {
            const int c = next * PANEL;
            multiply(STRIP, k_rows + row, W, q_panels + c * units, units, scores + c, COLUMNS, false);
            multiply(STRIP, v_rows + row, W, g_panels + c * units, units, products + c, COLUMNS, false);
            weigh(columns, next, s, scale * 1.44269504f, scores, products, weights, gradients);
            for (int i = 0; i < STRIP; i += UNIT<M>) pack_rows(gradients + i * COLUMNS + c, COLUMNS, packed + (c * SPAN + (strip * STRIP + i) * PANEL) / UNIT<M>);
          }
          const int c = p * PANEL, summed = (next - p) * PANEL / UNIT<M>;
          if (summed) for (int h = 0; h < W; h += PANEL) {
            const int at = (h * COLUMNS + c * PANEL) / UNIT<M>;
            multiply(STRIP, weights + c, COLUMNS, g_sums + at, summed, dv + row + h, W, true);
            multiply(STRIP, gradients + c, COLUMNS, q_sums + at, summed, dk + row + h, W, true);
          }
        }
      }
      for (int p = 0; p < panels; p++) if (const int f = from(p), n = to(p) - f; n > 0) {
        for (int h = 0; h < W; h += STRIP)
          multiply(std::min(STRIP, W - h), k_columns + (int64_t)s0 * W + h * SPAN + f * STRIP, SPAN, packed + (p * SPAN + f * STRIP) * PANEL / UNIT<M>, n * STRIP / UNIT<M>, dq + h * COLUMNS + p * PANEL, COLUMNS, true);
      }
    }
    for (int h = 0; h < H; h += PANEL) {
      pack_columns(dq + h * COLUMNS, COLUMNS, COLUMNS, (uint32_t*)turned);
      for (int i = 0; i < count; i++) write(turned + i * PANEL, std::min(PANEL, H - h), scale, in.bf16, gradient.dq, ((first + (r0 + i) / G) * in.N + k * G + (r0 + i) % G) * H + h);
    }
  }
  for (int s = 0; s < in.S; s++) {
    write(dk + (int64_t)s * W, H, scale, in.bf16, gradient.dk, (base + s) * H);
    write(dv + (int64_t)s * W, H, 1.f, in.bf16, gradient.dv, (base + s) * H);
  }
}
