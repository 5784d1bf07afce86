// Products of many rows with weights, which are packed first.
#pragma once
#include <algorithm>
#include "attention.h"
#include "inputs.h"
#include "tiles.h"

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
